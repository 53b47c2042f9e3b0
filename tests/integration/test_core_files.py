import threading
import time
from collections.abc import Callable
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import func, text

from core import artifacts, files
from core.db import Database
from core.errors import (
    AdapterNotReady,
    ArtifactNotFound,
    DomainError,
    FileExpired,
    FileNotFound_,
    InvalidCursor,
    InvalidFilePurpose,
    InvalidTrainingFile,
    InvalidValidationFile,
    NoAdapter,
)
from core.ids import public_file_id
from core.jobs import cancel
from tests.factories import Tenant, make_file, make_job, make_tenant


def test_a_stored_file_comes_back(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        made = make_file(tx, tenant, filename="../odd name\u2028.jsonl", report={"valid": True})

        assert files.get(tx, made.id, tenant_id=tenant.tenant_id) == made


def test_a_file_without_a_report_has_none(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        made = make_file(tx, tenant, report=None, rows=None, status="uploaded")

    assert (made.report, made.rows) == (None, None)


def test_another_tenants_file_is_not_there(
    database: Database, owner_database: Database, tenant: Tenant
) -> None:
    stranger = make_tenant(owner_database).tenant_id
    with database.begin() as tx:
        file = make_file(tx, tenant)

        with pytest.raises(FileNotFound_):
            files.get(tx, file.id, tenant_id=stranger)
        with pytest.raises(FileNotFound_):
            files.delete(tx, file.id, tenant_id=stranger)
        with pytest.raises(FileNotFound_):
            files.lock_for_job(
                tx, public_file_id(file.id), tenant_id=stranger, param="training_file"
            )
        with pytest.raises(InvalidCursor):
            files.page(tx, tenant_id=stranger, limit=2, after=file.id)


def test_deleting_while_paging_skips_nothing(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        made = [make_file(tx, tenant).id for _ in range(4)]
        seen = []
        page = files.page(tx, tenant_id=tenant.tenant_id, limit=1, order="asc")
        while page.files:
            last = page.files[0].id
            seen.append(last)
            files.delete(tx, last, tenant_id=tenant.tenant_id)
            page = files.page(tx, tenant_id=tenant.tenant_id, limit=1, order="asc", after=last)

    assert seen == made


def test_a_list_can_be_of_one_purpose(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        make_file(tx, tenant)
        other = make_file(tx, tenant, purpose="user_data")

        page = files.page(tx, tenant_id=tenant.tenant_id, limit=5, purpose="user_data")

    assert [file.id for file in page.files] == [other.id]
    assert not page.has_more


def test_a_deleted_file_is_gone(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        file = make_file(tx, tenant)
        files.delete(tx, file.id, tenant_id=tenant.tenant_id)

        with pytest.raises(FileNotFound_):
            files.get(tx, file.id, tenant_id=tenant.tenant_id)
        with pytest.raises(FileNotFound_):
            files.delete(tx, file.id, tenant_id=tenant.tenant_id)
        with pytest.raises(FileNotFound_):
            files.lock_for_job(
                tx, public_file_id(file.id), tenant_id=tenant.tenant_id, param="training_file"
            )


@pytest.mark.parametrize(
    ("over", "param", "error"),
    [
        ({"purpose": "user_data"}, "training_file", InvalidFilePurpose),
        ({"status": "error"}, "training_file", InvalidTrainingFile),
        ({"status": "error"}, "validation_file", InvalidValidationFile),
        ({"rows": 0}, "training_file", InvalidTrainingFile),
        ({"expires_at": func.now() - timedelta(seconds=1)}, "training_file", FileExpired),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused_for_its_field(
    database: Database,
    tenant: Tenant,
    over: dict[str, object],
    param: str,
    error: type[DomainError],
) -> None:
    with database.begin() as tx:
        file = make_file(tx, tenant, **over)

        with pytest.raises(error) as caught:
            files.lock_for_job(tx, public_file_id(file.id), tenant_id=tenant.tenant_id, param=param)

    assert caught.value.param == param
    assert public_file_id(file.id) in caught.value.message


@pytest.mark.parametrize("name", ["", "file-", "file-xyz", "nonsense", public_file_id(uuid4())])
def test_an_id_that_names_no_file_is_refused_for_its_field(
    database: Database, tenant: Tenant, name: str
) -> None:
    with database.begin() as tx, pytest.raises(FileNotFound_) as caught:
        files.lock_for_job(tx, name, tenant_id=tenant.tenant_id, param="validation_file")

    assert caught.value.param == "validation_file"


def test_a_file_that_expires_later_can_be_used(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        file = make_file(tx, tenant, expires_at=func.now() + timedelta(hours=1))

        locked = files.lock_for_job(
            tx, public_file_id(file.id), tenant_id=tenant.tenant_id, param="training_file"
        )

    assert locked == file


def has_waiter(database: Database) -> bool:
    """Whether a connection to this database waits for a lock."""
    waiters = text(
        "select count(*) from pg_stat_activity"
        " where datname = current_database() and wait_event_type = 'Lock'"
    )
    with database.begin() as tx:
        return bool(tx.execute(waiters).scalar_one())


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_is_not_deleted_under_a_job_that_is_being_made(
    database: Database, owner_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        file = make_file(tx, tenant)
    outcome = []

    def delete() -> None:
        try:
            with database.begin() as tx:
                files.delete(tx, file.id, tenant_id=tenant.tenant_id)
            outcome.append("deleted")
        except DomainError as error:
            outcome.append(error.code)

    with database.begin() as tx:
        locked = files.lock_for_job(
            tx, public_file_id(file.id), tenant_id=tenant.tenant_id, param="training_file"
        )
        deleter = threading.Thread(target=delete)
        deleter.start()
        wait_until(lambda: not deleter.is_alive() or has_waiter(owner_database))
        make_job(tx, tenant, file=locked)
    deleter.join()

    assert outcome == ["file_in_use"]


def test_an_adapter_is_awaited_until_the_end(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)

        with pytest.raises(AdapterNotReady):
            artifacts.adapter(tx, job)
        with pytest.raises(NoAdapter):
            artifacts.adapter(tx, cancel(tx, job.id, tenant_id=tenant.tenant_id))


@pytest.mark.parametrize("path", ["", "../adapter.tar", "/etc/passwd", "a\x00b", "adapter.tar"])
def test_a_path_that_was_not_stored_is_not_there(
    database: Database, tenant: Tenant, path: str
) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)

        with pytest.raises(ArtifactNotFound):
            artifacts.by_path(tx, job.id, path)
        with pytest.raises(FileNotFound_):
            artifacts.by_id(tx, job.id, tenant_id=tenant.tenant_id)

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, update

from core import keys, models
from core.db import Database
from core.errors import InsufficientScope, InvalidApiKey, InvalidRequest, NotFound
from core.keys import PREFIX
from tests.factories import Tenant, make_tenant


def authenticate(database: Database, text: str) -> keys.Caller:
    with database.begin() as tx:
        return keys.authenticate(tx, text)


def test_a_key_opens_its_own_tenant(database: Database, tenant: Tenant) -> None:
    caller = authenticate(database, tenant.secret)

    assert (caller.tenant_id, caller.tenant_slug, caller.key_id) == (
        tenant.tenant_id,
        tenant.slug,
        tenant.key_id,
    )
    assert caller.scopes == frozenset(keys.SCOPES)


def test_two_keys_can_share_a_tenant(database: Database, owner_database: Database) -> None:
    first = make_tenant(owner_database, "shared")
    second = make_tenant(owner_database, "shared")

    assert first.tenant_id == second.tenant_id
    assert first.secret != second.secret
    assert authenticate(database, second.secret).tenant_id == first.tenant_id


def test_the_database_holds_no_secret(owner_database: Database, tenant: Tenant) -> None:
    secret = tenant.secret.removeprefix(PREFIX).split("_", 1)[1]
    with owner_database.begin() as tx:
        row = tx.execute(select(models.api_key).where(models.api_key.c.id == tenant.key_id)).one()

    assert secret not in repr(row)
    assert secret.encode() not in bytes(row.secret_sha256)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "",
        lambda secret: secret[:-1],
        lambda secret: secret + "x",
        lambda secret: secret.upper(),
        lambda secret: secret.removeprefix(PREFIX),
        lambda _: PREFIX,
        lambda _: PREFIX + "_",
        lambda secret: f"{PREFIX}{'a' * 12}_{secret.rpartition('_')[2]}",
        lambda secret: secret.partition("_")[0],
        lambda _: f"{PREFIX}\x00_x",
        lambda secret: f"{secret}\ud800",
        lambda _: "é" * 70,
    ],
)
def test_any_other_text_is_one_and_the_same_error(
    database: Database, tenant: Tenant, spoil: object
) -> None:
    assert callable(spoil)

    with pytest.raises(InvalidApiKey) as caught:
        authenticate(database, spoil(tenant.secret))

    assert caught.value.message == InvalidApiKey().message


def test_a_revoked_key_is_of_no_use_at_once(
    database: Database, owner_database: Database, tenant: Tenant
) -> None:
    with owner_database.begin() as tx:
        first = keys.revoke(tx, tenant.public_key_id)
        again = keys.revoke(tx, tenant.public_key_id)

    with pytest.raises(InvalidApiKey):
        authenticate(database, tenant.secret)
    with database.begin() as tx:
        assert not keys.is_live(tx, tenant.key_id)
    assert first.revoked_at is not None
    assert again.revoked_at == first.revoked_at


def test_revoking_an_unknown_key_says_so(owner_database: Database) -> None:
    with owner_database.begin() as tx, pytest.raises(NotFound):
        keys.revoke(tx, "nobody")


def test_a_key_ends_at_its_time(database: Database, owner_database: Database) -> None:
    over = make_tenant(owner_database, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    lasting = make_tenant(owner_database, expires_at=datetime.now(UTC) + timedelta(hours=1))

    with pytest.raises(InvalidApiKey):
        authenticate(database, over.secret)
    assert authenticate(database, lasting.secret).key_id == lasting.key_id


def test_a_key_may_do_what_its_scopes_say(database: Database, owner_database: Database) -> None:
    reader = make_tenant(owner_database, scopes=["jobs:read"])

    caller = authenticate(database, reader.secret)

    caller.require("jobs:read")
    with pytest.raises(InsufficientScope, match="jobs:write"):
        caller.require("jobs:write")


def test_unknown_scopes_and_odd_tenant_names_are_refused(owner_database: Database) -> None:
    with owner_database.begin() as tx:
        with pytest.raises(InvalidRequest, match="unknown scope"):
            keys.create(tx, tenant="fine", name="x", scopes=["jobs:read", "root"])
        for slug in ("", "Upper", "a b", "-a", "a" * 64, "ü", "a\n"):
            with pytest.raises(InvalidRequest, match="tenant"):
                keys.create(tx, tenant=slug, name="x")


def test_the_last_use_is_noted_once_a_minute(
    database: Database, owner_database: Database, tenant: Tenant
) -> None:
    def last_used() -> datetime | None:
        with owner_database.begin() as tx:
            (key,) = keys.keys(tx, tenant=tenant.slug)
        return key.last_used_at

    never = last_used()
    authenticate(database, tenant.secret)
    first = last_used()
    authenticate(database, tenant.secret)
    second = last_used()
    with owner_database.begin() as tx:
        tx.execute(update(models.api_key).values(last_used_at=func.now() - timedelta(seconds=61)))
    authenticate(database, tenant.secret)

    assert never is None
    assert first is not None
    assert second == first
    assert last_used() != first


def test_a_list_shows_keys_without_secrets(owner_database: Database) -> None:
    first = make_tenant(owner_database, "listed")
    second = make_tenant(owner_database, "listed", scopes=["chat"])

    with owner_database.begin() as tx:
        listed = keys.keys(tx, tenant="listed")
        everyone = keys.keys(tx)

    assert [key.public_id for key in listed] == [first.public_key_id, second.public_key_id]
    assert listed[1].scopes == ("chat",)
    assert set(listed) <= set(everyone)

"""Files over HTTP: upload, checks line by line, download in ranges, delete."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from core.db import Database
from tests.conftest import Servers
from tests.factories import Tenant, make_tenant, prompt_lines, spec_dict
from tests.live_api import LiveApi, create_job, live_api, upload

FILES = "/v1/files"
UNKNOWN = "file-" + "0" * 32
MAX_FILE_BYTES = 200_000


@pytest.fixture(scope="module")
def api(
    servers: Servers, api_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveApi]:
    folder = tmp_path_factory.mktemp("api")
    with live_api(api_url, servers.redis_url, folder, max_file_bytes=MAX_FILE_BYTES) as running:
        yield running


def stored_files(api: LiveApi) -> list[Path]:
    """Everything in the store, half-written things too."""
    root = api.store.root
    return [path for path in root.rglob("*") if path.is_file()] if root.exists() else []


def test_a_good_file_is_processed(client: httpx2.Client) -> None:
    content = prompt_lines(3)

    file = upload(client, content)

    assert file["object"] == "file"
    assert file["status"] == "processed"
    assert file["bytes"] == len(content)
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert file["filename"] == "prompts.jsonl"
    assert file["purpose"] == "fine-tune"
    assert file["validation"] == {"state": "passed", "rows": 3, "error_count": 0}
    assert client.get(f"{FILES}/{file['id']}").json() == file
    assert client.get(f"{FILES}/{file['id']}/content").content == content


def test_a_bad_file_stays_with_its_report(client: httpx2.Client) -> None:
    content = b'{"prompt": "fine"}\nnonsense\n{"prompt": 3}\n{"messages": []}\n'

    file = upload(client, content)

    assert file["status"] == "error"
    assert file["validation"] == {"state": "failed", "rows": 4, "error_count": 3}
    report = client.get(f"{FILES}/{file['id']}/validation").json()
    assert report["valid"] is False
    assert [(each["line"], each["code"]) for each in report["errors"]] == [
        (2, "invalid_json"),
        (3, "unsupported_content"),
        (4, "empty_prompt"),
    ]
    assert all(each["message"] for each in report["errors"])


def test_all_bad_lines_are_listed_however_many(client: httpx2.Client) -> None:
    file = upload(client, b"[]\n" * 1500)

    inline = client.get(f"{FILES}/{file['id']}/validation").json()
    lines = client.get(f"{FILES}/{file['id']}/validation?format=jsonl").text.splitlines()

    assert inline["error_count"] == 1500
    assert len(inline["errors"]) == 1000
    assert len(lines) == 1500


def test_an_empty_file_is_bad(client: httpx2.Client) -> None:
    assert upload(client, b"")["status"] == "error"


def test_files_of_other_purposes_are_not_checked(client: httpx2.Client) -> None:
    file = upload(client, b"\x00 anything", purpose="user_data")

    assert file["status"] == "uploaded"
    assert file["validation"]["state"] == "not_checked"
    answer = client.get(f"{FILES}/{file['id']}/validation")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_file_purpose")


def test_a_name_is_text_and_never_a_path(api: LiveApi, client: httpx2.Client) -> None:
    answer = client.post(
        FILES, files={"file": ("../../etc/pass wd", b"x")}, data={"purpose": "user_data"}
    )

    file = answer.json()
    content = client.get(f"{FILES}/{file['id']}/content")
    assert file["filename"] == "../../etc/pass wd"
    assert "..%2F..%2Fetc%2Fpass%20wd" in content.headers["Content-Disposition"]
    assert all("wd" not in path.name for path in stored_files(api))


def test_the_checksum_is_compared(client: httpx2.Client) -> None:
    right = hashlib.sha256(prompt_lines()).hexdigest()

    wrong = client.post(
        FILES,
        files={"file": ("a.jsonl", prompt_lines())},
        data={"purpose": "fine-tune", "sha256": "0" * 64},
    )

    assert upload(client, sha256=right)["sha256"] == right
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "checksum_mismatch")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "purpose"),
        ({"purpose": "fun"}, "invalid_value", "purpose"),
        ({"purpose": "fine-tune", "colour": "red"}, "unknown_parameter", "colour"),
        ({"purpose": "fine-tune", "sha256": "abc"}, "invalid_value", "sha256"),
        (
            {"purpose": "fine-tune", "expires_after[anchor]": "created_at"},
            "invalid_combination",
            "expires_after",
        ),
        (
            {
                "purpose": "fine-tune",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "60",
            },
            "integer_below_min_value",
            "expires_after[seconds]",
        ),
    ],
)
def test_faulty_fields_are_named_and_nothing_is_stored(
    api: LiveApi, client: httpx2.Client, fields: dict[str, str], code: str, param: str
) -> None:
    before = stored_files(api)

    answer = client.post(FILES, files={"file": ("a.jsonl", prompt_lines())}, data=fields)

    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)
    assert stored_files(api) == before
    assert client.get(FILES).json()["data"] == []


def test_a_form_without_a_file_is_refused(client: httpx2.Client) -> None:
    answer = client.post(FILES, files={"purpose": (None, "fine-tune")})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


def test_a_file_field_that_is_text_is_refused(client: httpx2.Client) -> None:
    answer = client.post(FILES, files={"purpose": (None, "fine-tune"), "file": (None, "text")})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_type")


def test_another_media_type_is_refused(client: httpx2.Client) -> None:
    answer = client.post(FILES, json={"purpose": "fine-tune"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"no boundary in here"),
        ("multipart/form-data; boundary=x", b"--x\r\nno header\r\n\r\nbody\r\n--x--\r\n"),
    ],
)
def test_a_broken_form_is_refused(client: httpx2.Client, content_type: str, content: bytes) -> None:
    answer = client.post(FILES, content=content, headers={"Content-Type": content_type})

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in {"invalid_multipart", "missing_required_parameter"}


def test_a_file_over_the_limit_is_refused(api: LiveApi, client: httpx2.Client) -> None:
    before = stored_files(api)

    answer = client.post(
        FILES,
        files={"file": ("a.jsonl", b"x" * (MAX_FILE_BYTES + 1))},
        data={"purpose": "user_data"},
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
    assert stored_files(api) == before


def test_a_file_at_the_limit_is_taken(client: httpx2.Client) -> None:
    file = upload(client, b"x" * MAX_FILE_BYTES, purpose="user_data")

    assert file["bytes"] == MAX_FILE_BYTES


def test_bytes_are_counted_as_they_come(tenant: Tenant, api: LiveApi) -> None:
    """A chunked body has no Content-Length to look at."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while sent < 50 * MAX_FILE_BYTES:
            sent += 65536
            yield b"x" * 65536

    with api.client(tenant) as client:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = client.post(FILES, content=endless(), headers=headers)

    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")


def test_ranges_join_to_the_whole(client: httpx2.Client) -> None:
    content = bytes(range(256)) * 40
    url = f"{FILES}/{upload(client, content, purpose='user_data')['id']}/content"

    first = client.get(url, headers={"Range": "bytes=0-99"})
    tag = first.headers["ETag"]
    rest = client.get(url, headers={"Range": "bytes=100-", "If-Range": tag})
    last = client.get(url, headers={"Range": "bytes=-5"})

    assert [answer.status_code for answer in (first, rest, last)] == [206, 206, 206]
    assert first.headers["Content-Range"] == f"bytes 0-99/{len(content)}"
    assert first.content + rest.content == content
    assert last.content == content[-5:]


def test_a_stale_range_gets_the_whole(client: httpx2.Client) -> None:
    url = f"{FILES}/{upload(client, b'0123456789', purpose='user_data')['id']}/content"

    answer = client.get(url, headers={"Range": "bytes=5-", "If-Range": '"sha256-other"'})

    assert (answer.status_code, answer.content) == (200, b"0123456789")


def test_a_range_beyond_the_end_is_416(client: httpx2.Client) -> None:
    url = f"{FILES}/{upload(client, b'0123456789', purpose='user_data')['id']}/content"

    answer = client.get(url, headers={"Range": "bytes=10-"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["Content-Range"] == "bytes */10"


def test_head_tells_the_same_without_bytes(client: httpx2.Client) -> None:
    url = f"{FILES}/{upload(client, b'0123456789', purpose='user_data')['id']}/content"
    varying = {"date", "x-request-id", "openai-processing-ms"}

    head, whole = client.head(url), client.get(url)

    assert head.content == b""
    assert {k: v for k, v in head.headers.items() if k not in varying} == {
        k: v for k, v in whole.headers.items() if k not in varying
    }
    assert head.headers["Content-Length"] == "10"
    assert whole.headers["X-Content-Type-Options"] == "nosniff"
    assert whole.headers["Content-Type"] == "application/octet-stream"


def test_files_are_listed_by_purpose(client: httpx2.Client) -> None:
    prompts = upload(client)["id"]
    other = upload(client, b"x", purpose="user_data")["id"]

    everything = client.get(FILES).json()
    only = client.get(FILES, params={"purpose": "fine-tune"}).json()

    assert [each["id"] for each in everything["data"]] == [other, prompts]
    assert [each["id"] for each in only["data"]] == [prompts]


def test_a_deleted_file_is_gone_and_paging_goes_on(api: LiveApi, client: httpx2.Client) -> None:
    first, second = (upload(client)["id"] for _ in range(2))
    before = len(stored_files(api))

    deleted = client.delete(f"{FILES}/{second}")

    assert deleted.json() == {"id": second, "object": "file", "deleted": True}
    assert client.get(f"{FILES}/{second}").status_code == 404
    assert client.delete(f"{FILES}/{second}").status_code == 404
    assert len(stored_files(api)) == before - 1
    after = client.get(FILES, params={"after": second}).json()
    assert [each["id"] for each in after["data"]] == [first]


def test_a_file_that_a_job_needs_stays(client: httpx2.Client) -> None:
    job = create_job(client)
    url = f"{FILES}/{job['training_file']}"

    refused = client.delete(url)
    client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "file_in_use")
    assert refused.headers["x-should-retry"] == "false"
    assert client.delete(url).status_code == 200


def test_a_deleted_file_cannot_be_trained_on(client: httpx2.Client) -> None:
    file = upload(client)["id"]
    client.delete(f"{FILES}/{file}")

    answer = client.post("/v1/fine_tuning/jobs", json=spec_dict() | {"training_file": file})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "file_not_found")


@pytest.mark.parametrize("file_id", [UNKNOWN, "nonsense", "file-%00"])
def test_an_unknown_file_is_404(client: httpx2.Client, file_id: str) -> None:
    answer = client.get(f"{FILES}/{file_id}")

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")


def test_another_tenant_sees_nothing(
    api: LiveApi, client: httpx2.Client, owner_database: Database
) -> None:
    file = upload(client)["id"]

    with api.client(make_tenant(owner_database)) as other:
        answers = [
            other.get(f"{FILES}/{file}"),
            other.get(f"{FILES}/{file}/content"),
            other.get(f"{FILES}/{file}/validation"),
            other.delete(f"{FILES}/{file}"),
        ]
        listed = other.get(FILES).json()["data"]

    assert [answer.status_code for answer in answers] == [404] * 4
    assert listed == []
    assert client.get(f"{FILES}/{file}").status_code == 200

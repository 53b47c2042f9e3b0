import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx2
import pytest

from trimtab.client import Client, parse_frames, safe_path, unpack
from trimtab.errors import ApiError, Failed, Unreachable

Handler = Callable[[httpx2.Request], httpx2.Response]
CONTENT = bytes(range(256)) * 40


def client_of(handler: Handler) -> Client:
    return Client(
        "http://test", "sk-tt-1", transport=httpx2.MockTransport(handler), sleep=lambda _: None
    )


def problem(code: str, message: str) -> dict[str, object]:
    return {"detail": message, "error": {"message": message, "code": code}, "request_id": "req_1"}


class Answers:
    """Gives prepared answers in order and keeps the requests."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def frames(*items: object) -> bytes:
    return b"".join(b"data: " + json.dumps(item).encode() + b"\n\n" for item in items)


def test_every_request_carries_the_key() -> None:
    answers = Answers(httpx2.Response(200, json={"id": "ftjob-1"}))

    client_of(answers).job("ftjob-1")

    assert answers.requests[0].headers["authorization"] == "Bearer sk-tt-1"


def test_a_refusal_tells_code_message_and_lines() -> None:
    body = problem("invalid_training_file", "2 of 9 lines cannot be used")
    body["errors"] = [{"line": 3, "code": "invalid_json", "detail": "not JSON"}]

    with pytest.raises(ApiError) as caught:
        client_of(Answers(httpx2.Response(400, json=body))).job("ftjob-1")

    assert caught.value.code == "invalid_training_file"
    assert caught.value.exit_code == 2
    assert "line 3: not JSON" in str(caught.value)
    assert "req_1" in str(caught.value)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_fault_is_tried_again(status: int) -> None:
    answers = Answers(httpx2.Response(status, json={}), httpx2.Response(200, json={"id": "j"}))

    assert client_of(answers).job("j") == {"id": "j"}


def test_a_lasting_conflict_is_not_tried_again() -> None:
    conflict = httpx2.Response(
        409, json=problem("job_already_finished", "over"), headers={"x-should-retry": "false"}
    )
    answers = Answers(conflict)

    with pytest.raises(ApiError, match="job_already_finished"):
        client_of(answers).cancel("j")

    assert len(answers.requests) == 1


def test_repeats_of_a_post_carry_one_idempotency_key() -> None:
    answers = Answers(httpx2.ReadTimeout("slow"), httpx2.Response(200, json={"id": "j"}))

    client_of(answers).create_job({"model": "m"})

    first, second = (request.headers["idempotency-key"] for request in answers.requests)
    assert first == second


def test_two_posts_carry_two_idempotency_keys() -> None:
    answers = Answers(*(httpx2.Response(200, json={"id": "j"}) for _ in range(2)))
    client = client_of(answers)

    client.create_job({"model": "m"})
    client.create_job({"model": "m"})

    first, second = (request.headers["idempotency-key"] for request in answers.requests)
    assert first != second


def test_a_server_that_is_gone_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="no server answers"):
        client_of(Answers(*[httpx2.ConnectError("refused")] * 9)).job("j")


def test_a_repeated_upload_sends_the_whole_file_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(CONTENT)
    answers = Answers(httpx2.Response(503, json={}), httpx2.Response(200, json={"id": "file-1"}))

    def read_first(request: httpx2.Request) -> httpx2.Response:
        request.read()
        return answers(request)

    client_of(read_first).upload(path)

    for request in answers.requests:
        assert CONTENT in request.content
        assert b'filename="prompts.jsonl"' in request.content


def test_a_cut_stream_goes_on_behind_the_last_id() -> None:
    first = frames({"type": "status", "id": None}, {"type": "metrics", "id": "1-1"})
    second = frames({"type": "metrics", "id": "1-2"}, {"type": "end", "id": "1-2"})
    answers = Answers(
        httpx2.Response(200, content=first + b'data: {"type": "met'),
        httpx2.ConnectError("away"),
        httpx2.Response(200, content=second + b"data: [DONE]\n\n"),
    )

    seen = list(client_of(answers).stream("j"))

    assert [item["type"] for item in seen] == ["status", "metrics", "metrics", "end"]
    assert "last-event-id" not in answers.requests[0].headers
    assert [request.headers["last-event-id"] for request in answers.requests[1:]] == ["1-1", "1-1"]


def test_a_stream_with_nothing_more_to_tell_ends() -> None:
    assert list(client_of(Answers(httpx2.Response(204))).stream("j", after="1-9")) == []


def test_a_stream_that_stays_away_is_given_up() -> None:
    with pytest.raises(Unreachable, match="was lost"):
        list(client_of(Answers(*[httpx2.ConnectError("refused")] * 99)).stream("j"))


def test_a_stream_that_is_cut_often_but_goes_on_is_not_given_up() -> None:
    cuts = [
        httpx2.Response(200, content=frames({"type": "metrics", "id": f"1-{n}"})) for n in range(40)
    ]
    last = httpx2.Response(200, content=frames({"type": "end", "id": "1-40"}))

    assert len(list(client_of(Answers(*cuts, last)).stream("j"))) == 41


def test_a_refused_stream_is_an_error_at_once() -> None:
    with pytest.raises(ApiError, match="job_not_found"):
        list(
            client_of(Answers(httpx2.Response(404, json=problem("job_not_found", "no")))).stream(
                "j"
            )
        )


def test_heartbeats_are_signs_of_life() -> None:
    calls: list[int] = []
    content = b": hb\n" + frames({"type": "end", "id": None})

    list(
        client_of(Answers(httpx2.Response(200, content=content))).stream(
            "j", on_life=lambda: calls.append(1)
        )
    )

    assert calls


def test_frames_may_be_cut_anywhere_and_hold_any_character() -> None:
    item = {"type": "event", "message": "a\u2028b\x85c"}
    content = (
        b": hb\nretry: 2000\nid: 1-1\n"
        + f"data: {json.dumps(item, ensure_ascii=False)}\n\n".encode()
    )

    found = list(parse_frames(content[i : i + 1] for i in range(len(content))))

    assert found == [item]


def manifest_of(path: str = "adapter/adapter_model.safetensors") -> dict[str, object]:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return {"files": [{"path": path, "sha256": digest, "bytes": len(CONTENT)}]}


def test_a_download_is_verified_and_leaves_the_manifest(tmp_path: Path) -> None:
    answers = Answers(
        httpx2.Response(200, json=manifest_of()), httpx2.Response(200, content=CONTENT)
    )

    client_of(answers).download("j", tmp_path)

    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == CONTENT
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest_of()


def test_a_wrong_digest_is_fetched_once_more_and_then_refused(tmp_path: Path) -> None:
    answers = Answers(
        httpx2.Response(200, json=manifest_of()),
        httpx2.Response(200, content=b"wrong"),
        httpx2.Response(200, content=b"wrong again"),
    )

    with pytest.raises(Failed, match="not kept"):
        client_of(answers).download("j", tmp_path)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_download_goes_on_at_the_last_byte(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors.part").write_bytes(CONTENT[:1000])
    answers = Answers(
        httpx2.Response(200, json=manifest_of()), httpx2.Response(206, content=CONTENT[1000:])
    )

    client_of(answers).download("j", tmp_path)

    asked = answers.requests[1].headers
    assert asked["range"] == "bytes=1000-"
    assert asked["if-range"] == f'"sha256-{hashlib.sha256(CONTENT).hexdigest()}"'
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == CONTENT


def test_a_part_of_another_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors.part").write_bytes(b"old")
    answers = Answers(
        httpx2.Response(200, json=manifest_of()), httpx2.Response(200, content=CONTENT)
    )

    client_of(answers).download("j", tmp_path)

    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == CONTENT


def test_a_complete_part_is_taken(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors.part").write_bytes(CONTENT)
    answers = Answers(httpx2.Response(200, json=manifest_of()), httpx2.Response(416))

    client_of(answers).download("j", tmp_path)

    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == CONTENT


def tar_with(*entries: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for entry in entries:
            content = CONTENT if entry.isfile() else b""
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def checkpoint_manifest(tar: bytes) -> dict[str, object]:
    adapter = {"url": "/adapter?checkpoint=c", "sha256": hashlib.sha256(tar).hexdigest()}
    return {"files": [], "checkpoint_id": "c", "adapter": adapter}


def test_a_checkpoints_adapter_is_verified_and_unpacked(tmp_path: Path) -> None:
    tar = tar_with(tarfile.TarInfo("adapter_model.safetensors"))
    answers = Answers(
        httpx2.Response(200, json=checkpoint_manifest(tar)), httpx2.Response(200, content=tar)
    )

    client_of(answers).download("j", tmp_path, checkpoint="c")

    assert [request.url.params.get("checkpoint") for request in answers.requests] == ["c", "c"]
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == {
        "adapter/adapter_model.safetensors",
        "manifest.json",
    }
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == CONTENT


def test_a_checkpoints_adapter_with_a_wrong_digest_is_not_unpacked(tmp_path: Path) -> None:
    tar = tar_with(tarfile.TarInfo("adapter_model.safetensors"))
    wrong = [httpx2.Response(200, content=tar[:-1] + b"x") for _ in range(2)]
    answers = Answers(httpx2.Response(200, json=checkpoint_manifest(tar)), *wrong)

    with pytest.raises(Failed, match="not kept"):
        client_of(answers).download("j", tmp_path)

    assert not (tmp_path / "adapter").exists()


def link(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return entry


@pytest.mark.parametrize(
    "entry", [link("weights"), tarfile.TarInfo("../weights"), tarfile.TarInfo("/weights")]
)
def test_an_archive_writes_plain_files_below_its_folder_only(
    tmp_path: Path, entry: tarfile.TarInfo
) -> None:
    (tmp_path / "x.tar").write_bytes(tar_with(entry))

    with pytest.raises(Failed):
        unpack(tmp_path / "x.tar", tmp_path / "out")

    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x.tar"]


@pytest.mark.parametrize("wish", ["pause", "resume", "cancel"])
def test_a_wish_is_posted_to_its_address(wish: str) -> None:
    answers = Answers(httpx2.Response(200, json={"status": "queued"}))

    getattr(client_of(answers), wish)("j")

    assert answers.requests[0].method == "POST"
    assert answers.requests[0].url.path == f"/v1/fine_tuning/jobs/j/{wish}"


@pytest.mark.parametrize("end", ["paused", "succeeded"])
def test_waiting_ends_with_the_state_or_with_the_job(end: str) -> None:
    states = ["running", "running", end]
    answers = Answers(*(httpx2.Response(200, json={"status": state}) for state in states))

    found = client_of(answers).wait_for("j", "paused")

    assert found["status"] == end
    assert answers.answers == []


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../b", "a//b", "", "a\\b", "./a", "a\0"]
)
def test_a_path_that_could_leave_the_folder_is_refused(path: str) -> None:
    with pytest.raises(Failed, match="not written"):
        safe_path(path)


class OneModel(BaseHTTPRequestHandler):
    """A server with an empty list, whatever it is asked."""

    def do_GET(self) -> None:
        body = b'{"object": "list", "data": [], "has_more": false}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_proxy_never_sees_what_goes_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens on the discard port
    with ThreadingHTTPServer(("127.0.0.1", 0), OneModel) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            with Client(f"http://127.0.0.1:{server.server_port}", "sk-tt-1") as client:
                assert client.jobs() == []
        finally:
            server.shutdown()

"""The Python client: everything the command line asks of a Trimtab server, over HTTP.

Requests that may be repeated are repeated; a stream that was cut goes on where it was; a download
goes on at its last byte and is kept only if its digest is right.
"""

import hashlib
import json
import random
import tarfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx2

from trimtab.errors import ApiError, Failed, Unreachable

Json = dict[str, Any]
Answer = TypeVar("Answer")

_TRIES = 4
_STREAM_TRIES = 12
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 8.0
_RETRYABLE = frozenset({408, 409, 429})
_STREAM_SILENCE_SECONDS = 45.0
_CHUNK_BYTES = 1 << 16
_TAR = "adapter.tar"
_JOBS = "/v1/fine_tuning/jobs"
_ENDED = frozenset({"succeeded", "failed", "cancelled"})
_WAIT_SECONDS = 30
"""How long the server is asked to hold an answer until the job has changed."""


def is_local(url: str) -> bool:
    """Whether a URL names this machine; no proxy of the environment may see what goes there."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


class Client:
    """A connection to one server with one key; use it in a `with` block."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sleep = sleep
        self._http = httpx2.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx2.Timeout(60.0, connect=5.0),
            transport=transport,
            trust_env=not is_local(base_url),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    # -- files, models -----------------------------------------------------------------------

    def upload(self, path: Path) -> Json:
        """The stored file; an `ApiError` lists every line that is no prompt."""
        headers = _idempotent()

        def send() -> httpx2.Response:
            with path.open("rb") as file:
                return self._http.post(
                    "/v1/files",
                    headers=headers,
                    files={"file": (path.name, file)},
                    data={"purpose": "fine-tune"},
                )

        return self._json(send)

    def models(self) -> list[Json]:
        """Base models on offer, and finished adapters."""
        found: list[Json] = self._get("/v1/models")["data"]
        return found

    # -- jobs --------------------------------------------------------------------------------

    def create_job(self, spec: Mapping[str, Any]) -> Json:
        """The new job, queued."""
        return self._post(_JOBS, spec)

    def job(self, job_id: str) -> Json:
        """The job as it is now."""
        return self._get(f"{_JOBS}/{job_id}")

    def jobs(self, limit: int = 20) -> list[Json]:
        """The newest jobs, newest first."""
        found: list[Json] = self._get(_JOBS, params={"limit": str(limit)})["data"]
        return found

    def cancel(self, job_id: str) -> Json:
        """The job after the wish to cancel it was noted."""
        return self._post(f"{_JOBS}/{job_id}/cancel")

    def pause(self, job_id: str) -> Json:
        """The job after the wish to pause it was noted."""
        return self._post(f"{_JOBS}/{job_id}/pause")

    def resume(self, job_id: str) -> Json:
        """The job, back in the queue if it was paused, or without a pause that had not come yet."""
        return self._post(f"{_JOBS}/{job_id}/resume")

    def wait_for(self, job_id: str, *statuses: str) -> Json:
        """The job once it has one of these states, or has ended."""
        job = self.job(job_id)
        while job["status"] not in _ENDED.union(statuses):
            self._sleep(1.0)  # a busy server answers at once
            job = self._get(f"{_JOBS}/{job_id}", headers={"Prefer": f"wait={_WAIT_SECONDS}"})
        return job

    def metrics(self, job_id: str) -> Json:
        """All metrics so far, in columns."""
        return self._get(f"{_JOBS}/{job_id}/metrics")

    def events(self, job_id: str, limit: int = 20) -> list[Json]:
        """The newest events, newest first."""
        found: list[Json] = self._get(f"{_JOBS}/{job_id}/events", params={"limit": str(limit)})[
            "data"
        ]
        return found

    def stream(
        self, job_id: str, *, after: str | None = None, on_life: Callable[[], None] | None = None
    ) -> Iterator[Json]:
        """What happens to the job, each thing once and in order, up to its end.

        A cut connection is taken up again behind the last id, for as long as the server answers
        within about a minute.  `on_life` is called with every sign of life, heartbeats too.
        """
        failures = 0
        while failures < _STREAM_TRIES:
            failures += 1
            try:
                for item in self._stream_once(job_id, after, on_life or _nothing):
                    failures = 0
                    after = item.get("id") or after
                    yield item
                    if item["type"] == "end":
                        return
            except _StreamOver:
                return
            except (httpx2.TransportError, _Busy):
                pass  # the next round asks again, from the last id on
            self._sleep(_pause_seconds(failures))
        raise Unreachable(f"the stream of {job_id} was lost and does not come back")

    def _stream_once(
        self, job_id: str, after: str | None, on_life: Callable[[], None]
    ) -> Iterator[Json]:
        headers = {"Accept": "text/event-stream"}
        if after is not None:
            headers["Last-Event-ID"] = after
        timeout = httpx2.Timeout(_STREAM_SILENCE_SECONDS, connect=5.0)
        with self._http.stream(
            "GET", f"{_JOBS}/{job_id}/stream", headers=headers, timeout=timeout
        ) as response:
            if response.status_code == 204:
                raise _StreamOver
            _raise_for(response)
            yield from parse_frames(_noticed(response.iter_bytes(), on_life))

    # -- results -----------------------------------------------------------------------------

    def manifest(self, job_id: str, *, checkpoint: str | None = None) -> Json:
        """What the job left, as of its end or of a checkpoint: path, size, digest of each file."""
        params = None if checkpoint is None else {"checkpoint": checkpoint}
        return self._get(f"{_JOBS}/{job_id}/artifacts", params=params)

    def download(self, job_id: str, folder: Path, *, checkpoint: str | None = None) -> Json:
        """The job's manifest, after each of its files is in `folder` with the right digest.

        The files of a result come one by one.  A checkpoint's adapter comes as a tar, which is
        unpacked and not kept.
        """
        manifest = self.manifest(job_id, checkpoint=checkpoint)
        files = [file for file in manifest["files"] if file["path"] != _TAR]
        targets = [(file, folder / safe_path(file["path"])) for file in files]
        for file, target in targets:
            url = f"{_JOBS}/{job_id}/artifacts/{file['path']}"
            self._download(url, target, sha256=file["sha256"])
        if manifest.get("checkpoint_id") is not None:
            tar = folder / _TAR
            self._download(manifest["adapter"]["url"], tar, sha256=manifest["adapter"]["sha256"])
            unpack(tar, folder / "adapter")
            tar.unlink()
        text = json.dumps(manifest, indent=2) + "\n"
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        return manifest

    def _download(self, url: str, target: Path, *, sha256: str) -> None:
        """One file, whole and with this digest; a wrong one is fetched once more, then refused."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        for _ in range(2):
            digest = self._retried(lambda: self._fetch(url, part, sha256=sha256))
            if digest == sha256:
                part.replace(target)
                return
            part.unlink(missing_ok=True)
        raise Failed(f"{target.name} has the sha256 {digest} instead of {sha256}; not kept")

    def _fetch(self, url: str, part: Path, *, sha256: str) -> str:
        """The digest of `part` after the rest of the file came behind what was there."""
        hashed = hashlib.sha256(part.read_bytes() if part.exists() else b"")
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-", "If-Range": f'"sha256-{sha256}"'} if have else {}
        with self._http.stream("GET", url, headers=headers) as response:
            if response.status_code == 416:  # nothing is missing
                return hashed.hexdigest()
            _raise_for(response)
            if response.status_code != 206:
                hashed, have = hashlib.sha256(), 0
            with part.open("ab" if have else "wb") as file:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    hashed.update(chunk)
                    file.write(chunk)
        return hashed.hexdigest()

    # -- requests ----------------------------------------------------------------------------

    def _get(
        self,
        url: str,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        return self._json(lambda: self._http.get(url, params=params, headers=headers))

    def _post(self, url: str, body: Mapping[str, Any] | None = None) -> Json:
        headers = _idempotent()
        return self._json(lambda: self._http.post(url, headers=headers, json=body))

    def _json(self, send: Callable[[], httpx2.Response]) -> Json:
        def checked() -> Json:
            response = send()
            _raise_for(response)
            answer: Json = response.json()
            return answer

        return self._retried(checked)

    def _retried(self, attempt: Callable[[], Answer]) -> Answer:
        """The answer of the first attempt that is not worth another one."""
        for failures in range(1, _TRIES):
            try:
                return attempt()
            except _Busy as busy:
                self._sleep(busy.pause_seconds or _pause_seconds(failures))
            except httpx2.TransportError:
                self._sleep(_pause_seconds(failures))
        try:
            return attempt()
        except _Busy as busy:
            raise busy.problem from None
        except httpx2.TransportError as error:
            url = self._http.base_url
            raise Unreachable(f"no server answers at {url}: {error}") from error


class _StreamOver(Exception):
    """The server has nothing more to tell of this job."""


class _Busy(Exception):
    """An answer that says: try again."""

    def __init__(self, problem: ApiError, pause_seconds: float | None) -> None:
        super().__init__(str(problem))
        self.problem = problem
        self.pause_seconds = pause_seconds


def parse_frames(chunks: Iterable[bytes]) -> Iterator[Json]:
    """The JSON objects of a server-sent event stream; a frame that was cut off is dropped."""
    data: list[bytes] = []
    for line in _lines(chunks):
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif not line and data:
            text, data = b"\n".join(data), []
            if text != b"[DONE]":
                yield json.loads(text)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Complete lines without their ends; only a line feed ends one, unlike in `str.splitlines`."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)


def _noticed(chunks: Iterable[bytes], on_life: Callable[[], None]) -> Iterator[bytes]:
    """The same chunks; `on_life` is called with each."""
    for chunk in chunks:
        on_life()
        yield chunk


def _nothing() -> None:
    """What to do where nobody wants to know."""


def _idempotent() -> dict[str, str]:
    """A header that makes repeats of this one call harmless."""
    return {"Idempotency-Key": str(uuid.uuid4())}


def safe_path(path: str) -> PurePosixPath:
    """A relative path of plain names; anything that could leave the folder is refused."""
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise Failed(f"the server offers a file with the path {path!r}; not written")
    return PurePosixPath(*parts)


def unpack(tar: Path, folder: Path) -> None:
    """The plain files of an archive, in `folder`; anything else in it is refused."""
    with tarfile.open(tar, "r:") as archive:
        for entry in archive:
            content = archive.extractfile(entry) if entry.isfile() else None
            if content is None:
                raise Failed(f"the archive holds {entry.name!r}, which is no plain file")
            target = folder / safe_path(entry.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())


def _raise_for(response: httpx2.Response) -> None:
    """Nothing for a good answer; `_Busy` for one worth another try, else the server's own error."""
    if response.status_code < 400:
        return
    response.read()
    try:
        problem = response.json()
    except ValueError:
        problem = {"detail": f"HTTP {response.status_code} from something that is no Trimtab"}
    error = ApiError(response.status_code, problem if isinstance(problem, dict) else {})
    if _is_worth_a_retry(response):
        raise _Busy(error, _retry_after(response))
    raise error


def _is_worth_a_retry(response: httpx2.Response) -> bool:
    if (advice := response.headers.get("x-should-retry")) is not None:
        return bool(advice == "true")
    return response.status_code in _RETRYABLE or response.status_code >= 500


def _retry_after(response: httpx2.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return min(float(value), 60.0) if value.isdigit() else None


def _pause_seconds(failures: int) -> float:
    """Doubles with each failure, with jitter; nothing after a success."""
    if failures == 0:
        return 0.0
    longest = min(_FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1), _LONGEST_PAUSE_SECONDS)
    return longest * random.uniform(0.5, 1.0)

"""A real API server in a thread, on a socket of its own, with a model and an artifact folder."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import structlog
from fastapi import FastAPI

from api.__main__ import make_server
from api.app import create_app
from api.deps import Services
from api.settings import ApiSettings
from core.attempts import NewArtifact
from core.storage import ArtifactStore
from tests.factories import MODEL, Tenant, prompt_lines, spec_dict

ALIAS = "smollm2-135m-instruct"
MODEL_SHA256 = "ab" * 32
CONTEXT_LENGTH = 2048
DEADLINE_SECONDS = 20.0

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class LiveApi:
    """A running server."""

    origin: str
    app: FastAPI
    services: Services
    store: ArtifactStore

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"

    def client(self, tenant: Tenant | None = None, **options: Any) -> httpx2.Client:
        headers = {} if tenant is None else tenant.headers
        return httpx2.Client(base_url=self.origin, headers=headers, timeout=30, **options)


@contextmanager
def live_api(api_url: str, redis_url: str, folder: Path, **settings: Any) -> Iterator[LiveApi]:
    models = folder / "models"
    make_model(models / "smollm2")
    configured = ApiSettings(
        database_url=api_url,
        redis_url=redis_url,
        artifacts=folder / "artifacts",
        models=models,
        **settings,
    )
    app = create_app(configured)
    server = make_server(app, configured)
    logging_before = structlog.get_config()
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.LogfmtRenderer()],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started, "the server did not start"
        port = listener.getsockname()[1]
        yield LiveApi(
            origin=f"http://127.0.0.1:{port}",
            app=app,
            services=app.state.services,
            store=ArtifactStore(configured.artifacts),
        )
    finally:
        server.should_exit = True
        thread.join(DEADLINE_SECONDS)
        listener.close()
        structlog.configure(**logging_before)
    assert not thread.is_alive(), "the server did not stop"


def make_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "id": MODEL,
        "aliases": [ALIAS],
        "sha256": MODEL_SHA256,
        "parameters": 134_515_008,
        "context_length": CONTEXT_LENGTH,
        "licence": "apache-2.0",
    }
    (folder / "model.json").write_text(json.dumps(card))


def wait_until(condition: Callable[[], Value]) -> Value:
    """The first true value of `condition`."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def upload(client: httpx2.Client, content: bytes | None = None, **fields: str) -> dict[str, Any]:
    """A file of prompts, as the API answers it."""
    answer = client.post(
        "/v1/files",
        files={"file": ("prompts.jsonl", prompt_lines() if content is None else content)},
        data={"purpose": "fine-tune", **fields},
    )
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def job_body(client: httpx2.Client, **hyperparameters: Any) -> dict[str, Any]:
    """A job request with an uploaded file."""
    return spec_dict(**hyperparameters) | {"training_file": upload(client)["id"]}


def create_job(client: httpx2.Client, **hyperparameters: Any) -> dict[str, Any]:
    """A new job, as the API answers it."""
    answer = client.post("/v1/fine_tuning/jobs", json=job_body(client, **hyperparameters))
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def put_artifact(store: ArtifactStore, path: str, content: bytes, *, role: str) -> NewArtifact:
    """A result whose bytes are stored."""
    digest = hashlib.sha256(content).hexdigest()
    stored = store.put(f"results/{digest}/{path}", [content])
    return NewArtifact(
        path=path,
        role=role,
        media_type="application/octet-stream",
        uri=stored.key,
        sha256=digest,
        bytes=len(content),
    )

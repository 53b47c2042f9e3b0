"""`trimtab doctor`: each fault is one line, with what to do about it below."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from trimtab import embedded
from trimtab.cli import doctor as command
from trimtab.cli.main import app
from trimtab.home import Home

ROOT = Path(__file__).parents[3]
SHA256_OF_WEIGHTS = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
"""Of the word "weights", by sha256sum."""
HEAVY = ("rich.console", "httpx2", "trimtab.servers", "plotext", "pydantic")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DATABASE_URL", "REDIS_URL", "TRIMTAB_MODELS", "TRIMTAB_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    return tmp_path


def doctor() -> Result:
    return CliRunner().invoke(app, ["doctor"])


def add_model(home: Path, *, sha256: str) -> None:
    folder = home / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "model.json").write_text(json.dumps({"id": "tiny", "aliases": [], "sha256": sha256}))


@pytest.mark.usefixtures("home")
def test_a_machine_without_anything_is_told_what_to_do_first() -> None:
    said = doctor()

    assert said.exit_code == 0
    assert "! servers: none are running here\n    start them with" in said.stdout
    assert "models fetch smollm2-135m-instruct" in said.stdout
    assert "✓ store" in said.stdout


def test_weights_that_are_not_those_of_the_card_are_bad(home: Path) -> None:
    add_model(home, sha256="0" * 64)

    said = doctor()

    assert said.exit_code == 1
    assert "✗ model: tiny" in said.stdout


def test_weights_of_the_card_are_good(home: Path) -> None:
    add_model(home, sha256=SHA256_OF_WEIGHTS)

    assert "✓ model: tiny" in doctor().stdout


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("free", "mark"), [(2**40, "✓"), (2**31, "!"), (2**20, "✗")])
def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, free: int, mark: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    assert f"{mark} disk" in doctor().stdout


def test_a_store_that_cannot_be_written_is_bad(home: Path) -> None:
    (home / "artifacts").write_text("a file where a folder should be")

    said = doctor()

    assert said.exit_code == 1
    assert "✗ store" in said.stdout
    assert "TRIMTAB_ARTIFACTS" in said.stdout


@pytest.mark.usefixtures("home")
def test_servers_that_do_not_answer_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://trimtab_api:secret@127.0.0.1:1/none")
    monkeypatch.setenv("REDIS_URL", "redis://:secret@127.0.0.1:1/0")

    said = doctor()

    assert said.exit_code == 1
    assert "✗ postgres" in said.stdout
    assert "✗ redis" in said.stdout
    assert "secret" not in said.stdout


@pytest.mark.usefixtures("home")
def test_servers_that_keep_one_waiting_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("DATABASE_URL", f"postgresql://trimtab_api:secret@{address}/none")
        monkeypatch.setenv("REDIS_URL", f"redis://:secret@{address}/0")
        monkeypatch.setattr(command, "SERVER_SECONDS", 0.2)

        said = doctor()

    assert said.exit_code == 1
    assert "✗ servers: no answer within 0.2 s" in said.stdout


def test_only_what_is_not_named_is_taken_from_the_local_stack(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = SimpleNamespace(
        home=SimpleNamespace(secrets_file=home),
        is_guarded=lambda: True,
        endpoints=SimpleNamespace(api_url="postgresql://local", redis_url="redis://local"),
    )
    monkeypatch.setattr(embedded, "EmbeddedServers", lambda _path: stack)

    assert command._addresses(Home(home)) == {
        "DATABASE_URL": "postgresql://local",
        "REDIS_URL": "redis://local",
    }
    monkeypatch.setenv("DATABASE_URL", "postgresql://elsewhere")
    assert command._addresses(Home(home)) == {"REDIS_URL": "redis://local"}


def test_help_loads_nothing_that_it_does_not_need() -> None:
    code = f"import sys, trimtab.cli.main; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"

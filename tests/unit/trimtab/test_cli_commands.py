import json
import os
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from trimtab.cli.main import app
from trimtab.stack import HOST

COMMANDS = {
    "demo": "adapter",
    "up": "Ctrl-C",
    "doctor": "what to do",
    "submit": "Post a job",
    "list": "newest jobs",
    "show": "one job",
    "watch": "until it ends",
    "cancel": "checkpoints stay",
    "pause": "saves a checkpoint first",
    "resume": "withdraw a pause",
    "download": "every digest",
    "api": "python -m api",
    "worker": "python -m worker",
    "dispatcher": "python -m worker.dispatcher",
    "migrate": "python -m migrations",
    "keys": "python -m api.keys",
    "models": "Base models",
    "models fetch": "its digest",
    "models add": "safetensors only",
    "models list": "in the cache",
}
HEAVY = ("torch", "transformers", "sqlalchemy", "psycopg", "celery", "redis", "fastapi", "openai")


def run_trimtab(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trimtab.cli.main", *arguments],
        env={"PATH": os.environ["PATH"], "TRIMTAB_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("command", "said"), COMMANDS.items())
def test_every_command_says_what_it_does(command: str, said: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])

    assert result.exit_code == 0
    assert said in " ".join(result.output.split())


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])

    for command in COMMANDS:
        assert command.split()[0] in result.output


def test_the_command_line_loads_nothing_heavy() -> None:
    code = (
        f"import sys, trimtab.cli.main;print([name for name in {HEAVY!r} if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_known_fault_is_one_sentence_and_its_exit_code(tmp_path: Path) -> None:
    done = run_trimtab("models", "fetch", "no-such-model", home=tmp_path)

    assert done.returncode == 2
    assert done.stderr.startswith("trimtab: no-such-model cannot be fetched")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_client_command_without_a_key_says_how_to_give_one(tmp_path: Path) -> None:
    done = run_trimtab("list", home=tmp_path)

    assert done.returncode == 2
    assert "TRIMTAB_API_KEY" in done.stderr


def test_a_client_command_without_a_server_says_that_none_answers(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text("sk-tt-nobody\n")
    with socket.socket() as reserved:
        reserved.bind((HOST, 0))  # taken, and nobody listens
        url = f"http://{HOST}:{reserved.getsockname()[1]}"

        done = run_trimtab("list", "--base-url", url, home=tmp_path)

    assert done.returncode == 4
    assert f"no server answers at {url}" in done.stderr


class OneJob(BaseHTTPRequestHandler):
    """A server whose job is asked to pause, then is paused."""

    states: ClassVar[list[str]] = ["running", "running", "paused"]

    def _answer(self) -> None:
        body = json.dumps({"status": self.states.pop(0)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass


def test_pause_waits_when_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text("sk-tt-1\n")
    with ThreadingHTTPServer((HOST, 0), OneJob) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://{HOST}:{server.server_port}"
            done = run_trimtab("pause", "j", "--wait", "--base-url", url, home=tmp_path)
        finally:
            server.shutdown()

    assert (done.returncode, done.stdout) == (0, "paused\n")
    assert OneJob.states == []


def test_up_names_the_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]

        done = run_trimtab("up", "--port", str(port), home=tmp_path)

    assert done.returncode == 2
    assert f"port {port} on {HOST} is taken" in done.stderr
    assert "--port" in done.stderr
    assert not (tmp_path / "secrets.json").exists(), "nothing was started"


def test_demo_refuses_a_folder_without_a_job(tmp_path: Path) -> None:
    done = run_trimtab("demo", "--data", str(tmp_path), home=tmp_path)

    assert done.returncode == 2
    assert "holds no job.json" in done.stderr


def test_models_list_prints_one_object_per_line(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "small"
    folder.mkdir(parents=True)
    entry = {"id": "o/small", "aliases": ["small"], "parameters": 3, "context_length": 8}
    (folder / "model.json").write_text(json.dumps(entry))

    done = run_trimtab("models", "list", "--json", home=tmp_path)

    assert json.loads(done.stdout) == {**entry, "path": str(folder)}


def test_a_process_command_becomes_the_python_module(tmp_path: Path) -> None:
    done = run_trimtab("keys", "--no-such-flag", home=tmp_path)

    assert done.returncode == 2
    assert "usage: python -m api.keys" in done.stderr

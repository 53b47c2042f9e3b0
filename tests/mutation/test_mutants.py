"""Every fault of `mutants.py`, put into a copy of the engine, is noticed by the unit tests."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.mutation.mutants import MUTANTS, ROOT, Mutant, StaleMutant

UNCHANGED = ""
"""The name under which the engine runs as it is."""
TESTS_FAILED = 1
"""pytest's exit code; others stand for broken imports, no tests and the like."""
CRASHES = {"AttributeError", "ImportError", "NameError", "SyntaxError", "TypeError"}
"""A mutant that only crashes proves nothing about the tests."""


class Results:
    """What became of each mutant, read as the runner prints it."""

    def __init__(self, runner: "subprocess.Popen[str]") -> None:
        self._runner = runner
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, name: str) -> dict[str, Any]:
        assert self._runner.stdout is not None
        while name not in self._known:
            line = self._runner.stdout.readline()
            assert line, f"the runner ended with code {self._runner.wait()}"
            found = json.loads(line)
            self._known[found["name"]] = found
        return self._known[name]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """Only what was selected is run, in the order of the tests."""
    wanted = []
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path:
            mutant = item.callspec.params["mutant"] if hasattr(item, "callspec") else None
            wanted.append(mutant.name if mutant else UNCHANGED)
    names = [name for name in dict.fromkeys(wanted) if name == UNCHANGED or is_fresh(name)]
    runner = subprocess.Popen(
        [sys.executable, "-m", "tests.mutation.warm_runner", json.dumps(names)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with runner:
        yield Results(runner)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(runner.pid, signal.SIGKILL)


def is_fresh(name: str) -> bool:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    try:
        mutant.source()
    except StaleMutant:
        return False
    return True


def test_the_engine_as_it_is_passes_every_killer(results: Results) -> None:
    result = results.of(UNCHANGED)

    assert result["exit_code"] == 0, result["output"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_is_killed(results: Results, mutant: Mutant) -> None:
    mutant.source()  # raises if the passage is gone

    result = results.of(mutant.name)

    assert result["exit_code"] == TESTS_FAILED, result["output"]
    assert [f["when"] for f in result["failures"]] == ["call"], result["output"]
    assert result["failures"][0]["error"] not in CRASHES, result["output"]


def test_names_and_faults_are_different() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)

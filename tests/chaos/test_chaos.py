"""One seed of chaos in every run of the suite; `make chaos SEEDS=5` runs more and longer."""

import sys
from pathlib import Path

import pytest

from tests.chaos.faults import Fault
from tests.chaos.report import lines
from tests.chaos.run import run_seed

ROUNDS = 2
SEED = 1


@pytest.mark.timeout(600)
def test_chaos_loses_nothing_and_does_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_seed(tmp_path, SEED, rounds=ROUNDS)

    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines([report])) + "\n")
    assert report.findings.sentences() == []
    assert report.on_running_jobs == ROUNDS * len(Fault)

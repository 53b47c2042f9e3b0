"""`python -m tests.chaos --seeds 5`: longer runs than the one in the suite, and their report."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.report import Report, lines
from tests.chaos.run import run_seed


def main() -> int:
    """Run the seeds one after another; 1 if any promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--rounds", type=int, default=3, help="how often each kind of fault")
    chosen = parser.parse_args()
    reports: list[Report] = []
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        with tempfile.TemporaryDirectory(prefix="trimtab-chaos-") as home:
            reports.append(run_seed(Path(home), seed, rounds=chosen.rounds))
        _tell(lines(reports[-1:]))
    if len(reports) > 1:
        _tell(["", *lines(reports)])
    return int(any(sum(one.findings.counts().values()) for one in reports))


def _tell(text: list[str]) -> None:
    sys.stdout.write("\n".join(text) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

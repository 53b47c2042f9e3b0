"""What a chaos run did and what it found, as numbers that people read."""

from collections import Counter
from dataclasses import dataclass

from tests.chaos.checker import Findings
from tests.chaos.faults import Fault, Landed


@dataclass(frozen=True, kw_only=True)
class Report:
    """One seed."""

    seed: int
    seconds: float
    landed: tuple[Landed, ...]
    jobs: int
    attempts: int
    ends: Counter[str]
    """Attempts by the reason of their end."""
    findings: Findings

    @property
    def on_running_jobs(self) -> int:
        """Faults under which at least one job was running."""
        return sum(1 for one in self.landed if one.hit)


def lines(reports: list[Report]) -> list[str]:
    """The report over all seeds: faults by kind, jobs, attempts, and each promise's failures."""
    kinds = Counter(one.fault for report in reports for one in report.landed)
    hits = Counter(one.fault for report in reports for one in report.landed if one.hit)
    seeds = ", ".join(str(report.seed) for report in reports)
    out = [
        f"chaos: seeds {seeds}; {sum(report.seconds for report in reports):.0f} s",
        f"{'fault':46}{'injected':>9}{'on running jobs':>17}",
        *(f"{kind:46}{kinds[kind]:9d}{hits[kind]:17d}" for kind in Fault if kinds[kind]),
        f"{'all':46}{kinds.total():9d}{hits.total():17d}",
    ]
    num_jobs = sum(report.jobs for report in reports)
    out.append(f"jobs {num_jobs}, attempts {sum(report.attempts for report in reports)}")
    ends = sum((report.ends for report in reports), Counter[str]())
    out.append("ends of attempts: " + ", ".join(f"{why} {n}" for why, n in ends.most_common()))
    counts = sum((Counter(report.findings.counts()) for report in reports), Counter[str]())
    names = reports[0].findings.counts()
    out.append(", ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in names))
    out += [
        f"  seed {report.seed}: {sentence}"
        for report in reports
        for sentence in report.findings.sentences()
    ]
    return out

"""What a run's metrics show together, update after update: findings a user can act on.

What counts as odd is in `signs`, what it amounts to in `syndromes`.  Nothing here acts: that is
`guards`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from ppo_engine.signs import (
    BASELINE_UPDATES,
    GRADIENT_MEMORY,
    RECENT_UPDATES,
    SPIKE_UPDATES,
    USUAL_GRAD_NORM,
    VALIDATIONS,
    Advice,
    Evidence,
    History,
    Level,
    MonitorSettings,
    Observation,
    Sign,
    Validation,
)
from ppo_engine.syndromes import SYNDROMES, WATCHED, Code
from ppo_engine.verdicts import ClipVerdict

__all__ = ["Advice", "Evidence", "Finding", "Monitor", "MonitorSettings", "level_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A syndrome that a run shows."""

    code: Code
    level: Level
    since_step: int
    """First update since which it has been there without a break."""
    message: str
    """What is wrong, in words and numbers."""
    evidence: tuple[Evidence, ...]
    """At least one."""
    actions: tuple[Advice, ...]
    """What to do, most useful first."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self) | {
            "evidence": [dataclasses.asdict(each) for each in self.evidence],
            "actions": [dataclasses.asdict(each) for each in self.actions],
        }


def level_of(findings: Sequence[Finding]) -> Literal["ok", "warn", "critical"]:
    """The worst level among findings."""
    levels = {each.level for each in findings}
    if "critical" in levels:
        return "critical"
    return "warn" if levels else "ok"


@dataclass(slots=True)
class _Mean:
    """A mean over the values so far."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count


@dataclass(slots=True)
class _Memory:
    """All that a monitor remembers; bounded."""

    observed: int = 0
    baseline: dict[str, _Mean] = field(default_factory=dict)
    recent: list[Observation] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    grad_norm: _Mean = field(default_factory=_Mean)
    since: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        return cls(
            observed=state["observed"],
            baseline={name: _Mean(**mean) for name, mean in state["baseline"].items()},
            recent=[Observation(**each) for each in state["recent"]],
            validations=[Validation(**each) for each in state["validations"]],
            grad_norm=_Mean(**state["grad_norm"]),
            since=dict(state["since"]),
        )


class Monitor:
    """Watches a run, one update after the other, and says what it shows."""

    def __init__(self, settings: MonitorSettings) -> None:
        self._settings = settings
        self._memory = _Memory()

    def observe(
        self, step: int, values: Mapping[str, float | None], verdict: ClipVerdict | None = None
    ) -> tuple[Finding, ...]:
        """What the run shows after this update; call it once per update, in order."""
        known = {
            name: float(value)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }
        is_frozen = verdict is not None and verdict.cause == "frozen_adapter"
        self._remember(step, known, verdict=None if is_frozen else verdict, is_frozen=is_frozen)
        history = self._history(verdict)
        found = {
            code: signs
            for code, syndrome in SYNDROMES.items()
            if (signs := syndrome.detect(history, self._settings))
        }
        self._memory.since = {code: self._memory.since.get(code, step) for code in found}
        return tuple(self._finding(code, signs) for code, signs in found.items())

    def forget_recent(self) -> None:
        """After a rollback: the abandoned updates no longer count, the run's own start does."""
        memory = self._memory
        self._memory = _Memory(observed=memory.observed, baseline=memory.baseline)

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON types; `load` goes on exactly from there."""
        return self._memory.to_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` told."""
        self._memory = _Memory.from_dict(state)

    def _remember(
        self, step: int, known: Mapping[str, float], *, verdict: ClipVerdict | None, is_frozen: bool
    ) -> None:
        memory = self._memory
        kept = {name: value for name, value in known.items() if name in WATCHED}
        if memory.observed < BASELINE_UPDATES:
            for name, value in kept.items():
                memory.baseline.setdefault(name, _Mean()).add(value)
        memory.observed += 1
        # A frozen adapter has no gradient: what comes after it would look like an explosion.
        if "grad_norm" in kept and not is_frozen:
            kept |= self._usual_grad_norm(kept["grad_norm"])
        seen = Observation(step, kept, None if verdict is None else verdict.verdict)
        memory.recent = [*memory.recent, seen][-RECENT_UPDATES:]
        if "valid_reward_mean" in known:
            self._remember_validation(step, known["valid_reward_mean"])

    def _usual_grad_norm(self, grad_norm: float) -> dict[str, float]:
        """The running mean before this update, once it rests on enough; then takes this one in."""
        mean = self._memory.grad_norm
        if mean.count < BASELINE_UPDATES:
            mean.add(grad_norm)
            return {}
        usual = mean.value
        moved = GRADIENT_MEMORY * usual + (1 - GRADIENT_MEMORY) * grad_norm
        self._memory.grad_norm = _Mean(moved * mean.count, mean.count)
        return {USUAL_GRAD_NORM: usual}

    def _remember_validation(self, step: int, held_out_reward: float) -> None:
        history = self._history(None)
        rewards = history.known("reward_mean", SPIKE_UPDATES)
        kls = history.known("kl_reference_per_sequence", SPIKE_UPDATES)
        if not rewards or not kls:
            return
        seen = Validation(step, held_out_reward, _mean(rewards), _mean(kls))
        self._memory.validations = [*self._memory.validations, seen][-VALIDATIONS:]

    def _history(self, verdict: ClipVerdict | None) -> History:
        memory = self._memory
        after = memory.observed - BASELINE_UPDATES
        means = memory.baseline if after > 0 else {}
        return History(
            recent=memory.recent,
            baseline={name: mean.value for name, mean in means.items()},
            settled=max(0, min(after, len(memory.recent))),
            validations=memory.validations,
            verdict=verdict,
        )

    def _finding(self, code: Code, signs: Sequence[Sign]) -> Finding:
        syndrome = SYNDROMES[code]
        return Finding(
            code=code,
            level="critical" if any(each.level == "critical" for each in signs) else "warn",
            since_step=self._memory.since[code],
            message=f"{syndrome.meaning}: {'; '.join(each.text for each in signs)}.",
            evidence=tuple(each.evidence for each in signs),
            actions=(*(advice for each in signs for advice in each.actions), *syndrome.advice),
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

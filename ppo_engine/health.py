"""What a run does about its own health: judges each update, tells what changed, lets guards act.

What is wrong is found by `diagnosis`, what to do about it decided by `guards`; here it is done.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ppo_engine.config import TrainConfig
from ppo_engine.diagnosis import Finding, Monitor, MonitorSettings, level_of
from ppo_engine.errors import GuardAbort
from ppo_engine.guards import Firing, Guards
from ppo_engine.reports import EngineEvent
from ppo_engine.selfcheck import NOISE_LIMITS, SelfCheck
from ppo_engine.snapshot import Learned, Snapshot, roll_back, take_snapshot
from ppo_engine.update import Updater, UpdateResult
from ppo_engine.verdicts import ClipVerdict, clip_verdict

LEARNING_RATE_CUT = 0.5
"""`scale_lr` and `rollback` multiply both learning rates by this."""
KL_COEF_RAISE = 1.5
"""`scale_kl_coef` multiplies the KL coefficient by this."""
_SEED_STRIDE = 1_000_003
"""Between the sampling seeds before and after a rollback."""


class Run(Learned, Protocol):
    """What the guards act on."""

    config: TrainConfig
    updater: Updater
    generators: dict[str, torch.Generator]

    @property
    def finished_steps(self) -> int:
        """Updates done."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What was found and done after an update."""

    events: tuple[EngineEvent, ...]
    wants_pause: bool


class Health:
    """Findings, guards and the last good state of one run."""

    def __init__(self, config: TrainConfig) -> None:
        self.noise_limit = NOISE_LIMITS["fp32"]
        """Log-ratios below this may be rounding; the self-check may raise it."""
        self.last_good: Snapshot | None = None
        """Where a rollback leads."""
        self.can_roll_back = config.guards.can_roll_back
        self._guards = Guards(config.guards)
        self._monitor = Monitor(
            MonitorSettings(
                kl_controller=config.kl_controller,
                target_kl_per_sequence=config.target_kl_per_sequence,
                target_kl=config.target_kl,
                group_size=config.group_size,
                has_critic=config.has_critic,
                value_clip_range=config.value_clip_range,
            )
        )
        self._told: list[list[str]] | None = None
        """Codes and levels of the findings last told; the first update always tells."""

    @property
    def is_good(self) -> bool:
        """Whether nothing critical was found lately."""
        return self._guards.is_good

    def judge(self, run: Run, values: dict[str, float | None], result: UpdateResult) -> Judgement:
        """Look at the update that has just been counted, and act; GuardAbort if a rule says so."""
        step = run.finished_steps
        verdict = self._verdict(run, values, result)
        findings = self._monitor.observe(step, values, verdict)
        events = self._told_changes(findings, verdict)
        firings = self._guards.decide(step, findings, values)
        wants_pause = False
        for firing in firings:
            events.append(firing_event(firing, self._act(run, firing)))
            wants_pause |= firing.action == "pause"
        if self.can_roll_back and self.is_good and step % run.config.checkpoint_interval == 0:
            self.last_good = take_snapshot(run, step=step)
        return Judgement(events=tuple(events), wants_pause=wants_pause)

    def _verdict(
        self, run: Run, values: dict[str, float | None], result: UpdateResult
    ) -> ClipVerdict:
        config = run.config
        return clip_verdict(
            result.passes,
            epochs=config.epochs,
            minibatches=config.minibatches,
            learning_rate=values["learning_rate"] or 0.0,
            precision=config.precision,
            is_adapter_frozen=run.updater.is_adapter_frozen(run.finished_steps),
            noise_limit=self.noise_limit,
        )

    def _told_changes(
        self, findings: tuple[Finding, ...], verdict: ClipVerdict
    ) -> list[EngineEvent]:
        """An event when findings came, went or changed their level."""
        now: list[list[str]] = [[finding.code, finding.level] for finding in findings]
        if now == self._told:
            return []
        self._told = now
        level = level_of(findings)
        return [
            EngineEvent(
                level="info" if level == "ok" else "warn",
                code="diagnosis.changed",
                message=" ".join(finding.message for finding in findings)
                or "Nothing unusual is found.",
                data={
                    "level": level,
                    "findings": [finding.code for finding in findings],
                    "details": [finding.to_dict() for finding in findings],
                    "clip_verdict": verdict.to_dict(),
                },
            )
        ]

    def _act(self, run: Run, firing: Firing) -> dict[str, Any]:
        """Carry the action out; what it changed."""
        match firing.action:
            case "scale_lr":
                return self._cut_learning_rate(run)
            case "scale_kl_coef" if run.kl_controller.coef == 0:
                # There is no penalty to raise; a smaller step is the other way to stay close.
                return {"instead": "scale_lr", **self._cut_learning_rate(run)}
            case "scale_kl_coef":
                before = run.kl_controller.coef
                run.kl_controller.scale(KL_COEF_RAISE)
                return {"kl_coef": [before, run.kl_controller.coef]}
            case "rollback":
                return self._roll_back(run)
            case "abort":
                raise GuardAbort(firing.message)
            case _:
                return {}

    def _cut_learning_rate(self, run: Run) -> dict[str, Any]:
        before = run.updater.learning_rate_scale
        run.updater.learning_rate_scale = before * LEARNING_RATE_CUT
        return {"learning_rate_scale": [before, run.updater.learning_rate_scale]}

    def _roll_back(self, run: Run) -> dict[str, Any]:
        """Back to the last good state, with half the learning rate and other random answers."""
        if self.last_good is None:
            raise RuntimeError("a run that may roll back has a good state from its start")
        roll_back(run, self.last_good)
        generator = run.generators["sampling"]
        generator.manual_seed(generator.initial_seed() + _SEED_STRIDE)
        self._monitor.forget_recent()
        self._guards.note_rollback(self.last_good.step)
        return {"to_step": self.last_good.step, **self._cut_learning_rate(run)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the snapshot's tensors are kept beside it."""
        return {
            "noise_limit": self.noise_limit,
            "told": self._told,
            "guards": self._guards.state(),
            "monitor": self._monitor.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.noise_limit = state["noise_limit"]
        self._told = state["told"]
        self._guards.load(state["guards"])
        self._monitor.load(state["monitor"])


def firing_event(firing: Firing, done: dict[str, Any] | None = None) -> EngineEvent:
    """What a guard did, as an event."""
    return EngineEvent(
        level="warn" if firing.level == "warn" else "error",
        code="guard.fired",
        message=firing.message,
        data={"guard": firing.rule, "action": firing.action, **firing.data, **(done or {})},
    )


def self_check_event(found: SelfCheck) -> EngineEvent:
    """How the check before the first update went."""
    if found.failures:
        level, code, verdict = "error", "self_check.failed", "The self-check failed"
    else:
        level, code, verdict = "info", "self_check.passed", "The self-check passed"
        level = "warn" if found.warnings else level
    told = "; ".join((*found.failures, *found.warnings))
    return EngineEvent(
        level=level,  # type: ignore[arg-type]
        code=code,
        message=f"{verdict}: {told}" if told else f"{verdict}.",
        data={**found.numbers, "failures": list(found.failures), "warnings": list(found.warnings)},
    )

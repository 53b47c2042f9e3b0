"""When a run should step in on its own account: from findings and a user's rules to actions.

It decides and remembers what it decided; the trainer acts.  What `target_kl` and passes that are
not finite do is no guard: the update proper sees to them under every preset.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, Self, get_args

from ppo_engine.diagnosis import Finding
from ppo_engine.errors import InvalidConfig
from ppo_engine.metrics import METRICS, QUANTILES, quantile_name
from ppo_engine.reports import PassSums
from ppo_engine.signs import Level
from ppo_engine.syndromes import Code

Action = Literal[
    "stop_epochs", "skip_pass", "scale_lr", "scale_kl_coef", "rollback", "pause", "abort"
]
Preset = Literal["off", "warn", "standard", "strict"]

PASS_ACTIONS: tuple[Action, ...] = ("stop_epochs", "skip_pass")
"""Decided before a pass's optimizer step, from that pass alone."""
PASS_SIGNALS = frozenset(PassSums().values()) | frozenset(map(quantile_name, QUANTILES))
"""Metrics that a single pass has."""
MAX_RULES = 32
MAX_WINDOW = 1000
"""Updates, or known values, that a rule may look back on."""
PRESET_COOLDOWN = 3
"""Updates that a rule of a preset stays quiet after it has fired."""
GOOD_AFTER = 3
"""Updates without a critical finding that make a checkpoint good."""
MAX_ROLLBACKS = 3
"""Further ones become a pause: going back has not helped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardRule:
    """A user's own rule over one metric."""

    signal: str
    """Name of the metric; its mean over the window is judged."""
    window: int
    """Known values that the mean is taken over; before there are as many, nothing is judged."""
    warn: float
    """From here on the rule tells; if it lies above `critical`, low values are the bad ones."""
    critical: float
    """From here on the rule acts."""
    cooldown: int
    """Updates that the rule stays quiet after it has fired."""
    action: Action
    """What to do."""

    def __post_init__(self) -> None:
        """Refuse a rule that could not mean anything."""
        if self.signal not in METRICS and not self.signal.startswith("seconds."):
            raise _invalid(f"no metric is called {self.signal!r}")
        if self.action not in get_args(Action):
            raise _invalid(f"action must be one of {', '.join(get_args(Action))}")
        if self.action in PASS_ACTIONS and self.signal not in PASS_SIGNALS:
            raise _invalid(f"{self.action} needs a metric of passes, which {self.signal} is not")
        if not 1 <= self.window <= MAX_WINDOW:
            raise _invalid(f"window must be 1 to {MAX_WINDOW}, got {self.window}")
        if self.cooldown < 0:
            raise _invalid(f"cooldown must be 0 or more, got {self.cooldown}")
        if not (math.isfinite(self.warn) and math.isfinite(self.critical)):
            raise _invalid("warn and critical must be finite")
        if self.warn == self.critical:
            raise _invalid("warn and critical must differ: their order says which side is bad")

    def level(self, value: float) -> Level | None:
        """How bad a value is; a limit itself is already beyond."""
        sign = 1 if self.warn < self.critical else -1
        if sign * value >= sign * self.critical:
            return "critical"
        return "warn" if sign * value >= sign * self.warn else None


def _invalid(message: str) -> InvalidConfig:
    return InvalidConfig(f"guards: {message}", param="guards")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """Which guards a run has."""

    preset: Preset
    """What findings lead to; see `PRESETS`."""
    rules: tuple[GuardRule, ...]
    """The user's own, in force under every preset."""

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        if self.preset not in get_args(Preset):
            raise _invalid(f"preset must be one of {', '.join(get_args(Preset))}")
        if len(self.rules) > MAX_RULES:
            raise _invalid(f"at most {MAX_RULES} rules are allowed, got {len(self.rules)}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Guards from JSON; missing and unknown fields are errors."""
        try:
            rules = tuple(GuardRule(**rule) for rule in fields["rules"])
            return cls(**{**fields, "rules": rules})
        except (AttributeError, KeyError, TypeError) as error:
            raise _invalid(f"cannot be read: {error}") from error

    @property
    def can_roll_back(self) -> bool:
        """Whether anything could ever ask for a rollback."""
        actions = {*PRESETS[self.preset].values(), *(rule.action for rule in self.rules)}
        return "rollback" in actions

    def to_dict(self) -> dict[str, Any]:
        """The same guards as JSON types."""
        return {"preset": self.preset, "rules": [dataclasses.asdict(rule) for rule in self.rules]}


PRESETS: dict[Preset, dict[tuple[Code, Level], Action]] = {
    "off": {},
    "warn": {},
    "standard": {("negative_kl", "critical"): "pause"},
    "strict": {
        ("update_too_large", "warn"): "scale_lr",
        ("update_too_large", "critical"): "rollback",
        ("kl_blow_up", "warn"): "scale_kl_coef",
        ("kl_blow_up", "critical"): "rollback",
        ("negative_kl", "warn"): "pause",
        ("negative_kl", "critical"): "pause",
        ("entropy_collapse", "critical"): "rollback",
        ("entropy_explosion", "warn"): "scale_lr",
        ("entropy_explosion", "critical"): "scale_lr",
        ("repetition", "critical"): "rollback",
        ("reward_hacking", "warn"): "scale_kl_coef",
        ("reward_hacking", "critical"): "rollback",
        ("value_divergence", "critical"): "rollback",
        ("sampler_mismatch", "critical"): "pause",
        ("zero_variance_reward", "critical"): "pause",
        ("numerics", "critical"): "rollback",
    },
}
"""What a finding of this level leads to.

The first remedy of the others (a wider clip range, another reward, a penalty on length) is a
decision about the job that only its user can take.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """A guard that fired."""

    rule: str
    """`<preset>.<code of the finding>`, or `rules[<index>]` for one of the user's."""
    action: Action | Literal["none"]
    """What the trainer is to do; "none": only tell."""
    level: Level
    message: str
    """For the user, one sentence."""
    data: dict[str, Any]
    """Numbers behind it; `also` names other rules that asked for the same action."""


def pass_action(config: GuardConfig, values: Mapping[str, float | None]) -> Firing | None:
    """What the user's rules do about a pass with these values; ending the epochs goes first."""
    for action in PASS_ACTIONS:
        for index, rule in enumerate(config.rules):
            value = values.get(rule.signal)
            if rule.action == action and value is not None and rule.level(value) == "critical":
                return _fired(index, rule, value, "critical", window=1)
    return None


@dataclass(slots=True)
class _Memory:
    """What guards remember; all of it goes into a checkpoint."""

    updates: int = 0
    """Decided so far.  Time is counted in these: after a rollback steps come a second time."""
    fired: dict[str, dict[str, int]] = field(default_factory=dict)
    """By rule and level, the update in which it last fired."""
    rollbacks: list[int] = field(default_factory=list)
    """The steps gone back to."""
    last_bad: int | None = None
    """Latest update with a critical finding or a rollback."""
    windows: dict[str, list[float]] = field(default_factory=dict)
    """By rule of the user, the latest known values of its signal."""


class Guards:
    """Decides, after each update, what to do about findings and metrics."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._memory = _Memory()

    def decide(
        self, step: int, findings: Sequence[Finding], values: Mapping[str, float | None]
    ) -> tuple[Firing, ...]:
        """What fires after this update; at most one firing of each action."""
        memory = self._memory
        memory.updates += 1
        if any(finding.level == "critical" for finding in findings):
            memory.last_bad = memory.updates
        asked = [*self._by_preset(findings), *self._by_rules(values)]
        groups = _by_action([self._rollback_or_pause(each) for each in asked])
        for each in chain.from_iterable(groups):
            memory.fired.setdefault(each.rule, {})[each.level] = memory.updates
        return tuple(_merged(group, step) for group in groups)

    def note_rollback(self, step: int) -> None:
        """The run went back to the state after update `step`; what led there no longer counts."""
        memory = self._memory
        memory.rollbacks.append(step)
        memory.last_bad = memory.updates
        memory.windows = {}

    @property
    def is_good(self) -> bool:
        """Whether the last updates had no critical finding, and none was undone since."""
        memory = self._memory
        return memory.last_bad is None or memory.updates - memory.last_bad >= GOOD_AFTER

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON types; `load` goes on exactly from there."""
        return dataclasses.asdict(self._memory)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` told."""
        self._memory = _Memory(**copy.deepcopy(dict(state)))

    def _by_preset(self, findings: Sequence[Finding]) -> Iterator[Firing]:
        """What the preset does about findings, by rules that are not cooling down."""
        preset = self._config.preset
        for finding in findings:
            action = PRESETS[preset].get((finding.code, finding.level))
            rule = f"{preset}.{finding.code}"
            if action is None or self._is_quiet(rule, finding.level, PRESET_COOLDOWN):
                continue
            yield Firing(
                rule=rule,
                action=action,
                level=finding.level,
                message=f"{_TOLD[action]}: {finding.message}",
                data={
                    "finding": finding.code,
                    "since_step": finding.since_step,
                    "evidence": finding.to_dict()["evidence"],
                },
            )

    def _by_rules(self, values: Mapping[str, float | None]) -> Iterator[Firing]:
        """What the user's rules do, by those that are not cooling down."""
        for index, rule in enumerate(self._config.rules):
            if rule.action in PASS_ACTIONS:
                continue
            mean = self._windowed(index, rule, values.get(rule.signal))
            level = None if mean is None else rule.level(mean)
            if mean is None or level is None or self._is_quiet(_name(index), level, rule.cooldown):
                continue
            yield _fired(index, rule, mean, level, window=rule.window)

    def _windowed(self, index: int, rule: GuardRule, value: float | None) -> float | None:
        """Mean of the newest known values; None unless this update's is known and they suffice."""
        if value is None or not math.isfinite(value):
            return None
        windows = self._memory.windows
        known = windows[_name(index)] = [*windows.get(_name(index), []), value][-rule.window :]
        return math.fsum(known) / rule.window if len(known) == rule.window else None

    def _is_quiet(self, rule: str, level: Level, cooldown: int) -> bool:
        """Whether it fired lately, at this level or a worse one."""
        fired = self._memory.fired.get(rule, {})
        levels = ("critical",) if level == "critical" else ("warn", "critical")
        times = [fired[each] for each in levels if each in fired]
        return bool(times) and self._memory.updates - max(times) <= cooldown

    def _rollback_or_pause(self, firing: Firing) -> Firing:
        """After `MAX_ROLLBACKS` a person should look."""
        steps = self._memory.rollbacks
        if firing.action != "rollback" or len(steps) < MAX_ROLLBACKS:
            return firing
        told = f"{_TOLD['pause']}, since going back did not help {len(steps)} times"
        return dataclasses.replace(
            firing,
            action="pause",
            message=firing.message.replace(_TOLD["rollback"], told, 1),
            data={**firing.data, "rollbacks": list(steps)},
        )


def _by_action(asked: Sequence[Firing]) -> list[list[Firing]]:
    """What is to happen, one group per action; each warning that only tells is its own group.

    What ends or undoes the run stands alone: an abort goes before a rollback, that before all.
    """
    told = [[each] for each in asked if each.action == "none"]
    groups: dict[str, list[Firing]] = {}
    for each in asked:
        if each.action != "none":
            groups.setdefault(each.action, []).append(each)
    for alone in ("abort", "rollback"):
        if alone in groups:
            return [groups[alone], *told]
    return [*groups.values(), *told]


def _merged(group: Sequence[Firing], step: int) -> Firing:
    """The worst one, which names the others."""
    first = min(group, key=lambda each: each.level != "critical")
    also = [each.rule for each in group if each is not first]
    return dataclasses.replace(first, data={"step": step, **first.data, "also": also})


_TOLD: dict[Action, str] = {
    "stop_epochs": "Ended the step's passes",
    "skip_pass": "Skipped a pass",
    "scale_lr": "Slowed down",
    "scale_kl_coef": "Pulled closer to the base model",
    "rollback": "Went back to the last good checkpoint",
    "pause": "Paused",
    "abort": "Aborted",
}
"""Start of the message of a firing that acts."""


def _name(index: int) -> str:
    """The user's rule, as they would find it in the job."""
    return f"rules[{index}]"


def _fired(index: int, rule: GuardRule, value: float, level: Level, *, window: int) -> Firing:
    """One of the user's rules, beyond its limit of this level."""
    is_high = rule.warn < rule.critical
    threshold = rule.critical if level == "critical" else rule.warn
    over = "" if window == 1 else f", the mean of {window} values,"
    found = f"{rule.signal} was {value:.3g}{over} at or {'above' if is_high else 'below'}"
    action: Action | Literal["none"] = rule.action if level == "critical" else "none"
    told = "Warning" if action == "none" else _TOLD[action]
    return Firing(
        rule=_name(index),
        action=action,
        level=level,
        message=f"{told}: {found} {threshold:.3g}, by the job's own {_name(index)}.",
        data={
            "signal": rule.signal,
            "value": value,
            "threshold": threshold,
            "window": window,
        },
    )

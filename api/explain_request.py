"""The body of `POST /v1/ppo/clip/explain`: tokens and a clip rule, checked field by field."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from api.clip_views import ClipRule
from api.errors import bad_request
from api.faults import faults_of
from core.errors import Fault

MAX_TOKENS = 4096
MAX_RATIO = 1e9
"""Twice what a trainer lets through, e^20; up to here no sum overflows."""
MAX_ADVANTAGE = 1e12


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


_Length = Field(min_length=1, max_length=MAX_TOKENS)
_Number = Annotated[float, Field()]
_Numbers = Annotated[list[_Number], _Length]
_Ratio = Annotated[float, Field(gt=0, le=MAX_RATIO)]
_Ratios = Annotated[list[_Ratio], _Length]
_Advantage = Annotated[float, Field(ge=-MAX_ADVANTAGE, le=MAX_ADVANTAGE)]
_Advantages = Annotated[list[_Advantage], _Length]


class ExplainRequest(BaseModel):
    """Tokens to apply the clip rule to; a single number counts for every token."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    ratio: (
        Annotated[_Ratios, BeforeValidator(_as_list, json_schema_input_type=_Ratio | _Ratios)]
        | None
    ) = None
    """ρ, current over old probability; or give both log-probabilities."""
    logprob: (
        Annotated[_Numbers, BeforeValidator(_as_list, json_schema_input_type=_Number | _Numbers)]
        | None
    ) = None
    """log π, of the current policy."""
    old_logprob: (
        Annotated[_Numbers, BeforeValidator(_as_list, json_schema_input_type=_Number | _Numbers)]
        | None
    ) = None
    """log π_old; ρ = exp(logprob − old_logprob)."""
    advantage: Annotated[
        _Advantages, BeforeValidator(_as_list, json_schema_input_type=_Advantage | _Advantages)
    ]
    """A, how much better the token was than expected."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """ε_low: ratios below 1 − x are out of range."""
    clip_range_high: float | None = Field(None, gt=0, le=10)
    """ε_high: ratios above 1 + x are out of range; null: as `clip_range`."""
    dual_clip: float | None = Field(None, gt=1, le=100)
    """c: at a negative advantage A the objective is at least x·A; null: off."""

    @property
    def rule(self) -> ClipRule:
        """The clip rule."""
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        return ClipRule(clip_range=self.clip_range, clip_range_high=high, dual_clip=self.dual_clip)

    def tokens(self) -> list[tuple[float, float]]:
        """Ratio and advantage of each token."""
        columns = [self.ratio or self._ratios(), self.advantage]
        return list(zip(*_of_equal_length(columns), strict=True))

    def _ratios(self) -> list[float]:
        pairs = zip(*_of_equal_length([self.logprob or [], self.old_logprob or []]), strict=True)
        return [math.exp(new - old) for new, old in pairs]

    def faults(self) -> Iterator[Fault]:
        """What does not fit together."""
        given = {
            name: value
            for name in ("ratio", "logprob", "old_logprob", "advantage")
            if (value := getattr(self, name)) is not None
        }
        faults = [*_ways(given), *_lengths(given)]
        yield from faults
        if not faults and self.ratio is None:
            yield from self._drift_faults()
        if self.dual_clip is not None and self.dual_clip <= 1 + self.rule.clip_range_high:
            bound = "clip_range" if self.clip_range_high is None else "clip_range_high"
            detail = (
                f"dual_clip must exceed the upper bound {1 + self.rule.clip_range_high:g}, got "
                f"{self.dual_clip:g}; usual is 3"
            )
            yield from _at(("dual_clip", bound), "invalid_combination", detail)

    def _drift_faults(self) -> Iterator[Fault]:
        pairs = zip(*_of_equal_length([self.logprob or [], self.old_logprob or []]), strict=True)
        for place, (new, old) in enumerate(pairs):
            drift = new - old
            if drift > math.log(MAX_RATIO) or math.exp(drift) == 0:
                detail = (
                    f"logprob - old_logprob is {drift:g}; its exponential, the ratio, must be "
                    f"above 0 and at most {MAX_RATIO:g}"
                )
                sides = {"logprob": self.logprob, "old_logprob": self.old_logprob}
                names = tuple(_place(name, value, place) for name, value in sides.items())
                yield from _at(names, "invalid_combination", detail)
                return


def parse_explain(payload: Mapping[str, Any]) -> ExplainRequest:
    """The request; all its faults at once otherwise."""
    values = {name: value for name, value in payload.items() if value is not None}
    try:
        request = ExplainRequest.model_validate(values)
    except pydantic.ValidationError as error:
        found = faults_of(error, ExplainRequest)
        raise bad_request([_without_place(fault, values) for fault in found]) from None
    if faults := list(request.faults()):
        raise bad_request(faults)
    return request


def _without_place(fault: Fault, values: Mapping[str, Any]) -> Fault:
    """The fault of a single number, which was read as a list of one."""
    name, _, place = fault.pointer.removeprefix("/").partition("/")
    is_single = place and not isinstance(values.get(name), list)
    return replace(fault, pointer=f"/{name}") if is_single else fault


def _ways(given: Mapping[str, Any]) -> Iterator[Fault]:
    """A ratio can be said in two ways; one of them is needed."""
    by_logprobs = [name for name in ("logprob", "old_logprob") if name in given]
    if "ratio" in given and by_logprobs:
        detail = "give either ratio, or logprob and old_logprob"
        yield from _at(("ratio", *by_logprobs), "conflicting_parameters", detail)
    elif "ratio" not in given and not by_logprobs:
        detail = "ratio is required, or logprob and old_logprob"
        yield from _at(("ratio",), "missing_required_parameter", detail)
    elif len(by_logprobs) == 1:
        missing = "old_logprob" if by_logprobs == ["logprob"] else "logprob"
        detail = f"{missing} is required with {by_logprobs[0]}"
        yield from _at((missing,), "missing_required_parameter", detail)


def _lengths(given: Mapping[str, list[float]]) -> Iterator[Fault]:
    several = {name: len(value) for name, value in given.items() if len(value) > 1}
    if len(set(several.values())) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in several.items())
        yield from _at(tuple(several), "invalid_combination", f"lists must be equally long; {told}")


def _of_equal_length(columns: list[list[float]]) -> list[list[float]]:
    """Single numbers repeated for every token."""
    longest = max(map(len, columns))
    return [column * longest if len(column) == 1 else column for column in columns]


def _place(name: str, value: list[float] | None, place: int) -> str:
    return name if value is None or len(value) == 1 else f"{name}/{place}"


def _at(names: tuple[str, ...], code: str, detail: str) -> Iterator[Fault]:
    """The same fault at each of its sides."""
    return (Fault(f"/{name}", code, detail) for name in names)

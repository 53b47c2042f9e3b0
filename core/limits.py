"""How much a job may use: what its owner allows, and which of it is reached.  Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from core.hyperparameters import Model

USAGE_OF = {
    "max_runtime_seconds": "device_seconds",
    "max_generated_tokens": "response_tokens",
}
"""Each limit, and the part of a job's usage that is held against it."""


class Limits(Model):
    """What a job may use before it is paused or finished; its adapter is kept either way."""

    max_runtime_seconds: int | None = Field(None, ge=60, le=2_592_000)
    """Seconds in which it trains, over all attempts; waiting does not count."""
    max_generated_tokens: int | None = Field(None, ge=1)
    """Response tokens sampled in training."""
    on_limit: Literal["pause", "finish"] = "pause"
    """Whether it then rests, to be resumed, or ends as succeeded with what there is."""

    @model_validator(mode="after")
    def _names_a_limit(self) -> Self:
        """Something must be limited."""
        if self.max_runtime_seconds is None and self.max_generated_tokens is None:
            raise PydanticCustomError(
                "invalid_combination",
                "limits needs max_runtime_seconds, max_generated_tokens or both",
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A limit, and what was used when it was found to be reached."""

    name: str
    limit: int
    used: float


def limits_of(spec: Mapping[str, Any]) -> Limits | None:
    """The limits in a stored job request."""
    given = spec.get("limits")
    return None if given is None else Limits.model_validate(given)


def reached(
    limits: Limits, usage: Mapping[str, Any], budget_from: Mapping[str, Any]
) -> Reached | None:
    """The first limit that is reached by what was used since the budget began."""
    for name, part in USAGE_OF.items():
        limit = getattr(limits, name)
        used = (usage.get(part) or 0) - (budget_from.get(part) or 0)
        if limit is not None and used >= limit:
            return Reached(name=name, limit=limit, used=used)
    return None


def wants_finish(spec: Mapping[str, Any], limit_reached: str | None) -> bool:
    """Whether a job is to end with what there is."""
    limits = limits_of(spec)
    return limit_reached is not None and limits is not None and limits.on_limit == "finish"

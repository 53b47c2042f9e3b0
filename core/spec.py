"""What a user asks for: the job request, and the values it resolves to.

Its hyperparameters have a module of their own.
"""

import dataclasses
import difflib
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from core.errors import Fault, InvalidSpec
from core.hyperparameters import (
    CRITIC_ONLY,
    POINTER,
    SEED_BITS,
    GuardRule,
    Guards,
    LastLayers,
    Lora,
    Model,
    OverlongBuffer,
    PpoHyperparameters,
    combination_faults,
    context_faults,
    final_values,
    total_steps,
)
from core.limits import Limits

SPEC_VERSION = 1
"""Raised when stored specs have to be read in another way."""

REWARDS = ("sentiment", "length", "regex")
"""Rewards on offer."""

METHODS = ("ppo",)
"""Methods on offer."""

_SERVED_RANK = 16
_MAX_DEPTH = 16
_READS_SAMPLE = re.compile(r"\{\{\s*sample\.")


class Reward(Model):
    """What every reward has."""

    name: str | None = Field(None, min_length=1, max_length=64)
    """Name of its curve; default is the type."""
    input: str = Field("{{sample.output_text}}", min_length=1, max_length=10_000)
    """Template of the text that is judged."""


class SentimentReward(Reward):
    """How positive, negative or neutral the text is; -1 to 1."""

    type: Literal["sentiment"]
    target: Literal["positive", "negative", "neutral"] = "positive"
    """What earns a high reward."""


class LengthReward(Reward):
    """How well the length fits a range or a target; 0 to 1."""

    type: Literal["length"]
    unit: Literal["words", "chars", "sentences"] = "words"
    """What is counted."""
    min: int | None = Field(None, ge=0)
    """Shorter earns less."""
    max: int | None = Field(None, ge=0)
    """Longer earns less."""
    target: float | None = Field(None, ge=0)
    """The length that earns 1."""
    tolerance: float | None = Field(None, gt=0)
    """Distance from the target at which nothing is earned."""

    @model_validator(mode="after")
    def _range_or_target(self) -> Self:
        """One of the two ways to say what is wanted, whole."""
        has_range = self.min is not None or self.max is not None
        if has_range == (self.target is not None):
            raise PydanticCustomError(
                "invalid_combination", "give either min and/or max, or target with tolerance"
            )
        if self.tolerance is not None and self.target is None:
            raise PydanticCustomError("invalid_combination", "tolerance needs target")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise PydanticCustomError("invalid_combination", "min must not exceed max")
        return self


class RegexReward(Reward):
    """Whether, or how often, a pattern of the linear-time engine matches; 0 to 1."""

    type: Literal["regex"]
    pattern: str = Field(min_length=1, max_length=1000)
    """RE2 syntax."""
    mode: Literal["search", "fullmatch", "count"] = "search"
    """Anywhere, the whole text, or the number of matches."""
    max_count: int | None = Field(None, ge=1)
    """Matches that earn 1 in mode `count`."""


AnyReward = Annotated[SentimentReward | LengthReward | RegexReward, Field(discriminator="type")]


class PpoMethod(Model):
    """PPO with one reward."""

    reward: AnyReward
    """What answers are paid for."""
    hyperparameters: PpoHyperparameters = Field(default_factory=PpoHyperparameters)
    """All have defaults."""


class Method(Model):
    """How to train; only the branch that `type` names is read."""

    type: Literal["ppo"]
    ppo: PpoMethod
    reinforcement: Any = None
    """Ignored unless it is the type."""
    reward_model: Any = None
    """Ignored unless it is the type."""
    supervised: Any = None
    """Ignored unless it is the type."""
    dpo: Any = None
    """Ignored unless it is the type."""

    @property
    def ignored(self) -> list[str]:
        """Branches that came along without being the type."""
        names = ("reinforcement", "reward_model", "supervised", "dpo")
        return [name for name in names if getattr(self, name) is not None]


MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class JobSpec(Model):
    """The body of a job request."""

    model: str = Field(min_length=1, max_length=256)
    """An offered base model; or a checkpoint or a finished model, to go on from its adapter."""
    training_file: str = Field(min_length=1, max_length=128)
    """Id of a file of prompts."""
    validation_file: str | None = Field(None, min_length=1, max_length=128)
    """Id of a file of held-out prompts."""
    method: Method
    """How to train."""
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    """Part of the name of the result."""
    seed: int | None = Field(None, ge=0, le=2**SEED_BITS - 1)
    """Same seed, same run; drawn and shown when absent."""
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    """Your own labels."""
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    """None is offered yet."""
    hyperparameters: dict[str, Literal["auto"]] | None = None
    """Deprecated by OpenAI; only "auto" beside `method`."""
    limits: Limits | None = None
    """What the job may use before it is paused or finished."""
    priority: int = Field(0, ge=-100, le=100)
    """Higher runs earlier."""

    @property
    def ppo(self) -> PpoHyperparameters:
        """The hyperparameters."""
        return self.method.ppo.hyperparameters

    @property
    def reward(self) -> dict[str, Any]:
        """The reward as the plain dict that the engine's graders are built from."""
        return self.method.ppo.reward.model_dump(mode="json", exclude_none=True)

    def stored(self) -> dict[str, Any]:
        """What the user said, as JSON, without what was left to defaults."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something a user should know about an accepted job."""

    code: str
    param: str | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Every setting of a job with its final value; stored once, reused by each attempt."""

    hyperparameters: dict[str, Any]
    """Every field of `PpoHyperparameters`, in the API's words, none of them "auto"."""
    reward: dict[str, Any]
    """The reward as a plain dict."""
    seed: int
    total_steps: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from JSON."""
        return cls(
            hyperparameters=dict(data["hyperparameters"]),
            reward=dict(data["reward"]),
            seed=data["seed"],
            total_steps=data["total_steps"],
        )


def parse_spec(data: object) -> JobSpec:
    """The request, checked field by field and in combination; InvalidSpec lists all faults."""
    if faults := [*_unstorable(data), *_unsupported(data)]:
        raise InvalidSpec(faults=faults)
    try:
        spec = JobSpec.model_validate(data)
    except ValidationError as error:
        raise InvalidSpec(faults=[_fault(detail) for detail in error.errors()]) from None
    if faults := list(_combinations(spec)):
        raise InvalidSpec(faults=faults)
    return spec


def resolve(
    spec: JobSpec,
    *,
    prompts: int,
    context_length: int | None = None,
    seed: int | None = None,
    start_lora: Mapping[str, Any] | None = None,
) -> Resolved:
    """Final values of all settings; without a seed in the request `seed` counts, or one is drawn.

    `start_lora` is the form of the adapter that the job starts from, and so of its own.
    InvalidSpec if prompt and response cannot fit the model's context, or the adapter its start.
    """
    ppo = spec.ppo
    faults = [] if context_length is None else context_faults(ppo, context_length)
    faults += [] if start_lora is None else _start_faults(ppo, start_lora)
    if faults:
        raise InvalidSpec(faults=faults)
    values = final_values(ppo)
    if start_lora is not None:
        values["lora"] = dict(start_lora)
    chosen = _first_given(spec.seed, ppo.seed, seed, secrets.randbelow(2**SEED_BITS))
    values["seed"] = chosen
    total = total_steps(ppo, prompts)
    values["max_steps"] = total
    return Resolved(hyperparameters=values, reward=spec.reward, seed=int(chosen), total_steps=total)


def notices(spec: JobSpec) -> list[Notice]:
    """What is unusual about a job that is accepted all the same."""
    return list(_notices(spec))


def _first_given(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _combinations(spec: JobSpec) -> Iterator[Fault]:
    """Faults of fields that are fine alone; one fault for each side."""
    yield from combination_faults(spec.ppo)
    if None not in (spec.seed, spec.ppo.seed) and spec.seed != spec.ppo.seed:
        detail = (
            f"two seeds: {spec.seed} for the job, {spec.ppo.seed} in its hyperparameters; give one"
        )
        yield Fault("/seed", "conflicting_parameters", detail)
        yield Fault(f"{POINTER}/seed", "conflicting_parameters", detail)


def _start_faults(ppo: PpoHyperparameters, start_lora: Mapping[str, Any]) -> list[Fault]:
    """Faults of an adapter that shall have another form than the one it starts from."""
    given = ppo.lora.model_dump(mode="json", exclude_unset=True)
    faults = []
    form = Lora().model_dump(mode="json") | dict(start_lora)  # older jobs know fewer settings
    for name, value in given.items():
        if value != form[name]:
            detail = (
                f"lora.{name} is {value}, but the adapter to go on from has {form[name]}; "
                "leave lora out"
            )
            faults.append(Fault(f"{POINTER}/lora/{name}", "invalid_combination", detail))
    return [*faults, Fault("/model", "invalid_combination", faults[0].detail)] if faults else []


def _unstorable(data: object) -> Iterator[Fault]:
    """What cannot be kept: NUL, half of a surrogate pair, and nesting without end."""
    waiting: list[tuple[str, int, object]] = [("", 0, data)]
    while waiting:
        pointer, depth, value = waiting.pop()
        if depth > _MAX_DEPTH:
            detail = f"nested more than {_MAX_DEPTH} levels deep"
            yield Fault(_printable(pointer), "invalid_value", detail)
        elif isinstance(value, str) and _has_odd_letters(value):
            detail = "text may hold neither NUL nor half of a surrogate pair"
            yield Fault(_printable(pointer), "invalid_value", detail)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                place = f"{pointer}/{_escape(name)}"
                waiting += [(place, 0, name), (place, depth + 1, inner)]
        elif isinstance(value, list):
            waiting += [(f"{pointer}/{index}", depth + 1, one) for index, one in enumerate(value)]


def _has_odd_letters(text: str) -> bool:
    return "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\x00", "?")


_LATER_METHODS = ("reinforcement", "reward_model", "supervised", "dpo")
_CODE_REWARDS = ("python", "label_model")
_FIXED_SAMPLING = ("top_p", "top_k")


def _unsupported(data: object) -> Iterator[Fault]:
    """Requests that are understood and refused; told before any field is looked at."""
    method = _child(data, "method")
    kind = _child(method, "type")
    if kind in _LATER_METHODS:
        offered = ", ".join(METHODS)
        yield Fault(
            "/method/type",
            "method_not_supported",
            f"method.type {kind!r} is not offered here; offered: {offered}",
        )
        return
    ppo = _child(method, "ppo")
    if (reward := _child(_child(ppo, "reward"), "type")) in _CODE_REWARDS:
        yield Fault(
            "/method/ppo/reward/type",
            "grader_not_supported",
            f"reward type {reward!r} would run code of the request; offered: {', '.join(REWARDS)}",
        )
    for name in _FIXED_SAMPLING:
        if _child(_child(ppo, "hyperparameters"), name) is not None:
            yield Fault(
                f"{POINTER}/{name}",
                "unsupported_parameter",
                f"{name} would make the sampled and the trained distribution differ; "
                "use temperature",
            )


def _child(data: object, name: str) -> Any:
    return data.get(name) if isinstance(data, Mapping) else None


def _notices(spec: JobSpec) -> Iterator[Notice]:
    for name in spec.method.ignored:
        yield Notice(
            code="method_branch_ignored",
            param=f"method.{name}",
            message=f"method.{name} is ignored because method.type is {spec.method.type!r}",
        )
    if spec.ppo.lora.rank > _SERVED_RANK:
        yield Notice(
            code="rank_above_serving_default",
            param="method.ppo.hyperparameters.lora.rank",
            message=f"vLLM serves adapters up to rank {_SERVED_RANK} unless told otherwise",
        )
    if spec.ppo.epochs * spec.ppo.minibatches == 1:
        yield Notice(
            code="clip_inactive",
            param="method.ppo.hyperparameters.epochs",
            message="with one pass per step the ratio is always 1 and nothing is ever clipped; "
            "raise epochs or minibatches",
        )
    ignored = CRITIC_ONLY & spec.ppo.model_fields_set
    if spec.ppo.advantage_estimator != "gae" and ignored:
        names = ", ".join(sorted(name.rstrip("_") for name in ignored))
        yield Notice(
            code="setting_ignored",
            param="method.ppo.hyperparameters.advantage_estimator",
            message=f"{spec.ppo.advantage_estimator} has no critic, so nothing reads {names}",
        )
    if not _READS_SAMPLE.search(spec.method.ppo.reward.input):
        yield Notice(
            code="reward_ignores_sample",
            param="method.ppo.reward.input",
            message="the reward never reads the answer ({{sample.output_text}})",
        )


# From pydantic's words to ours.

_MIN_TYPES = {"greater_than": "above", "greater_than_equal": "at least"}
_MAX_TYPES = {"less_than": "below", "less_than_equal": "at most"}
_VALUE_TYPES = {
    "literal_error",
    "enum",
    "string_pattern_mismatch",
    "string_too_short",
    "too_short",
    "finite_number",
    "union_tag_invalid",
}
_OWN_TYPES = {"invalid_combination"}


def _fault(error: ErrorDetails) -> Fault:
    """Pydantic's finding as one of our faults."""
    location = [part for part in error["loc"] if not _is_branch(part)]
    kind = error["type"]
    context = error.get("ctx", {})
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        location.append("type")
    pointer = "".join(f"/{_escape(part)}" for part in location)
    name = str(location[-1]) if location else "the body"
    if kind in {"missing", "union_tag_not_found"}:
        return Fault(pointer, "missing_required_parameter", f"{name} is required")
    if kind == "extra_forbidden":
        return Fault(pointer, "unknown_parameter", _unknown(location))
    if kind in _MIN_TYPES | _MAX_TYPES:
        return Fault(pointer, *_out_of_bounds(error, name, context))
    if kind == "string_too_long":
        limit = context["max_length"]
        return Fault(
            pointer,
            "string_above_max_length",
            f"{name} may have at most {limit} characters, got {len(error['input'])}",
        )
    if kind == "too_long":
        detail = f"{name} may have at most {context['max_length']} entries"
        return Fault(pointer, "array_above_max_length", detail)
    if kind == "union_tag_invalid":
        detail = f"{context['tag']!r} is not a reward; offered: {', '.join(REWARDS)}"
        return Fault(pointer, "invalid_value", detail)
    if kind in _OWN_TYPES:
        return Fault(pointer, kind, error["msg"])
    code = "invalid_value" if kind in _VALUE_TYPES else "invalid_type"
    return Fault(pointer, code, f"{name}: {_lower_first(error['msg'])}{_got(error['input'])}")


def _is_branch(part: int | str) -> bool:
    """Whether pydantic added this to the path: the tag of a union, or a type in brackets."""
    if not isinstance(part, str):
        return False
    return part in {*REWARDS, "[key]", "number", "word", "table"} or part.startswith(
        ("list[", "literal[", "function-")
    )


def _escape(part: int | str) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")


def _out_of_bounds(error: ErrorDetails, name: str, context: Mapping[str, Any]) -> tuple[str, str]:
    kind = error["type"]
    is_low = kind in _MIN_TYPES
    word = (_MIN_TYPES | _MAX_TYPES)[kind]
    bound = next(context[key] for key in ("gt", "ge", "lt", "le") if key in context)
    number = "integer" if isinstance(error["input"], int) else "decimal"
    code = f"{number}_{'below_min' if is_low else 'above_max'}_value"
    return code, f"{name} must be {word} {bound:g}, got {error['input']}{_usual(name)}"


_USUAL = {
    "clip_range": "0.1 to 0.3",
    "clip_range_high": "0.28",
    "dual_clip": "3",
    "kl_coef": "0.01 to 0.1",
    "learning_rate": "1e-6 to 1e-4",
    "lambda": "0.95",
    "temperature": "1",
}


def _usual(name: str) -> str:
    return f"; usual is {_USUAL[name]}" if name in _USUAL else ""


def _unknown(location: list[int | str]) -> str:
    """That the field does not exist here, and where it does or which one may have been meant."""
    name = str(location[-1])
    known = _fields_at(location[:-1])
    if homes := [".".join(place) for place in _FIELDS if name in _fields_at([*place])]:
        return f"unknown parameter {name!r}; it belongs in {homes[0] or 'the body itself'}"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown parameter {name!r}{hint}"


_FIELDS: dict[tuple[str, ...], type[BaseModel]] = {
    (): JobSpec,
    ("limits",): Limits,
    ("method",): Method,
    ("method", "ppo"): PpoMethod,
    ("method", "ppo", "hyperparameters"): PpoHyperparameters,
    ("method", "ppo", "hyperparameters", "lora"): Lora,
    ("method", "ppo", "hyperparameters", "lora", "layers"): LastLayers,
    ("method", "ppo", "hyperparameters", "guards"): Guards,
    ("method", "ppo", "hyperparameters", "guards", "rules"): GuardRule,
    ("method", "ppo", "hyperparameters", "overlong_buffer"): OverlongBuffer,
}


def _fields_at(location: list[int | str]) -> list[str]:
    place = tuple(part for part in location if isinstance(part, str))
    if place == ("method", "ppo", "reward"):
        models: list[type[BaseModel]] = [SentimentReward, LengthReward, RegexReward]
    else:
        models = [_FIELDS[place]] if place in _FIELDS else []
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _got(value: Any) -> str:
    """A short value as it came; long or nested ones are not repeated."""
    shown = repr(value) if isinstance(value, str | int | float | bool) else ""
    return f", got {shown}" if shown and len(shown) <= 80 else ""

"""The settings of PPO that a user may choose: bounds, defaults, and what they resolve to.

Bounds and defaults of every hyperparameter live here and nowhere else.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from core.errors import Fault

SEED_BITS = 31
"""Seeds are whole numbers below 2 to this power."""
POINTER = "/method/ppo/hyperparameters"
"""Where the settings stand in a job request."""

AUTO: Final = "auto"
"""Every setting takes this word for its default."""
MEASURED = ("precision", "micro_batch_size")
"""Settings whose default is found on the worker, by the job's first attempt, for all of them."""

LossAggregationName = Literal[
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
]


def _say_auto_in_schema(schema: dict[str, Any]) -> None:
    """Every hyperparameter also takes "auto"; the schema says so."""
    for name, field in schema.get("properties", {}).items():
        about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
        options = field.pop("anyOf", None) or [dict(field)]
        schema["properties"][name] = {
            **about,
            "anyOf": [*options, {"const": AUTO, "type": "string"}],
        }


class Model(BaseModel):
    """A part of a request: unknown fields refused, types taken literally, `null` means absent."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Drop nulls where null means nothing; a field that may be null keeps it."""
        if not isinstance(data, Mapping):
            return data
        return {name: value for name, value in data.items() if not cls._is_absent(name, value)}

    @classmethod
    def _is_absent(cls, name: str, value: Any) -> bool:
        if value is not None:
            return False
        known = {field.alias or own: field for own, field in cls.model_fields.items()}
        field = known.get(name)
        return field is not None and type(None) not in get_args(field.annotation)


class LastLayers(Model):
    """Only the top of the model: faster and leaner, because it trains less."""

    last: int = Field(ge=1, le=1024)
    """Number of layers, counted from the top."""


def _kind_of_layers(value: Any) -> str:
    return "word" if isinstance(value, str) else "table"


Layers = Annotated[
    Annotated[Literal["all"], Tag("word")] | Annotated[LastLayers, Tag("table")],
    Discriminator(_kind_of_layers),
]


class Lora(Model):
    """The adapter: which linear layers it changes, and how large it is."""

    rank: int = Field(16, ge=1, le=256)
    """Inner dimension; more can express more and costs more."""
    alpha: float = Field(32, gt=0, le=1024)
    """Scale: the adapter's output is multiplied by alpha / rank."""
    target_modules: Literal["auto"] | Annotated[list[str], Field(min_length=1, max_length=64)] = (
        "auto"
    )
    """Names of linear layers; "auto" takes all except the output head."""
    layers: Layers = "all"
    """Which layers of the model are adapted."""


class OverlongBuffer(Model):
    """A soft length limit before the hard one: a penalty that grows token by token."""

    tokens: int = Field(ge=1)
    """Length of the zone before `max_response_tokens` in which the penalty grows."""
    penalty: float = Field(ge=0, le=100)
    """Taken off the reward at `max_response_tokens`."""


class GuardRule(Model):
    """A rule of your own over one metric.

    If `critical` lies above `warn`, high values are the bad ones, else low ones.
    """

    signal: str = Field(min_length=1, max_length=64)
    """Name of the metric, as in `/metrics`."""
    window: int = Field(1, ge=1, le=1000)
    """Updates whose mean is judged."""
    warn: float
    """From here on the rule tells."""
    critical: float
    """From here on the rule acts."""
    cooldown: int = Field(3, ge=0, le=1_000_000)
    """Updates that the rule stays quiet after it has fired."""
    action: Literal[
        "stop_epochs", "skip_pass", "scale_lr", "scale_kl_coef", "rollback", "pause", "abort"
    ]
    """What to do; the first two act on single passes."""


class Guards(Model):
    """What the run does by itself when training goes wrong."""

    preset: Literal["off", "warn", "standard", "strict"] = "standard"
    """off and warn only tell, standard pauses on what must be a bug, strict also rolls back."""
    rules: Annotated[list[GuardRule], Field(max_length=32)] = Field(default_factory=list)
    """Your own, in force under every preset."""


def _kind_of_number(value: Any) -> str:
    return "word" if isinstance(value, str) else "number"


Lambda = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("number")]
    | Annotated[Literal["length_adaptive"], Tag("word")],
    Discriminator(_kind_of_number),
]
MicroBatchSize = Annotated[
    Annotated[int, Field(ge=1), Tag("number")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(_kind_of_number),
]


class PpoHyperparameters(Model):
    """Settings of PPO; each takes "auto", which is its default."""

    model_config = ConfigDict(json_schema_extra=_say_auto_in_schema)

    clip_range: float = Field(0.2, gt=0, lt=1)
    """The ratio of new to old probability is kept in [1 - x, 1 + x]; usual is 0.1 to 0.3."""
    clip_range_high: float | None = Field(None, gt=0, le=10)
    """Upper bound 1 + x instead, to let rare tokens rise more (0.28); null: as `clip_range`."""
    dual_clip: float | None = Field(None, gt=1, le=100)
    """At a negative advantage A the objective is at least x·A (usual 3); null: off."""
    value_clip_range: float | None = Field(0.2, gt=0, le=100)
    """How far a pass may move the critic from its old value; null: off."""
    kl_coef: float = Field(0.05, ge=0, le=10)
    """Penalty per nat of divergence from the base model; more stays closer."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """How that divergence is estimated; in the loss k2 (its default there) or k3."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Whether the penalty is taken off the token rewards or added to the loss."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Whether `kl_coef` stays, or follows `target_kl_per_sequence`."""
    target_kl_per_sequence: float = Field(6.0, gt=0, le=1000)
    """What the adaptive controller aims at, in nats per response."""
    kl_horizon: int = Field(10_000, ge=1)
    """Responses over which the controller moves `kl_coef` by about a fifth; fewer react faster."""
    target_kl: float | None = Field(0.02, gt=0, le=10)
    """Old-to-current divergence per token at 1.5 times which a step's passes end; null: never."""
    advantage_estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """A critic, or the other answers to the same prompt, without (rloo) or with (grpo) scaling."""
    group_size: int = Field(1, ge=1, le=64)
    """Responses per prompt; 4 by default for rloo, 8 for grpo, which need at least 2."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lambda_: Lambda = Field(0.95, alias="lambda")
    """GAE: 0 trusts the critic, 1 the sampled return; `length_adaptive`: 1 - 20/length."""
    lambda_value: float | None = Field(None, ge=0, le=1)
    """Another lambda for the critic's targets (usual 1); null: as `lambda`."""
    standardize_advantages: bool = True
    """Whether advantages get mean 0 and variance 1 over the rollout."""
    reward_scaling: Literal["none", "running_std"] = "running_std"
    """Whether rewards are divided by their running standard deviation."""
    missing_stop_penalty: float = Field(0.0, ge=0, le=100)
    """Taken off the reward of a response that was cut by length."""
    overlong_buffer: OverlongBuffer | None = None
    """Soft penalty before the length limit; null: none."""
    mask_truncated: bool = False
    """Whether responses cut by length are left out of the loss."""
    bootstrap_truncated: bool = False
    """Whether responses cut by length are credited with the critic's value of going on."""
    importance_weight_cap: float | None = Field(None, gt=0, le=100)
    """Largest weight that corrects for the sampler's own numbers (usual 2); null: no weights."""
    critic: Literal["shared_head", "detached_head", "adapter"] = "shared_head"
    """A head on the policy's trunk, one that does not train the trunk, or an adapter of its own."""
    value_coef: float = Field(0.1, ge=0, le=10)
    """Weight of the critic's loss."""
    entropy_coef: float = Field(0.0, ge=0, le=1)
    """Weight of the entropy bonus; more keeps answers varied."""
    critic_warmup_steps: int = Field(1, ge=0, le=1000)
    """Leading steps in which only the critic learns."""
    batch_size: int = Field(32, ge=1, le=4096)
    """Prompts per step."""
    epochs: int = Field(2, ge=1, le=20)
    """Walks over the rollout in each step."""
    minibatches: int = Field(4, ge=1, le=64)
    """Passes in each walk; divides the responses of a step."""
    n_epochs: int = Field(1, ge=1, le=100)
    """Walks over the prompts in the whole run."""
    max_steps: int | None = Field(None, ge=1, le=1_000_000)
    """Steps of the whole run; with `n_epochs` the smaller wins."""
    micro_batch_size: MicroBatchSize = AUTO
    """Responses per forward and backward; changes memory and speed, not the result."""
    loss_aggregation: LossAggregationName = "token_mean"
    """How much one token weighs."""
    learning_rate: float = Field(3e-5, gt=0, le=0.1)
    """Rate of the adapter."""
    value_learning_rate: float = Field(3e-4, gt=0, le=0.1)
    """Rate of the critic."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of both rates after the warm-up."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the run in which both rates rise from 0."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Decoupled decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0, le=1000)
    """Norm to which a larger gradient is scaled down."""
    max_prompt_tokens: int = Field(512, ge=1, le=32_768)
    """Longer prompts are refused."""
    max_response_tokens: int = Field(128, ge=1, le=16_384)
    """Responses are cut at this length."""
    temperature: float = Field(1.0, gt=0, le=2)
    """Of sampling and of every log-probability."""
    lora: Lora = Field(default_factory=Lora)
    """The adapter."""
    precision: Literal["auto", "fp32", "bf16"] = AUTO
    """Number format of the frozen base model."""
    seed: int | None = Field(None, ge=0, le=2**SEED_BITS - 1)
    """The job's seed may stand here too; if both are given they must be equal."""
    checkpoint_interval: int = Field(10, ge=1)
    """Steps between checkpoints."""
    eval_interval: int = Field(10, ge=1)
    """Steps between evaluations on the validation prompts."""
    eval_samples: int = Field(32, ge=1)
    """Validation prompts per evaluation."""
    stored_samples: int = Field(8, ge=0, le=256)
    """Responses per step kept as text and token by token."""
    guards: Guards = Field(default_factory=Guards)
    """A preset, and rules of your own: what the run does by itself when training goes wrong."""

    @classmethod
    def _is_absent(cls, name: str, value: Any) -> bool:
        is_auto = isinstance(value, str) and value == AUTO
        return is_auto or super()._is_absent(name, value)


_BY_ESTIMATOR: dict[str, dict[str, Any]] = {
    "kl_coef": {"grpo": 0.0},
    "group_size": {"rloo": 4, "grpo": 8},
    "standardize_advantages": {"rloo": False, "grpo": False},
    "reward_scaling": {"rloo": "none", "grpo": "none"},
}
"""Defaults that depend on `advantage_estimator`."""

CRITIC_ONLY = frozenset(
    {
        "gamma",
        "lambda_",
        "lambda_value",
        "critic",
        "critic_warmup_steps",
        "value_coef",
        "value_clip_range",
        "value_learning_rate",
    }
)
"""Settings that mean nothing without a critic."""


def final_values(ppo: PpoHyperparameters) -> dict[str, Any]:
    """Every setting with its value, defaults that depend on others included; JSON types."""
    values = ppo.model_dump(mode="json", by_alias=True)
    given = ppo.model_fields_set
    for name, defaults in _BY_ESTIMATOR.items():
        if name not in given:
            values[name] = defaults.get(ppo.advantage_estimator, values[name])
    if ppo.kl_placement == "loss" and "kl_estimator" not in given:
        values["kl_estimator"] = "k2"
    if ppo.clip_range_high is None:
        values["clip_range_high"] = ppo.clip_range
    rows = values["batch_size"] * values["group_size"]
    if isinstance(ppo.micro_batch_size, int):
        values["micro_batch_size"] = min(ppo.micro_batch_size, rows // ppo.minibatches)
    return values


def total_steps(ppo: PpoHyperparameters, prompts: int) -> int:
    """Steps of the run: `max_steps` alone decides; together with `n_epochs` the smaller wins."""
    by_walks = math.ceil(ppo.n_epochs * prompts / ppo.batch_size)
    if ppo.max_steps is None:
        return max(1, by_walks)
    return min(ppo.max_steps, by_walks) if "n_epochs" in ppo.model_fields_set else ppo.max_steps


def context_faults(ppo: PpoHyperparameters, context_length: int) -> list[Fault]:
    """Faults if prompt and response may not fit the model's context together."""
    wanted = ppo.max_prompt_tokens + ppo.max_response_tokens
    if wanted <= context_length:
        return []
    detail = (
        f"max_prompt_tokens + max_response_tokens is {wanted}, but the model's context holds "
        f"{context_length} tokens"
    )
    return _faults(detail, "max_prompt_tokens", "max_response_tokens")


def combination_faults(ppo: PpoHyperparameters) -> Iterator[Fault]:
    """Faults of settings that are fine alone; one for each side."""
    values = final_values(ppo)
    yield from _row_faults(ppo, values)
    yield from _clip_faults(ppo)
    yield from _kl_faults(ppo, values)
    yield from _estimator_faults(ppo, values)
    buffer = ppo.overlong_buffer
    if buffer is not None and buffer.tokens > ppo.max_response_tokens:
        detail = (
            f"overlong_buffer.tokens must not exceed max_response_tokens "
            f"({ppo.max_response_tokens}), got {buffer.tokens}"
        )
        yield from _faults(detail, "overlong_buffer/tokens", "max_response_tokens")
    for index, rule in enumerate(ppo.guards.rules):
        if rule.warn == rule.critical:
            detail = "warn and critical must differ: their order says which side is bad"
            at = f"guards/rules/{index}"
            yield from _faults(detail, f"{at}/warn", f"{at}/critical")


def _faults(detail: str, *names: str) -> list[Fault]:
    return [Fault(f"{POINTER}/{name}", "invalid_combination", detail) for name in names]


def _row_faults(ppo: PpoHyperparameters, values: Mapping[str, Any]) -> Iterator[Fault]:
    """The passes must share the responses evenly."""
    group_size = values["group_size"]
    rows = ppo.batch_size * group_size
    if rows % ppo.minibatches == 0:
        return
    what = (
        f"batch_size ({ppo.batch_size})"
        if group_size == 1
        else f"the {rows} responses of a step (batch_size {ppo.batch_size} × "
        f"group_size {group_size})"
    )
    detail = (
        f"minibatches ({ppo.minibatches}) must divide {what}; "
        f"{_nearest_divisor(rows, ppo.minibatches)} would"
    )
    yield from _faults(detail, "minibatches", "batch_size")


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, min(number, 64) + 1) if number % d == 0]
    return min(divisors, key=lambda divisor: abs(divisor - wanted))


def _clip_faults(ppo: PpoHyperparameters) -> Iterator[Fault]:
    side = "clip_range" if ppo.clip_range_high is None else "clip_range_high"
    upper = 1 + (ppo.clip_range if ppo.clip_range_high is None else ppo.clip_range_high)
    if ppo.dual_clip is not None and ppo.dual_clip <= upper:
        detail = f"dual_clip must be above 1 + {side} = {upper:g}, got {ppo.dual_clip:g}"
        yield from _faults(detail, "dual_clip", side)


def _kl_faults(ppo: PpoHyperparameters, values: Mapping[str, Any]) -> Iterator[Fault]:
    rows = ppo.batch_size * values["group_size"]
    if ppo.kl_controller == "adaptive" and ppo.kl_horizon < rows:
        what = f"batch_size ({rows})" if values["group_size"] == 1 else f"a step's {rows} responses"
        detail = (
            f"an adaptive coefficient needs a kl_horizon of at least {what}, "
            f"got {ppo.kl_horizon}: it could jump past zero"
        )
        yield from _faults(detail, "kl_horizon", "batch_size")
    if ppo.kl_controller == "adaptive" and values["kl_coef"] == 0:
        detail = "an adaptive kl_coef cannot start at 0, where it would stay; give a positive one"
        yield from _faults(detail, "kl_controller", "kl_coef")
    if ppo.kl_placement == "loss" and values["kl_estimator"] in ("k1", "exact"):
        detail = (
            f"kl_estimator {values['kl_estimator']} cannot be a loss (k1 has no gradient on "
            "average, exact needs the reference in every pass); take k2 or k3, or "
            "kl_placement reward"
        )
        yield from _faults(detail, "kl_estimator", "kl_placement")


def _estimator_faults(ppo: PpoHyperparameters, values: Mapping[str, Any]) -> Iterator[Fault]:
    if ppo.advantage_estimator == "gae":
        return
    if values["group_size"] < 2:
        detail = (
            f"{ppo.advantage_estimator} compares the answers to one prompt: group_size must be 2 "
            f"or more, got {values['group_size']}"
        )
        yield from _faults(detail, "group_size", "advantage_estimator")
    if ppo.bootstrap_truncated:
        detail = f"bootstrap_truncated needs a critic, which {ppo.advantage_estimator} has not"
        yield from _faults(detail, "bootstrap_truncated", "advantage_estimator")

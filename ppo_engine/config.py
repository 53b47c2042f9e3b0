"""The settings of one run, frozen and checked at birth.

Fields have no defaults: whoever starts a run decides each of them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Self

from ppo_engine.errors import InvalidConfig


class LossAggregation(StrEnum):
    """How much one response token weighs in the loss of an optimizer step."""

    TOKEN_MEAN = "token_mean"  # noqa: S105 - not a password
    SEQUENCE_MEAN_TOKEN_MEAN = "sequence_mean_token_mean"  # noqa: S105 - not a password
    SEQUENCE_MEAN_TOKEN_SUM = "sequence_mean_token_sum"  # noqa: S105 - not a password
    SEQUENCE_MEAN_TOKEN_SUM_NORM = "sequence_mean_token_sum_norm"  # noqa: S105 - not a password


_COUNTS = (
    "kl_horizon",
    "batch_size",
    "epochs",
    "minibatches",
    "total_steps",
    "micro_batch_size",
    "max_prompt_tokens",
    "max_response_tokens",
    "checkpoint_interval",
    "eval_interval",
    "eval_samples",
)
_CHOICES = {
    "kl_controller": ("fixed", "adaptive"),
    "reward_scaling": ("none", "running_std"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "precision": ("fp32", "bf16"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Which linear layers get a low-rank adapter, and how large it is."""

    rank: int
    """Inner dimension r of the adapter; more can express more and costs more."""
    alpha: float
    """Scale: the adapter's output is multiplied by alpha / rank."""
    target_modules: Literal["auto"] | tuple[str, ...]
    """Names of the linear layers; "auto" takes all except the output head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Every setting of a PPO run."""

    clip_low: float
    """ε_low: the ratio's lower bound is 1 - ε_low; smaller binds earlier."""
    clip_high: float
    """ε_high: the ratio's upper bound is 1 + ε_high; smaller binds earlier."""
    dual_clip: float | None
    """c: at a negative advantage the objective is at least c·A; None switches it off."""
    value_clip_range: float | None
    """Half-width of the window around the old value in which the critic may move; None: no clip."""
    kl_coef: float
    """β of the KL penalty in the token reward, in reward units per nat; more stays closer."""
    kl_controller: Literal["fixed", "adaptive"]
    """Whether β stays, or follows `target_kl_per_sequence`."""
    target_kl_per_sequence: float
    """Target of the adaptive controller, in nats per response, to the reference."""
    kl_horizon: int
    """Episodes over which the adaptive controller moves β by about a fifth; fewer react faster."""
    target_kl: float | None
    """Old-to-current KL per token at 1.5 times which a step's passes end; None: never."""
    gamma: float
    """Discount per token."""
    lam: float
    """λ of GAE: 0 trusts the critic, 1 the sampled return."""
    standardize_advantages: bool
    """Whether advantages get mean 0 and variance 1 over the rollout."""
    reward_scaling: Literal["none", "running_std"]
    """Whether scores are divided by their running standard deviation."""
    missing_stop_penalty: float
    """Taken off the score of a response that ended by length; 0: none."""
    value_coef: float
    """Weight of the value loss."""
    entropy_coef: float
    """Weight of the entropy bonus; more keeps the policy broader."""
    critic_warmup_steps: int
    """Leading steps in which only the value head learns."""
    batch_size: int
    """Prompts, and responses, per step."""
    epochs: int
    """Walks over the rollout per step."""
    minibatches: int
    """Passes (optimizer steps) per walk; divides `batch_size`."""
    total_steps: int
    """Updates in the whole run."""
    micro_batch_size: int
    """Rows per forward and backward; changes memory and speed, not the result."""
    loss_aggregation: LossAggregation
    """How much one token weighs."""
    learning_rate: float
    """AdamW's rate for the adapter."""
    value_learning_rate: float
    """AdamW's rate for the value head."""
    lr_schedule: Literal["constant", "linear", "cosine"]
    """Course of both rates after the warm-up."""
    warmup_fraction: float
    """Share of the run in which both rates rise from 0."""
    weight_decay: float
    """AdamW's decoupled decay."""
    max_grad_norm: float
    """Norm to which a larger gradient is scaled down."""
    max_prompt_tokens: int
    """Prompts longer than this are refused."""
    max_response_tokens: int
    """Responses are cut at this length."""
    temperature: float
    """τ of sampling and of every log-probability."""
    lora: LoraConfig
    """The adapter."""
    precision: Literal["fp32", "bf16"]
    """Number format of the frozen base; adapter, losses and optimizer are fp32."""
    checkpoint_interval: int
    """Steps between checkpoints."""
    eval_interval: int
    """Steps between evaluations on the validation prompts."""
    eval_samples: int
    """Validation prompts per evaluation."""
    stored_samples: int
    """Responses per step kept as text with their scores."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Settings from the `config` of a run file; missing and unknown fields are errors."""
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(names ^ set(fields)):
            raise InvalidConfig(f"missing or unknown settings: {', '.join(wrong)}", param=wrong[0])
        try:
            lora = dict(fields["lora"])
            modules = lora["target_modules"]
            lora["target_modules"] = modules if modules == "auto" else tuple(modules)
            aggregation = LossAggregation(fields["loss_aggregation"])
            return cls(**{**fields, "lora": LoraConfig(**lora), "loss_aggregation": aggregation})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidConfig(f"the settings cannot be read: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The same settings as plain JSON types."""
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        """Refuse settings that make no sense, alone or together."""
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise InvalidConfig(f"{name} must be 1 or more", param=name)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InvalidConfig(f"{name} must be one of {', '.join(allowed)}", param=name)
        if self.temperature <= 0:
            raise InvalidConfig("temperature must be positive", param="temperature")
        self._check_kl_controller()
        if not 0 < self.clip_low < 1:
            raise InvalidConfig(
                f"clip_low must lie in (0, 1), got {self.clip_low}", param="clip_low"
            )
        if self.clip_high <= 0:
            raise InvalidConfig(
                f"clip_high must be positive, got {self.clip_high}", param="clip_high"
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise InvalidConfig(
                f"dual_clip must exceed 1 + clip_high = {1 + self.clip_high}, got {self.dual_clip}",
                param="dual_clip",
            )
        if self.batch_size % self.minibatches:
            raise InvalidConfig(
                f"minibatches ({self.minibatches}) must divide batch_size ({self.batch_size})",
                param="minibatches",
            )

    def _check_kl_controller(self) -> None:
        """The factor 1 + clip(e, ±.2)·n/horizon must stay positive, with a β to act on."""
        if self.kl_controller != "adaptive":
            return
        if self.kl_horizon < self.batch_size:
            raise InvalidConfig(
                f"kl_horizon ({self.kl_horizon}) must not be below batch_size ({self.batch_size}), "
                "or the KL coefficient could jump past zero",
                param="kl_horizon",
            )
        if self.kl_coef == 0:
            raise InvalidConfig(
                "an adaptive KL coefficient cannot start at 0, where it would stay", param="kl_coef"
            )

    @property
    def minibatch_size(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size // self.minibatches

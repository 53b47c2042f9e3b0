"""The settings of one run, frozen and checked at birth.

Fields have no defaults: whoever starts a run decides each of them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Self

from ppo_engine.errors import InvalidConfig
from ppo_engine.guards import GuardConfig


class LossAggregation(StrEnum):
    """How much one response token weighs in the loss of an optimizer step."""

    TOKEN_MEAN = "token_mean"  # noqa: S105 - not a password
    SEQUENCE_MEAN_TOKEN_MEAN = "sequence_mean_token_mean"  # noqa: S105 - not a password
    SEQUENCE_MEAN_TOKEN_SUM = "sequence_mean_token_sum"  # noqa: S105 - not a password
    SEQUENCE_MEAN_TOKEN_SUM_NORM = "sequence_mean_token_sum_norm"  # noqa: S105 - not a password


class AdvantageEstimator(StrEnum):
    """Where advantages come from."""

    GAE = "gae"
    """A critic's values and token rewards."""
    RLOO = "rloo"
    """The other samples of the same prompt; no critic."""
    GRPO = "grpo"
    """As RLOO, in standard deviations of the group."""


class KlEstimator(StrEnum):
    """How the divergence from the reference is estimated at a sampled token."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"
    EXACT = "exact"
    """Over the whole vocabulary, not only the sampled token."""


class Critic(StrEnum):
    """What computes the values."""

    SHARED_HEAD = "shared_head"
    """A scalar head on the policy's own trunk; its loss trains the trunk too."""
    DETACHED_HEAD = "detached_head"
    """The same head without a gradient into the trunk."""
    ADAPTER = "adapter"
    """A head on the same base with an adapter of its own: a second forward pass."""


LENGTH_ADAPTIVE = "length_adaptive"
"""As `lam`: λ of each response follows its length (VAPO)."""

_COUNTS = (
    "group_size",
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
    "kl_placement": ("reward", "loss"),
}
_ENUMS = {
    "loss_aggregation": LossAggregation,
    "advantage_estimator": AdvantageEstimator,
    "kl_estimator": KlEstimator,
    "critic": Critic,
}
_LOSS_ESTIMATORS = (KlEstimator.K2, KlEstimator.K3)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Which linear layers get a low-rank adapter, and how large it is."""

    rank: int
    """Inner dimension r of the adapter; more can express more and costs more."""
    alpha: float
    """Scale: the adapter's output is multiplied by alpha / rank."""
    target_modules: Literal["auto"] | tuple[str, ...]
    """Names of the linear layers; "auto" takes all except the output head."""
    last_layers: int | None
    """Only so many layers at the top get one; fewer are faster and learn less.  None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlongBuffer:
    """A soft length limit: a penalty that grows over the last tokens before the hard one."""

    tokens: int
    """Length of the zone before `max_response_tokens` in which the penalty grows."""
    penalty: float
    """Taken off the score at `max_response_tokens`."""


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
    kl_estimator: KlEstimator
    """Estimator of the penalty; in the loss only k2 and k3 pull the right way."""
    kl_placement: Literal["reward", "loss"]
    """Whether β·KL is taken off the token rewards or added to the loss."""
    kl_controller: Literal["fixed", "adaptive"]
    """Whether β stays, or follows `target_kl_per_sequence`."""
    target_kl_per_sequence: float
    """Target of the adaptive controller, in nats per response, to the reference."""
    kl_horizon: int
    """Episodes over which the adaptive controller moves β by about a fifth; fewer react faster."""
    target_kl: float | None
    """Old-to-current KL per token at 1.5 times which a step's passes end; None: never."""
    advantage_estimator: AdvantageEstimator
    """Where advantages come from; only GAE has a critic."""
    group_size: int
    """Responses per prompt; more make a group's mean steadier and cost more."""
    gamma: float
    """Discount per token."""
    lam: float | Literal["length_adaptive"]
    """λ of GAE: 0 trusts the critic, 1 the sampled return."""
    lambda_value: float | None
    """λ of the critic's returns where it is to differ (VC-PPO: 1); None: as `lam`."""
    standardize_advantages: bool
    """Whether advantages get mean 0 and variance 1 over the rollout."""
    reward_scaling: Literal["none", "running_std"]
    """Whether scores are divided by their running standard deviation."""
    missing_stop_penalty: float
    """Taken off the score of a response that ended by length; 0: none."""
    overlong_buffer: OverlongBuffer | None
    """Soft penalty before the length limit; None: none."""
    mask_truncated: bool
    """Whether responses cut by length are left out of the loss."""
    bootstrap_truncated: bool
    """Whether a response cut by length is credited with the critic's value of going on."""
    importance_weight_cap: float | None
    """Largest weight for the sampler's deviation from the trainer (TIS); None: no weights."""
    critic: Critic
    """What computes the values."""
    value_coef: float
    """Weight of the value loss."""
    entropy_coef: float
    """Weight of the entropy bonus; more keeps the policy broader."""
    critic_warmup_steps: int
    """Leading steps in which only the value head learns."""
    batch_size: int
    """Prompts per step."""
    epochs: int
    """Walks over the rollout per step."""
    minibatches: int
    """Passes (optimizer steps) per walk; divides the responses of a step."""
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
    """Responses per step kept as text with their scores, and token by token."""
    guards: GuardConfig
    """What is done when training goes wrong."""

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
            buffer = fields["overlong_buffer"]
            parts: dict[str, Any] = {name: kind(fields[name]) for name, kind in _ENUMS.items()}
            parts |= {
                "lora": LoraConfig(**lora),
                "overlong_buffer": None if buffer is None else OverlongBuffer(**buffer),
                "guards": GuardConfig.from_dict(fields["guards"]),
            }
            return cls(**{**fields, **parts})
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
        if self.responses_per_step % self.minibatches:
            raise InvalidConfig(
                f"minibatches ({self.minibatches}) must divide the {self.responses_per_step} "
                "responses of a step (batch_size × group_size)",
                param="minibatches",
            )
        self._check_estimator()
        self._check_lengths()

    def _check_estimator(self) -> None:
        """Advantages and KL terms that would not do what their names say are refused."""
        if self.advantage_estimator is not AdvantageEstimator.GAE and self.group_size < 2:
            raise InvalidConfig(
                f"{self.advantage_estimator} compares the samples of a prompt: group_size must be "
                f"2 or more, got {self.group_size}",
                param="group_size",
            )
        if self.kl_placement == "loss" and self.kl_estimator not in _LOSS_ESTIMATORS:
            raise InvalidConfig(
                f"kl_estimator {self.kl_estimator} cannot be a loss; take k2 or k3",
                param="kl_estimator",
            )
        if isinstance(self.lam, str) and self.lam != LENGTH_ADAPTIVE:
            raise InvalidConfig(f"lam is a number or {LENGTH_ADAPTIVE}", param="lam")
        if not self.has_critic and self.bootstrap_truncated:
            raise InvalidConfig(
                f"bootstrap_truncated needs a critic, which {self.advantage_estimator} has not",
                param="bootstrap_truncated",
            )
        cap = self.importance_weight_cap
        if cap is not None and cap <= 0:
            raise InvalidConfig(
                f"importance_weight_cap must be positive, got {cap}", param="importance_weight_cap"
            )

    def _check_lengths(self) -> None:
        """The soft limit's zone must lie before the hard limit."""
        buffer = self.overlong_buffer
        if buffer is not None and not 0 < buffer.tokens <= self.max_response_tokens:
            raise InvalidConfig(
                f"overlong_buffer.tokens must lie in 1..max_response_tokens "
                f"({self.max_response_tokens}), got {buffer.tokens}",
                param="overlong_buffer",
            )

    def _check_kl_controller(self) -> None:
        """The factor 1 + clip(e, ±.2)·n/horizon must stay positive, with a β to act on."""
        if self.kl_controller != "adaptive":
            return
        if self.kl_horizon < self.responses_per_step:
            raise InvalidConfig(
                f"kl_horizon ({self.kl_horizon}) must not be below the {self.responses_per_step} "
                "responses of a step, or the KL coefficient could jump past zero",
                param="kl_horizon",
            )
        if self.kl_coef == 0:
            raise InvalidConfig(
                "an adaptive KL coefficient cannot start at 0, where it would stay", param="kl_coef"
            )

    @property
    def minibatch_size(self) -> int:
        """Rows of one optimizer step."""
        return self.responses_per_step // self.minibatches

    @property
    def responses_per_step(self) -> int:
        """Rows of a rollout."""
        return self.batch_size * self.group_size

    @property
    def has_critic(self) -> bool:
        """Whether values are learned at all."""
        return self.advantage_estimator is AdvantageEstimator.GAE

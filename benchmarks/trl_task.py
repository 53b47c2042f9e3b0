"""What the two sides of `trl_step.py` are told, and how they answer.

They run in environments of their own, so only the standard library is imported here.
"""

import dataclasses
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

CLIP_RANGE = 0.2
VALUE_CLIP_RANGE = 0.2
VALUE_COEF = 0.1
KL_COEF = 0.05
GAMMA = 1.0
LAM = 0.95
LORA_RANK = 16
LORA_ALPHA = 32
CHARACTERS_PER_POINT = 10

Dtype = Literal["fp32", "bf16", "default"]
TrlCritic = Literal["full", "lora"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """PPO steps that a side is to take and time."""

    model: str
    """Folder of the base model."""
    prompts: list[list[int]]
    """Token ids; a step takes `rows` of them, in shuffled order."""
    rows: int
    """Responses per step, one to a prompt."""
    response_tokens: int
    """New tokens of every response: nothing ends one sooner."""
    epochs: int
    minibatches: int
    dtype: Dtype
    """Of the weights as they are loaded; `default` is what each side takes when told nothing."""
    trl_critic: TrlCritic
    """`full` trains all weights of a second model, `lora` adapters on it."""
    warmup_steps: int
    """Steps taken first, and left out of the times."""
    timed_steps: int
    learning_rate: float
    """Of the policy's adapter, constant."""
    value_learning_rate: float
    """Of our value head."""
    trl_critic_learning_rate: float
    unused_token: int
    """Pads TRL's rows.  Its masks follow from the padding token, so no text may hold it."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedBatch:
    """One minibatch whose loss both sides compute; [B, T] lists but for the prompts."""

    model: str
    prompts: list[list[int]]
    responses: list[list[int]]
    log_ratios: list[list[float]]
    """How far the policy is to have moved since the rollout."""
    old_logprobs: list[list[float]]
    """Empty for the side that goes first, which sets them by `log_ratios`."""
    advantages: list[list[float]]
    values: list[list[float]]
    """As the critics differ, theirs are given, not computed."""
    old_values: list[list[float]]
    returns: list[list[float]]
    unused_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAnswer:
    """What a side measured."""

    seconds: list[dict[str, float]]
    """Of each timed step: `sample`, `score`, `learn`, and `step` for the whole."""
    tokens: list[int]
    """Response tokens of each timed step."""
    rewards: list[float]
    """Mean of every step, the warm-up included."""
    kl_to_reference: list[float]
    """Nats per response, of every step."""
    reward_seconds: float
    """Spent per step in the reward function and what it needed around it."""
    peak_memory_bytes: int
    trained_parameters: int
    critic_parameters: int
    """Those that only the critic has, trained or not."""
    note: str
    """Settings that the side chose for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossAnswer:
    """What a side made of the fixed batch."""

    logprobs: list[list[float]]
    old_logprobs: list[list[float]]
    policy_loss: float
    value_loss: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A task of either kind, as it lies in the file that a side is started with."""

    steps: Steps | None = None
    fixed_batch: FixedBatch | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        steps, batch = found["steps"], found["fixed_batch"]
        return cls(
            steps=None if steps is None else Steps(**steps),
            fixed_batch=None if batch is None else FixedBatch(**batch),
        )

    def write(self, path: Path) -> None:
        """For the process that will carry it out."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")


def reward(text: str) -> float:
    """Letters e per ten characters: it costs next to nothing, and samples differ in it."""
    return CHARACTERS_PER_POINT * text.lower().count("e") / max(len(text), 1)


def peak_memory_bytes() -> int:
    """Most memory that this process has held so far."""
    # Kilobytes everywhere but on macOS, where they are bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def carry_out(
    fixed_loss: Callable[[FixedBatch], LossAnswer], take_steps: Callable[[Steps], StepAnswer]
) -> None:
    """Do what the order in the file on the command line asks of a side, and tell."""
    order = Order.read(Path(sys.argv[1]))
    if order.fixed_batch is not None:
        tell(fixed_loss(order.fixed_batch))
    if order.steps is not None:
        tell(take_steps(order.steps))


def tell(answer: StepAnswer | LossAnswer) -> None:
    """Print the answer as the last line, where the process that asked looks for it."""
    print(json.dumps(dataclasses.asdict(answer)), flush=True)


def answer_in(output: str) -> dict[str, Any]:
    """What `tell` printed; libraries may have printed before it."""
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found

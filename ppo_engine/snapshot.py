"""A good state of a run, kept in memory, to which a guard may roll back.

Rolling back restores what has been learned, not how far the run is: steps go on counting and
prompts go on coming, so a run always ends.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppo_engine.kl import KlController
from ppo_engine.policy import Policy
from ppo_engine.rewards import RunningStd

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


class Learned(Protocol):
    """The parts of a trainer that hold what has been learned."""

    policy: Policy
    optimizer: torch.optim.AdamW
    kl_controller: KlController
    reward_std: RunningStd


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a run had learned after a step."""

    step: int
    tensors: dict[str, Tensor]
    """Weights by parameter name, and Adam's state as `<name>.<key>` behind `optimizer:`."""
    state: dict[str, Any]
    """JSON types: the KL coefficient and the running deviation of rewards."""


def take_snapshot(run: Learned, *, step: int) -> Snapshot:
    """The run's state, copied."""
    weights = {name: p.detach().clone() for name, p in trained_parameters(run).items()}
    moments = {f"optimizer:{name}": x.clone() for name, x in optimizer_tensors(run).items()}
    state = {"kl_controller": run.kl_controller.state(), "reward_std": run.reward_std.state()}
    return Snapshot(step=step, tensors=weights | moments, state=copy.deepcopy(state))


def roll_back(run: Learned, to: Snapshot) -> None:
    """Bring weights, optimizer, KL coefficient and reward scaling back."""
    with torch.no_grad():
        for name, parameter in trained_parameters(run).items():
            parameter.copy_(to.tensors[name])
    moments = {
        name.removeprefix("optimizer:"): tensor.clone()
        for name, tensor in to.tensors.items()
        if name.startswith("optimizer:")
    }
    run.optimizer.state.clear()
    restore_optimizer(run, moments)
    run.kl_controller.load(to.state["kl_controller"])
    run.reward_std.load(to.state["reward_std"])


def trained_parameters(run: Learned) -> dict[str, nn.Parameter]:
    """Everything that is trained, by name."""
    return run.policy.adapter_parameters() | run.policy.value_parameters()


def optimizer_tensors(run: Learned) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter; what has never been trained has none."""
    found: dict[str, Tensor] = {}
    for weights in run.policy.trained_weights():
        state = run.optimizer.state.get(weights.together)
        if not state:
            continue
        for moment in ADAM_MOMENTS:
            views = weights.split(state[moment])
            found |= {f"{name}.{moment}": view for name, view in views.items()}
        found |= {f"{name}.step": state["step"].clone() for name in weights.parameters}
    return found


def restore_optimizer(run: Learned, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    for weights in run.policy.trained_weights():
        names = list(weights.parameters)
        if f"{names[0]}.step" not in tensors:
            continue
        run.optimizer.state[weights.together] = {
            "step": tensors[f"{names[0]}.step"].to(weights.together.device),
            **{
                moment: weights.joined({name: tensors[f"{name}.{moment}"] for name in names})
                for moment in ADAM_MOMENTS
            },
        }

"""Asks public implementations of PPO for numbers, and writes questions and answers to `data/`.

`make differential` runs it in an environment of its own; the suite needs only the data.  Nothing of
Trimtab is imported here.  Inputs are float64 with four decimals, drawn from fixed seeds; answers
keep every digit.  The versions asked stand in the requirements files beside this one, and in the
data.

verl and TRL are installed without what they depend on.  The packages in `ABSENT` are imported by
them at the top, but by none of the functions asked here, and are replaced by stand-ins.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
ABSENT = frozenset(
    {
        "codetiming",
        "datasets",
        "dill",
        "hydra",
        "pandas",
        "peft",
        "pyarrow",
        "ray",
        "tensorboard",
        "torchdata",
        "wandb",
    }
)
DECIMALS = 4
ROWS, COLUMNS = 4, 6
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
MAX_RESPONSE_TOKENS = 9
NO_DUAL_CLIP = 1e9
"""verl has no way to turn its dual clip off; no ratio reaches this one."""

Json = dict[str, Any]


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports mocks for packages that are not installed."""

    def find_spec(self, name: str, _path: object, _target: object = None) -> Any:
        if name.split(".", maxsplit=1)[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = MagicMock(name=spec.name)
        module.__name__ = spec.name
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        pass


sys.meta_path.append(StandIns())

from omegaconf import OmegaConf  # noqa: E402
from torchrl.objectives.value.functional import generalized_advantage_estimate  # noqa: E402
from trl.experimental.ppo import ppo_trainer as trl_ppo  # noqa: E402
from verl.trainer.ppo import core_algos as verl_ppo  # noqa: E402
from verl.trainer.ppo import rollout_corr_helper as verl_correction  # noqa: E402
from verl.utils import torch_functional as verl_functional  # noqa: E402


class Draw:
    """Inputs from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def numbers(self, *shape: int, spread: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator, dtype=torch.float64)
        return (spread * drawn).round(decimals=DECIMALS)

    def mask(self, *, holes: bool) -> Tensor:
        """Lengths of at least one; with holes, some columns inside belong to nobody."""
        lengths = torch.randint(1, COLUMNS + 1, (ROWS,), generator=self._generator)
        lengths[0] = COLUMNS
        mask = torch.arange(COLUMNS) < lengths[:, None]
        if holes:
            kept = torch.rand(ROWS, COLUMNS, generator=self._generator) < 0.6
            kept[:, 0] = True
            mask &= kept
        return mask

    def order(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self._generator).tolist()


def plain(value: Any) -> Any:
    """As JSON: tensors as nested lists."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value


def gae_torchrl() -> list[Json]:
    cases = []
    for seed, (gamma, lam) in enumerate([(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)]):
        draw = Draw(seed)
        mask = draw.mask(holes=False)
        rewards, values = draw.numbers(ROWS, COLUMNS) * mask, draw.numbers(ROWS, COLUMNS) * mask
        following = torch.nn.functional.pad(values[:, 1:], (0, 1))
        is_last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
        advantages, returns = generalized_advantage_estimate(
            # As plain numbers they would make the discounts fp32.
            torch.tensor(gamma, dtype=torch.float64),
            torch.tensor(lam, dtype=torch.float64),
            *(x.unsqueeze(-1) for x in (values, following, rewards, is_last)),
        )
        cases.append(
            {
                "gamma": gamma,
                "lam": lam,
                "mask": mask,
                "rewards": rewards,
                "values": values,
                "advantages": advantages.squeeze(-1) * mask,
                "returns": returns.squeeze(-1) * mask,
            }
        )
    return cases


def gae_verl() -> list[Json]:
    cases = []
    for seed, (gamma, lam) in enumerate([(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)], 10):
        draw = Draw(seed)
        mask = draw.mask(holes=True)
        # Rewards and values of masked columns are garbage that must not matter.
        rewards, values = draw.numbers(ROWS, COLUMNS), draw.numbers(ROWS, COLUMNS)
        whitened, returns = verl_ppo.compute_gae_advantage_return(
            rewards, values, mask.double(), gamma, lam
        )
        cases.append(
            {
                "gamma": gamma,
                "lam": lam,
                "mask": mask,
                "rewards": rewards,
                "values": values,
                "whitened": whitened * mask,
                "returns": returns * mask,
            }
        )
    return cases


def policy_loss_verl() -> list[Json]:
    rules = [(0.2, 0.2, NO_DUAL_CLIP), (0.2, 0.28, NO_DUAL_CLIP), (0.2, 0.2, 3.0), (0.1, 0.4, 1.6)]
    cases = []
    for seed, (low, high, dual) in enumerate(rules, 20):
        draw = Draw(seed)
        mask = draw.mask(holes=seed % 2 == 1)
        old = draw.numbers(ROWS, COLUMNS)
        logprobs = (old + draw.numbers(ROWS, COLUMNS, spread=0.7)).round(decimals=DECIMALS)
        advantages = draw.numbers(ROWS, COLUMNS)
        advantages[1, 0] = 0.0
        logprobs[0, 1] = old[0, 1] + 25.0  # both bound the log-ratio at 20
        for aggregation in AGGREGATIONS:
            current = logprobs.clone().requires_grad_()
            loss, metrics = verl_ppo.get_policy_loss_fn("vanilla")(
                old,
                current,
                advantages,
                mask.double(),
                loss_agg_mode=aggregation,
                config=OmegaConf.create(
                    {
                        "clip_ratio": low,
                        "clip_ratio_low": low,
                        "clip_ratio_high": high,
                        "clip_ratio_c": dual,
                        "global_batch_info": {"loss_scale_factor": MAX_RESPONSE_TOKENS},
                    }
                ),
            )
            loss.backward()
            cases.append(
                {
                    "clip_low": low,
                    "clip_high": high,
                    "dual_clip": None if dual == NO_DUAL_CLIP else dual,
                    "aggregation": aggregation,
                    "max_response_tokens": MAX_RESPONSE_TOKENS,
                    "mask": mask,
                    "old_logprobs": old,
                    "logprobs": logprobs,
                    "advantages": advantages,
                    "loss": loss,
                    "gradient": current.grad,
                    "clipped_fraction": metrics["actor/pg_clipfrac"],
                    "dual_clipped_fraction": metrics["actor/pg_clipfrac_lower"],
                    "mean_drift": metrics["actor/ppo_kl"],
                }
            )
    return cases


def value_loss_verl() -> list[Json]:
    cases = []
    for seed, clip_range in enumerate([0.2, 0.5, 1e9], 30):
        draw = Draw(seed)
        mask = draw.mask(holes=seed % 2 == 0)
        old, returns = draw.numbers(ROWS, COLUMNS), draw.numbers(ROWS, COLUMNS)
        values = (old + draw.numbers(ROWS, COLUMNS, spread=0.5)).round(decimals=DECIMALS)
        current = values.clone().requires_grad_()
        loss, clipped = verl_ppo.compute_value_loss(
            current, returns, old, mask.double(), clip_range
        )
        loss.backward()
        cases.append(
            {
                "clip_range": clip_range,
                "mask": mask,
                "old_values": old,
                "values": values,
                "returns": returns,
                "loss": loss,
                "gradient": current.grad,
                "clipped_fraction": clipped,
            }
        )
    return cases


def aggregation_verl() -> list[Json]:
    """With a row that has no tokens."""
    cases = []
    for seed, aggregation in enumerate(AGGREGATIONS, 40):
        draw = Draw(seed)
        mask = draw.mask(holes=True)
        mask[2] = False
        losses = draw.numbers(ROWS, COLUMNS)
        total = verl_ppo.agg_loss(
            losses, mask.double(), aggregation, loss_scale_factor=MAX_RESPONSE_TOKENS
        )
        cases.append(
            {
                "aggregation": aggregation,
                "max_response_tokens": MAX_RESPONSE_TOKENS,
                "mask": mask,
                "losses": losses,
                "total": total,
            }
        )
    return cases


def kl_verl() -> list[Json]:
    draw = Draw(50)
    reference = draw.numbers(12)
    logprobs = (reference + draw.numbers(12, spread=0.8)).round(decimals=DECIMALS)
    cases = []
    for estimator in ("k1", "k2", "k3", "k3+"):
        current = logprobs.clone().requires_grad_()
        found = verl_ppo.kl_penalty(current, reference, estimator)
        found.sum().backward()
        cases.append(
            {
                "estimator": estimator,
                "logprobs": logprobs,
                "reference_logprobs": reference,
                "kl": found,
                "gradient": current.grad,
            }
        )
    return cases


def adaptive_kl_verl() -> list[Json]:
    controller = verl_ppo.AdaptiveKLController(init_kl_coef=0.2, target_kl=6.0, horizon=1000)
    steps = []
    for kl, episodes in [(9.0, 64), (6.3, 64), (5.5, 32), (-1.0, 64), (6.0, 100), (40.0, 500)]:
        controller.update(kl, episodes)
        steps.append({"kl": kl, "episodes": episodes, "coef": float(controller.value)})
    return [{"coef": 0.2, "target": 6.0, "horizon": 1000, "steps": steps}]


def groups_verl() -> list[Json]:
    """Groups of two to five in a shuffled order; in one of them all scores are equal."""
    cases = []
    for seed in (60, 61):
        draw = Draw(seed)
        sizes = [2, 3, 4, 5, 3]
        ids = [group for group, size in enumerate(sizes) for _ in range(size)]
        scores = draw.numbers(len(ids))
        scores[-3:] = 0.1
        order = draw.order(len(ids))
        scores, ids = scores[order], [ids[i] for i in order]
        answers = {}
        for name, formula in {
            "rloo": verl_ppo.compute_rloo_outcome_advantage,
            "grpo": verl_ppo.compute_grpo_outcome_advantage,
        }.items():
            rewards = torch.stack([torch.zeros_like(scores), scores], dim=1)
            advantages, _ = formula(rewards, torch.ones_like(rewards), np.array(ids))
            answers[name] = advantages[:, 0]
        cases.append({"scores": scores, "group_ids": ids, **answers})
    return cases


def importance_weights_verl() -> list[Json]:
    draw = Draw(70)
    mask = draw.mask(holes=True)
    behavior = draw.numbers(ROWS, COLUMNS)
    old = (behavior + draw.numbers(ROWS, COLUMNS, spread=0.8)).round(decimals=DECIMALS)
    weights, _ = verl_correction.compute_rollout_correction_weights(
        old - behavior, mask.double(), rollout_is="token", rollout_is_threshold=1.5
    )
    return [
        {
            "cap": 1.5,
            "mask": mask,
            "old_logprobs": old,
            "behavior_logprobs": behavior,
            "weights": weights,
        }
    ]


def whitening() -> list[Json]:
    cases = []
    formulas: dict[str, Callable[..., Tensor]] = {
        "verl": verl_functional.masked_whiten,
        "trl": trl_ppo.masked_whiten,
    }
    for seed, (name, formula) in enumerate(formulas.items(), 80):
        draw = Draw(seed)
        mask = draw.mask(holes=True)
        values = draw.numbers(ROWS, COLUMNS, spread=2.0) + 1.0
        cases.append(
            {
                "by": name,
                "mask": mask,
                "values": values,
                "whitened": formula(values, mask.double()) * mask,
                "whitened_around_the_mean": formula(values, mask.double(), shift_mean=False) * mask,
            }
        )
    return cases


def logprobs_verl() -> list[Json]:
    cases = []
    for seed, temperature in enumerate([1.0, 0.7], 90):
        draw = Draw(seed)
        logits = draw.numbers(2, 3, 7, spread=2.0).float()
        tokens = torch.tensor([[0, 6, 3], [2, 2, 5]])
        scaled = logits / temperature
        cases.append(
            {
                "temperature": temperature,
                "logits": (logits.double()).round(decimals=DECIMALS),
                "tokens": tokens,
                "logprobs": verl_functional.logprobs_from_logits_naive(scaled, tokens),
                "entropy": verl_functional.entropy_from_logits(scaled),
            }
        )
    return cases


QUESTIONS: dict[str, tuple[tuple[str, ...], Callable[[], list[Json]]]] = {
    "gae_torchrl": (("torchrl",), gae_torchrl),
    "gae_verl": (("verl",), gae_verl),
    "policy_loss_verl": (("verl",), policy_loss_verl),
    "value_loss_verl": (("verl",), value_loss_verl),
    "aggregation_verl": (("verl",), aggregation_verl),
    "kl_verl": (("verl",), kl_verl),
    "adaptive_kl_verl": (("verl",), adaptive_kl_verl),
    "groups_verl": (("verl",), groups_verl),
    "importance_weights_verl": (("verl",), importance_weights_verl),
    "whitening": (("trl", "verl"), whitening),
    "logprobs_verl": (("verl",), logprobs_verl),
}


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, (asked, ask) in QUESTIONS.items():
        versions = {package: importlib.metadata.version(package) for package in asked}
        versions["torch"] = importlib.metadata.version("torch").split("+")[0]
        text = {"asked": versions, "cases": [plain(case) for case in ask()]}
        (DATA / f"{name}.json").write_text(json.dumps(text, indent=None) + "\n")


if __name__ == "__main__":
    main()

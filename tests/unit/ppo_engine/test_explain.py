"""The clip rule in plain numbers equals the one in tensors."""

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from ppo_engine.clip_stats import classify
from ppo_engine.errors import InvalidConfig
from ppo_engine.explain import TOKEN_CLASSES, TokenClass, explain
from ppo_engine.losses import surrogate_terms
from tests.unit.ppo_engine.loss_checks import GOLDEN_TOKENS

DRIFTS = [i / 10 for i in range(-30, 31)] + [-20.0, -1e-9, 1e-9, 20.0]
ADVANTAGES = (-2.5, -1.0, -1e-6, 0.0, 1e-6, 0.3, 2.0)
RULES: tuple[dict[str, Any], ...] = (
    {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 3.0},
    # Bounds that some drifts meet exactly: exp(0.3), exp(-0.4), exp(1.5).
    {"clip_low": 1 - math.exp(-0.4), "clip_high": math.exp(0.3) - 1, "dual_clip": math.exp(1.5)},
)


@pytest.mark.parametrize("rule", RULES)
def test_explain_equals_the_loss_and_its_gradient(rule: dict[str, Any]) -> None:
    pairs = list(itertools.product(DRIFTS, ADVANTAGES))
    drifts, advantages = torch.tensor(pairs, dtype=torch.float64).T
    drifts = drifts.clone().requires_grad_()
    terms = surrogate_terms(drifts, advantages, **rule)
    (gradients,) = torch.autograd.grad(terms.objective.sum(), drifts)
    classes = classify(drifts.detach(), advantages, **rule)
    ratios = torch.exp(drifts).tolist()

    for i, ratio in enumerate(ratios):
        told = explain(
            ratio,
            pairs[i][1],
            clip_range=rule["clip_low"],
            clip_range_high=rule["clip_high"],
            dual_clip=rule["dual_clip"],
        )

        assert told.unclipped == terms.unclipped[i].item()
        assert told.clipped == terms.clipped[i].item()
        assert told.objective == terms.objective[i].item()
        assert told.token_class == TOKEN_CLASSES[classes[i]]
        assert told.d_objective_d_logprob == gradients[i].item()


def test_the_grid_meets_every_class_and_every_tie() -> None:
    rule = RULES[2]
    low, high = 1 - rule["clip_low"], 1 + rule["clip_high"]
    ratios = torch.exp(torch.tensor(DRIFTS, dtype=torch.float64)).tolist()

    met = {
        explain(
            ratio,
            a,
            clip_range=rule["clip_low"],
            clip_range_high=rule["clip_high"],
            dual_clip=rule["dual_clip"],
        ).token_class
        for ratio in ratios
        for a in ADVANTAGES
    }

    assert met == set(TokenClass)
    assert {low, high, rule["dual_clip"]} <= set(ratios)


@pytest.mark.parametrize("token", GOLDEN_TOKENS)
def test_golden_tokens(token: Any) -> None:
    told = explain(
        token.ratio,
        token.advantage,
        clip_range=token.low,
        clip_range_high=token.high,
        dual_clip=token.dual,
    )

    found = (told.unclipped, told.clipped, told.objective, told.d_objective_d_logprob)
    assert found == pytest.approx(
        (token.unclipped, token.clipped, token.objective, token.gradient), rel=1e-12
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "branch", "token_class", "words"),
    [
        (3.0, 1.0, None, "clipped", "clipped_high", "already 3 times as likely"),
        (0.5, -2.5, None, "clipped", "clipped_low", "0.5 times its old probability"),
        (0.5, 1.0, None, "unclipped", "unclipped_out_low", "pulls it back"),
        (1.5, -2.5, None, "unclipped", "unclipped_out_high", "full weight"),
        (5.0, -1.0, 3.0, "dual", "dual_clipped", "dual clip 3"),
        (1.1, 1.0, None, "unclipped", "in_range_positive", "[0.8, 1.2]"),
        (1.1, -1.0, None, "unclipped", "in_range_negative", "made rarer"),
        (9.0, 0.0, None, "unclipped", "zero_advantage", "nothing to learn"),
    ],
)
def test_every_class_is_told_in_words(
    ratio: float, advantage: float, dual: float | None, branch: str, token_class: str, words: str
) -> None:
    told = explain(ratio, advantage, dual_clip=dual).to_dict()

    assert (told["branch"], told["class"]) == (branch, token_class)
    assert told["gradient_kept"] is (branch == "unclipped")
    assert words in told["explanation"]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"ratio": math.nan}, "ratio"),
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": math.inf}, "ratio"),
        ({"advantage": math.nan}, "advantage"),
        ({"advantage": -math.inf}, "advantage"),
        ({"clip_range": 1.0}, "clip_range"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"clip_range": math.nan}, "clip_range"),
        ({"clip_range_high": 0.0}, "clip_range_high"),
        ({"clip_range_high": math.inf}, "clip_range_high"),
        ({"dual_clip": 1.2}, "dual_clip"),
        ({"dual_clip": math.nan}, "dual_clip"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, float], param: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        explain(**{"ratio": 1.1, "advantage": 1.0, **settings})

    assert caught.value.param == param


def test_readers_without_torch_or_numpy_can_import_it() -> None:
    code = (
        "import sys, ppo_engine.explain, ppo_engine.reports, ppo_engine.rows, "
        "ppo_engine.graders.catalog; "
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

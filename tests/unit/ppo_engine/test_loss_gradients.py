"""The loss far from where training should be: gradients stay finite, and the pass is skipped."""

import math

import pytest
import torch
from torch import Tensor

from ppo_engine.clip_stats import PassStatistics
from ppo_engine.losses import log_ratio, surrogate_terms
from ppo_engine.reports import PassReport

RULE = {"clip_low": 0.2, "clip_high": 0.2}


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("drift", [-4999.0, -100.0, 100.0, 4999.0])
def test_the_gradient_stays_finite_however_far_the_policy_ran(
    drift: float, advantage: float, dual_clip: float | None
) -> None:
    logprobs = torch.tensor([[-5000.0 + max(drift, 0.0)]]).requires_grad_()
    old = torch.tensor([[-5000.0 - min(drift, 0.0)]])

    terms = surrogate_terms(
        log_ratio(logprobs, old), torch.tensor([[advantage]]), **RULE, dual_clip=dual_clip
    )
    (gradient,) = torch.autograd.grad(terms.objective.sum(), logprobs)

    # Beyond the bound of ±20 the log-ratio is a constant.
    assert gradient.item() == 0.0
    assert math.isfinite(terms.objective.item())


def report(logprobs: Tensor, mask: Tensor) -> PassReport:
    """Of a pass whose old log-probabilities and advantages are all 0."""
    zeros = torch.zeros_like(logprobs)
    statistics = PassStatistics(**RULE, dual_clip=None, value_clip_range=0.2)
    statistics.add(
        logprobs=logprobs,
        old_logprobs=zeros,
        advantages=zeros,
        response_mask=mask,
        values=zeros,
        old_values=zeros,
        returns=zeros,
    )
    return statistics.report(epoch=0, minibatch=0, grad_norm=1.0, max_grad_norm=1.0, skipped=False)


@pytest.mark.parametrize(
    ("drift", "is_skipped"), [(-20.5, True), (-20.0, False), (0.1, False), (20.5, True)]
)
def test_a_pass_is_skipped_where_a_log_ratio_had_to_be_bounded(drift, is_skipped) -> None:
    found = report(torch.tensor([[0.0, drift]]), torch.tensor([[True, True]]))

    assert found.skipped is is_skipped


def test_what_stands_outside_the_response_skips_no_pass() -> None:
    found = report(torch.tensor([[0.0, 900.0]]), torch.tensor([[True, False]]))

    assert not found.skipped

"""Hand-computed values of what is measured beside the losses."""

import pytest
import torch

from ppo_engine.logprobs import token_logprobs
from ppo_engine.measurements import _explained_variance

HAND = 1e-6


@pytest.mark.parametrize(
    ("temperature", "logprob", "entropy"), [(1.0, -0.407606, 0.832396), (0.5, -0.142932, 0.441057)]
)
def test_log_probability_and_entropy(temperature: float, logprob: float, entropy: float) -> None:
    found = token_logprobs(
        torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[2]]), temperature=temperature
    )

    assert found.logprobs.item() == pytest.approx(logprob, abs=HAND)
    assert found.entropy.item() == pytest.approx(entropy, abs=HAND)


def test_explained_variance() -> None:
    values, returns = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([1.02675, 1.165, 1.0])

    assert _explained_variance(values, returns) == pytest.approx(-0.9340, abs=1e-4)

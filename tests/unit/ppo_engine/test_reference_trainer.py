import pytest
import torch

from ppo_engine.rollout import Samples
from tests.reference_trainer import ReferenceTrainer, Response
from tests.tiny_run import tiny_config, tiny_policy, tiny_trainer

# fp32: padded and unpadded matrix products round differently, and Adam divides small gradients
# by small roots.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4


class RecordingSampler:
    """Passes samples on and keeps them."""

    def __init__(self, sampler, generator: torch.Generator) -> None:
        self._sampler = sampler
        self._generator = generator
        self.last: Samples | None = None

    def sample(self, prompts, generator: torch.Generator, **settings) -> Samples:
        samples = self._sampler.sample(prompts, generator, **settings)
        if generator is self._generator:  # not validation
            self.last = samples
        return samples


def _responses(samples: Samples, scores) -> list[Response]:
    columns = samples.prompt_columns
    return [
        Response(
            prompt=tokens[:columns][attention[:columns]].tolist(),
            answer=tokens[columns:][mask].tolist(),
            score=score,
        )
        for tokens, attention, mask, score in zip(
            samples.tokens, samples.attention_mask, samples.response_mask, scores, strict=True
        )
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dual_clip": 1.5, "clip_high": 0.28, "learning_rate": 1e-2},
        {"entropy_coef": 0.02, "gamma": 0.9, "temperature": 0.7, "warmup_fraction": 0.5},
        {"critic_warmup_steps": 1, "micro_batch_size": 5, "max_grad_norm": 0.1},
    ],
)
def test_the_engine_agrees_with_ppo_written_out(tiny_model, changes):
    config = tiny_config(**changes)
    trainer = tiny_trainer(tiny_model, config)
    recorder = trainer._sampler = RecordingSampler(trainer._sampler, trainer.generators["sampling"])
    reference = ReferenceTrainer(tiny_policy(tiny_model, config), config)
    shuffling = torch.Generator().manual_seed(1)
    scorer = trainer._scorer

    for report in trainer.steps():
        samples = recorder.last
        responses = _responses(samples, scorer.grade(samples.texts, []))
        orders = [
            [part.tolist() for part in torch.randperm(6, generator=shuffling).split(3)]
            for _ in range(config.epochs)
        ]
        losses = reference.update(responses, orders)

        assert report.values["policy_loss"] == pytest.approx(
            sum(losses) / len(losses), abs=LOSS_TOLERANCE
        )
        for ours, theirs in zip(
            trainer.policy.adapter_parameters().values(), reference.adapter, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=WEIGHT_TOLERANCE)
        for ours, theirs in zip(
            trainer.policy.value_parameters().values(), reference.head, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=WEIGHT_TOLERANCE)

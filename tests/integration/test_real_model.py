"""The engine on the demo's model, SmolLM2-135M-Instruct in fp32: what must hold exactly."""

import pytest
import torch

from ppo_engine.answers import load_adapter
from ppo_engine.config import LoraConfig
from ppo_engine.export import BaseModelRef, RunSummary, export_result
from ppo_engine.graders.catalog import build_grader
from ppo_engine.policy import BaseModel, Policy
from ppo_engine.trainer import Trainer
from tests.tiny_run import tiny_config, tiny_prompts
from trimtab.home import models_folder
from trimtab.model_cache import DEMO_MODEL

CONFIG = tiny_config(
    batch_size=4,
    minibatches=2,
    micro_batch_size=2,
    total_steps=2,
    max_response_tokens=8,
    learning_rate=3e-4,
    lora=LoraConfig(rank=16, alpha=32.0, target_modules="auto", last_layers=None),
)
QUESTIONS = ["What do you think of rain?", "Describe a quiet morning by the sea.", "Hi", "Why?"]


@pytest.fixture(scope="module")
def folder():
    path = models_folder() / DEMO_MODEL
    assert path.exists(), f"run `trimtab models fetch {DEMO_MODEL}` first (make test does)"
    return path


@pytest.fixture(scope="module")
def trained(folder):
    """A trainer after its two steps, with their reports."""
    base = BaseModel.load(folder, precision="fp32", device="cpu")
    policy = Policy(base, CONFIG.lora, temperature=1.0, seed=3)
    grader = build_grader({"type": "sentiment"})
    trainer = Trainer(policy, grader, tiny_prompts(base, QUESTIONS), CONFIG, seed=3)
    return trainer, list(trainer.steps())


def test_at_the_first_minibatch_the_ratio_is_exactly_one(trained):
    _, reports = trained

    for report in reports:
        first = report.passes[0].values
        assert (first["ratio_min"], first["ratio_max"]) == (1.0, 1.0)
        assert first["log_ratio_abs_max"] == 0.0
        assert first["policy_clip_fraction"] == 0.0


def test_the_kl_to_the_reference_starts_at_exactly_zero_and_then_moves(trained):
    _, (first, second) = trained

    assert first.values["kl_reference_per_sequence"] == 0.0
    assert second.values["kl_reference_per_sequence"] != 0.0


def test_the_exported_adapter_gives_the_same_log_probabilities_in_peft(trained, folder, tmp_path):
    trainer, reports = trained
    ref = BaseModelRef(id="HuggingFaceTB/SmolLM2-135M-Instruct", path=str(folder), sha256="0" * 64)
    summary = RunSummary(
        job_id="test",
        seed=3,
        config=CONFIG.to_dict(),
        reward={"type": "sentiment"},
        first=reports[0].values,
        last=reports[-1].values,
    )
    export_result(trainer.policy, tmp_path / "final", ref, summary, step=2)
    tokens = torch.tensor([list(tiny_prompts(trainer.policy.base, QUESTIONS)[0].token_ids)])
    with torch.no_grad():
        expected = trainer.policy.model(input_ids=tokens).logits

    base = BaseModel.load(folder, precision="fp32", device="cpu")
    loaded = load_adapter(base, tmp_path / "final" / "adapter")

    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, expected)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(input_ids=tokens).logits, expected, atol=1e-3)

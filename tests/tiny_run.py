"""Valid small engine runs: a test states only what matters to it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_engine.config import (
    AdvantageEstimator,
    Critic,
    KlEstimator,
    LoraConfig,
    LossAggregation,
    TrainConfig,
)
from ppo_engine.guards import GuardConfig
from ppo_engine.policy import BaseModel, Policy
from ppo_engine.prompts import EncodedPrompt
from ppo_engine.rows import Prompt
from ppo_engine.trainer import Trainer

TINY_CONFIG = TrainConfig(
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    value_clip_range=0.2,
    kl_coef=0.05,
    kl_estimator=KlEstimator.K1,
    kl_placement="reward",
    kl_controller="fixed",
    target_kl_per_sequence=6.0,
    kl_horizon=10_000,
    target_kl=None,
    advantage_estimator=AdvantageEstimator.GAE,
    group_size=1,
    gamma=1.0,
    lam=0.95,
    lambda_value=None,
    standardize_advantages=True,
    reward_scaling="running_std",
    missing_stop_penalty=0.0,
    overlong_buffer=None,
    mask_truncated=False,
    bootstrap_truncated=False,
    importance_weight_cap=None,
    critic=Critic.SHARED_HEAD,
    value_coef=0.1,
    entropy_coef=0.0,
    critic_warmup_steps=0,
    batch_size=6,
    epochs=2,
    minibatches=2,
    total_steps=4,
    micro_batch_size=2,
    loss_aggregation=LossAggregation.TOKEN_MEAN,
    learning_rate=3e-3,
    value_learning_rate=1e-2,
    lr_schedule="constant",
    warmup_fraction=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    max_prompt_tokens=64,
    max_response_tokens=8,
    temperature=1.0,
    lora=LoraConfig(rank=4, alpha=8.0, target_modules="auto", last_layers=None),
    precision="fp32",
    checkpoint_interval=2,
    eval_interval=2,
    eval_samples=4,
    stored_samples=2,
    guards=GuardConfig(preset="off", rules=()),
)


def tiny_config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TINY_CONFIG, **changes)


class AsciiShare:
    """A reward that varies between answers of a random model, and can be learned."""

    def grade(self, texts: Sequence[str], _items: Sequence[Mapping[str, Any]]) -> list[float]:
        return [sum(c.isascii() for c in text) / max(1, len(text)) for text in texts]


def tiny_prompts(base: BaseModel, texts: Sequence[str] = ("Hi", "Why not?", "abc", "Go on, then")):
    prompts = []
    for line, text in enumerate(texts, start=1):
        messages = ({"role": "user", "content": text},)
        ids = base.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        prompt = Prompt(messages=messages, item={})
        prompts.append(EncodedPrompt(prompt=prompt, line=line, token_ids=tuple(ids)))
    return prompts


def tiny_policy(folder: Path, config: TrainConfig = TINY_CONFIG, *, seed: int = 0) -> Policy:
    base = BaseModel.load(folder, precision=config.precision, device="cpu")
    critic = config.critic if config.has_critic else None
    return Policy(base, config.lora, temperature=config.temperature, seed=seed, critic=critic)


def tiny_trainer(
    folder: Path, config: TrainConfig = TINY_CONFIG, *, seed: int = 0, scorer: Any = None
) -> Trainer:
    policy = tiny_policy(folder, config, seed=seed)
    prompts = tiny_prompts(policy.base)
    scorer = scorer or AsciiShare()
    return Trainer(policy, scorer, prompts, config, seed=seed, validation=prompts)

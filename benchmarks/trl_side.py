"""TRL's side of `trl_step.py`: its PPOTrainer as released, timed from outside.

    .venv/bench-trl/bin/python -m benchmarks.trl_side ORDER.json

Runs in an environment of its own; nothing of Trimtab's engine is imported.  The clock sits in a
callback, in a hook and around one function that TRL calls.
"""

import os
import tempfile
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn, tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.trl_task import (
    CLIP_RANGE,
    GAMMA,
    KL_COEF,
    LAM,
    LORA_ALPHA,
    LORA_RANK,
    VALUE_CLIP_RANGE,
    VALUE_COEF,
    FixedBatch,
    LossAnswer,
    StepAnswer,
    Steps,
    carry_out,
    peak_memory_bytes,
    reward,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "default": torch.float32}
TEMPERATURE = 1.0


class RewardFunction(nn.Module):
    """The reward function in the shape that TRL asks of a reward model.

    TRL runs the backbone on prompt and response, then `score` on its last hidden states.  Here
    these are the reward itself, in one dimension, the same at every position.
    """

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any, response_tokens: int) -> None:
        super().__init__()
        self.backbone = RewardBackbone(tokenizer, response_tokens)
        self.score = nn.Identity()


class RewardBackbone(nn.Module):
    """Decodes responses and asks the function."""

    def __init__(self, tokenizer: Any, response_tokens: int) -> None:
        super().__init__()
        self.seconds: list[float] = []
        """Of every call."""
        self._tokenizer = tokenizer
        self._response_tokens = response_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_options: Any) -> Any:
        """Hidden states [B, S, 1]."""
        start = time.perf_counter()
        responses = input_ids[:, -self._response_tokens :]
        masks = attention_mask[:, -self._response_tokens :].bool()
        rows = [row[mask].tolist() for row, mask in zip(responses, masks, strict=True)]
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        rewards = tensor([reward(text) for text in texts])
        states = rewards[:, None, None].expand(*input_ids.shape, 1)
        self.seconds.append(time.perf_counter() - start)
        return SimpleNamespace(hidden_states=(states,))


@dataclass(slots=True)
class Clock:
    """When each phase of each step ended, and what the steps were like."""

    sampled: list[float] = field(default_factory=list)
    scored: list[float] = field(default_factory=list)
    """When the first minibatch of the step went into the model."""
    ended: list[float] = field(default_factory=list)
    """One more than steps: the first is the start of the training."""
    tokens: list[int] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)

    def seconds(self) -> list[dict[str, float]]:
        """Of each step, by phase."""
        times = zip(self.ended[:-1], self.sampled, self.scored, self.ended[1:], strict=True)
        return [
            {
                "sample": sampled - start,
                "score": scored - sampled,
                "learn": end - scored,
                "step": end - start,
            }
            for start, sampled, scored, end in times
        ]

    def watch(self, trainer: PPOTrainer) -> None:
        """Note times from now on."""
        generate = ppo_trainer.batch_generation
        pad_id = trainer.processing_class.pad_token_id

        def generate_and_note(model: Any, queries: Tensor, *options: Any) -> Any:
            sequences, logits = generate(model, queries, *options)
            self.sampled.append(time.perf_counter())
            self.tokens.append(int((sequences[:, queries.shape[1] :] != pad_id).sum()))
            return sequences, logits

        def note_first(*_inputs: Any) -> None:
            if len(self.scored) < len(self.sampled):
                self.scored.append(time.perf_counter())

        ppo_trainer.batch_generation = generate_and_note
        # Rollout and scoring call the models inside; only minibatches go through the whole.
        trainer.model.register_forward_pre_hook(note_first)
        trainer.add_callback(StepEnds(self))


class StepEnds(TrainerCallback):
    """Tells the clock where steps end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_begin(self, *_arguments: Any, **_options: Any) -> None:
        """The first step starts."""
        self._clock.ended.append(time.perf_counter())

    def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
        """Its optimizer steps and metrics are done."""
        self._clock.ended.append(time.perf_counter())

    def on_log(self, *_arguments: Any, logs: dict[str, Any], **_options: Any) -> None:
        """What TRL says of a step."""
        self._clock.logs.append(dict(logs))


def take_steps(steps: Steps) -> StepAnswer:
    """TRL's step, with the micro-batches that suit it best; see `_settings`."""
    torch.manual_seed(steps.seed)
    tokenizer = _tokenizer(steps.model, steps.unused_token)
    reward_model = RewardFunction(tokenizer, steps.response_tokens)
    value_model = _value_model(steps)
    policy = get_peft_model(_causal_lm(steps.model, steps.dtype), _lora("CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            _settings(steps, folder),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,  # the policy with its adapter off
            reward_model=reward_model,
            train_dataset=Dataset.from_dict({"input_ids": steps.prompts}),
            value_model=value_model,
            optimizers=_optimizer(policy, value_model, steps),
        )
        clock = Clock()
        clock.watch(trainer)
        trainer.train()
    logs = [log for log in clock.logs if "objective/scores" in log]
    timed = slice(steps.warmup_steps, None)
    return StepAnswer(
        seconds=clock.seconds()[timed],
        tokens=clock.tokens[timed],
        rewards=[float(log["objective/scores"]) for log in logs],
        kl_to_reference=[float(log["objective/kl"]) for log in logs],
        reward_seconds=sum(reward_model.backbone.seconds) / len(reward_model.backbone.seconds),
        peak_memory_bytes=peak_memory_bytes(),
        trained_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        critic_parameters=sum(p.numel() for p in value_model.parameters()),
        note=(
            f"{steps.trl_critic} critic; one forward and backward per minibatch; rollout and "
            f"scoring {steps.rows} rows at a time; fused AdamW; no gradient checkpointing"
        ),
    )


def _settings(steps: Steps, folder: str) -> PPOConfig:
    """TRL's defaults but for what both sides share.

    A micro-batch is a minibatch: with gradient accumulation, TRL takes an optimizer step only every
    `gradient_accumulation_steps` micro-batches, whatever `num_mini_batches` says.  `bf16` is a flag
    that its PPOTrainer leaves without effect; the dtype is that of the weights.
    """
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=steps.rows,
        gradient_accumulation_steps=1,
        num_mini_batches=steps.minibatches,
        num_ppo_epochs=steps.epochs,
        total_episodes=steps.rows * (steps.warmup_steps + steps.timed_steps),
        local_rollout_forward_batch_size=steps.rows,
        num_sample_generations=0,
        response_length=steps.response_tokens,
        stop_token=None,
        temperature=TEMPERATURE,
        kl_coef=KL_COEF,
        cliprange=CLIP_RANGE,
        cliprange_value=VALUE_CLIP_RANGE,
        vf_coef=VALUE_COEF,
        gamma=GAMMA,
        lam=LAM,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=steps.seed,
    )


def _optimizer(policy: nn.Module, value_model: nn.Module, steps: Steps) -> Any:
    """Of TRL's default kind, with a rate for the critic that a whole model can bear."""
    groups = [
        {"params": _trained(policy), "lr": steps.learning_rate},
        {"params": _trained(value_model), "lr": steps.trl_critic_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _tokenizer(folder: str, unused_token: int) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(unused_token)
    return tokenizer


def _causal_lm(folder: str, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True)


def _value_model(steps: Steps) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(
        steps.model, num_labels=1, dtype=DTYPES[steps.dtype], local_files_only=True
    )
    if steps.trl_critic == "full":
        return model
    # Put into the model, not around it: TRL reaches for its backbone and its head by name.
    model = inject_adapter_in_model(_lora("SEQ_CLS", exclude="score"), model)
    model.score.requires_grad_(requires_grad=True)  # that froze all but the adapters
    return model


def _lora(task_type: str, *, exclude: str | None = None) -> LoraConfig:
    return LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules="all-linear",
        exclude_modules=None if exclude is None else [exclude],
        task_type=task_type,
    )


@torch.no_grad()
def fixed_loss(batch: FixedBatch) -> LossAnswer:
    """The lines of TRL's training loop from the model to the loss, with the functions it calls."""
    tokenizer = _tokenizer(batch.model, batch.unused_token)
    model = get_peft_model(_causal_lm(batch.model, "fp32"), _lora("CAUSAL_LM"))
    queries = tokenizer.pad({"input_ids": batch.prompts}, return_tensors="pt")["input_ids"]
    responses = tensor(batch.responses)
    context_length = queries.shape[1]
    sequences = torch.cat([queries, responses], dim=1)

    output = ppo_trainer.forward(model, sequences, tokenizer.pad_token_id)
    logits = output.logits[:, context_length - 1 : -1] / (TEMPERATURE + 1e-7)
    logprobs = ppo_trainer.selective_log_softmax(logits, responses)

    mask = torch.ones_like(logprobs).bool()
    values, old_values = tensor(batch.values), tensor(batch.old_values)
    returns, advantages = tensor(batch.returns), tensor(batch.advantages)
    clipped = torch.clamp(values, old_values - VALUE_CLIP_RANGE, old_values + VALUE_CLIP_RANGE)
    errors = torch.max(torch.square(values - returns), torch.square(clipped - returns))
    value_loss = 0.5 * ppo_trainer.masked_mean(errors, mask)
    ratio = torch.exp(logprobs - tensor(batch.old_logprobs))
    limited = torch.clamp(ratio, 1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE)
    losses = torch.max(-advantages * ratio, -advantages * limited)
    policy_loss = ppo_trainer.masked_mean(losses, mask)
    return LossAnswer(
        logprobs=logprobs.tolist(),
        old_logprobs=batch.old_logprobs,
        policy_loss=policy_loss.item(),
        value_loss=value_loss.item(),
        loss=(policy_loss + VALUE_COEF * value_loss).item(),
    )


if __name__ == "__main__":
    carry_out(fixed_loss, take_steps)

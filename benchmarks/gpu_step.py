"""One PPO step on a GPU at the size of real models, against a plain loop of separate models.

    python benchmarks/gpu_step.py --shape 0.5b --steps 3 [--baseline]

Weights are random: speed and memory do not depend on them.  The plain loop is what one would write
first: `generate`, then a policy with LoRA, a second copy as the reference, a third as the critic,
full logits, padding and all; attention is the eager one, since the fused one gives NaN where left
padding sees nothing.  Prints medians over the steps after the first.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_engine.config import TrainConfig
from ppo_engine.policy import BaseModel, Policy
from ppo_engine.prompts import EncodedPrompt
from ppo_engine.rows import Prompt
from ppo_engine.trainer import Trainer

HERE = Path(__file__).parent
PROMPT_TOKENS = 64
SHAPES = {
    # Qwen2.5-0.5B
    "0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # Llama-3-8B
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


class NoText:
    """A tokenizer that says nothing; rewards here come from numbers."""

    pad_token_id = 0

    def batch_decode(self, rows: Sequence[Any], **_: Any) -> list[str]:
        """An empty text per row."""
        return [""] * len(rows)

    def decode(self, _tokens: Sequence[int]) -> str:
        """An empty text."""
        return ""


class Noise:
    """A reward that costs nothing and varies."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def grade(self, texts: Sequence[str], _items: Sequence[Mapping[str, Any]]) -> list[float]:
        """A number between 0 and 1 for each text."""
        numbers: list[float] = torch.rand(len(texts), generator=self._generator).tolist()
        return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What both sides do in a step."""

    rows: int
    response_tokens: int
    epochs: int
    minibatches: int
    micro_batch_size: int

    def config(self, steps: int) -> TrainConfig:
        """The same work as settings of the engine."""
        settings = json.loads((HERE / "step_config.json").read_text(encoding="utf-8"))
        changes = {
            "batch_size": self.rows,
            "epochs": self.epochs,
            "minibatches": self.minibatches,
            "micro_batch_size": self.micro_batch_size,
            "max_prompt_tokens": PROMPT_TOKENS,
            "max_response_tokens": self.response_tokens,
            "total_steps": steps,
            "critic_warmup_steps": 0,
            "target_kl": None,
            "precision": "bf16",
            "stored_samples": 0,
        }
        return TrainConfig.from_dict(settings | changes)


def random_model(shape: str, **settings: Any) -> Any:
    """A frozen model of this shape in bf16 on the GPU."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, eos_token_id=1, **settings)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(requires_grad=False)
    return model.eval()


def prompts(work: Work, vocabulary: int) -> list[EncodedPrompt]:
    """Random prompts of 32 to 64 tokens."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for line in range(work.rows):
        length = int(torch.randint(32, PROMPT_TOKENS + 1, (1,), generator=generator))
        ids = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
        message = Prompt(messages=({"role": "user", "content": ""},), item={})
        found.append(EncodedPrompt(prompt=message, line=line, token_ids=tuple(ids)))
    return found


def ours(shape: str, work: Work, steps: int) -> dict[str, float]:
    """Medians of our phases, and the peak memory."""
    model = random_model(shape)
    stop = model.config.vocab_size - 1  # next to never drawn: every response has full length
    base = BaseModel(model=model, tokenizer=NoText(), stop_ids=(stop,), pad_id=0)
    config = work.config(steps + 1)
    policy = Policy(base, config.lora, temperature=1.0, seed=0)
    trainer = Trainer(policy, Noise(), prompts(work, stop), config, seed=0)
    torch.cuda.reset_peak_memory_stats()
    reports = list(trainer.steps())
    for event in reports[0].events:
        print(f"  {event.code}: {event.message}", flush=True)
    # The first step also checks itself and sets kernels up.
    parts = [name for name in reports[0].values if name.startswith("seconds.")]
    found = {
        name.removeprefix("seconds."): statistics.median(r.values[name] or 0.0 for r in reports[1:])
        for name in parts
    }
    return found | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


class PlainLoop:
    """Three models, `generate`, full logits."""

    def __init__(self, shape: str, work: Work) -> None:
        self.work = work
        eager = {"attn_implementation": "eager"}
        lora = PeftLoraConfig(r=16, lora_alpha=32, target_modules="all-linear", bias="none")
        self.policy = get_peft_model(random_model(shape, **eager), lora)
        self.reference = random_model(shape, **eager)
        self.critic = get_peft_model(random_model(shape, **eager), lora)
        self.head = nn.Linear(self.critic.config.hidden_size, 1, device="cuda")
        trained = [p for m in (self.policy, self.critic) for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW([*trained, *self.head.parameters()], lr=1e-5)
        rows = prompts(work, self.policy.config.vocab_size)
        longest = max(len(row.token_ids) for row in rows)
        padded = [[0] * (longest - len(row.token_ids)) + list(row.token_ids) for row in rows]
        self.tokens = torch.tensor(padded, device="cuda")
        self.mask = self.tokens != 0

    def step(self) -> dict[str, float]:
        """Seconds of each phase of one step."""
        seconds: dict[str, float] = {}
        sequences = timed(seconds, "sample", self._sample)
        old, reference, values = timed(seconds, "estimate", lambda: self._estimate(sequences))
        advantages = torch.randn_like(old)
        timed(seconds, "learn", lambda: self._learn(sequences, old, values, advantages))
        del reference
        return seconds

    def _sample(self) -> Tensor:
        drawn: Tensor = self.policy.generate(
            input_ids=self.tokens,
            attention_mask=self.mask.long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=self.work.response_tokens,
            min_new_tokens=self.work.response_tokens,
            pad_token_id=0,
        )
        return drawn

    @torch.no_grad()
    def _estimate(self, sequences: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for rows in self._micro_batches(torch.arange(len(sequences), device="cuda")):
            batch = sequences[rows]
            parts.append(
                (
                    self._logprobs(self.policy, batch),
                    self._logprobs(self.reference, batch),
                    self._values(batch),
                )
            )
        old, reference, values = zip(*parts, strict=True)
        return torch.cat(old), torch.cat(reference), torch.cat(values)

    def _learn(self, sequences: Tensor, old: Tensor, values: Tensor, advantages: Tensor) -> None:
        for _ in range(self.work.epochs):
            order = torch.randperm(len(sequences), device="cuda")
            for rows in order.split(len(sequences) // self.work.minibatches):
                self.optimizer.zero_grad()
                for part in self._micro_batches(rows):
                    ratio = (self._logprobs(self.policy, sequences[part]) - old[part]).exp()
                    gain = advantages[part]
                    objective = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
                    error = (self._values(sequences[part]) - values[part] - gain).square()
                    (-objective.mean() + 0.1 * error.mean()).backward()
                self.optimizer.step()

    def _micro_batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.work.micro_batch_size)

    def _logprobs(self, model: Any, sequences: Tensor) -> Tensor:
        logits = model(input_ids=sequences, attention_mask=(sequences != 0).long()).logits
        count = self.work.response_tokens
        logprobs = torch.log_softmax(logits[:, -count - 1 : -1].float(), dim=-1)
        return logprobs.gather(-1, sequences[:, -count:, None]).squeeze(-1)

    def _values(self, sequences: Tensor) -> Tensor:
        output = self.critic(
            input_ids=sequences,
            attention_mask=(sequences != 0).long(),
            output_hidden_states=True,
        )
        states = output.hidden_states[-1][:, -self.work.response_tokens - 1 : -1]
        values: Tensor = self.head(states.float()).squeeze(-1)
        return values


def timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    """The result of `work`, its seconds noted."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start
    return result


def baseline(shape: str, work: Work, steps: int) -> dict[str, float]:
    """The same figures of the plain loop."""
    loop = PlainLoop(shape, work)
    torch.cuda.reset_peak_memory_stats()
    found = [loop.step() for _ in range(steps + 1)][1:]
    medians = {name: statistics.median(each[name] for each in found) for name in found[0]}
    return medians | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def report(name: str, figures: Mapping[str, float], shape: str, work: Work) -> None:
    """One line: phases, tokens per second, share of the chip's rate in the update."""
    total = sum(seconds for part, seconds in figures.items() if part != "peak_gib")
    rate = _update_flops(shape, work) / figures["learn"] / 1e12
    line = {
        "who": name,
        "shape": shape,
        **{key: round(value, 3) for key, value in figures.items()},
        "step_seconds": round(total, 3),
        "response_tokens_per_second": round(work.rows * work.response_tokens / total),
        "update_tflops": round(rate, 1),
    }
    print(json.dumps(line), flush=True)


def _update_flops(shape: str, work: Work) -> float:
    """What the update cannot do without.

    Forward and backward pass of every token through the frozen linear layers, and of every response
    token through the head; attention and adapters are not counted.
    """
    s: dict[str, Any] = SHAPES[shape]
    hidden, kv = s["hidden_size"], s["num_key_value_heads"] / s["num_attention_heads"]
    layer = hidden * hidden * (2 + 2 * kv) + 3 * hidden * s["intermediate_size"]
    responses = work.rows * work.response_tokens
    tokens = responses + sum(len(each.token_ids) for each in prompts(work, s["vocab_size"]))
    head = hidden * s["vocab_size"]
    flops: float = 4 * work.epochs * (tokens * s["num_hidden_layers"] * layer + responses * head)
    return flops


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--baseline", action="store_true")
    arguments = parser.parse_args()
    work = Work(
        rows=arguments.rows,
        response_tokens=arguments.response_tokens,
        epochs=2,
        minibatches=4,
        micro_batch_size=arguments.micro_batch_size,
    )
    side = baseline if arguments.baseline else ours
    name = "plain loop" if arguments.baseline else "trimtab"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    report(name, side(arguments.shape, work, arguments.steps), arguments.shape, work)


if __name__ == "__main__":
    sys.exit(main())

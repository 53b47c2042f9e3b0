"""Whether the cost of a step grows as it should: with its tokens, and with nothing else.

    python -m benchmarks.scaling --model FOLDER [--layers 4] [--steps 200] [--precision bf16]

- seconds per token over response lengths and over rows: to stay level, but for attention's own
  growth;
- the share of filler among the tokens computed in the update when a third of the responses stop
  early;
- memory over many steps with responses of all lengths: to stay level.

`--layers` takes only so many of the model's layers, which is quick, but the head then weighs more.
Sizes take turns, a step each, and ratios are those within a round, as a machine's speed changes
from minute to minute; medians of the rounds after the first.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.step import HERE, ResponseLength
from ppo_engine.attention import SpanwiseAttention
from ppo_engine.config import TrainConfig
from ppo_engine.key_values import NativeKeyValues, PlainKeyValues
from ppo_engine.layout import Layout
from ppo_engine.packing import CommonShape, common_prefix, pack
from ppo_engine.policy import BaseModel, Policy, read_states
from ppo_engine.prompts import EncodedPrompt
from ppo_engine.rows import Prompt
from ppo_engine.sampling import Sampler
from ppo_engine.trainer import Trainer
from ppo_engine.update import Updater

PROMPT_TOKENS = 24
RESPONSE_TOKENS = (16, 64, 256)
ROWS = (8, 32, 128, 256)
STOP_EVERY = 30
"""Of the vocabulary's entries one in so many ends a response of the memory curve."""
SMALL = 8
"""Micro-batch, and rows where they are not what varies."""
ROUNDS = 7
"""That count."""


def loaded(model: Path, *, layers: int, precision: str) -> BaseModel:
    """The model's lowest layers, which answer no stop token."""
    base = BaseModel.load(model, precision=precision, device="cpu")
    backbone = base.model.base_model
    backbone.layers = backbone.layers[:layers]
    base.model.config.num_hidden_layers = layers
    return dataclasses.replace(base, stop_ids=(len(base.tokenizer),))


def settings_of(base: BaseModel, **changed: Any) -> TrainConfig:
    """Those of `step_config.json` but for some."""
    settings = json.loads((HERE / "step_config.json").read_text())
    precision = "fp32" if base.model.dtype is torch.float32 else "bf16"
    return TrainConfig.from_dict(settings | {"epochs": 1, "precision": precision} | changed)


def policy_of(base: BaseModel) -> Policy:
    """With a fresh adapter."""
    return Policy(base, settings_of(base).lora, temperature=1.0, seed=0)


def trainer_of(
    policy: Policy,
    *,
    rows: int,
    response_tokens: int,
    steps: int,
    prompt_tokens: int = PROMPT_TOKENS,
) -> Trainer:
    """A run on random prompts without a common beginning."""
    config = settings_of(
        policy.base,
        batch_size=rows,
        minibatches=max(1, rows // SMALL),
        micro_batch_size=SMALL,
        max_response_tokens=response_tokens,
        total_steps=steps,
    )
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1000, 40_000, (rows, prompt_tokens), generator=generator)
    prompt = Prompt(messages=({"role": "user", "content": "-"},), item={})
    prompts = [
        EncodedPrompt(prompt=prompt, line=1, token_ids=tuple(each)) for each in words.tolist()
    ]
    return Trainer(policy, ResponseLength(), prompts, config, seed=0)


class AttentionClock:
    """Seconds spent in attention since they were last read."""

    METHODS = (
        (PlainKeyValues, "attend"),
        (NativeKeyValues, "attend"),
        (SpanwiseAttention, "forward"),
        (SpanwiseAttention, "backward"),
    )

    def __init__(self) -> None:
        self._seconds = 0.0
        for kind, name in self.METHODS:
            setattr(kind, name, self._timed(getattr(kind, name)))

    def read(self) -> float:
        """Seconds; the clock starts anew."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            self._seconds += time.perf_counter() - start
            return result

        return timed


@torch.no_grad()
def refresh(policy: Policy) -> None:
    """Makes the adapter one that changes nothing, as the first step of a run wants it to be."""
    for name, parameter in policy.adapter_parameters().items():
        if "lora_B" in name:
            parameter.zero_()


class Size(NamedTuple):
    """Of a step."""

    rows: int
    response_tokens: int

    @property
    def computed(self) -> int:
        """Tokens: prompts are as long as responses.

        Those take the output head, too, so their share must stay.
        """
        return 2 * self.rows * self.response_tokens


def growth(policy: Policy, clock: AttentionClock, sizes: Sequence[Size]) -> list[dict[str, float]]:
    """Seconds per token of each size, relative to the first one's.

    Of sampling and of learning, with and without attention.
    """
    runs = [
        trainer_of(
            policy,
            rows=size.rows,
            response_tokens=size.response_tokens,
            prompt_tokens=size.response_tokens,
            steps=ROUNDS + 1,
        ).steps()
        for size in sizes
    ]
    seconds: dict[str, float] = {}

    def note(phase: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            clock.read()
            start = time.perf_counter()
            result = action(*arguments, **options)
            took = time.perf_counter() - start
            seconds[phase] = took
            seconds[f"{phase}, no attention"] = took - clock.read()
            return result

        return timed

    ratios: list[dict[str, list[float]]] = [{} for _ in sizes]
    with (
        mock.patch.object(Sampler, "sample", note("sample", Sampler.sample)),
        mock.patch.object(Updater, "learn", note("learn", Updater.learn)),
    ):
        for number in range(ROUNDS + 1):
            first: dict[str, float] = {}
            for size, run, found in zip(sizes, runs, ratios, strict=True):
                refresh(policy)
                next(run)
                per_token = {phase: took / size.computed for phase, took in seconds.items()}
                first = first or per_token
                for phase, each in per_token.items():
                    if number:
                        found.setdefault(phase, []).append(each / first[phase])
    return [{phase: statistics.median(each) for phase, each in found.items()} for found in ratios]


def filler_share(policy: Policy) -> float:
    """Filler among the tokens computed in an epoch when a third of the rows stop early."""
    trainer = trainer_of(policy, rows=48, response_tokens=48, steps=1)
    sampler = Sampler(policy=trainer.policy, max_response_tokens=48)
    samples = sampler.sample(trainer.prompts.next_batch(48), torch.Generator().manual_seed(0))
    mask = samples.response_mask.clone()
    attention = samples.attention_mask.clone()
    lengths = torch.randint(4, 40, (16,), generator=torch.Generator().manual_seed(1)).tolist()
    for row, length in enumerate(lengths):
        mask[3 * row, length:] = False
        attention[3 * row, samples.prompt_columns + length :] = False
    samples = dataclasses.replace(
        samples,
        response_mask=mask,
        attention_mask=attention,
        behavior_logprobs=samples.behavior_logprobs * mask,
    )
    computed = real = 0
    layout = Layout(trainer.policy, samples, SMALL)
    for rows in torch.randperm(48, generator=torch.Generator().manual_seed(2)).split(SMALL):
        for batch in layout.micro_batches(rows):
            tokens, seen = samples.tokens[batch.rows], attention[batch.rows]
            read = read_states(mask[batch.rows], tokens)
            shape = batch.shape or CommonShape(0, common_prefix(tokens, seen, read))
            packed = pack(seen, read, prefix=shape.prefix, pad_to=shape.tokens)
            computed += len(packed.sources)
            real += int(packed.is_real.sum())
    return 1 - real / computed


def memory_over(base: BaseModel, steps: int) -> list[float]:
    """Peak memory after each step, MiB."""
    stops = tuple(range(0, len(base.tokenizer), STOP_EVERY))
    base = dataclasses.replace(base, stop_ids=stops)
    trainer = trainer_of(policy_of(base), rows=2 * SMALL, response_tokens=64, steps=steps)
    return [(r.values["peak_memory_bytes"] or 0.0) / 2**20 for r in trainer.steps()]


def report(name: str, counts: Sequence[int], found: Sequence[Mapping[str, float]]) -> None:
    """A table."""
    print(f"\n| {name} | {' | '.join(found[0])} |\n|{'---|' * (1 + len(found[0]))}")
    for count, each in zip(counts, found, strict=True):
        shares = (f"{share:.2f}" for share in each.values())
        print(f"| {count} | {' | '.join(shares)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="of the memory curve")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(arguments)
    base = loaded(options.model, layers=options.layers, precision=options.precision)
    print(
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"{options.layers} layers, {options.precision}, relative to the first line of each table"
    )
    # First: what the tables take would hide its growth.
    curve = memory_over(base, options.steps)
    tenth = max(1, len(curve) // 10)
    print(
        f"\npeak memory after {tenth} steps {curve[tenth - 1]:.0f} MiB, "
        f"after {len(curve)} steps {curve[-1]:.0f} MiB",
        flush=True,
    )
    clock, policy = AttentionClock(), policy_of(base)
    by_tokens = [Size(SMALL, count) for count in RESPONSE_TOKENS]
    report("response tokens (8 rows)", RESPONSE_TOKENS, growth(policy, clock, by_tokens))
    by_rows = [Size(count, 16) for count in ROWS]
    report("rows (16 response tokens)", ROWS, growth(policy, clock, by_rows))
    filler = filler_share(policy)
    print(f"\nfiller with a third stopping early: {filler:.1%} of the update's tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

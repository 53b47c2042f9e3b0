"""Our PPO step beside that of TRL's last PPOTrainer, in one run.

    make bench-trl                  # or, once that has made TRL's environment:
    python -m benchmarks.trl_step --model FOLDER [--pairs 3] [--rows 32] [--response-tokens 48]
    python -m benchmarks.trl_step --model FOLDER --learning [--seeds 1 2 3] [--learning-steps 15]

First both compute the loss of one fixed batch.  Then each takes the same steps in a process of its
own, in turn, on the same prompts, to the same number of tokens, with the same reward function.
Ratios are those of a pair; figures of different machines, or of one on different days, do not
compare.  With `--learning` both train longer instead, and rewards stand beside KL.
"""

import argparse
import dataclasses
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.trl_task import FixedBatch, LossAnswer, Order, StepAnswer, Steps, answer_in
from ppo_engine.prompts import load_prompts

ROOT = Path(__file__).parents[1]
TRL_PYTHON = ROOT / ".venv" / "bench-trl" / "bin" / "python"
PLAIN_PROMPTS = ROOT / "benchmarks" / "trl_prompts.txt"
CHAT_PROMPTS = ROOT / "trimtab" / "demo_data" / "prompts.jsonl"
MAX_PROMPT_TOKENS = 256
UNUSED_TOKEN = "<empty_output>"  # noqa: S105 - not a password
PHASES = ("sample", "score", "learn", "step")
FIXED_ROWS, FIXED_TOKENS = 4, 12
MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides' answers to one order, one right after the other."""

    ours: StepAnswer
    trl: StepAnswer


class Sides:
    """Starts either side on an order, and waits for its answer."""

    def __init__(self, trl_python: Path, folder: Path) -> None:
        self._trl_python = trl_python
        self._order = folder / "order.json"

    def ours(self, order: Order) -> dict[str, Any]:
        """By this environment's Python."""
        return self._ask(sys.executable, "benchmarks.trl_ours", order)

    def trl(self, order: Order) -> dict[str, Any]:
        """By the Python of TRL's environment."""
        return self._ask(str(self._trl_python), "benchmarks.trl_side", order)

    def pair(self, steps: Steps) -> Pair:
        """Ours first."""
        order = Order(steps=steps)
        return Pair(StepAnswer(**self.ours(order)), StepAnswer(**self.trl(order)))

    def _ask(self, python: str, module: str, order: Order) -> dict[str, Any]:
        order.write(self._order)
        ended = subprocess.run(  # noqa: S603 - our own modules
            [python, "-m", module, str(self._order)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise SystemExit(f"{module} failed:\n{ended.stderr[-3000:]}")
        return answer_in(ended.stdout)


def encoded_prompts(kind: str, tokenizer: Any) -> list[list[int]]:
    """Token ids: plain sentences to go on with, or questions in the model's chat template."""
    if kind == "chat":
        found = load_prompts(CHAT_PROMPTS, tokenizer, max_prompt_tokens=MAX_PROMPT_TOKENS)
        return [list(prompt.token_ids) for prompt in found]
    lines = PLAIN_PROMPTS.read_text(encoding="utf-8").splitlines()
    return [list(tokenizer(line)["input_ids"]) for line in lines]


def fixed_batch(model: str, prompts: Sequence[list[int]], unused_token: int) -> FixedBatch:
    """A minibatch with every number drawn from a fixed seed; its responses are other prompts."""
    draw = random.Random(0)

    def numbers(spread: float) -> list[list[float]]:
        return [
            [round(draw.gauss(0, spread), 4) for _ in range(FIXED_TOKENS)]
            for _ in range(FIXED_ROWS)
        ]

    return FixedBatch(
        model=model,
        prompts=list(prompts[:FIXED_ROWS]),
        responses=[prompt[:FIXED_TOKENS] for prompt in prompts[FIXED_ROWS : 2 * FIXED_ROWS]],
        log_ratios=numbers(0.3),
        old_logprobs=[],
        advantages=numbers(1.0),
        values=numbers(0.5),
        old_values=numbers(0.5),
        returns=numbers(0.5),
        unused_token=unused_token,
    )


def compare_losses(sides: Sides, batch: FixedBatch) -> list[str]:
    """A table of what both make of the batch; TRL is given our old log-probabilities."""
    ours = LossAnswer(**sides.ours(Order(fixed_batch=batch)))
    given = dataclasses.replace(batch, old_logprobs=ours.old_logprobs)
    trl = LossAnswer(**sides.trl(Order(fixed_batch=given)))
    apart = max(
        abs(one - other)
        for ours_row, trl_row in zip(ours.logprobs, trl.logprobs, strict=True)
        for one, other in zip(ours_row, trl_row, strict=True)
    )
    rows = [
        f"| {name} | {one:.7f} | {other:.7f} | {abs(one - other):.1e} |"
        for name, one, other in (
            ("policy loss", ours.policy_loss, trl.policy_loss),
            ("value loss", ours.value_loss, trl.value_loss),
            ("loss", ours.loss, trl.loss),
        )
    ]
    return [
        "| one fixed batch, fp32 | Trimtab | TRL | apart |",
        "|---|---|---|---|",
        *rows,
        f"| log-probabilities, largest difference | | | {apart:.1e} |",
    ]


def ratio_text(ratios: Sequence[float]) -> str:
    """Median, and the range where there are several."""
    middle = f"{statistics.median(ratios):.2f}x"
    return middle if len(ratios) < 2 else f"{middle} ({min(ratios):.2f}-{max(ratios):.2f})"


def phase_seconds(answer: StepAnswer, phase: str) -> float:
    """Median over the timed steps."""
    return statistics.median(step[phase] for step in answer.seconds)


def table(pairs: Sequence[Pair]) -> list[str]:
    """Medians over the pairs, and the ratios TRL to us, as Markdown."""

    def plain(name: str, of: Callable[[StepAnswer], float], form: str) -> str:
        ours = statistics.median(of(pair.ours) for pair in pairs)
        return f"| {name} | {ours:{form}} | {statistics.median(of(p.trl) for p in pairs):{form}} |"

    def row(name: str, of: Callable[[StepAnswer], float], form: str) -> str:
        ratios = [of(pair.trl) / of(pair.ours) for pair in pairs]
        return f"{plain(name, of, form)} {ratio_text(ratios)} |"

    names = {
        "sample": "rollout, s",
        "score": "scoring, s",
        "learn": "update, s",
        "step": "whole step, s",
    }
    return [
        "| median of the pairs | Trimtab | TRL | TRL / Trimtab, median (range) |",
        "|---|---|---|---|",
        *(row(names[phase], lambda a, p=phase: phase_seconds(a, p), ".2f") for phase in PHASES),
        row("peak memory, MiB", lambda answer: answer.peak_memory_bytes / MEBIBYTE, ",.0f"),
        *(
            f"{plain(name, of, form)} |"
            for name, of, form in (
                ("response tokens a step", lambda answer: statistics.mean(answer.tokens), ",.0f"),
                ("trained parameters", lambda answer: answer.trained_parameters, ",.0f"),
                ("the critic's own parameters", lambda answer: answer.critic_parameters, ",.0f"),
                ("reward function, ms a step", lambda answer: 1000 * answer.reward_seconds, ".1f"),
            )
        ),
    ]


def learning_table(pairs: Sequence[Pair], seeds: Sequence[int]) -> list[str]:
    """Reward and KL to the reference by step, mean over the seeds, and each seed's end."""

    def mean(values: Sequence[float]) -> float:
        return statistics.mean(values)

    def course(answers: Sequence[StepAnswer], step: int) -> str:
        rewards = mean([answer.rewards[step] for answer in answers])
        return f"{rewards:.3f} | {mean([answer.kl_to_reference[step] for answer in answers]):.2f}"

    def end(answer: StepAnswer) -> str:
        """Over the last quarter of the run, as single steps are noisy."""
        last = max(len(answer.rewards) // 4, 1)
        return f"{mean(answer.rewards[-last:]):.3f} | {mean(answer.kl_to_reference[-last:]):.2f}"

    ours, trl = [pair.ours for pair in pairs], [pair.trl for pair in pairs]
    header = "| Trimtab: reward | KL, nats a response | TRL: reward | KL |"
    return [
        f"| step, mean of {len(pairs)} seeds {header}",
        "|---|---|---|---|---|",
        *(
            f"| {step + 1} | {course(ours, step)} | {course(trl, step)} |"
            for step in range(len(ours[0].rewards))
        ),
        "",
        f"| seed, mean of the last quarter {header}",
        "|---|---|---|---|---|",
        *(
            f"| {seed} | {end(pair.ours)} | {end(pair.trl)} |"
            for seed, pair in zip(seeds, pairs, strict=True)
        ),
    ]


def machine() -> str:
    """Its shape, and how busy it was before."""
    return (
        f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start, "
        f"torch {torch.__version__}"
    )


def steps_of(arguments: argparse.Namespace, prompts: list[list[int]], unused_token: int) -> Steps:
    """What both sides are to do, but for the seed."""
    return Steps(
        model=str(arguments.model.resolve()),
        prompts=prompts,
        rows=arguments.rows,
        response_tokens=arguments.response_tokens,
        epochs=arguments.epochs,
        minibatches=arguments.minibatches,
        dtype=arguments.dtype,
        trl_critic=arguments.critic,
        warmup_steps=0 if arguments.learning else arguments.warmup_steps,
        timed_steps=arguments.learning_steps if arguments.learning else arguments.steps,
        learning_rate=arguments.learning_rate,
        value_learning_rate=arguments.value_learning_rate,
        trl_critic_learning_rate=arguments.trl_critic_learning_rate,
        unused_token=unused_token,
        seed=0,
    )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed")
    parser.add_argument("--warmup-steps", type=int, default=1, help="before them, not timed")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "default"), default="fp32")
    parser.add_argument("--prompts", choices=("plain", "chat"), default="plain")
    parser.add_argument("--critic", choices=("full", "lora"), default="full", help="TRL's")
    parser.add_argument("--learning", action="store_true", help="compare learning, not speed")
    parser.add_argument("--learning-steps", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of --learning")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of both adapters")
    parser.add_argument("--value-learning-rate", type=float, default=5e-3, help="of our head")
    parser.add_argument("--trl-critic-learning-rate", type=float, default=1e-5)
    parser.add_argument("--trl-python", type=Path, default=TRL_PYTHON)
    arguments = parser.parse_args()
    if not arguments.trl_python.exists():
        parser.error(f"{arguments.trl_python} does not exist; `make bench-trl` makes it")
    return arguments


def main() -> None:
    """Compare losses, then times or learning; print as it goes."""
    arguments = parsed()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    prompts = encoded_prompts(arguments.prompts, tokenizer)
    if len(prompts) < arguments.rows:
        raise SystemExit(f"there are {len(prompts)} prompts, too few for --rows {arguments.rows}")
    unused_token = tokenizer.convert_tokens_to_ids(UNUSED_TOKEN)
    if unused_token in (None, tokenizer.unk_token_id):
        raise SystemExit(f"the tokenizer has no {UNUSED_TOKEN} to pad TRL's rows with")
    steps = steps_of(arguments, prompts, unused_token)
    if not arguments.learning:
        # Both take the same prompts, whatever order they shuffle them into.
        steps = dataclasses.replace(steps, prompts=prompts[: arguments.rows])
    lengths = [len(prompt) for prompt in steps.prompts]
    print(
        f"{machine()}\n{steps.rows} rows of {len(lengths)} {arguments.prompts} prompts "
        f"({min(lengths)}-{max(lengths)} tokens), {steps.response_tokens} new tokens, "
        f"{steps.epochs} epochs x {steps.minibatches} minibatches, {steps.dtype}\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(arguments.trl_python, Path(folder))
        plain = encoded_prompts("plain", tokenizer)
        losses = compare_losses(sides, fixed_batch(steps.model, plain, unused_token))
        print(*losses, "", sep="\n", flush=True)
        seeds = arguments.seeds if arguments.learning else list(range(1, arguments.pairs + 1))
        pairs = []
        for seed in seeds:
            pair = sides.pair(dataclasses.replace(steps, seed=seed))
            pairs.append(pair)
            print(
                f"seed {seed}: step {phase_seconds(pair.ours, 'step'):.2f} s against "
                f"{phase_seconds(pair.trl, 'step'):.2f} s of TRL, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    print(f"\nTrimtab: {pairs[0].ours.note}\nTRL: {pairs[0].trl.note}\n")
    print(*table(pairs), sep="\n")
    if arguments.learning:
        print("", *learning_table(pairs, seeds), sep="\n")


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of a PPO step goes, and what larger micro-batches give.

    python benchmarks/step.py [--model FOLDER] [--steps 5]

Prints medians over the steps after the first, and ratios within this run: figures of different
machines, or of one machine on different days, do not compare.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppo_engine.config import TrainConfig
from ppo_engine.policy import BaseModel, Policy
from ppo_engine.prompts import load_prompts
from ppo_engine.trainer import Trainer

HERE = Path(__file__).parent
PROMPTS = HERE.parent / "trimtab" / "demo_data" / "prompts.jsonl"
PHASES = ("sample", "score", "estimate", "learn")
MICRO_BATCH_SIZES = (1, 2, 4, 8)


class ResponseLength:
    """A reward that costs nothing to compute."""

    def grade(self, texts: Sequence[str], _items: Sequence[Mapping[str, Any]]) -> list[float]:
        """Characters of each text."""
        return [float(len(text)) for text in texts]


def seconds_by_phase(model: Path, *, micro_batch_size: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each phase in every step but the first, which warms caches up."""
    settings = json.loads((HERE / "step_config.json").read_text())
    settings |= {"micro_batch_size": micro_batch_size, "total_steps": steps + 1}
    config = TrainConfig.from_dict(settings)
    base = BaseModel.load(model, precision=config.precision, device="cpu")
    prompts = load_prompts(PROMPTS, base.tokenizer, max_prompt_tokens=config.max_prompt_tokens)
    policy = Policy(base, config.lora, temperature=config.temperature, seed=0)
    reports = list(Trainer(policy, ResponseLength(), prompts, config, seed=0).steps())[1:]
    return {
        phase: [report.values[f"seconds.{phase}"] or 0.0 for report in reports] for phase in PHASES
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    learn = {}
    for size in MICRO_BATCH_SIZES:
        phases = seconds_by_phase(arguments.model, micro_batch_size=size, steps=arguments.steps)
        medians = {name: statistics.median(values) for name, values in phases.items()}
        learn[size] = medians["learn"]
        shares = ", ".join(
            f"{name} {value / sum(medians.values()):.0%}" for name, value in medians.items()
        )
        print(
            f"micro-batch {size}: {shares}; learn takes x{learn[size] / learn[1]:.2f} of "
            f"micro-batch 1 (median of {arguments.steps}, "
            f"slowest/fastest {max(phases['learn']) / min(phases['learn']):.2f})"
        )


if __name__ == "__main__":
    sys.exit(main())

"""Answers of the base and of an adapter to the same prompts, scored: what training has changed."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ppo_engine.errors import InvalidConfig
from ppo_engine.folders import write_json
from ppo_engine.policy import BaseModel, CausalPolicy
from ppo_engine.prompts import EncodedPrompt
from ppo_engine.sampling import Sampler
from ppo_engine.scoring import Scorer, checked_scores

BATCH_SIZE = 16
"""Prompts sampled at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledAnswers:
    """Several answers to each prompt."""

    texts: tuple[tuple[str, ...], ...]
    """[prompts][samples]"""
    scores: Tensor
    """[prompts, samples] fp32"""

    def mean(self) -> dict[str, float]:
        """Mean reward, and its standard error over prompts (answers to one are not independent)."""
        return _mean_of_prompts(self.scores.mean(dim=1))


def load_adapter(base: BaseModel, adapter: Path) -> PeftModel:
    """The base with a stored adapter, as any user of `peft` would load it."""
    try:
        return PeftModel.from_pretrained(base.model, adapter).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidConfig(f"the adapter cannot be loaded: {error}", param="adapter") from error


def sample_answers(
    policy: CausalPolicy,
    scorer: Scorer,
    prompts: Sequence[EncodedPrompt],
    *,
    samples_per_prompt: int,
    max_response_tokens: int,
    seed: int,
) -> SampledAnswers:
    """Scored answers; the same seed draws the same random numbers for any policy."""
    sampler = Sampler(policy=policy, max_response_tokens=max_response_tokens)
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[str]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    for _ in range(samples_per_prompt):
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            drawn = sampler.sample(batch, generator).texts
            rewards = checked_scores(scorer, drawn, [each.prompt.item for each in batch])
            for row, text in enumerate(drawn):
                texts[start + row].append(text)
                scores[start + row].append(rewards[row].item())
    return SampledAnswers(texts=tuple(map(tuple, texts)), scores=torch.tensor(scores))


def write_comparison(
    folder: Path,
    prompts: Sequence[EncodedPrompt],
    base: SampledAnswers,
    adapter: SampledAnswers | None,
) -> None:
    """`answers.jsonl` with every answer, `summary.json` with the means and their difference."""
    lines = []
    for index, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt.prompt.messages[-1]["content"]}
        row["base"] = _rows(base, index)
        row["adapter"] = [] if adapter is None else _rows(adapter, index)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    summary: dict[str, Any] = {
        "prompts": len(prompts),
        "samples_per_prompt": base.scores.shape[1],
        "base": base.mean(),
    }
    if adapter is not None:
        # Prompt by prompt: what makes one prompt easier than another drops out.
        gained = adapter.scores.mean(dim=1) - base.scores.mean(dim=1)
        summary |= {"adapter": adapter.mean(), "difference": _mean_of_prompts(gained)}
    write_json(folder / "summary.json", summary)


def _rows(answers: SampledAnswers, index: int) -> list[dict[str, Any]]:
    pairs = zip(answers.texts[index], answers.scores[index].tolist(), strict=True)
    return [{"text": text, "score": score} for text, score in pairs]


def _mean_of_prompts(by_prompt: Tensor) -> dict[str, float]:
    count = len(by_prompt)
    spread = by_prompt.std(correction=1).item() if count > 1 else 0.0
    return {"mean": by_prompt.mean().item(), "standard_error": spread / math.sqrt(count)}

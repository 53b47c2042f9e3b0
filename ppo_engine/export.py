"""The result of a run on disk: an adapter that `peft` loads, its card, and a manifest."""

import json
import mimetypes
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ppo_engine.errors import InvalidConfig
from ppo_engine.folders import MANIFEST, files_of, sha256_of, whole_folder, write_json
from ppo_engine.policy import Policy

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_READABLE = 0o644  # adapters are shared; libraries leave weights at 0600


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelRef:
    """Which model an adapter belongs to."""

    id: str
    """Public name, such as `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    path: str
    """Folder of its files on this machine; never leaves it."""
    sha256: str
    """Digest of its weights."""


def write_adapter(policy: Policy, folder: Path, base_model: BaseModelRef) -> None:
    """The LoRA weights and their config in PEFT's format; the same weights are the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(policy.model).items()
    }
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = policy.model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_model.id, "inference_mode": True}
    plain = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    write_json(folder / ADAPTER_CONFIG, plain)


def read_adapter(policy: Policy, folder: Path) -> None:
    """Put stored LoRA weights into the policy's adapter."""
    weights = load_file(folder / ADAPTER_WEIGHTS)
    if sorted(weights) != sorted(get_peft_model_state_dict(policy.model)):
        raise InvalidConfig("the stored adapter has other layers than this run", param="lora")
    set_peft_model_state_dict(policy.model, weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What the card says about the training."""

    job_id: str
    seed: int
    config: dict[str, Any]
    reward: dict[str, Any]
    first: dict[str, float | None]
    """Metric values of the first update this process saw."""
    last: dict[str, float | None]
    """Metric values of the last update."""


def export_result(
    policy: Policy, folder: Path, base_model: BaseModelRef, summary: RunSummary, *, step: int
) -> str:
    """Write the finished adapter folder; the digest of its manifest."""
    with whole_folder(folder) as temporary:
        adapter = temporary / "adapter"
        write_adapter(policy, adapter, base_model)
        policy.base.tokenizer.save_pretrained(adapter)
        (adapter / "README.md").write_text(_card(base_model, summary, step=step), encoding="utf-8")
        training = temporary / "training"
        training.mkdir()
        write_json(
            training / "config.json",
            {"seed": summary.seed, "reward": summary.reward, "config": summary.config},
        )
        for name in files_of(temporary):
            (temporary / name).chmod(_READABLE)
        manifest = {
            "schema_version": 1,
            "job_id": summary.job_id,
            "step": step,
            "base_model": {"id": base_model.id, "sha256": base_model.sha256},
            "files": [_entry(temporary, name) for name in files_of(temporary)],
        }
        write_json(temporary / MANIFEST, manifest)
    return sha256_of(folder / MANIFEST)


def _entry(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return {
        "path": name,
        "role": _role(name),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "media_type": _media_type(name),
    }


def _role(name: str) -> str:
    if name.startswith("training/"):
        return "training"
    file = Path(name).name
    if file in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        return "adapter"
    return "card" if file == "README.md" else "tokenizer"


def _media_type(name: str) -> str:
    known = {".md": "text/markdown", ".jinja": "text/plain", ".jsonl": "application/jsonl"}
    guessed = mimetypes.guess_type(name)[0]
    return known.get(Path(name).suffix) or guessed or "application/octet-stream"


def _card(base_model: BaseModelRef, summary: RunSummary, *, step: int) -> str:
    """The model card: where the adapter comes from, how it was trained, how to load it."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("trimtab", "torch", "peft"))
    return f"""---
base_model: {base_model.id}
library_name: peft
tags: [lora, ppo, trimtab]
---
# LoRA adapter for {base_model.id}

Trained with PPO by Trimtab in {step} updates; job `{summary.job_id}`, seed {summary.seed}.
Base weights: sha256 `{base_model.sha256}`.

| metric | first update | last update |
|---|---|---|
{_metric_rows(summary)}

Reward:

```json
{json.dumps(summary.reward, indent=2, ensure_ascii=False)}
```

All settings are in `training/config.json` of the job's artifacts. A reward is a proxy: read samples
before trusting the number.

## Loading

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base_model.id}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

Made with {versions}.
"""


def _metric_rows(summary: RunSummary) -> str:
    names = ("reward_mean", "kl_reference_per_sequence", "policy_clip_fraction", "entropy")
    return "\n".join(
        f"| {name} | {_number(summary.first.get(name))} | {_number(summary.last.get(name))} |"
        for name in names
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"

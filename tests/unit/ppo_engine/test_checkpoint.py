import json
import shutil

import pytest
import torch

from ppo_engine import folders
from ppo_engine.checkpoint import restore_checkpoint, save_checkpoint
from ppo_engine.errors import InvalidConfig
from ppo_engine.export import BaseModelRef
from tests.tiny_run import tiny_config, tiny_trainer

BASE = BaseModelRef(id="tests/tiny-random", path="unused", sha256="0" * 64)
CONFIG = tiny_config(
    total_steps=6,
    kl_controller="adaptive",
    kl_horizon=50,
    critic_warmup_steps=1,
    lr_schedule="cosine",
    batch_size=6,
)
TIMES = ("seconds.", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


def _timeless(report) -> dict:
    return {k: v for k, v in report.values.items() if not k.startswith(TIMES)}


def _digest(trainer, folder) -> str:
    save_checkpoint(trainer, folder, BASE)
    return json.loads((folder / "manifest.json").read_text())["files"]


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tiny_model, tmp_path):
    whole = tiny_trainer(tiny_model, CONFIG)
    expected = [_timeless(report) for report in whole.steps()]

    first = tiny_trainer(tiny_model, CONFIG)
    steps = first.steps()
    values = [_timeless(next(steps)) for _ in range(3)]
    save_checkpoint(first, tmp_path / "ck-3", BASE)
    values.append(_timeless(next(steps)))  # work after the checkpoint is lost
    values.pop()
    second = tiny_trainer(tiny_model, CONFIG)
    changed = restore_checkpoint(second, tmp_path / "ck-3")
    values += [_timeless(report) for report in second.steps()]

    assert changed == {}
    assert values == expected
    assert _digest(second, tmp_path / "a") == _digest(whole, tmp_path / "b")


def test_saving_changes_nothing(tiny_model, tmp_path):
    quiet, saving = tiny_trainer(tiny_model, CONFIG), tiny_trainer(tiny_model, CONFIG)

    for one, other in zip(quiet.steps(), saving.steps(), strict=True):
        save_checkpoint(saving, tmp_path / f"ck-{other.step}", BASE)
        assert _timeless(one) == _timeless(other)


def test_a_damaged_checkpoint_is_refused(tiny_model, tmp_path):
    trainer = tiny_trainer(tiny_model, CONFIG)
    next(trainer.steps())
    save_checkpoint(trainer, tmp_path / "ck-1", BASE)
    weights = tmp_path / "ck-1" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    with pytest.raises(InvalidConfig, match=r"adapter_model\.safetensors is damaged"):
        restore_checkpoint(tiny_trainer(tiny_model, CONFIG), tmp_path / "ck-1")


def test_another_environment_is_told(tiny_model, tmp_path):
    trainer = tiny_trainer(tiny_model, CONFIG)
    next(trainer.steps())
    save_checkpoint(trainer, tmp_path / "ck-1", BASE)
    manifest = json.loads((tmp_path / "ck-1" / "manifest.json").read_text())
    manifest["environment"]["torch"] = "1.0"
    (tmp_path / "ck-1" / "manifest.json").write_text(json.dumps(manifest))

    changed = restore_checkpoint(tiny_trainer(tiny_model, CONFIG), tmp_path / "ck-1")

    assert changed == {"torch": {"saved": "1.0", "now": torch.__version__}}


def test_a_crash_while_saving_leaves_the_old_checkpoint(tiny_model, tmp_path, monkeypatch):
    trainer = tiny_trainer(tiny_model, CONFIG)
    steps = trainer.steps()
    next(steps)
    save_checkpoint(trainer, tmp_path / "ck", BASE)
    kept = shutil.copytree(tmp_path / "ck", tmp_path / "copy")
    next(steps)

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", crash)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(trainer, tmp_path / "ck", BASE)

    manifest = (tmp_path / "ck" / "manifest.json").read_bytes()
    assert manifest == (kept / "manifest.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck", "copy"]


def test_a_checkpoint_holds_safetensors_and_json_only(tiny_model, tmp_path):
    trainer = tiny_trainer(tiny_model, CONFIG)
    next(trainer.steps())
    save_checkpoint(trainer, tmp_path / "ck-1", BASE)

    suffixes = {path.suffix for path in (tmp_path / "ck-1").rglob("*") if path.is_file()}

    assert suffixes == {".safetensors", ".json"}

"""What goes wrong outside the mathematics, and what becomes of it."""

import errno
import json
import math
from contextlib import suppress

import pytest
from safetensors import SafetensorError

from ppo_engine.__main__ import _as_engine_error
from ppo_engine.config import LoraConfig
from ppo_engine.errors import DiskFull, InvalidConfig, ModelLoadFailed, OutOfMemory
from ppo_engine.folders import whole_folder
from ppo_engine.policy import BaseModel
from ppo_engine.reports import PassSums
from ppo_engine.run_directory import RunFile
from tests.tiny_run import tiny_config, tiny_policy


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (SafetensorError("Error: I/O error: No space left (os error 28)"), DiskFull),
        (MemoryError(), OutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
    ],
)
def test_a_known_fault_keeps_its_exit_code(error, kind):
    assert type(_as_engine_error(error)) is kind


def test_an_unforeseen_fault_names_no_folder():
    told = _as_engine_error(FileNotFoundError(2, "No such file", "/secret/place"))

    assert (told.exit_code, told.code) == (1, "internal_error")
    assert "/secret" not in told.message


def test_a_run_file_that_lacks_something_says_what(tmp_path):
    content = {"protocol_version": 1, "kind": "train", "config": {}, "reward": {}}
    (tmp_path / "run.json").write_text(json.dumps(content))

    with pytest.raises(InvalidConfig, match="lacks 'data'"):
        RunFile.load(tmp_path / "run.json")


def test_an_adapter_on_the_output_head_is_refused(tiny_model):
    config = tiny_config(
        lora=LoraConfig(rank=4, alpha=8.0, target_modules=("lm_head",), last_layers=None)
    )

    with pytest.raises(InvalidConfig, match="output head") as caught:
        tiny_policy(tiny_model, config)

    assert caught.value.param == "lora.target_modules"


def test_a_model_that_scales_its_scores_is_refused(tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"logit_scale": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelLoadFailed, match="logit_scale"):
        BaseModel.load(tmp_path, precision="fp32", device="cpu")


def test_a_largest_value_that_is_no_number_is_not_hidden():
    sums = PassSums(log_ratio_abs_max=0.5).merged(PassSums(log_ratio_abs_max=math.nan))

    assert math.isnan(sums.log_ratio_abs_max)


def test_a_folder_that_fails_half_way_leaves_the_one_before(tmp_path):
    folder = tmp_path / "ck"
    with whole_folder(folder) as new:
        (new / "a").write_text("first")

    with suppress(ZeroDivisionError), whole_folder(folder) as new:
        (new / "a").write_text("second")
        raise ZeroDivisionError

    assert (folder / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("first", "second"):
        with whole_folder(tmp_path / "ck") as new:
            (new / text).write_text(text)

    assert [path.name for path in (tmp_path / "ck").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]

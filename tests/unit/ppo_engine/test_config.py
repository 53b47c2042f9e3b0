import dataclasses

import pytest

from ppo_engine.config import TrainConfig
from ppo_engine.errors import InvalidConfig
from tests.tiny_run import TINY_CONFIG, tiny_config


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_low": 1.0}, "clip_low"),
        ({"clip_high": 0.0}, "clip_high"),
        ({"dual_clip": 1.2}, "dual_clip"),
        ({"minibatches": 4}, "minibatches"),
        ({"minibatches": 0}, "minibatches"),
        ({"epochs": 0}, "epochs"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"kl_controller": "bogus"}, "kl_controller"),
        ({"reward_scaling": "bogus"}, "reward_scaling"),
        ({"kl_controller": "adaptive", "kl_horizon": 5}, "kl_horizon"),
        ({"kl_controller": "adaptive", "kl_coef": 0.0}, "kl_coef"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, param):
    with pytest.raises(InvalidConfig) as caught:
        tiny_config(**changes)

    assert caught.value.param == param


def test_settings_survive_json():
    assert TrainConfig.from_dict(TINY_CONFIG.to_dict()) == TINY_CONFIG


@pytest.mark.parametrize(
    ("name", "value"), [("loss_aggregation", "bogus"), ("lora", {"rank": 4}), ("epochs", "two")]
)
def test_settings_that_cannot_be_read_are_refused(name, value):
    with pytest.raises(InvalidConfig):
        TrainConfig.from_dict(TINY_CONFIG.to_dict() | {name: value})


def test_missing_and_unknown_settings_are_named():
    fields = TINY_CONFIG.to_dict()
    del fields["epochs"]

    with pytest.raises(InvalidConfig, match="epoch_count, epochs"):
        TrainConfig.from_dict(fields | {"epoch_count": 2})


def test_settings_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY_CONFIG.epochs = 3

"""What the request takes, the engine takes: the two are written apart and must not drift."""

from typing import Any

import pytest

from core.spec import LengthReward, RegexReward, SentimentReward, parse_spec, resolve
from ppo_engine.errors import InvalidConfig
from ppo_engine.graders.catalog import GRADER_TYPES, build_grader
from tests.factories import spec_dict
from tests.unit.core.test_spec import BOUNDS, CHOICES
from worker.translate import engine_config


@pytest.mark.parametrize("name", sorted(set(BOUNDS) | set(CHOICES)))
def test_the_engine_takes_every_value_inside_the_bounds(name: str) -> None:
    low, _, high, _ = BOUNDS.get(name, (CHOICES.get(name, [None])[0], 0, None, 0))
    values = CHOICES.get(name) or [low, high]

    for value in values:
        engine_config(resolve(parse_spec(spec_dict(**{name: value})), prompts=8))


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip_range", 1.0), ("clip_range", 0.0), ("dual_clip", 1.2), ("minibatches", 5)],
)
def test_the_engine_refuses_what_the_request_refuses(name: str, value: Any) -> None:
    resolved = resolve(parse_spec(spec_dict()), prompts=8)
    resolved.hyperparameters[name] = value

    with pytest.raises(InvalidConfig):
        engine_config(resolved)


def test_the_same_rewards_are_on_offer() -> None:
    kinds = [SentimentReward, LengthReward, RegexReward]
    offered = {kind.model_fields["type"].annotation.__args__[0] for kind in kinds}

    assert offered == set(GRADER_TYPES)


@pytest.mark.parametrize(
    "reward",
    [
        {"type": "sentiment"},
        {"type": "sentiment", "target": "neutral", "name": "mood", "input": "{{item.a}}"},
        {"type": "length", "min": 0, "max": 0},
        {"type": "length", "unit": "chars", "target": 0.5},
        {"type": "length", "unit": "sentences", "target": 3, "tolerance": 0.1},
        {"type": "regex", "pattern": "(a|b)+"},
        {"type": "regex", "pattern": "x" * 1000, "mode": "count", "max_count": 1},
        {"type": "regex", "pattern": "x", "mode": "fullmatch"},
    ],
)
def test_the_grader_is_built_from_what_the_request_made_of_it(reward: dict[str, Any]) -> None:
    body = spec_dict()
    body["method"]["ppo"]["reward"] = reward

    rewards = build_grader(parse_spec(body).reward).grade(["a good day"], [{"a": "b"}])

    assert len(rewards) == 1

"""Rewards: what each grader gives, and which settings it refuses."""

import subprocess
import sys
from typing import Any

import pytest

from ppo_engine.errors import InvalidConfig, RewardFailed
from ppo_engine.graders.catalog import build_grader
from ppo_engine.graders.length import count_sentences
from ppo_engine.graders.template import Template


def reward(text: str, item: dict[str, Any] | None = None, **settings: Any) -> float:
    """The reward of one text."""
    (value,) = build_grader(settings).grade([text], [item or {}])
    return value


def test_sentiment_is_the_compound_score() -> None:
    # VADER: "love" is 3.2; x / sqrt(x² + 15).
    love = 3.2 / (3.2**2 + 15) ** 0.5

    assert reward("love", type="sentiment") == pytest.approx(love, abs=1e-4)
    assert reward("love", type="sentiment", target="negative") == pytest.approx(-love, abs=1e-4)
    assert reward("love", type="sentiment", target="neutral") == pytest.approx(
        1 - 2 * love, abs=1e-4
    )
    assert reward("", type="sentiment") == 0.0
    assert reward("", type="sentiment", target="neutral") == 1.0


def test_good_words_beat_bad_ones() -> None:
    grader = build_grader({"type": "sentiment"})

    good, plain, bad = grader.grade(
        ["What a wonderful day!", "The table is brown.", "This is awful."], [{}, {}, {}]
    )

    assert good > plain > bad


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("one two three", {"min": 2, "max": 4}, 1.0),
        ("one two", {"min": 2}, 1.0),
        ("one two", {"max": 2}, 1.0),
        ("one", {"min": 4, "max": 9}, 0.25),
        ("one two three four", {"max": 2}, 0.5),
        ("", {"min": 4}, 0.0),
        ("one", {"max": 0}, 0.0),
        ("", {"max": 0}, 1.0),
        ("one two", {"target": 2, "tolerance": 4}, 1.0),
        ("one two three", {"target": 2, "tolerance": 4}, 0.75),
        ("one", {"target": 2, "tolerance": 4}, 0.75),
        ("one two three four five six seven", {"target": 2, "tolerance": 4}, 0.0),
        ("one", {"target": 2}, 0.5),
        ("one", {"target": 0}, 0.0),
        ("añb ", {"unit": "chars", "target": 4, "tolerance": 1}, 1.0),
        ("One. Two! Three", {"unit": "sentences", "min": 3, "max": 3}, 1.0),
    ],
)
def test_length_rewards(text: str, settings: dict[str, Any], expected: float) -> None:
    assert reward(text, type="length", **settings) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("Hello", 1),
        ("Hello. ", 1),
        ("It costs 3.14 euros. Cheap!", 2),
        ('He said "Go." Then he left.', 2),
        ("What?! No way...", 2),
        ("one。two！three", 3),
        ("..... " * 20000, 0),
    ],
)
def test_sentences_are_counted(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("say yes now", {"pattern": "yes"}, 1.0),
        ("say no now", {"pattern": "yes"}, 0.0),
        ("yes", {"pattern": "yes", "mode": "fullmatch"}, 1.0),
        ("yes!", {"pattern": "yes", "mode": "fullmatch"}, 0.0),
        ("a b a", {"pattern": "a", "mode": "count", "max_count": 4}, 0.5),
        ("a a a a a", {"pattern": "a", "mode": "count", "max_count": 4}, 1.0),
        ("a a", {"pattern": "a", "mode": "count"}, 1.0),
        ("Ä", {"pattern": "(?i)ä"}, 1.0),
    ],
)
def test_regex_rewards(text: str, settings: dict[str, Any], expected: float) -> None:
    assert reward(text, type="regex", **settings) == expected


def test_a_pattern_that_explodes_elsewhere_is_linear_here() -> None:
    assert reward("a" * 100_000, type="regex", pattern="^(a+)+$", mode="fullmatch") == 1.0
    assert reward("a" * 100_000 + "!", type="regex", pattern="^(a+)+$") == 0.0


def test_bad_patterns_print_nothing() -> None:
    code = (
        "from ppo_engine.graders.catalog import build_grader\n"
        "from ppo_engine.errors import InvalidConfig\n"
        "try: build_grader({'type': 'regex', 'pattern': '('})\n"
        "except InvalidConfig: pass\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    assert done.stderr == b""


@pytest.mark.parametrize(
    ("settings", "param", "words"),
    [
        ({}, "reward.type", "sentiment, length, regex"),
        ({"type": "python"}, "reward.type", "'python'"),
        ({"type": "sentiment", "target": "happy"}, "reward.target", "positive, negative, neutral"),
        ({"type": "sentiment", "pattern": "x"}, "reward.pattern", "unknown"),
        ({"type": "length"}, "reward.min", "must be given"),
        ({"type": "length", "min": 1, "target": 2}, "reward.min", "one of the two"),
        ({"type": "length", "min": 3, "max": 2}, "reward.min", "must not exceed max"),
        ({"type": "length", "min": -1}, "reward.min", "at least 0"),
        ({"type": "length", "min": "3"}, "reward.min", "number"),
        ({"type": "length", "min": True}, "reward.min", "number"),
        ({"type": "length", "min": float("nan")}, "reward.min", "number"),
        ({"type": "length", "max": float("inf")}, "reward.max", "number"),
        ({"type": "length", "min": 1, "tolerance": 2}, "reward.tolerance", "needs target"),
        ({"type": "length", "target": 1, "tolerance": 0}, "reward.tolerance", "positive"),
        ({"type": "length", "unit": "tokens", "min": 1}, "reward.unit", "words, chars, sentences"),
        ({"type": "regex"}, "reward.pattern", "required"),
        ({"type": "regex", "pattern": ""}, "reward.pattern", "1 to 1000"),
        ({"type": "regex", "pattern": "a" * 1001}, "reward.pattern", "1 to 1000"),
        ({"type": "regex", "pattern": "(?=a)"}, "reward.pattern", "(?="),
        ({"type": "regex", "pattern": "\ud800"}, "reward.pattern", "RE2"),
        ({"type": "regex", "pattern": "a", "mode": "all"}, "reward.mode", "search"),
        ({"type": "regex", "pattern": "a", "max_count": 1.5}, "reward.max_count", "whole"),
        ({"type": "regex", "pattern": "a", "max_count": 0}, "reward.max_count", "at least 1"),
        ({"type": "sentiment", "input": "{{reference}}"}, "reward.input", "{{item.key}}"),
        ({"type": "sentiment", "input": "{{item}}"}, "reward.input", "{{item}}"),
        ({"type": "sentiment", "input": "{{item.a[x]}}"}, "reward.input", "item.a[x]"),
        ({"type": "sentiment", "input": "{{sample.output_json.x}}"}, "reward.input", "output_json"),
        ({"type": "sentiment", "input": 7}, "reward.input", "string"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        build_grader(settings)

    assert caught.value.param == param
    assert words in caught.value.message


def test_settings_that_are_null_are_absent() -> None:
    assert reward("a b", type="length", name=None, min=2, max=None, target=None) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{sample.output_text}}", "answer"),
        ("{{ sample.output_text }}!", "answer!"),
        ("{{item.name}}: {{sample.output_text}}", "Ann: answer"),
        ("{{item.a.b[1].c}}", "deep"),
        ("{{item.a}}", '{"b": [0, {"c": "deep"}]}'),
        ("{{item.count}} {{item.nothing}} {{item.ä}}", "3 null ü"),
        ("no reference { } }}", "no reference { } }}"),
        ("{{item.odd key}}", "odd"),
    ],
)
def test_templates_are_filled(text: str, expected: str) -> None:
    item = {
        "name": "Ann",
        "a": {"b": [0, {"c": "deep"}]},
        "count": 3,
        "nothing": None,
        "ä": "ü",
        "odd key": "odd",
    }

    assert Template(text, param="reward.input").render("answer", item) == expected


def test_an_answer_with_braces_is_not_a_template() -> None:
    template = Template("{{sample.output_text}}", param="reward.input")

    assert template.render("{{item.secret}}", {"secret": "x"}) == "{{item.secret}}"


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("{{item.a.b}} {{item.c}}", "item.a.b"),
        ("{{item.list[3]}}", "item.list[3]"),
        ("{{item.name[0]}}", None),
        ("{{item.name.x}}", "item.name.x"),
    ],
)
def test_a_missing_key_is_named(text: str, missing: str | None) -> None:
    template = Template(text, param="reward.input")
    item = {"a": {}, "c": 1, "list": [1], "name": "Ann"}

    assert template.missing(item) == ([] if missing is None else [missing])
    if missing is not None:
        with pytest.raises(RewardFailed, match=missing.replace("[", r"\[")):
            template.render("", item)


def test_whether_a_template_reads_the_answer() -> None:
    assert Template("{{sample.output_text}}", param="x").reads_sample
    assert not Template("{{item.a}} only", param="x").reads_sample


def test_rows_and_texts_belong_together() -> None:
    grader = build_grader({"type": "length", "input": "{{item.words}}", "target": 2})

    assert grader.grade(["x", "y"], [{"words": "a b"}, {"words": "a"}]) == [1.0, 0.5]
    with pytest.raises(ValueError, match="shorter"):
        grader.grade(["x", "y"], [{"words": "a"}])

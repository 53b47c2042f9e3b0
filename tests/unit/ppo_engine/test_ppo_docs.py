"""`docs/ppo.md` says what the code says."""

import re
from pathlib import Path

from ppo_engine.explain import CLIPPED_CLASSES, TokenClass, explain
from ppo_engine.metrics import METRICS, metrics_table

PAGE = (Path(__file__).parents[3] / "docs" / "ppo.md").read_text()


def test_the_metrics_are_those_of_the_code() -> None:
    begin, end = "<!-- metrics: from ppo_engine.metrics.METRICS -->\n", "\n<!-- end of metrics -->"

    written = PAGE.partition(begin)[2].partition(end)[0]

    assert written == metrics_table(), (
        "put the output of ppo_engine.metrics.metrics_table() between the marks of docs/ppo.md"
    )


def test_every_class_stands_in_order_and_with_its_gradient() -> None:
    rows = re.findall(r"^\| `(\w+)` \| A [^|]*\| (\w+)", PAGE, re.MULTILINE)

    assert [name for name, _ in rows] == list(TokenClass)
    assert {name for name, gradient in rows if gradient == "removed"} == set(CLIPPED_CLASSES)


def test_the_example_tokens_are_true() -> None:
    number = r"\**(−?[\d.]+)A?\**"
    token = rf"(?:any A > 0|{number}), ([\d.]+)(, c = 3|, no c)?"
    columns = rf"{token} \| {number} \| {number} \| {number} \| `(\w+)` \| (−?[\d.]+)"
    rows = re.findall(rf"^\| {columns} ", PAGE, re.MULTILINE)

    assert len(rows) == 6
    for advantage, ratio, dual, *expected, name, gradient in rows:
        told = explain(
            float(ratio),
            parsed(advantage or "1"),
            dual_clip=3.0 if dual == ", c = 3" else None,
        )
        found = (told.unclipped, told.clipped, told.objective, told.d_objective_d_logprob)
        assert [round(x, 9) for x in found] == [parsed(x) for x in (*expected, gradient)]
        assert told.token_class == name


def parsed(number: str) -> float:
    return float(number.replace("−", "-"))


def test_units_and_formulas_are_given() -> None:
    assert all(metric.unit and metric.formula for metric in METRICS.values())

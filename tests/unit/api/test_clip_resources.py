"""Tokens explained, and the definitions of all numbers of the clip resources."""

import gzip
import io
import math
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import torch

from api import clip_schemas, openapi
from api.app import create_app
from api.clip_schemas import EXPLAINED_METRICS, PASS_METRICS, defined_as
from api.clip_views import ClipRule, explanation_view, token_row
from api.errors import ApiError
from api.explain_request import MAX_TOKENS, parse_explain
from api.routes.clip import CUSTOMARY_RANGES
from api.schemas import View
from api.settings import ApiSettings
from api.token_tables import TokenFilter, TokenOrder, TokenTable
from core.errors import StoredFileCorrupt
from ppo_engine.clip_stats import PassStatistics
from ppo_engine.explain import TOKEN_CLASSES, explain
from ppo_engine.histogram import histogram_edges
from ppo_engine.metrics import METRICS
from ppo_engine.run_directory import RunDirectory
from tests.tiny_run import tiny_trainer

RULE = ClipRule(clip_range=0.2, clip_range_high=0.28, dual_clip=3.0)
TOKENS = [(3.0, 1.0), (0.5, -2.5), (0.5, 1.0), (1.5, -2.5), (5.0, -1.0), (1.1, 0.5), (2.0, 0.0)]


def explained(tokens: list[tuple[float, float]], rule: ClipRule = RULE) -> dict[str, Any]:
    found = [
        explain(
            ratio,
            advantage,
            clip_range=rule.clip_range,
            clip_range_high=rule.clip_range_high,
            dual_clip=rule.dual_clip,
        )
        for ratio, advantage in tokens
    ]
    return explanation_view(found, rule).model_dump()


def test_a_summary_is_by_hand() -> None:
    """clipped_high, clipped_low, two kept out of range, dual_clipped, in range, A = 0."""
    summary = explained(TOKENS)["summary"]

    assert summary["tokens"] == 7
    assert summary["counts"] == dict.fromkeys(TOKEN_CLASSES, 1) | {"in_range_negative": 0}
    assert summary["policy_clip_fraction"] == 3 / 7
    assert summary["policy_clip_fraction_of_positive"] == 1 / 3
    assert summary["policy_clip_fraction_of_negative"] == 2 / 3
    assert summary["clipped_advantage_mass"] == pytest.approx((1 + 2.5 + 1) / 8.5)
    removed, weights = 3 + 1.25 + 5, 3 + 1.25 + 0.5 + 3.75 + 5 + 0.55
    assert summary["policy_gradient_kept"] == pytest.approx(1 - removed / weights)
    assert summary["surrogate_unclipped"] == pytest.approx((3 - 1.25 + 0.5 - 3.75 - 5 + 0.55) / 7)
    assert summary["surrogate_objective"] == pytest.approx((1.28 - 2.0 + 0.5 - 3.75 - 3 + 0.55) / 7)
    assert summary["ratio_above_range_fraction"] == 4 / 7
    assert summary["ratio_below_range_fraction"] == 2 / 7
    assert (summary["ratio_min"], summary["ratio_max"]) == (0.5, 5.0)
    assert summary["log_ratio_abs_max"] == pytest.approx(math.log(5))
    assert summary["update_kl_k1"] == pytest.approx(-sum(math.log(r) for r, _ in TOKENS) / 7)


def test_a_summary_equals_what_a_trainer_would_report() -> None:
    old = torch.full((1, len(TOKENS)), -1.0, dtype=torch.float64)
    ratios, advantages = torch.tensor(TOKENS, dtype=torch.float64).T
    statistics = PassStatistics(clip_low=0.2, clip_high=0.28, dual_clip=3.0, value_clip_range=None)
    statistics.add(
        logprobs=old + ratios.log()[None],
        old_logprobs=old,
        advantages=advantages[None],
        response_mask=torch.ones_like(old).bool(),
        values=old,
        old_values=old,
        returns=old,
    )
    report = statistics.report(
        epoch=0, minibatch=0, grad_norm=1.0, max_grad_norm=1.0, skipped=False
    )

    summary = explained(TOKENS)["summary"]

    assert summary["counts"] == report.counts
    for name in EXPLAINED_METRICS:
        assert summary[name] == pytest.approx(report.values[name], rel=1e-12), name


def test_log_probabilities_say_the_ratio_too() -> None:
    request = parse_explain({"logprob": [-1.0, -3.0], "old_logprob": [-2.0, -3.0], "advantage": 2})

    assert request.tokens() == [(math.e, 2.0), (1.0, 2.0)]


def test_a_single_number_counts_for_every_token() -> None:
    request = parse_explain({"ratio": 1.5, "advantage": [1, -1, 0]})

    assert request.tokens() == [(1.5, 1.0), (1.5, -1.0), (1.5, 0.0)]


def test_null_is_absent() -> None:
    nulls = dict.fromkeys(("logprob", "old_logprob", "clip_range", "clip_range_high", "dual_clip"))

    rule = parse_explain({"ratio": 1, "advantage": 1, **nulls}).rule

    assert rule == ClipRule(clip_range=0.2, clip_range_high=0.2, dual_clip=None)


@pytest.mark.parametrize(
    ("body", "code", "pointers"),
    [
        ({}, "missing_required_parameter", ["/advantage"]),
        ({"advantage": 1}, "missing_required_parameter", ["/ratio"]),
        ({"ratio": 1}, "missing_required_parameter", ["/advantage"]),
        ({"advantage": 1, "logprob": -1}, "missing_required_parameter", ["/old_logprob"]),
        ({"advantage": 1, "old_logprob": -1}, "missing_required_parameter", ["/logprob"]),
        (
            {"advantage": 1, "ratio": 1, "logprob": -1},
            "conflicting_parameters",
            ["/ratio", "/logprob"],
        ),
        (
            {"advantage": 1, "ratio": 1, "logprob": -1, "old_logprob": -1},
            "conflicting_parameters",
            ["/ratio", "/logprob", "/old_logprob"],
        ),
        (
            {"advantage": [1, 1], "ratio": [1, 1, 1]},
            "invalid_combination",
            ["/ratio", "/advantage"],
        ),
        (
            {"advantage": 1, "logprob": [-1, -1], "old_logprob": [-1, -1, -1]},
            "invalid_combination",
            ["/logprob", "/old_logprob"],
        ),
        ({"advantage": 1, "ratio": 0}, "decimal_below_min_value", ["/ratio"]),
        ({"advantage": 1, "ratio": [1, -2]}, "decimal_below_min_value", ["/ratio/1"]),
        ({"advantage": 1, "ratio": 1e10}, "decimal_above_max_value", ["/ratio"]),
        ({"advantage": 1, "ratio": 10**400}, "invalid_type", ["/ratio"]),
        ({"advantage": 1, "ratio": "1"}, "invalid_type", ["/ratio"]),
        ({"advantage": True, "ratio": 1}, "invalid_type", ["/advantage"]),
        ({"advantage": [[1]], "ratio": 1}, "invalid_type", ["/advantage/0"]),
        ({"advantage": 1e13, "ratio": 1}, "decimal_above_max_value", ["/advantage"]),
        ({"advantage": [], "ratio": 1}, "array_below_min_length", ["/advantage"]),
        (
            {"advantage": 1, "ratio": [1.0] * (MAX_TOKENS + 1)},
            "array_above_max_length",
            ["/ratio"],
        ),
        (
            {"advantage": 1, "logprob": [0, 800], "old_logprob": -1},
            "invalid_combination",
            ["/logprob/1", "/old_logprob"],
        ),
        (
            {"advantage": 1, "logprob": -1e308, "old_logprob": 1e308},
            "invalid_combination",
            ["/logprob", "/old_logprob"],
        ),
        (
            {"advantage": 1, "ratio": 1, "dual_clip": 1.2},
            "invalid_combination",
            ["/dual_clip", "/clip_range"],
        ),
        (
            {"advantage": 1, "ratio": 1, "dual_clip": 1.2, "clip_range_high": 0.28},
            "invalid_combination",
            ["/dual_clip", "/clip_range_high"],
        ),
        ({"advantage": 1, "ratio": 1, "clip_range": 1}, "decimal_above_max_value", ["/clip_range"]),
        (
            {"advantage": 1, "ratio": 1, "clip_range_high": 0},
            "decimal_below_min_value",
            ["/clip_range_high"],
        ),
        ({"advantage": 1, "ratio": 1, "cliprange": 0.2}, "unknown_parameter", ["/cliprange"]),
    ],
)
def test_what_cannot_be_explained_is_refused(
    body: dict[str, Any], code: str, pointers: list[str]
) -> None:
    with pytest.raises(ApiError) as caught:
        parse_explain(body)

    assert (caught.value.code, caught.value.status) == (code, 400)
    assert [fault.pointer for fault in caught.value.faults] == pointers


@pytest.mark.parametrize("ratio", [-2, [1, -2]])
def test_a_refusal_names_the_field(ratio: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse_explain({"ratio": ratio, "advantage": 1})

    assert caught.value.detail == "ratio: input should be greater than 0, got -2"


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ApiError) as caught:
        parse_explain({"ratio": -1, "advantage": "x", "clip_range": 2})

    assert {fault.pointer for fault in caught.value.faults} == {
        "/ratio",
        "/advantage",
        "/clip_range",
    }


def test_the_largest_numbers_overflow_nothing() -> None:
    request = parse_explain({"ratio": [1e9] * MAX_TOKENS, "advantage": [1e12, -1e12] * 2048})

    summary = explained(request.tokens())["summary"]

    assert all(math.isfinite(value) for value in summary.values() if isinstance(value, float))


# -- token tables --------------------------------------------------------------------------------


def test_the_tokens_that_an_engine_stores_are_read_as_they_are(
    tiny_model: Path, tmp_path: Path
) -> None:
    report = next(tiny_trainer(tiny_model).steps())
    directory = RunDirectory(tmp_path)
    directory.write_step(report)
    directory._file.close()
    table = TokenTable(lambda: (tmp_path / "tokens" / "1.jsonl.gz").open("rb"))
    every = TokenFilter(row=None, classes=None)

    found = table.page(
        every, TokenOrder(by="position", is_descending=False), after=None, limit=1000
    )

    assert len(found) == len(report.tokens) > 0
    told = [
        token_row(UUID(int=1), 1, report.step, each).model_dump(mode="json", by_alias=True)
        for each in found
    ]
    assert {each["sample_id"].rpartition("-")[2] for each in told} == {
        str(each["row"]) for each in report.samples
    }
    first = told[0]
    assert {name: first[name] for name in found[0] if name != "row"} == {
        name: value for name, value in found[0].items() if name != "row"
    }
    assert None not in first.values()


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"{}")[:-9], b"\x1f\x8b\x08" + b"\xff" * 30, gzip.compress(b"{x\n")],
)
def test_a_table_that_cannot_be_read_is_corrupt(content: bytes) -> None:
    table = TokenTable(lambda: io.BytesIO(content))

    with pytest.raises(StoredFileCorrupt):
        table.has_row(1)


# -- definitions ---------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    settings = ApiSettings(
        database_url="postgresql://nobody:none@127.0.0.1:1/none",
        redis_url="redis://127.0.0.1:1/0",
    )
    schemas: dict[str, Any] = openapi.document(create_app(settings))["components"]["schemas"]
    return schemas


SCHEMAS = document()


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ("ClipSummary", PASS_METRICS),
        ("ClipPass", PASS_METRICS),
        ("ExplainedSummary", EXPLAINED_METRICS),
        ("Bucket", ("policy_clip_fraction", "ratio_mean", "update_kl_k3")),
        ("SweepPoint", ("policy_clip_fraction_dual", "policy_gradient_kept", "objective_gap")),
        ("NoiseFloor", ("log_ratio_abs_max",)),
    ],
)
def test_metrics_are_described_by_their_formulas(schema: str, names: tuple[str, ...]) -> None:
    described = SCHEMAS[schema]["properties"]

    for name in names:
        assert METRICS[name].formula in described[name]["description"]
        assert described[name]["description"] == defined_as(name)


def test_the_classes_of_the_schema_are_those_of_the_engine() -> None:
    assert tuple(SCHEMAS["TokenCounts"]["properties"]) == TOKEN_CLASSES


PLAIN = {"step", "attempt", "token_id"}
"""Numbers that name something."""


def _is_number(schema: dict[str, Any]) -> bool:
    if schema.get("type") == "array":
        return _is_number(schema["items"])
    kinds = [schema, *schema.get("anyOf", [])]
    return any(each.get("type") in ("number", "integer", "boolean") for each in kinds)


@pytest.mark.parametrize(
    "model",
    [
        each
        for each in vars(clip_schemas).values()
        if isinstance(each, type) and issubclass(each, View) and each is not View
    ],
)
def test_every_number_of_the_clip_resources_is_defined(model: type[View]) -> None:
    properties = model.model_json_schema(mode="serialization")["properties"]

    undefined = {
        name
        for name, schema in properties.items()
        if _is_number(schema) and name not in PLAIN and not schema.get("description")
    }

    assert undefined == set()


def test_the_body_of_an_explanation_is_described() -> None:
    properties = SCHEMAS["ExplainRequest"]["properties"]

    assert all(schema["description"] for schema in properties.values())
    kinds = [each.get("type") for each in properties["advantage"]["anyOf"]]
    assert kinds == ["number", "array"]


def test_bounds_of_customary_ranges_are_edges_of_any_histogram() -> None:
    edges = histogram_edges(0.123, 0.456, None)

    for each in CUSTOMARY_RANGES:
        assert {1 - each, 1 + each} <= set(edges)

"""Clip statistics over HTTP: buckets and verdicts, histogram, sweep, tokens, diagnosis."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import torch
from sqlalchemy import event
from torch import Tensor

from core import models
from core.attempts import store_artifacts
from core.db import Database
from core.events import EventCode, NewClipPass, NewEvent
from core.ids import job_id_of
from ppo_engine.clip_stats import PassStatistics
from ppo_engine.diagnosis import Monitor, MonitorSettings
from ppo_engine.explain import TOKEN_CLASSES
from ppo_engine.histogram import SUMS, single
from ppo_engine.metrics import METRICS
from ppo_engine.reports import PassReport
from tests.factories import Tenant, metric
from tests.integration.test_api_timeline import Run
from tests.live_api import LiveApi, create_job, put_artifact

SINGLE = 1e-5
"""Room for the fp32 of stored sums."""

RULE: dict[str, Any] = {"clip_range": 0.2, "clip_range_high": 0.28, "dual_clip": 3.0}
SIZES: dict[str, Any] = {"batch_size": 8, "epochs": 2, "minibatches": 2, "critic_warmup_steps": 0}
CUSTOMARY = [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28, 0.3, 0.4, 0.5]
FRACTIONS = (
    "policy_clip_fraction",
    "policy_clip_fraction_high",
    "policy_clip_fraction_low",
    "policy_clip_fraction_dual",
)
SWEPT = (*FRACTIONS, "clipped_advantage_mass", "policy_gradient_kept", "objective_gap")


class ClipRun(Run):
    """A job with these hyperparameters, in the hands of a worker."""

    def __init__(
        self, client: httpx2.Client, worker_database: Database, tenant: Tenant, **settings: Any
    ) -> None:
        self._client = client
        self._database = worker_database
        self._tenant = tenant
        self.job = create_job(client, max_steps=1000, **settings)
        self.holder = self.claim(resumed_from=0)
        self._line = 0

    def refused(self, path: str) -> tuple[int, str, list[str]]:
        """Status, code and pointers of an error."""
        answer = self._client.get(f"{self.url}/{path}")
        body = answer.json()
        assert answer.status_code >= 400, body
        return answer.status_code, body["error"]["code"], [f["pointer"] for f in body["errors"]]

    def record(self, *passes: "Pass") -> None:
        """Store the passes as the journal does."""
        self.tell(passes=tuple(self._stored(each) for each in passes))

    def _stored(self, each: "Pass") -> NewClipPass:
        self._line += 1
        report = each.report()
        return NewClipPass(
            line=self._line,
            step=each.step,
            epoch=each.epoch,
            minibatch=each.minibatch,
            values=report.stored_values(),
            histogram=report.histogram,
        )

    def publish_tokens(self, api: LiveApi, step: int, content: bytes) -> None:
        """Make a token table an artifact of the job."""
        found = put_artifact(api.store, f"tokens/{step}.jsonl.gz", content, role="tokens")
        with self._database.begin() as tx:
            store_artifacts(tx, self.holder, (found,))

    def sample_id(self, step: int, row: int, *, attempt: int | None = None) -> str:
        job = job_id_of(self.job["id"])
        return f"smp_{job.hex}-{attempt or self.holder.attempt}-{step}-{row}"


@pytest.fixture
def run(client: httpx2.Client, worker_database: Database, tenant: Tenant) -> ClipRun:
    return ClipRun(client, worker_database, tenant, **RULE, **SIZES)


@dataclass(frozen=True)
class Pass:
    """Tokens of one pass, drawn at random."""

    step: int = 1
    epoch: int = 0
    minibatch: int = 0
    spread: float = 0.5
    zero: bool = False

    def tensors(self) -> dict[str, Tensor]:
        seed = self.step * 10_000 + self.epoch * 100 + self.minibatch
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(12, 9, generator=generator) < 0.7
        old, noise, advantages = (torch.randn(12, 9, generator=generator) for _ in range(3))
        advantages[1] = 0
        zeros = torch.zeros_like(old)
        return {
            "logprobs": (old + self.spread * noise) * mask,
            "old_logprobs": old * mask,
            "advantages": zeros if self.zero else advantages * mask,
            "response_mask": mask,
            "values": zeros,
            "old_values": zeros,
            "returns": zeros,
        }

    def tokens(self) -> list[tuple[float, float]]:
        """Ratio and advantage of each response token, as the trainer's fp32 has them."""
        found = self.tensors()
        ratio = torch.exp(found["logprobs"] - found["old_logprobs"])
        mask = found["response_mask"]
        return list(zip(ratio[mask].tolist(), found["advantages"][mask].tolist(), strict=True))

    def report(self) -> PassReport:
        statistics = PassStatistics(
            clip_low=RULE["clip_range"],
            clip_high=RULE["clip_range_high"],
            dual_clip=RULE["dual_clip"],
            value_clip_range=0.2,
        )
        statistics.add(**self.tensors())
        return statistics.report(
            epoch=self.epoch,
            minibatch=self.minibatch,
            grad_norm=0.5,
            max_grad_norm=1.0,
            skipped=False,
        )


PASSES = [Pass(step, epoch, mini) for step in (1, 2, 3) for epoch in (0, 1) for mini in (0, 1)]


def by_definition(
    tokens: Sequence[tuple[float, float]], low: float, high: float, dual: float | None
) -> dict[str, float]:
    """What a clip range does, token by token, from the definitions."""
    up, down, beyond = [], [], []
    for ratio, advantage in tokens:
        if advantage < 0 and dual is not None and ratio > single(dual):
            beyond.append((ratio, advantage))
        elif advantage > 0 and ratio > single(1 + high):
            up.append((ratio, advantage))
        elif advantage < 0 and ratio < single(1 - low):
            down.append((ratio, advantage))
    clipped = [*up, *down, *beyond]
    gap = sum((r - (1 + high)) * a for r, a in up) + sum((r - (1 - low)) * a for r, a in down)
    gap += sum((r - (dual or 0)) * a for r, a in beyond)
    return {
        "policy_clip_fraction": len(clipped) / len(tokens),
        "policy_clip_fraction_high": len(up) / len(tokens),
        "policy_clip_fraction_low": len(down) / len(tokens),
        "policy_clip_fraction_dual": len(beyond) / len(tokens),
        "clipped_advantage_mass": sum(abs(a) for _, a in clipped) / sum(abs(a) for _, a in tokens),
        "policy_gradient_kept": 1
        - sum(abs(r * a) for r, a in clipped) / sum(abs(r * a) for r, a in tokens),
        "objective_gap": gap / len(tokens),
    }


def all_tokens(passes: Sequence[Pass] = PASSES) -> list[tuple[float, float]]:
    return [token for each in passes for token in each.tokens()]


# -- sweep ---------------------------------------------------------------------------------------


def test_a_sweep_at_the_runs_own_range_equals_the_stored_counts(run: ClipRun) -> None:
    run.record(*PASSES)

    sweep = run.get("clip/sweep")

    (own,) = [each for each in sweep["data"] if each["is_own"]]
    counts = [each["summary"]["counts"] for each in run.get("clip")["data"]]
    total = {name: sum(each[name] for each in counts) for name in TOKEN_CLASSES}
    tokens = sum(total.values())
    clipped = [total["clipped_high"], total["clipped_low"], total["dual_clipped"]]
    assert all(clipped)
    assert [own[name] for name in FRACTIONS] == [n / tokens for n in (sum(clipped), *clipped)]
    assert (own["exact"], own["bounds"]) == (True, {})
    assert {name: own[name] for name in RULE} == RULE
    assert (sweep["tokens"], sweep["passes"]) == (tokens, len(PASSES))
    assert (sweep["from_step"], sweep["to_step"]) == (1, 3)


@pytest.mark.parametrize(
    ("query", "rule"),
    [
        ("clip_range=0.1", (0.1, 0.1, 3.0)),
        ("clip_range=0.4&clip_range_high=0.5&dual_clip=2", (0.4, 0.5, 2.0)),
        ("clip_range=0.02&dual_clip=off", (0.02, 0.02, None)),
        ("clip_range_high=0.3", (0.2, 0.3, 3.0)),
    ],
)
def test_on_edges_a_sweep_equals_the_tokens_themselves(
    run: ClipRun, query: str, rule: tuple[float, float, float | None]
) -> None:
    run.record(*PASSES)

    own, point = run.get(f"clip/sweep?{query}")["data"]

    truth = by_definition(all_tokens(), *rule)
    assert own["is_own"]
    assert (point["clip_range"], point["clip_range_high"], point["dual_clip"]) == rule
    assert (point["exact"], point["is_own"]) == (True, False)
    assert [point[name] for name in FRACTIONS] == [truth[name] for name in FRACTIONS]
    assert [point[name] for name in SWEPT] == pytest.approx(
        [truth[name] for name in SWEPT], rel=SINGLE
    )


@pytest.mark.parametrize("rule", [(0.137, 0.263, 2.77), (0.333, 0.071, 4.4), (0.011, 1.7, 7.3)])
def test_off_edges_the_truth_lies_within_the_bounds(
    run: ClipRun, rule: tuple[float, float, float]
) -> None:
    run.record(*PASSES)
    query = "clip_range={}&clip_range_high={}&dual_clip={}".format(*rule)

    point = run.get(f"clip/sweep?{query}")["data"][1]

    truth = by_definition(all_tokens(), *rule)
    assert point["exact"] is False
    assert point["policy_clip_fraction"] is None
    assert {name for name in SWEPT if point[name] is None} == set(point["bounds"])
    for name, limits in point["bounds"].items():
        assert limits["low"] - SINGLE <= truth[name] <= limits["high"] + SINGLE, name
        assert limits["low"] < limits["high"]
    for name in set(SWEPT) - set(point["bounds"]):
        assert point[name] == pytest.approx(truth[name], rel=SINGLE)


def test_without_a_list_the_customary_ranges_are_judged_and_all_are_exact(run: ClipRun) -> None:
    run.record(*PASSES)

    points = run.get("clip/sweep")["data"]

    pairs = [(each["clip_range"], each["clip_range_high"]) for each in points]
    assert pairs == [(0.2, 0.28), *((each, each) for each in CUSTOMARY)]
    assert [each["is_own"] for each in points] == [True] + [False] * len(CUSTOMARY)
    assert all(each["exact"] for each in points)


def test_lists_of_ranges_pair_up(run: ClipRun) -> None:
    run.record(*PASSES)

    points = run.get("clip/sweep?clip_range=0.1,0.2&clip_range[]=0.3&clip_range_high=0.1,0.28,0.5")[
        "data"
    ]

    # The second pair is the run's own, which stands first and only once.
    pairs = [(each["clip_range"], each["clip_range_high"]) for each in points]
    assert pairs == [(0.2, 0.28), (0.1, 0.1), (0.3, 0.5)]


@pytest.mark.parametrize(
    ("query", "chosen"),
    [
        ("epoch=1", [each for each in PASSES if each.epoch == 1]),
        ("minibatch=0", [each for each in PASSES if each.minibatch == 0]),
        ("from_step=2&to_step=2", [each for each in PASSES if each.step == 2]),
        ("from_step=3&epoch=0&minibatch=1", [Pass(3, 0, 1)]),
    ],
)
def test_a_sweep_takes_the_passes_asked_for(run: ClipRun, query: str, chosen: list[Pass]) -> None:
    run.record(*PASSES)

    sweep = run.get(f"clip/sweep?{query}")

    truth = by_definition(all_tokens(chosen), 0.2, 0.28, 3.0)
    assert sweep["passes"] == len(chosen)
    assert sweep["tokens"] == len(all_tokens(chosen))
    assert [sweep["data"][0][name] for name in FRACTIONS] == [truth[name] for name in FRACTIONS]


def test_a_sweep_says_what_it_is_not(run: ClipRun) -> None:
    caveat = run.get("clip/sweep")["caveat"]

    assert "would have gone on" in caveat
    assert "Pass [0][0]" in caveat


def test_without_passes_there_is_nothing_to_sweep(run: ClipRun) -> None:
    sweep = run.get("clip/sweep?from_step=500")

    assert (sweep["data"], sweep["tokens"], sweep["passes"]) == ([], 0, 0)
    assert sweep["from_step"] is None


def test_a_number_without_a_denominator_is_null(run: ClipRun) -> None:
    run.record(Pass(zero=True))

    own = run.get("clip/sweep")["data"][0]

    assert own["policy_clip_fraction"] == 0
    assert (own["clipped_advantage_mass"], own["policy_gradient_kept"]) == (None, None)
    assert (own["exact"], own["bounds"]) == (True, {})


def test_a_sweep_leaves_out_what_a_resume_replaced(run: ClipRun) -> None:
    run.record(*PASSES)
    run.restart(resumed_from=1)
    again = Pass(2, spread=0.1)
    run.record(again)

    sweep = run.get("clip/sweep")

    kept = [each for each in PASSES if each.step == 1]
    assert sweep["tokens"] == len(all_tokens([*kept, again]))


def test_ranges_that_the_runs_dual_clip_forbids_are_left_out_of_the_customary_ones(
    client: httpx2.Client, worker_database: Database, tenant: Tenant
) -> None:
    rule = {"clip_range": 0.2, "clip_range_high": 0.2, "dual_clip": 1.35}
    run = ClipRun(client, worker_database, tenant, **rule)

    status, code, pointers = run.refused("clip/sweep?clip_range=0.4")

    assert (status, code) == (400, "invalid_combination")
    assert pointers == ["/dual_clip", "/clip_range_high"]
    assert run.get("clip/sweep")["data"] == []
    assert run.get("clip/sweep?clip_range=0.4&dual_clip=off")["data"] == []


@pytest.mark.parametrize(
    ("query", "code", "pointers"),
    [
        (
            "clip_range=0.1,0.2&clip_range_high=0.3",
            "invalid_combination",
            ["/clip_range", "/clip_range_high"],
        ),
        ("clip_range=" + ",".join(["0.1"] * 65), "array_above_max_length", ["/clip_range"]),
        ("clip_range=0.1,1", "decimal_above_max_value", ["/clip_range/1"]),
        ("clip_range=0", "decimal_below_min_value", ["/clip_range/0"]),
        ("clip_range=nan", "decimal_above_max_value", ["/clip_range/0"]),
        ("clip_range=abc", "invalid_type", ["/clip_range/0"]),
        ("clip_range_high=11", "decimal_above_max_value", ["/clip_range_high/0"]),
        ("dual_clip=nan", "decimal_below_min_value", ["/dual_clip"]),
        ("dual_clip=101", "decimal_above_max_value", ["/dual_clip"]),
        ("dual_clip=none", "invalid_type", ["/dual_clip"]),
        (
            "clip_range=0.5&dual_clip=1.5",
            "invalid_combination",
            ["/dual_clip", "/clip_range_high"],
        ),
        ("epoch=-1", "integer_below_min_value", ["/epoch"]),
        ("columns=2", "unknown_parameter", ["/columns"]),
    ],
)
def test_a_wrong_sweep_is_refused(run: ClipRun, query: str, code: str, pointers: list[str]) -> None:
    assert run.refused(f"clip/sweep?{query}") == (400, code, pointers)


# -- histogram -----------------------------------------------------------------------------------


def test_a_histogram_holds_every_token_by_sign(run: ClipRun) -> None:
    run.record(*PASSES)

    body = run.get("clip/histogram")

    (column,) = body["columns"]
    tokens = all_tokens()
    assert body["object"] == "fine_tuning.job.clip.histogram"
    assert (column["from_step"], column["to_step"], column["passes"]) == (1, 3, 12)
    assert len(column["positive"]["count"]) == len(body["edges"]) + 1
    assert sum(column["positive"]["count"]) == sum(a > 0 for _, a in tokens)
    assert sum(column["negative"]["count"]) == sum(a < 0 for _, a in tokens)
    assert column["zero_advantage_count"] == sum(a == 0 for _, a in tokens)
    assert sum(column["negative"]["abs_advantage"]) == pytest.approx(
        sum(-a for _, a in tokens if a < 0), rel=SINGLE
    )
    assert sum(column["positive"]["ratio_abs_advantage"]) == pytest.approx(
        sum(r * a for r, a in tokens if a > 0), rel=SINGLE
    )


def test_a_bin_holds_the_tokens_between_its_edges(run: ClipRun) -> None:
    run.record(Pass())

    body = run.get("clip/histogram")

    place = body["edges"].index(1.28)
    within = [r for r, a in Pass().tokens() if a > 0 and r > single(1.28)]
    assert within
    assert sum(body["columns"][0]["positive"]["count"][place + 1 :]) == len(within)


def test_columns_split_the_steps_evenly_and_add_up(run: ClipRun) -> None:
    steps = [1, 2, 3, 5, 8, 13, 21]
    run.record(*(Pass(step) for step in steps))

    parts = run.get("clip/histogram?columns=3")["columns"]
    (whole,) = run.get("clip/histogram")["columns"]

    spans = [(each["from_step"], each["to_step"], each["passes"]) for each in parts]
    assert spans == [(1, 2, 2), (3, 5, 2), (8, 21, 3)]
    for sign in ("positive", "negative"):
        for kind in SUMS:
            summed = [sum(bins) for bins in zip(*(p[sign][kind] for p in parts), strict=True)]
            assert summed == pytest.approx(whole[sign][kind])


def test_there_are_no_more_columns_than_steps(run: ClipRun) -> None:
    run.record(*PASSES)

    columns = run.get("clip/histogram?columns=600")["columns"]

    assert [(each["from_step"], each["to_step"]) for each in columns] == [(1, 1), (2, 2), (3, 3)]


def test_a_histogram_takes_the_passes_asked_for(run: ClipRun) -> None:
    run.record(*PASSES)

    body = run.get("clip/histogram?epoch=1&minibatch=0&from_step=2&columns=600")

    assert (body["epoch"], body["minibatch"]) == (1, 0)
    assert [(each["from_step"], each["passes"]) for each in body["columns"]] == [(2, 1), (3, 1)]


def test_more_passes_than_are_read_at_once_are_merged(run: ClipRun) -> None:
    run.record(*(Pass(step) for step in range(1, 451)))

    columns = run.get("clip/histogram?columns=2")["columns"]

    assert [each["passes"] for each in columns] == [225, 225]


def test_too_many_passes_are_refused(run: ClipRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.routes.clip.MAX_PASSES", 11)
    run.record(*PASSES)

    refused = run.refused("clip/histogram")

    assert refused == (400, "invalid_combination", ["/from_step", "/to_step"])
    assert run.get("clip/histogram?to_step=2")["columns"][0]["passes"] == 8


def test_without_passes_there_are_no_columns(run: ClipRun) -> None:
    body = run.get("clip/histogram?columns=7")

    assert body["columns"] == []
    assert 1.28 in body["edges"]


@pytest.mark.parametrize("columns", ["0", "601"])
def test_a_wrong_number_of_columns_is_refused(run: ClipRun, columns: str) -> None:
    assert run.refused(f"clip/histogram?columns={columns}")[0] == 400


# -- clip updates --------------------------------------------------------------------------------


def test_buckets_add_up_to_the_step(run: ClipRun) -> None:
    run.record(*PASSES)

    update = run.get("clip?detail=buckets&limit=1")["data"][0]

    assert update["passes"] is None
    for table in ("position", "old_probability"):
        buckets = update["buckets"][table].values()
        for name, count in update["summary"]["counts"].items():
            assert sum(each["counts"][name] for each in buckets) == count
    worst = update["buckets"]["worst_sequences"]
    clipped = [each["clipped_tokens"] for each in worst]
    assert clipped
    assert clipped == sorted(clipped, reverse=True)
    assert {"row", "epoch", "minibatch", "tokens", "ratio_max"} < worst[0].keys()


@pytest.mark.parametrize("detail", ["summary", "passes"])
def test_buckets_are_told_on_request_only(run: ClipRun, detail: str) -> None:
    run.record(*PASSES)

    assert run.get(f"clip?detail={detail}")["data"][0]["buckets"] is None


def test_a_run_that_kept_no_buckets_has_none(run: ClipRun) -> None:
    stored = run._stored(Pass())
    old = {name: stored.values[name] for name in stored.values if name not in _NEW_VALUES}
    run.tell(
        passes=(
            NewClipPass(
                line=1, step=1, epoch=0, minibatch=0, values=old, histogram=stored.histogram
            ),
        )
    )

    update = run.get("clip?detail=buckets")["data"][0]

    assert update["buckets"] is None
    assert update["summary"]["tokens"] == len(Pass().tokens())


_NEW_VALUES = ("buckets", "worst_sequences")


def test_the_noise_floor_is_that_of_the_first_pass(run: ClipRun) -> None:
    run.record(*PASSES)

    floors = [each["noise_floor"] for each in run.get("clip?order=asc")["data"]]

    for step, floor in enumerate(floors, start=1):
        values = Pass(step, 0, 0).report().values
        assert floor == {name: pytest.approx(values[name]) for name in floor}
    assert floors[0].keys() == {"policy_clip_fraction", "log_ratio_abs_max", "update_kl_k3"}


def test_without_the_first_pass_there_is_no_noise_floor(run: ClipRun) -> None:
    run.record(Pass(1, 0, 1))

    assert run.get("clip")["data"][0]["noise_floor"] is None


def test_a_verdict_says_what_it_amounts_to(run: ClipRun) -> None:
    """Ratios far from 1 in the first pass are noise; a limit that the run found may allow them."""
    run.tell(metric(1, 2, noise_limit=9.0, learning_rate=1e-5))
    run.record(*PASSES)

    noisy, allowed = run.get("clip?order=asc&to_step=2")["data"]

    assert noisy["verdict"]["verdict"] == "numeric_noise"
    assert allowed["verdict"]["verdict"] == "tight"
    assert allowed["verdict"]["numbers"]["learning_rate"] == 1e-5
    assert "Clipping is tight" in allowed["verdict"]["sentence"]
    assert allowed["verdict"]["suggestion"]
    assert (allowed["clip_active"], allowed["reason"]) == (True, None)


@pytest.mark.parametrize(
    ("settings", "step", "words"),
    [
        ({"epochs": 1, "minibatches": 1}, 9, "one pass per step"),
        ({"critic_warmup_steps": 3}, 3, "critic_warmup_steps"),
    ],
)
def test_where_no_ratio_can_leave_1_the_update_says_why(
    client: httpx2.Client,
    worker_database: Database,
    tenant: Tenant,
    settings: dict[str, int],
    step: int,
    words: str,
) -> None:
    run = ClipRun(client, worker_database, tenant, **RULE, **(SIZES | settings))
    run.record(Pass(step, spread=0.0))

    update = run.get("clip")["data"][0]

    assert update["clip_active"] is False
    assert words in update["reason"]
    assert update["verdict"]["verdict"] == "inactive_by_construction"


def test_after_the_warm_up_clipping_can_act(run: ClipRun) -> None:
    run.record(*PASSES)

    assert {each["clip_active"] for each in run.get("clip")["data"]} == {True}


def test_passes_hold_every_metric_and_no_raw_sums(run: ClipRun) -> None:
    run.record(*PASSES)

    passes = run.get("clip?detail=passes&limit=1")["data"][0]["passes"]

    told = passes[1][0].keys()
    assert [len(row) for row in passes] == [2, 2]
    assert told - {"counts", "epoch", "minibatch", "skipped"} <= METRICS.keys()
    assert passes[1][0]["ratio_q50"] == pytest.approx(Pass(3, 1, 0).report().values["ratio_q50"])
    assert isinstance(passes[1][0]["tokens"], int)


# -- tokens --------------------------------------------------------------------------------------


def token(row: int, position: int, **over: Any) -> dict[str, Any]:
    """One line of a token table."""
    return {
        "row": row,
        "position": position,
        "token_id": 100 + position,
        "text": f" word{position}",
        "behavior_logprob": -1.0,
        "old_logprob": -1.1,
        "logprob": -1.2,
        "kl_reference_logprob": -1.3,
        "log_ratio": 0.1,
        "ratio": 1.1,
        "advantage": 0.5,
        "reward": 0.25,
        "value": 0.75,
        "return": 1.25,
        "class": "in_range_positive",
        "gradient_kept": True,
        "unclipped": 0.55,
        "clipped": 0.56,
        "objective": 0.57,
        "d_objective_d_logprob": 0.58,
        "epoch": 1,
        "minibatch": 2,
        **over,
    }


def table(*tokens: dict[str, Any]) -> bytes:
    return gzip.compress("".join(json.dumps(each) + "\n" for each in tokens).encode())


FOUR = table(
    token(2, 0, ratio=1.5, advantage=-1.0, **{"class": "unclipped_out_high"}),
    token(2, 1, ratio=0.5, advantage=2.0, **{"class": "unclipped_out_low"}),
    token(5, 0, ratio=3.0, advantage=1.0, **{"class": "clipped_high"}),
    token(5, 1, ratio=None, advantage=0.0, **{"class": "zero_advantage"}),
)


def places(page: dict[str, Any]) -> list[tuple[int, int]]:
    """Row and position of the tokens of a page."""
    return [(int(each["sample_id"].split("-")[-1]), each["position"]) for each in page["data"]]


def test_a_token_is_told_in_full(run: ClipRun, api: LiveApi) -> None:
    run.publish_tokens(api, 7, table(token(3, 4)))

    page = run.get("clip/tokens")

    sample = run.sample_id(7, 3)
    rest = {name: value for name, value in token(3, 4).items() if name != "row"}
    assert page["data"] == [
        {
            "id": f"{sample}-4",
            "object": "fine_tuning.job.clip.token",
            "sample_id": sample,
            **rest,
        }
    ]
    assert (page["has_more"], page["last_id"]) == (False, f"{sample}-4")


def test_without_a_step_the_newest_table_is_read(run: ClipRun, api: LiveApi) -> None:
    for step in (9, 10, 8):
        run.publish_tokens(api, step, table(token(step, 0)))

    assert places(run.get("clip/tokens")) == [(10, 0)]
    assert places(run.get("clip/tokens?step=9")) == [(9, 0)]
    assert places(run.get(f"clip/tokens?sample_id={run.sample_id(8, 8)}")) == [(8, 0)]


def test_a_job_without_tokens_has_an_empty_list(run: ClipRun) -> None:
    page = run.get("clip/tokens")

    assert (page["data"], page["has_more"], page["last_id"]) == ([], False, None)


def test_other_artifacts_are_no_token_tables(
    run: ClipRun, api: LiveApi, worker_database: Database
) -> None:
    names = (
        "tokens/x.jsonl.gz",
        "tokens/1.jsonl",
        "samples/3.jsonl.gz",
        "tokens/99999999999.jsonl.gz",
    )
    left = [put_artifact(api.store, name, b"", role="sample") for name in names]
    with worker_database.begin() as tx:
        store_artifacts(tx, run.holder, left)

    assert run.get("clip/tokens")["data"] == []


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [(2, 0), (2, 1), (5, 0), (5, 1)]),
        ("order=desc", [(5, 1), (5, 0), (2, 1), (2, 0)]),
        ("order_by=ratio", [(5, 0), (2, 0), (2, 1), (5, 1)]),
        ("order_by=ratio&order=asc", [(2, 1), (2, 0), (5, 0), (5, 1)]),
        ("order_by=advantage", [(2, 1), (5, 0), (5, 1), (2, 0)]),
        ("class=clipped_high", [(5, 0)]),
        ("class=clipped_high,unclipped_out_low", [(2, 1), (5, 0)]),
        ("class[]=zero_advantage", [(5, 1)]),
        ("class=dual_clipped", []),
        ("limit=0", []),
    ],
)
def test_tokens_are_filtered_and_ordered(
    run: ClipRun, api: LiveApi, query: str, expected: list[tuple[int, int]]
) -> None:
    run.publish_tokens(api, 1, FOUR)

    assert places(run.get(f"clip/tokens?{query}")) == expected


@pytest.mark.parametrize("order_by", ["position", "ratio", "advantage"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_tokens_join_without_holes(
    run: ClipRun, api: LiveApi, client: httpx2.Client, order_by: str, order: str
) -> None:
    """Equal values and nulls too."""
    tied = [token(row, at, ratio=[1.0, 2.0, None][at % 3]) for row in (1, 2) for at in range(6)]
    run.publish_tokens(api, 1, table(*tied))
    query = f"order_by={order_by}&order={order}"

    whole = places(run.get(f"clip/tokens?{query}"))
    seen: list[tuple[int, int]] = []
    url: str | None = f"{run.url}/clip/tokens?{query}&limit=5"
    while url is not None:
        answer = client.get(url)
        seen += places(answer.json())
        link = answer.headers.get("Link")
        url = None if link is None else link.partition(">")[0].removeprefix("<")

    assert len(whole) == len(tied)
    assert seen == whole


def test_a_page_goes_on_in_the_table_that_it_began_in(run: ClipRun, api: LiveApi) -> None:
    run.publish_tokens(api, 1, FOUR)
    first = run.get("clip/tokens?limit=3")
    run.publish_tokens(api, 2, table(token(9, 0)))

    rest = run.get(f"clip/tokens?limit=3&after={first['last_id']}")

    assert places(rest) == [(5, 1)]


def test_one_sample_only(run: ClipRun, api: LiveApi) -> None:
    run.publish_tokens(api, 1, FOUR)
    sample = run.sample_id(1, 5)

    assert places(run.get(f"clip/tokens?sample_id={sample}")) == [(5, 0), (5, 1)]
    assert places(run.get(f"clip/tokens?sample_id={sample}&step=1&class=clipped_high")) == [(5, 0)]
    assert places(run.get(f"clip/tokens?sample_id={sample}&class=dual_clipped")) == []


def test_an_unknown_sample_is_404(run: ClipRun, api: LiveApi) -> None:
    run.publish_tokens(api, 1, FOUR)
    other = "smp_" + "0" * 32 + "-1-1-2"
    names = [run.sample_id(1, 4), run.sample_id(2, 2), run.sample_id(1, 2, attempt=2), other]
    names += ["nonsense", run.sample_id(1, 2) + "-0", run.sample_id(1, 2).replace("-1-2", "-01-2")]

    for name in names:
        refused = run.refused(f"clip/tokens?sample_id={name}")
        assert refused == (404, "sample_not_found", ["/sample_id"]), name


def test_a_step_without_tokens_is_404(run: ClipRun, api: LiveApi) -> None:
    run.publish_tokens(api, 1, FOUR)

    refused = run.refused("clip/tokens?step=2")

    assert refused == (404, "token_table_not_found", ["/step"])


def test_step_and_sample_must_agree(run: ClipRun, api: LiveApi) -> None:
    run.publish_tokens(api, 1, FOUR)

    refused = run.refused(f"clip/tokens?step=2&sample_id={run.sample_id(1, 2)}")

    assert refused == (400, "conflicting_parameters", ["/step", "/sample_id"])


def test_a_cursor_of_no_such_token_is_refused(run: ClipRun, api: LiveApi) -> None:
    run.publish_tokens(api, 1, FOUR)
    run.publish_tokens(api, 2, FOUR)
    names = ["nonsense", run.sample_id(1, 2), f"{run.sample_id(1, 2)}-9"]
    names += [f"{run.sample_id(3, 2)}-0", f"{run.sample_id(1, 2, attempt=2)}-0"]

    for name in names:
        refused = run.refused(f"clip/tokens?after={name}")
        assert refused == (400, "invalid_cursor", ["/after"]), name
    other_step = run.refused(f"clip/tokens?step=2&after={run.sample_id(1, 2)}-0")
    assert other_step == (400, "invalid_cursor", ["/after"])


@pytest.mark.parametrize(
    ("query", "code", "pointer"),
    [
        ("class=nonsense", "invalid_value", "/class/0"),
        ("order_by=text", "invalid_value", "/order_by"),
        ("limit=1001", "integer_above_max_value", "/limit"),
        ("step=-1", "integer_below_min_value", "/step"),
        ("class_=clipped_high", "unknown_parameter", "/class_"),
    ],
)
def test_wrong_parameters_of_tokens_are_refused(
    run: ClipRun, query: str, code: str, pointer: str
) -> None:
    assert run.refused(f"clip/tokens?{query}") == (400, code, [pointer])


def test_a_resume_hides_the_tokens_that_it_will_replace(run: ClipRun, api: LiveApi) -> None:
    for step in (3, 5):
        run.publish_tokens(api, step, table(token(step, 0)))
    run.restart(resumed_from=4)

    assert places(run.get("clip/tokens")) == [(3, 0)]
    assert run.refused("clip/tokens?step=5")[1] == "token_table_not_found"
    run.publish_tokens(api, 5, table(token(6, 0)))
    assert run.get("clip/tokens")["data"][0]["sample_id"] == run.sample_id(5, 6, attempt=2)


def test_a_table_that_unpacks_to_too_much_is_refused(
    run: ClipRun, api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.publish_tokens(api, 1, table(*(token(1, at) for at in range(100))))
    monkeypatch.setattr("api.token_tables.MAX_PLAIN_BYTES", 10_000)

    assert run.refused("clip/tokens")[:2] == (400, "token_table_too_large")


@pytest.mark.parametrize("content", [b"no gzip", FOUR[:-12], gzip.compress(b"{broken\n")])
def test_a_table_that_cannot_be_read_is_our_fault(
    run: ClipRun, api: LiveApi, content: bytes
) -> None:
    run.publish_tokens(api, 1, content)

    assert run.refused("clip/tokens")[:2] == (500, "internal_error")


# -- explain -------------------------------------------------------------------------------------


def test_the_clip_rule_is_explained(client: httpx2.Client) -> None:
    answer = client.post("/v1/ppo/clip/explain", json={"ratio": [3, 0.5], "advantage": [1, -2.5]})

    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "ppo.clip.explanation"
    assert (body["clip_range"], body["clip_range_high"], body["dual_clip"]) == (0.2, 0.2, None)
    told = [(each["objective"], each["class"], each["gradient_kept"]) for each in body["data"]]
    assert told == [(1.2, "clipped_high", False), (-2.0, "clipped_low", False)]
    assert [each["d_objective_d_logprob"] for each in body["data"]] == [0, 0]
    assert "push stops" in body["data"][0]["explanation"]
    assert body["summary"]["policy_clip_fraction"] == 1
    assert body["summary"]["counts"]["clipped_low"] == 1


def test_as_many_tokens_as_allowed_are_explained(client: httpx2.Client) -> None:
    answer = client.post(
        "/v1/ppo/clip/explain", json={"ratio": [1.1] * 4096, "advantage": 1.0, "dual_clip": None}
    )

    assert len(answer.json()["data"]) == 4096


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"ratio": NaN, "advantage": 1}', "invalid_json"),
        (b'{"ratio": 1e999, "advantage": 1}', "invalid_json"),
        (b'{"logprob": 800, "old_logprob": 0, "advantage": 1}', "invalid_combination"),
        (b'{"ratio": -1, "advantage": 1}', "decimal_below_min_value"),
        (b"[]", "invalid_type"),
    ],
)
def test_nonsense_is_not_explained(client: httpx2.Client, content: bytes, code: str) -> None:
    answer = client.post(
        "/v1/ppo/clip/explain", content=content, headers={"Content-Type": "application/json"}
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_an_explanation_needs_a_key(api: LiveApi) -> None:
    with api.client() as stranger:
        answer = stranger.post("/v1/ppo/clip/explain", json={"ratio": 1, "advantage": 1})

    assert answer.status_code == 401


def test_a_malformed_idempotency_key_is_refused_here_too(client: httpx2.Client) -> None:
    answer = client.post(
        "/v1/ppo/clip/explain",
        json={"ratio": 1, "advantage": 1},
        headers={"Idempotency-Key": "a b"},
    )

    assert answer.json()["error"]["code"] == "invalid_idempotency_key"


# -- diagnosis and health ------------------------------------------------------------------------


def test_before_the_first_step_nothing_is_known(run: ClipRun) -> None:
    body = run.get("diagnosis")

    assert body["object"] == "fine_tuning.job.diagnosis"
    assert (body["level"], body["findings"], body["step"]) == ("unknown", [], None)
    assert body["clip_verdict"] is None


def test_a_diagnosis_is_what_the_runs_own_monitor_finds(run: ClipRun) -> None:
    values = [{"update_kl_k3_max": 0.001 if step < 8 else 0.5} for step in range(1, 13)]
    for step, each in enumerate(values, start=1):
        run.tell(metric(step, step, **each))
    monitor = Monitor(
        MonitorSettings(
            kl_controller="fixed",
            target_kl_per_sequence=6.0,
            target_kl=0.02,
            group_size=1,
            has_critic=True,
            value_clip_range=0.2,
        )
    )
    found = [monitor.observe(step, each) for step, each in enumerate(values, start=1)]

    body = run.get("diagnosis")

    assert found[-1]
    assert body["findings"] == json.loads(json.dumps([each.to_dict() for each in found[-1]]))
    assert (body["step"], body["level"]) == (12, "critical")
    assert body["findings"][0]["since_step"] == 9


def test_a_diagnosis_as_of_an_earlier_step(run: ClipRun) -> None:
    for step in range(1, 13):
        run.tell(metric(step, step, update_kl_k3_max=0.001 if step < 8 else 0.5))

    body = run.get("diagnosis?step=7")

    assert (body["step"], body["level"], body["findings"]) == (7, "ok", [])
    assert run.get("diagnosis?step=0")["level"] == "unknown"


def test_a_diagnosis_judges_the_clip_statistics_too(run: ClipRun) -> None:
    for step in (1, 2, 3):
        run.tell(metric(step, step, noise_limit=9.0))
    run.record(*PASSES)

    body = run.get("diagnosis")

    assert body["clip_verdict"]["verdict"] == "tight"
    assert [each["code"] for each in body["findings"]] == ["clip"]
    assert body["findings"][0]["evidence"][0]["value"] > 0.3
    assert body["findings"][0]["actions"][0]["text"]


def test_a_long_run_is_judged_by_its_start_and_its_end(
    run: ClipRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entropy falls to a tenth of the baseline; without the first steps there is none."""
    monkeypatch.setattr("api.routes.diagnosis.REPLAYED_STEPS", 10)
    run.tell(*(metric(n, n, entropy=5.0 if n <= 5 else 0.45) for n in range(1, 41)))

    findings = run.get("diagnosis")["findings"]

    assert [each["code"] for each in findings] == ["entropy_collapse"]
    assert findings[0]["since_step"] > 30


def test_a_job_that_resolved_before_newer_settings_existed_is_judged(
    run: ClipRun, owner_database: Database
) -> None:
    with owner_database.begin() as tx:
        job = models.job
        old = {"advantage_estimator", "group_size"}
        resolved = dict(
            tx.execute(job.select().where(job.c.id == job_id_of(run.job["id"]))).one().resolved
        )
        resolved["hyperparameters"] = {
            name: value for name, value in resolved["hyperparameters"].items() if name not in old
        }
        tx.execute(
            job.update().where(job.c.id == job_id_of(run.job["id"])).values(resolved=resolved)
        )
    run.tell(metric(1, 1, reward_mean=0.5))

    assert run.get("diagnosis")["level"] == "ok"


def changed(level: str, *codes: str, line: int = 1) -> NewEvent:
    return NewEvent(
        code=EventCode.DIAGNOSIS_CHANGED,
        message="news",
        step=1,
        line=line,
        data={"level": level, "findings": list(codes), "details": []},
    )


def test_a_job_shows_its_newest_health(run: ClipRun, client: httpx2.Client) -> None:
    before = client.get(run.url).json()["health"]
    run.tell(changed("critical", "numerics"), changed("warn", "clip", "repetition", line=2))

    shown = client.get(run.url).json()["health"]

    assert before == {"level": "unknown", "findings": []}
    assert shown == {"level": "warn", "findings": ["clip", "repetition"]}


def test_a_list_of_jobs_asks_for_their_health_once(
    client: httpx2.Client, worker_database: Database, tenant: Tenant, api: LiveApi
) -> None:
    runs = [ClipRun(client, worker_database, tenant) for _ in range(3)]
    for run, level in zip(runs, ("ok", "warn", "critical"), strict=True):
        run.tell(changed(level))
    statements: list[str] = []

    def note(_c: Any, _k: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(api.services.database.engine, "before_cursor_execute", note)
    try:
        shown = client.get("/v1/fine_tuning/jobs").json()["data"]
    finally:
        event.remove(api.services.database.engine, "before_cursor_execute", note)

    assert [each["health"]["level"] for each in shown] == ["critical", "warn", "ok"]
    assert sum("job_event" in each for each in statements) == 1


# -- all -----------------------------------------------------------------------------------------


def test_a_job_links_to_its_clip_resources(run: ClipRun, client: httpx2.Client) -> None:
    links = run.job["links"]

    for name in ("clip", "clip_histogram", "clip_sweep", "clip_tokens", "diagnosis"):
        assert client.get(links[name]).status_code == 200


@pytest.mark.parametrize("path", ["clip/histogram", "clip/sweep", "clip/tokens", "diagnosis"])
def test_unchanged_answers_are_304(
    run: ClipRun, client: httpx2.Client, api: LiveApi, path: str
) -> None:
    run.tell(metric(1, 1, reward_mean=0.5))
    run.record(*PASSES)
    run.publish_tokens(api, 1, FOUR)
    tag = client.get(f"{run.url}/{path}").headers["ETag"]

    answer = client.get(f"{run.url}/{path}", headers={"If-None-Match": tag})

    assert answer.status_code == 304

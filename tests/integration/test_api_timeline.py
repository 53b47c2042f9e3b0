"""Events, checkpoints, metrics and clip statistics over HTTP."""

import csv
import io
from typing import Any

import httpx2
import pytest

from core import attempts, jobs
from core.attempts import Holder
from core.db import Database
from core.events import EventCode, NewClipPass, NewEvent, NewMetric, Report
from core.ids import job_id_of
from core.states import Phase
from ppo_engine.explain import TOKEN_CLASSES
from ppo_engine.histogram import Histogram, histogram_edges
from ppo_engine.metrics import QUANTILES, quantile_name
from ppo_engine.reports import PassReport, PassSums
from tests.factories import TTL, Tenant, claim_job, metric, stored_checkpoint
from tests.integration.test_core_feed import after_reading_events
from tests.live_api import LiveApi, create_job

JOBS = "/v1/fine_tuning/jobs"


class Run:
    """A job in the hands of a worker."""

    def __init__(self, client: httpx2.Client, worker_database: Database, tenant: Tenant) -> None:
        self._client = client
        self._database = worker_database
        self._tenant = tenant
        self.job = create_job(client, max_steps=100)
        self.holder = self.claim(resumed_from=0)

    @property
    def url(self) -> str:
        return f"{JOBS}/{self.job['id']}"

    def get(self, path: str) -> dict[str, Any]:
        answer = self._client.get(f"{self.url}/{path}")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def claim(self, *, resumed_from: int) -> Holder:
        with self._database.begin() as tx:
            job = jobs.get(tx, job_id_of(self.job["id"]), tenant_id=self._tenant.tenant_id)
            holder = claim_job(tx, job).holder
            attempts.record_resume(tx, holder, step=resumed_from)
        return holder

    def tell(self, *items: NewEvent | NewMetric, passes: tuple[NewClipPass, ...] = ()) -> None:
        report = Report(items=items, passes=passes)
        with self._database.begin() as tx:
            attempts.heartbeat(tx, self.holder, ttl=TTL, phase=Phase.TRAINING, report=report)

    def save(self, step: int) -> None:
        with self._database.begin() as tx:
            attempts.checkpoint(tx, self.holder, stored_checkpoint(step), ttl=TTL)

    def restart(self, *, resumed_from: int) -> None:
        """The worker stops; the next attempt goes on from an earlier step."""
        with self._database.begin() as tx:
            attempts.release(tx, self.holder, reason="worker_stopped")
        self.holder = self.claim(resumed_from=resumed_from)


@pytest.fixture
def run(client: httpx2.Client, worker_database: Database, tenant: Tenant) -> Run:
    return Run(client, worker_database, tenant)


def test_events_come_newest_first_in_openais_form(run: Run) -> None:
    run.tell(metric(1, 1, reward_mean=0.25, valid_reward_mean=0.5))

    events = run.get("events")["data"]

    assert [event["seq"] for event in events] == [3, 2, 1]
    assert [event["code"] for event in events] == [None, "job.claimed", "job.created"]
    newest = events[0]
    assert newest["object"] == "fine_tuning.job.event"
    assert newest["type"] == "metrics"
    assert newest["message"] == "Step 1/100: reward 0.25"
    assert newest["data"]["train_mean_reward"] == 0.25
    assert newest["data"]["full_valid_mean_reward"] == 0.5
    assert newest["data"]["total_steps"] == 100
    assert events[2]["type"] == "message"


def test_pages_of_events_join_without_holes(run: Run) -> None:
    run.tell(*(metric(n, n) for n in range(1, 8)))

    seen: list[int] = []
    page = run.get("events?limit=2&order=asc")
    while page["data"]:
        seen += [event["seq"] for event in page["data"]]
        page = run.get(f"events?limit=2&order=asc&after={page['last_id']}")

    assert seen == list(range(1, 10))


@pytest.mark.parametrize(
    ("query", "seqs"),
    [
        ("type=metrics", [4]),
        ("type=message", [3, 2, 1]),
        ("level=warn", [3]),
        ("code=job.claimed", [2]),
        ("code=job.claimed&type=metrics", []),
        ("level=info", [4, 2, 1]),
        ("limit=0", []),
    ],
)
def test_events_are_filtered(run: Run, query: str, seqs: list[int]) -> None:
    fired = NewEvent(code=EventCode.GUARD_FIRED, message="KL is high", level="warn", line=1)
    run.tell(fired, metric(2, 1))

    assert [event["seq"] for event in run.get(f"events?{query}")["data"]] == seqs


def test_a_cursor_of_another_job_is_refused(run: Run, client: httpx2.Client) -> None:
    other = create_job(client)
    foreign = client.get(f"{JOBS}/{other['id']}/events").json()["last_id"]

    answer = client.get(f"{run.url}/events?after={foreign}")

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor")


def test_checkpoints_come_with_the_figures_of_their_step(run: Run) -> None:
    run.tell(metric(1, 5, reward_mean=0.5), metric(2, 10, reward_mean=0.75))
    run.save(5)
    run.save(10)

    page = run.get("checkpoints?limit=1")
    rest = run.get(f"checkpoints?after={page['last_id']}")

    newest = page["data"][0]
    assert newest["object"] == "fine_tuning.job.checkpoint"
    assert newest["step_number"] == 10
    assert newest["metrics"] == {"step": 10, "reward_mean": 0.75}
    assert newest["fine_tuning_job_id"] == run.job["id"]
    assert newest["fine_tuned_model_checkpoint"].endswith(":ckpt-step-10")
    assert page["has_more"] is True
    assert [each["step_number"] for each in rest["data"]] == [5]
    assert rest["has_more"] is False


def test_metrics_come_in_columns(run: Run) -> None:
    run.tell(metric(1, 1, reward_mean=0.1, entropy=2.0), metric(2, 2, reward_mean=0.2))

    body = run.get("metrics")

    assert body["steps"] == [1, 2]
    assert body["series"] == {"reward_mean": [0.1, 0.2], "entropy": [2.0, None]}
    assert body["definitions"]["entropy"]["unit"] == "nats per token"
    assert body["thinned"] is False
    assert body["nonfinite"] == {}
    assert body["attempts"] == [{"attempt": 1, "resumed_from_step": 0}]


def test_values_that_were_not_finite_are_listed(run: Run) -> None:
    run.tell(metric(1, 1, policy_loss=None), metric(2, 2, policy_loss=0.5))

    body = run.get("metrics?names=policy_loss")

    assert body["series"] == {"policy_loss": [None, 0.5]}
    assert body["nonfinite"] == {"policy_loss": [1]}


@pytest.mark.parametrize(
    ("query", "steps"),
    [("from_step=3", [3, 4]), ("to_step=2", [1, 2]), ("from_step=2&to_step=3", [2, 3])],
)
def test_metrics_of_some_steps(run: Run, query: str, steps: list[int]) -> None:
    run.tell(*(metric(n, n) for n in range(1, 5)))

    assert run.get(f"metrics?{query}")["steps"] == steps


def test_named_metrics_only(run: Run) -> None:
    run.tell(metric(1, 1, a=1.0, b=2.0, c=3.0))

    assert set(run.get("metrics?names=a&names=b")["series"]) == {"a", "b"}
    assert set(run.get("metrics?names=a,c")["series"]) == {"a", "c"}
    assert set(run.get("metrics?names[]=c")["series"]) == {"c"}


def test_a_resume_hides_what_it_replaced(run: Run) -> None:
    run.tell(*(metric(n, n, reward_mean=0.0) for n in range(1, 6)))
    run.restart(resumed_from=3)
    run.tell(metric(1, 4, reward_mean=1.0))

    body = run.get("metrics")

    assert body["steps"] == [1, 2, 3, 4]
    assert body["series"]["reward_mean"] == [0.0, 0.0, 0.0, 1.0]
    assert body["attempts"][1] == {"attempt": 2, "resumed_from_step": 3}
    events = run.get("events?type=metrics")["data"]
    assert len(events) == 6


def test_after_a_resume_the_job_shows_the_step_it_goes_on_from(
    run: Run, client: httpx2.Client
) -> None:
    run.tell(*(metric(n, n, reward_mean=float(n)) for n in range(1, 6)))
    run.restart(resumed_from=3)

    shown = client.get(run.url).json()

    assert shown["latest"]["step"] == 3
    assert (shown["attempt"], shown["resumed_from_step"]) == (2, 3)


def test_thinning_keeps_the_spikes(run: Run) -> None:
    values = [0.0] * 50
    values[17], values[31] = 9.0, -9.0
    run.tell(*(metric(n, n, reward_mean=value) for n, value in enumerate(values, start=1)))

    body = run.get("metrics?max_points=8&names=reward_mean")

    assert body["thinned"] is True
    assert len(body["steps"]) <= 8
    assert {9.0, -9.0} <= set(body["series"]["reward_mean"])


def test_a_page_of_events_passes_over_nothing_told_meanwhile(run: Run, api: LiveApi) -> None:
    """An event and the metrics behind it, committed between the two reads of one page."""
    engine = api.services.database.engine
    news = NewEvent(code=EventCode.SELF_CHECK_PASSED, message="fine", step=1, line=1)

    with after_reading_events(engine, lambda: run.tell(news, metric(2, 1))):
        first = run.get("events?order=asc")
    rest = run.get(f"events?order=asc&after={first['last_id']}")

    assert [each["seq"] for each in first["data"]] == [1, 2]
    assert [each["seq"] for each in rest["data"]] == [3, 4]


def test_metrics_as_csv(run: Run, client: httpx2.Client) -> None:
    run.tell(metric(1, 1, a=1.5, b=None), metric(2, 2, a=2.5, b=0.5))

    answer = client.get(f"{run.url}/metrics?format=csv&names=a,b")

    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert "attachment" in answer.headers["Content-Disposition"]
    assert list(csv.reader(io.StringIO(answer.text))) == [
        ["step", "a", "b"],
        ["1", "1.5", ""],
        ["2", "2.5", "0.5"],
    ]


CLIPPED = TOKEN_CLASSES.index("clipped_high")
KEPT = TOKEN_CLASSES.index("in_range_positive")


def clip_rows(step: int, *counts: tuple[int, int]) -> tuple[NewClipPass, ...]:
    """One pass per pair of clipped and kept tokens; advantages and ratios are 1."""
    return tuple(_clip_row(step, place, *each) for place, each in enumerate(counts))


def _clip_row(step: int, place: int, clipped: int, kept: int) -> NewClipPass:
    by_class = [0] * len(TOKEN_CLASSES)
    by_class[CLIPPED], by_class[KEPT] = clipped, kept
    edges = histogram_edges(0.2, 0.2, None)
    bins = 6 * (len(edges) + 1)
    report = PassReport(
        epoch=0,
        minibatch=place,
        skipped=False,
        sums=PassSums(
            sequences=1,
            counts=tuple(by_class),
            ratio=float(clipped + kept),
            ratio_square=float(clipped + kept),
            ratio_min=1.0,
            ratio_max=1.0,
            log_sequence_ratio=0.0,
            log_sequence_ratio_square=0.0,
        ),
        ratio_quantiles={quantile_name(share): 1.0 for share in QUANTILES},
        ratios=Histogram(edges=tuple(edges), sums=(0.0,) * bins, zero_advantage_count=0),
    )
    return NewClipPass(
        line=step * 10 + place,
        step=step,
        epoch=0,
        minibatch=place,
        values=report.stored_values(),
        histogram=report.histogram,
    )


def test_clip_merges_passes_by_tokens_not_by_means(run: Run) -> None:
    """1 of 10 and 9 of 90... would be a mean of 0.55; by tokens it is 10 of 100."""
    run.tell(passes=clip_rows(1, (1, 9), (9, 81)))

    page = run.get("clip")

    update = page["data"][0]
    assert update["object"] == "fine_tuning.job.clip"
    assert update["step"] == 1
    assert update["summary"]["tokens"] == 100
    assert update["summary"]["policy_clip_fraction"] == pytest.approx(0.1)
    assert update["summary"]["counts"]["clipped_high"] == 10
    assert update["clip_range"] == 0.2
    assert update["dual_clip"] is None
    assert update["passes"] is None
    assert page["stream_cursor"].startswith("1-")


def test_unequal_passes_are_weighed_by_their_tokens(run: Run) -> None:
    run.tell(passes=clip_rows(1, (1, 0), (0, 99)))

    summary = run.get("clip")["data"][0]["summary"]

    assert summary["policy_clip_fraction"] == pytest.approx(0.01)


def test_clip_passes_are_a_matrix_without_raw_sums(run: Run) -> None:
    run.tell(passes=clip_rows(1, (1, 9), (9, 1)))

    passes = run.get("clip?detail=passes")["data"][0]["passes"]

    assert [[each["policy_clip_fraction"] for each in row] for row in passes] == [[0.1, 0.9]]
    assert passes[0][1]["minibatch"] == 1
    assert "sums" not in passes[0][0]


def test_clip_pages_by_step(run: Run) -> None:
    for step in (1, 2, 3):
        run.tell(passes=clip_rows(step, (1, 9)))

    first = run.get("clip?limit=2")
    rest = run.get(f"clip?limit=2&after={first['last_id']}")

    assert [each["step"] for each in first["data"]] == [3, 2]
    assert [each["step"] for each in rest["data"]] == [1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [each["step"] for each in run.get("clip?from_step=2&order=asc")["data"]] == [2, 3]


def test_a_resume_hides_clip_statistics_too(run: Run) -> None:
    run.tell(passes=(*clip_rows(1, (1, 9)), *clip_rows(2, (1, 9))))
    run.restart(resumed_from=1)
    run.tell(passes=clip_rows(2, (9, 1)))

    updates = run.get("clip")["data"]

    assert [(each["attempt"], each["step"]) for each in updates] == [(2, 2), (1, 1)]
    assert updates[0]["summary"]["policy_clip_fraction"] == pytest.approx(0.9)


@pytest.mark.parametrize("after", ["nonsense", "clip_" + "0" * 32 + "-1-1", "clip_x-١-١"])
def test_a_foreign_clip_cursor_is_refused(run: Run, client: httpx2.Client, after: str) -> None:
    answer = client.get(f"{run.url}/clip", params={"after": after})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor")


@pytest.mark.parametrize("path", ["events", "checkpoints", "metrics", "clip"])
def test_unchanged_pages_are_304(run: Run, client: httpx2.Client, path: str) -> None:
    tag = client.get(f"{run.url}/{path}").headers["ETag"]

    answer = client.get(f"{run.url}/{path}", headers={"If-None-Match": tag})

    assert answer.status_code == 304

import json
from datetime import UTC, datetime
from uuid import UUID

from core.events import EventCode, FeedItem, feed_payload

JOB = UUID(int=5)
AT = datetime(2026, 1, 2, 3, 4, 5, 600_000, tzinfo=UTC)


def test_a_metric_as_json() -> None:
    item = FeedItem(
        job_id=JOB, seq=9, attempt=2, kind="metrics", at=AT, step=4, data={"reward_mean": None}
    )

    assert json.loads(json.dumps(feed_payload(item))) == {
        "type": "metrics",
        "id": "2-9",
        "job_id": "ftjob-00000000000000000000000000000005",
        "attempt": 2,
        "seq": 9,
        "step": 4,
        "created_at": 1767323045,
        "values": {"reward_mean": None},
    }


def test_an_event_as_json() -> None:
    item = FeedItem(
        job_id=JOB,
        seq=1,
        attempt=0,
        kind="event",
        at=AT,
        step=None,
        data={"to": "queued"},
        level="warn",
        code="job.queued",
        message="again",
    )

    payload = feed_payload(item)

    assert payload["type"] == "event"
    assert (payload["level"], payload["code"], payload["message"], payload["data"]) == (
        "warn",
        "job.queued",
        "again",
        {"to": "queued"},
    )
    assert "values" not in payload


def test_a_stored_checkpoint_is_a_frame_of_its_own_kind() -> None:
    item = FeedItem(
        job_id=JOB,
        seq=3,
        attempt=1,
        kind="event",
        at=AT,
        step=10,
        data={},
        code=EventCode.CHECKPOINT_SAVED,
    )

    assert feed_payload(item)["type"] == "checkpoint"


def test_a_frame_never_has_a_truthy_error_at_the_top() -> None:
    """The openai client raises on such a frame."""
    for kind in ("event", "metrics"):
        item = FeedItem(job_id=JOB, seq=1, attempt=1, kind=kind, at=AT, step=1, data={"error": "x"})
        assert "error" not in feed_payload(item)

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import ids
from core.errors import CheckpointNotFound, DomainError, FileNotFound_, JobNotFound

counts = st.integers(0, 10**9 - 1)
OTHER = UUID(int=7)


@given(st.uuids(), counts, counts)
def test_every_id_leads_back(key: UUID, attempt: int, step: int) -> None:
    assert ids.job_id_of(ids.public_job_id(key)) == key
    assert ids.file_id_of(ids.public_file_id(key)) == key
    assert ids.checkpoint_of(ids.public_checkpoint_id(key, attempt, step)) == (key, attempt, step)
    assert ids.event_seq_of(ids.public_event_id(key, step), key) == step


@given(st.text())
def test_any_other_text_is_not_found(text: str) -> None:
    for parse, error in (
        (ids.job_id_of, JobNotFound),
        (ids.file_id_of, FileNotFound_),
        (ids.checkpoint_of, CheckpointNotFound),
    ):
        with pytest.raises(error):
            parse(text)
    assert ids.event_seq_of(text, OTHER) is None


@pytest.mark.parametrize(
    "text",
    [
        "ftjob-" + "0" * 31,
        "ftjob-" + "0" * 33,
        "ftjob-" + "G" * 32,
        "ftjob-" + "A" * 32,
        "file-" + "0" * 32,
        "0" * 32,
        "ftjob-" + "٣" * 32,
        "ftjob-" + "0" * 500_000,
        "ftjob-\ud800",
    ],
)
def test_what_looks_like_a_job_and_is_none(text: str) -> None:
    with pytest.raises(JobNotFound) as caught:
        ids.job_id_of(text)

    assert len(caught.value.message) < 1000
    caught.value.message.encode()


@pytest.mark.parametrize(
    "tail", ["", "-1", "-1-", "--1", "-1-1e3", "-1-١", "-1-9999999999", "-1--5"]
)
def test_what_looks_like_a_checkpoint_and_is_none(tail: str) -> None:
    with pytest.raises(DomainError):
        ids.checkpoint_of("ftckpt_" + "0" * 32 + tail)


def test_an_event_of_another_job_is_none_of_ours() -> None:
    assert ids.event_seq_of(ids.public_event_id(UUID(int=1), 4), OTHER) is None

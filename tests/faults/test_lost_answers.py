"""Postgres commits and the answer is lost: everything is tried again, nothing is twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from sqlalchemy import Connection

from core.db import Database
from core.errors import DatabaseUnavailable
from core.states import JobStatus
from tests.fakes.bench import Bench, assert_as_if_uninterrupted
from worker import supervisor


class Lossy(Database):
    """Every second transaction commits, and says that nobody answered."""

    lost = 0
    _count = 0

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        self._count += 1
        with super().begin() as tx:
            yield tx
        if self._count > 1 and self._count % 2 == 0:  # not the claim, which the reaper repeats
            self.lost += 1
            raise DatabaseUnavailable


def test_whatever_answer_is_lost_a_job_has_one_end_and_each_row_once(bench: Bench) -> None:
    job = bench.make_job(steps=7)
    lossy = Lossy(bench.worker_url, pool_size=4)

    with bench.parts() as parts:
        supervisor.run_job(
            replace(parts, database=lossy), job.id, task_id="task", is_told_to_go=lambda: False
        )
    lossy.dispose()

    done = bench.job(job.id)
    assert lossy.lost > 5
    assert (done.status, done.attempt, done.crashes) == (JobStatus.SUCCEEDED, 1, 0)
    assert bench.codes(job.id).count("checkpoint.saved") == 4
    assert_as_if_uninterrupted(bench, done, steps=7)

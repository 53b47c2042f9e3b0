import pytest

from core.states import FINAL, HELD, TRANSITIONS, JobStatus

DESIGN = """
validating_files: queued paused failed cancelled
queued: running paused cancelled
running: succeeded queued paused cancelled failed
paused: queued cancelled
succeeded:
failed:
cancelled:
"""


def test_the_transitions_are_those_of_the_design() -> None:
    written = {}
    for line in DESIGN.strip().splitlines():
        state, _, targets = line.partition(":")
        written[state] = frozenset(targets.split())

    assert written == TRANSITIONS


def test_three_states_are_final() -> None:
    assert {"succeeded", "failed", "cancelled"} == FINAL
    assert not FINAL & HELD


@pytest.mark.parametrize("state", JobStatus)
def test_every_state_reaches_an_end(state: JobStatus) -> None:
    seen, waiting = set(), [state]
    while waiting:
        one = waiting.pop()
        seen.add(one)
        waiting += TRANSITIONS[one] - seen

    assert seen & FINAL


def test_no_state_follows_itself() -> None:
    assert all(state not in targets for state, targets in TRANSITIONS.items())

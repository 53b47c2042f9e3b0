"""The table from errors to answers."""

from collections.abc import Iterator

import pytest
from sqlalchemy.exc import OperationalError

from api.error_codes import ERROR_CODES
from api.errors import ApiError, as_api_error
from core import errors
from core.errors import DomainError, Fault, ServerFault


def descendants(kind: type[DomainError]) -> Iterator[type[DomainError]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


ABSTRACT = {errors.NotFound, errors.Conflict}
TOLD = [
    kind
    for kind in descendants(DomainError)
    if kind not in ABSTRACT and not issubclass(kind, ServerFault)
]


@pytest.mark.parametrize("kind", TOLD)
def test_every_domain_error_has_an_answer(kind: type[DomainError]) -> None:
    answer = as_api_error(kind())

    assert answer.code == kind.code
    assert 400 <= answer.status < 500


@pytest.mark.parametrize("kind", list(descendants(ServerFault)))
def test_our_own_faults_say_nothing_about_themselves(kind: type[DomainError]) -> None:
    answer = as_api_error(kind("secret detail"))

    assert answer.status in (500, 503)
    assert "secret" not in answer.detail


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.JobNotFound(), 404),
        (errors.FileNotFound_(param="training_file"), 400),
        (errors.ModelNotFound(param="model"), 400),
        (errors.JobAlreadyFinished(), 409),
        (errors.IdempotencyInProgress(), 409),
        (errors.IdempotencyKeyReused(), 422),
        (errors.InvalidApiKey(), 401),
        (errors.InsufficientScope(), 403),
        (errors.ArtifactExpired(), 410),
        (errors.DatabaseUnavailable(), 503),
        (OperationalError("select", {}, Exception()), 503),
        (RuntimeError("boom"), 500),
    ],
)
def test_statuses(error: Exception, status: int) -> None:
    assert as_api_error(error).status == status


def test_all_faults_are_told_and_the_first_speaks() -> None:
    faults = [Fault("/a", "invalid_type", "a is odd"), Fault("/b", "invalid_value", "b too")]

    answer = as_api_error(errors.InvalidSpec(faults=faults))

    assert (answer.code, answer.detail, answer.status) == ("invalid_type", "a is odd", 400)
    assert answer.faults == tuple(faults)


def test_a_param_becomes_a_pointer() -> None:
    error = ApiError("invalid_value", "no", param="method.ppo.reward")

    assert error.faults[0].pointer == "/method/ppo/reward"
    assert error.faults[0].param == "method.ppo.reward"


def test_only_a_wait_makes_409_and_429_worth_a_retry() -> None:
    passing = {
        code
        for code, about in ERROR_CODES.items()
        if about.status in (409, 429) and not about.is_permanent
    }

    assert passing == {"idempotency_in_progress"}

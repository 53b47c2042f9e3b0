from typing import Any

import pytest

from core.errors import InvalidSpec
from core.limits import Limits, limits_of, reached, wants_finish
from core.spec import parse_spec
from tests.factories import spec_dict


def limits(**fields: Any) -> Limits:
    return Limits(**fields)


@pytest.mark.parametrize(
    ("device_seconds", "response_tokens", "expected"),
    [
        (59.9, 99, None),
        (60.0, 99, ("max_runtime_seconds", 60, 60.0)),
        (59.9, 100, ("max_generated_tokens", 100, 100)),
        (75.5, 300, ("max_runtime_seconds", 60, 75.5)),
    ],
)
def test_a_limit_is_reached_at_its_value(
    device_seconds: float, response_tokens: int, expected: tuple[str, int, float] | None
) -> None:
    usage = {"device_seconds": device_seconds, "response_tokens": response_tokens}

    found = reached(limits(max_runtime_seconds=60, max_generated_tokens=100), usage, {})

    assert (found and (found.name, found.limit, found.used)) == expected


def test_what_was_used_before_the_budget_began_does_not_count() -> None:
    allowed = limits(max_generated_tokens=100)

    assert reached(allowed, {"response_tokens": 249}, {"response_tokens": 150}) is None
    found = reached(allowed, {"response_tokens": 250}, {"response_tokens": 150})
    assert found is not None
    assert found.used == 100


def test_nothing_is_reached_before_anything_is_known() -> None:
    assert reached(limits(max_generated_tokens=1), {"response_tokens": None}, {}) is None
    assert reached(limits(max_generated_tokens=1), {}, {}) is None


@pytest.mark.parametrize(
    ("given", "limit_reached", "expected"),
    [
        ({"max_generated_tokens": 1, "on_limit": "finish"}, "max_generated_tokens", True),
        ({"max_generated_tokens": 1, "on_limit": "finish"}, None, False),
        ({"max_generated_tokens": 1}, "max_generated_tokens", False),
        (None, None, False),
    ],
)
def test_only_a_reached_limit_that_says_so_finishes(
    given: dict[str, Any] | None,
    limit_reached: str | None,
    expected: bool,  # noqa: FBT001
) -> None:
    assert wants_finish({"limits": given}, limit_reached) is expected


def test_limits_come_back_from_a_stored_request() -> None:
    spec = parse_spec(spec_dict() | {"limits": {"max_runtime_seconds": 60}})

    assert limits_of(spec.stored()) == limits(max_runtime_seconds=60, on_limit="pause")
    assert limits_of(parse_spec(spec_dict()).stored()) is None


@pytest.mark.parametrize(
    ("given", "code", "pointer"),
    [
        ({}, "invalid_combination", "/limits"),
        ({"on_limit": "finish"}, "invalid_combination", "/limits"),
        ({"max_runtime_seconds": 59}, "integer_below_min_value", "/limits/max_runtime_seconds"),
        (
            {"max_runtime_seconds": 2_592_001},
            "integer_above_max_value",
            "/limits/max_runtime_seconds",
        ),
        ({"max_generated_tokens": 0}, "integer_below_min_value", "/limits/max_generated_tokens"),
        ({"max_generated_tokens": 1, "on_limit": "stop"}, "invalid_value", "/limits/on_limit"),
        ({"max_tokens": 1}, "unknown_parameter", "/limits/max_tokens"),
    ],
)
def test_faulty_limits_are_refused(given: dict[str, Any], code: str, pointer: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(spec_dict() | {"limits": given})

    assert (caught.value.faults[0].code, caught.value.faults[0].pointer) == (code, pointer)

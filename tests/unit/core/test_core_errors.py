import pickle
from collections.abc import Iterator

import pytest

from core import errors
from core.errors import DomainError, Fault, InvalidSpec


def tree(kind: type[DomainError] = DomainError) -> Iterator[type[DomainError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


ALL = sorted(set(tree()), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_pickling(kind: type[DomainError]) -> None:
    fault = Fault("/a/b", "invalid_value", "change it", line=3)

    copy = pickle.loads(pickle.dumps(kind("what happened", param="a.b", faults=[fault])))  # noqa: S301

    assert type(copy) is kind
    assert (str(copy), copy.param, copy.faults, copy.code) == (
        "what happened",
        "a.b",
        (fault,),
        kind.code,
    )


@pytest.mark.parametrize("kind", ALL)
def test_an_error_says_something_by_itself(kind: type[DomainError]) -> None:
    assert kind().message.endswith((".", "message.", "second."))


@pytest.mark.parametrize("kind", ALL)
def test_an_error_stands_in_the_drawing_of_the_tree(kind: type[DomainError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")


def test_a_leaf_has_a_code_of_its_own() -> None:
    leaves = [kind for kind in ALL if not kind.__subclasses__()]
    codes = [kind.code for kind in leaves]

    assert sorted(codes) == sorted(set(codes))


def test_an_invalid_spec_speaks_with_its_first_fault() -> None:
    first = Fault("/method/ppo", "unknown_parameter", "no such thing")

    error = InvalidSpec(faults=[first, Fault("", "invalid_type", "x")])

    assert (error.message, error.param, error.first_code) == (
        "no such thing",
        "method.ppo",
        "unknown_parameter",
    )


@pytest.mark.parametrize(
    ("pointer", "param"), [("", None), ("/model", "model"), ("/metadata/0", "metadata.0")]
)
def test_a_pointer_is_also_a_param(pointer: str, param: str | None) -> None:
    assert Fault(pointer, "c", "d").param == param

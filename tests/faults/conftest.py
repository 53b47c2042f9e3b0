"""What fault tests stand on: a bench of the worker, on the run's servers or on its own."""

from collections.abc import Iterator

import pytest

from tests.fakes.bench import bench as bench  # noqa: PLC0414 - a fixture, found by its name here
from tests.fakes.bench import migrated_servers
from trimtab.embedded import EmbeddedServers


@pytest.fixture(scope="module")
def own_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServers]:
    """This module's own, to be killed."""
    with migrated_servers(tmp_path_factory.mktemp("own") / "home") as servers:
        yield servers

"""What most integration tests stand on: an API over the module's database, a worker's bench."""

from collections.abc import Iterator

import httpx2
import pytest

from tests.conftest import Servers
from tests.factories import Tenant
from tests.fakes.bench import bench as bench  # noqa: PLC0414 - a fixture, found by its name here
from tests.live_api import LiveApi, live_api


@pytest.fixture(scope="module")
def api(
    servers: Servers, api_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveApi]:
    with live_api(api_url, servers.redis_url, tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def client(api: LiveApi, tenant: Tenant) -> Iterator[httpx2.Client]:
    with api.client(tenant) as opened:
        yield opened

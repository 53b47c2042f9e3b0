import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from worker.settings import DispatcherSettings, WorkerSettings

SECRETS = {"DATABASE_URL": "postgresql://u:pw@h/d", "REDIS_URL": "redis://:pw@h/0"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_defaults_follow_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", "/srv/trimtab")

    settings = WorkerSettings.from_environment()

    assert settings.scratch == Path("/srv/trimtab/scratch")
    assert settings.artifacts == Path("/srv/trimtab/artifacts")
    assert settings.trainer_command == (sys.executable, "-m", "ppo_engine")
    assert (settings.heartbeat_seconds, settings.lease_seconds) == (10, 60)


def test_the_trainer_command_is_a_json_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_TRAINER_COMMAND", '["torchrun", "-m", "ppo_engine"]')

    assert WorkerSettings.from_environment().trainer_command == ("torchrun", "-m", "ppo_engine")


@pytest.mark.parametrize("name", sorted(SECRETS))
@pytest.mark.parametrize("kind", [WorkerSettings, DispatcherSettings])
def test_no_secret_has_a_default(
    kind: type[WorkerSettings | DispatcherSettings], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name)

    with pytest.raises(ValidationError, match=name):
        kind.from_environment()


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_WORKER_LABEL", "w")

    assert "pw" not in repr(WorkerSettings.from_environment()).replace("SecretStr", "")


@pytest.mark.parametrize("name", ["TRIMTAB_LEASE_SECONDS", "TRIMTAB_TICK_SECONDS"])
def test_times_are_positive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")

    with pytest.raises(ValidationError):
        WorkerSettings.from_environment()

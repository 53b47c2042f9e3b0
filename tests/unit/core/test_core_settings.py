from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from core.settings import DatabaseSettings, ProcessSettings, ServiceSettings

NAMES = ("TRIMTAB_HOME", "TRIMTAB_ARTIFACTS", "TRIMTAB_MODELS", "TRIMTAB_LOG", "DATABASE_URL")
SECRET = "postgresql://u:hidden@h/d"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*NAMES, "REDIS_URL", "DATABASE_URL_FILE", "REDIS_URL_FILE", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_folders_follow_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", "/srv/trimtab")
    monkeypatch.setenv("TRIMTAB_MODELS", "/models")
    monkeypatch.setenv("DATABASE_URL", SECRET)
    monkeypatch.setenv("REDIS_URL", "redis://h")

    settings = ServiceSettings.from_environment()

    assert settings.artifacts == Path("/srv/trimtab/artifacts")
    assert settings.models == Path("/models")
    assert ProcessSettings(home=tmp_path).home == tmp_path


def test_the_home_has_its_place_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ProcessSettings.from_environment().home == tmp_path / ".local/state/trimtab"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert ProcessSettings.from_environment().home == Path("/state/trimtab")


def test_a_secret_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"{SECRET}\n")
    monkeypatch.setenv("DATABASE_URL_FILE", str(tmp_path / "url"))

    assert DatabaseSettings.from_environment().database_url.get_secret_value() == SECRET


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValidationError, match="DATABASE_URL"):
        DatabaseSettings.from_environment()


def test_a_list_is_written_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listed(ProcessSettings):
        command: list[str] = Field(["x"], validation_alias="TRIMTAB_COMMAND")

    assert Listed.from_environment().command == ["x"]
    monkeypatch.setenv("TRIMTAB_COMMAND", '["python", "-m", "ppo_engine"]')

    assert Listed.from_environment().command == ["python", "-m", "ppo_engine"]


def test_only_the_full_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Served(ProcessSettings):
        port: int = Field(8000, validation_alias="TRIMTAB_PORT")

    monkeypatch.setenv("PORT", "1")
    monkeypatch.setenv("trimtab_port", "2")

    assert Served.from_environment().port == 8000
    assert Served(port=3).port == Served(TRIMTAB_PORT=3).port == 3


def test_settings_show_no_secret_and_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", SECRET)
    settings = DatabaseSettings.from_environment()

    assert "hidden" not in repr(settings) + str(settings.model_dump())
    with pytest.raises(ValidationError):
        settings.home = Path("/elsewhere")


def test_a_wrong_value_is_refused_without_showing_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", SECRET)
    monkeypatch.setenv("TRIMTAB_LOG", "xml")

    with pytest.raises(ValidationError, match="TRIMTAB_LOG") as caught:
        DatabaseSettings.from_environment()

    assert "hidden" not in str(caught.value)

"""Settings that several processes share; each process has its own class built on these.

Values come from the environment.  A secret may come from a file instead: `NAME_FILE`.
"""

import os
from pathlib import Path
from typing import Any, Self

from pydantic import Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


def default_home() -> Path:
    """Where state lives when TRIMTAB_HOME does not say."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "trimtab"


class Environment(PydanticBaseSettingsSource):
    """Values named by a field's alias, and by that only: `HOME` is nobody's `home`.

    `NAME_FILE` names a file that holds the value of `NAME`, but for a last newline.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The text for this field, or None."""
        name = str(field.validation_alias or field_name)
        text = os.environ.get(name)
        path = os.environ.get(f"{name}_FILE")
        if text is None and path:
            text = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
        return text, name, self.field_is_complex(field)

    def __call__(self) -> dict[str, Any]:
        """All values that the environment gives; lists and the like as JSON."""
        found = {}
        for field_name, field in self.settings_cls.model_fields.items():
            text, name, is_complex = self.get_field_value(field, field_name)
            if text is not None:
                found[name] = self.prepare_field_value(field_name, field, text, is_complex)
        return found


class ProcessSettings(BaseSettings):
    """What every process has."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, hide_input_in_errors=True
    )

    home: Path = Field(default_factory=default_home, validation_alias="TRIMTAB_HOME")
    """Folder of everything local."""
    log_format: str = Field("json", pattern="^(json|console)$", validation_alias="TRIMTAB_LOG")
    """`json`, or `console` for people."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment."""
        del env_settings, dotenv_settings, file_secret_settings
        return init_settings, Environment(settings_cls)

    @classmethod
    def from_environment(cls) -> Self:
        """The settings of this process; a pydantic ValidationError names what is missing."""
        return cls()


class DatabaseSettings(ProcessSettings):
    """A process that speaks to Postgres, as its own role."""

    database_url: SecretStr = Field(validation_alias="DATABASE_URL")
    """`postgresql://user:password@host:port/database`."""


class ServiceSettings(DatabaseSettings):
    """A process that also speaks to Redis and reads models and artifacts."""

    redis_url: SecretStr = Field(validation_alias="REDIS_URL")
    """`redis://user:password@host:port/0`."""
    artifacts: Path = Field(
        default_factory=lambda data: data["home"] / "artifacts",
        validation_alias="TRIMTAB_ARTIFACTS",
    )
    """Folder of the artifact store."""
    models: Path = Field(
        default_factory=lambda data: data["home"] / "models", validation_alias="TRIMTAB_MODELS"
    )
    """Folder of the base models."""

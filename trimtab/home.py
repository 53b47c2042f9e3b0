"""Where Trimtab is on this machine: its state, what lies where in it, and its command."""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

DEMO_MODEL = "smollm2-135m-instruct"
"""The base model of the demo, by its alias."""

SHIPPED = Path(__file__).parent / "demo_data"
"""`job.json`, `prompts.jsonl` and `heldout.jsonl` of the demo."""


@dataclass(frozen=True, slots=True)
class Home:
    """The state folder, `TRIMTAB_HOME`."""

    path: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """`TRIMTAB_HOME`, else `$XDG_STATE_HOME/trimtab`, else `~/.local/state/trimtab`."""
        variables = os.environ if environment is None else environment
        if chosen := variables.get("TRIMTAB_HOME"):
            return cls(Path(chosen).expanduser().absolute())
        base = variables.get("XDG_STATE_HOME") or "~/.local/state"
        return cls(Path(base).expanduser().absolute() / "trimtab")

    @property
    def models(self) -> Path:
        """Model folders, unless `TRIMTAB_MODELS` names another place."""
        return self.path / "models"

    @property
    def artifacts(self) -> Path:
        """Uploaded files, checkpoints and adapters."""
        return self.path / "artifacts"

    @property
    def scratch(self) -> Path:
        """Run directories of trainers."""
        return self.path / "scratch"

    @property
    def logs(self) -> Path:
        """One file per process."""
        return self.path / "logs"

    @property
    def key_file(self) -> Path:
        """The API key of the local stack, alone in the file."""
        return self.path / "api-key"

    @property
    def address_file(self) -> Path:
        """The base URL of the running local stack."""
        return self.path / "api-url"


def models_folder(environment: Mapping[str, str] | None = None) -> Path:
    """The model cache: `TRIMTAB_MODELS`, else the folder `models` of the state folder."""
    variables = os.environ if environment is None else environment
    if chosen := variables.get("TRIMTAB_MODELS"):
        return Path(chosen).expanduser().absolute()
    return Home.from_environment(variables).models


def command(words: str) -> str:
    """How to type one of our commands here: with its path where the shell would not find it."""
    program = Path(sys.argv[0])
    if program.name != "trimtab" or shutil.which("trimtab") == str(program.absolute()):
        return f"trimtab {words}"
    return f"{program} {words}"

"""The base models on offer: folders that an operator put there, each with a `model.json`."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import ModelNotFound

DESCRIPTION = "model.json"


class ModelCard(BaseModel):
    """What `model.json` says."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    id: str = Field(min_length=1, max_length=256)
    """Public name, such as `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    aliases: tuple[str, ...] = ()
    """Other names it is found under."""
    sha256: str
    """Digest that names these weights."""
    parameters: int = 0
    context_length: int = Field(ge=1)
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A base model on offer."""

    id: str
    aliases: tuple[str, ...]
    sha256: str
    parameters: int
    context_length: int
    licence: str
    path: Path
    """Its folder."""
    created: int
    """Unix time at which it came here."""


class ModelCatalog:
    """The models in a folder, read anew at each question so that additions show at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self) -> list[CatalogEntry]:
        """All models, by id; folders without a readable card are no models."""
        found = [_entry(card) for card in sorted(self.folder.glob(f"*/{DESCRIPTION}"))]
        return sorted((one for one in found if one is not None), key=lambda one: one.id)

    def find(self, name: str) -> CatalogEntry:
        """The model of that id or alias; ModelNotFound lists what is offered."""
        entries = self.entries()
        for entry in entries:
            if name == entry.id or name in entry.aliases:
                return entry
        offered = ", ".join(entry.id for entry in entries) or "none yet (trimtab models fetch)"
        raise ModelNotFound(
            f"The model {name!r} is not offered here; offered: {offered}.", param="model"
        )


def _entry(path: Path) -> CatalogEntry | None:
    try:
        card = ModelCard.model_validate(json.loads(path.read_bytes()))
        created = int(path.stat().st_mtime)
    except (OSError, ValueError, ValidationError):
        return None
    return CatalogEntry(**card.model_dump(), path=path.parent, created=created)

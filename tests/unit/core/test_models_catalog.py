import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import ModelNotFound
from core.models_catalog import ModelCatalog


def add(folder: Path, name: str, **over: Any) -> None:
    card = {"id": f"org/{name}", "aliases": [name], "sha256": "0" * 64, "context_length": 2048}
    (folder / name).mkdir(parents=True)
    (folder / name / "model.json").write_text(json.dumps(card | over))


def test_a_model_is_found_by_id_and_by_alias(tmp_path: Path) -> None:
    add(tmp_path, "small", parameters=3, licence="apache-2.0")
    catalog = ModelCatalog(tmp_path)

    entry = catalog.find("org/small")

    assert catalog.find("small") == entry
    assert (entry.path, entry.parameters, entry.licence) == (tmp_path / "small", 3, "apache-2.0")
    assert entry.context_length == 2048


def test_an_addition_shows_at_once(tmp_path: Path) -> None:
    catalog = ModelCatalog(tmp_path / "models")
    before = catalog.entries()
    add(catalog.folder, "b")
    add(catalog.folder, "a")

    assert before == []
    assert [entry.id for entry in catalog.entries()] == ["org/a", "org/b"]


def test_an_unknown_model_is_refused_with_those_offered(tmp_path: Path) -> None:
    catalog = ModelCatalog(tmp_path)
    with pytest.raises(ModelNotFound, match="none yet"):
        catalog.find("x")
    add(tmp_path, "a")
    add(tmp_path, "b")

    with pytest.raises(ModelNotFound, match="org/a, org/b") as caught:
        catalog.find("../a")

    assert caught.value.param == "model"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": "x"}', "\ufeff"])
def test_a_folder_without_a_readable_card_is_no_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model.json").write_text(text)
    (tmp_path / "bare").mkdir()

    assert ModelCatalog(tmp_path).entries() == []

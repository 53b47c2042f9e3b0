"""A GGUF file becomes a model folder that transformers loads: safetensors, tokenizer, template.

Used once per model, by `python -m ppo_engine.convert GGUF OUT --id ... --alias ... --licence ...`.
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_engine.errors import EngineError, InvalidConfig


def convert_gguf(
    gguf: Path, out: Path, *, model_id: str, aliases: Sequence[str] = (), licence: str = "unknown"
) -> Path:
    """The folder `out`, written whole or not at all; its weights are the file's, exactly, in fp32.

    Beside the weights: tokenizer, chat template, generation settings and `model.json`, the entry
    by which the service offers the model.
    """
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        model, tokenizer = _load(gguf)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        entry = {
            "id": model_id,
            "aliases": list(aliases),
            "sha256": _sha256(scratch / "model.safetensors"),
            "parameters": model.num_parameters(),
            "context_length": model.config.max_position_embeddings,
            "licence": licence,
        }
        (scratch / "model.json").write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
        for file in scratch.iterdir():
            file.chmod(0o644)  # transformers leaves large weights at 0600, for no other user
        shutil.rmtree(out, ignore_errors=True)
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _load(gguf: Path) -> tuple[Any, Any]:
    """Model and tokenizer of the file, freed of what still says that they are quantized."""
    import torch  # noqa: PLC0415 - a wrong command line is told without waiting for torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    try:
        where = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    except (OSError, ValueError, LookupError, struct.error) as error:  # as torn files go
        raise InvalidConfig(f"{gguf.name} cannot be read as GGUF: {error}", param="gguf") from error
    # The weights are plain fp32 by now; with the quantizer left in place `save_pretrained` refuses.
    del model.hf_quantizer
    del model.config.quantization_config
    return model, tokenizer


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; a fault is one sentence on stderr and its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ppo_engine.convert", description=__doc__)
    parser.add_argument("gguf", type=Path, help="the file to convert")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--id", required=True, help="name under which the service offers the model")
    parser.add_argument("--alias", action="append", default=[], help="another name; repeatable")
    parser.add_argument("--licence", default="unknown", help="SPDX name of the weights' licence")
    options = parser.parse_args(arguments)
    try:
        convert_gguf(
            options.gguf,
            options.out,
            model_id=options.id,
            aliases=options.alias,
            licence=options.licence,
        )
    except EngineError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

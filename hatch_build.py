"""Compiles the engine's kernels (ppo_engine/native.c) when the package is built or installed.

Once per instruction set; the engine takes the best that its processor runs.  Where that fails, as
without a C compiler, the engine works with PyTorch's operators alone, slower.
"""

import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_X86 = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512_bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"],
}
# OpenMP's pragmas without its library: that of PyTorch serves, and a second one would fight it for
# the cores.
_COMPILE = ["-O3", "-std=gnu11", "-fopenmp", "-fPIC", "-c"]


class NativeKernels(BuildHookInterface[Any]):
    """Adds `ppo_engine/_native_*.so`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Before the files of a wheel, or of an editable install, are collected."""
        folder = Path(self.root) / "ppo_engine"
        is_x86 = platform.machine().lower() in {"x86_64", "amd64"}
        variants = _X86 if is_x86 else {"any": []}
        made = [name for name, options in variants.items() if self._make(folder, name, options)]
        if made:
            build_data["artifacts"] += [f"ppo_engine/_native_{name}.so" for name in made]
            build_data["pure_python"] = False
            build_data["infer_tag"] = True

    def _make(self, folder: Path, name: str, options: list[str]) -> bool:
        compiler = shlex.split(os.environ.get("CC") or "cc")
        result, parts = folder / f"_native_{name}.so", folder / f"_native_{name}.o"
        result.unlink(missing_ok=True)
        try:
            for command in (
                [*compiler, *_COMPILE, *options, "-o", str(parts), str(folder / "native.c")],
                [*compiler, "-shared", "-o", str(result), str(parts), "-lm"],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or error
            self.app.display_warning(f"no {name} kernels, the engine will be slower: {said}")
            return False
        finally:
            parts.unlink(missing_ok=True)
        return True

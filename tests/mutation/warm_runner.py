"""Runs tests against mutants, each in a fork of one process that has the heavy imports done.

Reads a list of mutants' names from the first argument, as JSON, and prints a line of JSON for each
one when it is done.  `ppo_engine` must not be imported here: every fork imports its own copy.
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.mutants import MUTANTS, PACKAGE, ROOT, Mutant

HEAVY_IMPORTS = (
    "hypothesis.strategies",
    "_hypothesis_pytestplugin",
    "pytest_timeout",
    "numpy.random",
    "torch",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "tests.conftest",
)
FORKS = 2
SECONDS_PER_MUTANT = 60
FOREIGN_SOURCE = 97
"""Exit code when a test imported the engine from elsewhere than the mutated copy."""
BROKEN_RUNNER = 98


class Failures:
    """A pytest plugin that keeps which tests failed, and by what."""

    def __init__(self) -> None:
        self.found: list[dict[str, str]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        """Keep the name of the exception of every failure."""
        report = yield
        if report.failed:
            error = call.excinfo.type.__name__
            self.found.append({"test": item.nodeid, "when": report.when, "error": error})
        return report


def write_copy(folder: Path, mutant: Mutant | None) -> None:
    """The package under `folder`, with the mutant's fault in it."""
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        (folder / PACKAGE / mutant.file).write_text(mutant.source(), encoding="utf-8")


def run_tests(folder: Path, killers: list[str]) -> tuple[int, list[dict[str, str]]]:
    """pytest's exit code and failures, with the engine taken from `folder`."""
    sys.path.insert(0, str(folder))
    importlib.import_module(PACKAGE)  # its path now decides where every submodule comes from
    from hypothesis import Phase, configuration, settings  # noqa: PLC0415

    configuration.set_hypothesis_home_dir(folder)
    settings.register_profile(
        "mutation",
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate),
    )
    settings.load_profile("mutation")
    failures = Failures()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", f"timeout={SECONDS_PER_MUTANT}"]
    # Plugins of pytest were imported before pytest could rewrite their assertions.
    quiet = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    code = int(pytest.main([*options, *quiet, f"--rootdir={ROOT}", *killers], plugins=[failures]))
    inside = str(folder)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == PACKAGE and not (file or "").startswith(inside):
            print(f"{name} was imported from {file}")  # noqa: T201
            return FOREIGN_SOURCE, failures.found
    return code, failures.found


def run_in_fork(name: str, mutant: Mutant | None, killers: list[str]) -> int:
    """The id of a process that tests one mutant and prints its line."""
    pid = os.fork()
    if pid:
        return pid
    result = os.dup(1)
    line: dict[str, Any] = {"name": name, "exit_code": BROKEN_RUNNER, "failures": []}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            output = folder / "output"
            with output.open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                write_copy(folder, mutant)
                line["exit_code"], line["failures"] = run_tests(folder, killers)
            sys.stdout.flush()
            line["output"] = output.read_text(errors="replace")[-4000:]
    except BaseException:  # noqa: BLE001 - a fork never returns into its parent's code
        line["output"] = traceback.format_exc()
    finally:
        # One write, so that lines of two forks do not mix.
        with contextlib.suppress(BrokenPipeError):
            os.write(result, (json.dumps(line) + "\n").encode())
        os._exit(0)


def main() -> None:
    """Test the mutants that are named, two at a time; no name means the engine as it is."""
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    for module in HEAVY_IMPORTS:
        importlib.import_module(module)
    assert not any(name.split(".")[0] == PACKAGE for name in sys.modules)
    gc.freeze()
    mutants = {mutant.name: mutant for mutant in MUTANTS}
    every_killer = list(dict.fromkeys(test for mutant in MUTANTS for test in mutant.killers))
    running = 0
    for name in json.loads(sys.argv[1]):
        if running == FORKS:
            os.wait()
            running -= 1
        mutant = mutants[name] if name else None
        run_in_fork(name, mutant, list(mutant.killers) if mutant else every_killer)
        running += 1
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


if __name__ == "__main__":
    main()

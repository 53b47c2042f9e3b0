import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running_stack import RunningStack, removed_afterwards, write_prompts

MAKE_MODEL = "import sys, pathlib; from tests.tiny_model import make_tiny_model; \
make_tiny_model(pathlib.Path(sys.argv[1]))"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache with the tiny model, made in a process of its own: it needs torch."""
    models = tmp_path_factory.mktemp("models")
    subprocess.run(
        [sys.executable, "-c", MAKE_MODEL, str(models / "tiny")], check=True, capture_output=True
    )
    return models


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder that outlives the stacks of one module."""
    with removed_afterwards(tmp_path_factory.mktemp("state") / "home") as home:
        yield home


@pytest.fixture(scope="module")
def stack(home: Path, tiny_models: Path) -> Iterator[RunningStack]:
    """A `trimtab up` with two workers for one module."""
    with RunningStack(home, tiny_models, workers=2) as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", 8)

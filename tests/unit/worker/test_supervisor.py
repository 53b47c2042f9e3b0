import subprocess
import sys
from typing import Any

from worker.supervisor import halved_micro_batch


def settings(micro_batch_size: int, **extra: Any) -> dict[str, Any]:
    return {"hyperparameters": {"micro_batch_size": micro_batch_size, "gamma": 1.0}, **extra}


def test_memory_is_halved_once() -> None:
    smaller = halved_micro_batch(settings(8))

    assert smaller is not None
    assert smaller["hyperparameters"] == {"micro_batch_size": 4, "gamma": 1.0}
    assert halved_micro_batch(smaller) is None


def test_a_micro_batch_of_one_cannot_be_halved() -> None:
    assert halved_micro_batch(settings(1)) is None


def test_an_unknown_micro_batch_cannot_be_halved() -> None:
    assert halved_micro_batch({"hyperparameters": {"micro_batch_size": "auto"}}) is None


def test_the_worker_loads_no_torch() -> None:
    program = (
        "import sys, worker.tasks, worker.dispatcher;"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )

    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert answer.stdout.strip() == "[]"

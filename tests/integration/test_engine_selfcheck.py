"""A self-check that fails, in a process of its own."""

import sys
from pathlib import Path

from tests.fakes.run_folder import make_run_folder

# No sampler is closer to its trainer than this.
IMPOSSIBLE_LIMIT = """
import sys
from ppo_engine import __main__, selfcheck
selfcheck.SAMPLER_LIMITS["fp32"] = -1.0
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_failed_self_check_is_told_with_its_numbers_and_fails_the_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    entry = {"id": "tests/tiny", "path": str(tiny_model), "sha256": "0" * 64}
    run = make_run_folder(tmp_path / "attempt-1", base_model=entry)

    code = run.train([sys.executable, "-c", IMPOSSIBLE_LIMIT])

    (event,) = run.lines_of("event")
    error = run.exit()["error"]
    assert code == 70
    assert error["code"] == "self_check_failed"
    assert "nats per token, more than -1" in error["message"]
    assert (event["code"], event["level"], event["step"]) == ("self_check.failed", "error", 0)
    assert event["data"]["log_ratio_abs_max"] == 0.0
    assert event["data"]["failures"]
    assert not run.lines_of("metrics")

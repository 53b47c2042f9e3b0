"""The real engine, which waits behind its first step until it is asked to stop.

A tiny model's steps are over before a wish of a test has travelled; so the wish meets the run
at a known step.
"""

import sys
import time

from ppo_engine.__main__ import main
from ppo_engine.run_directory import RunDirectory

read_request = RunDirectory.stop_request


def wait_for_request(directory: RunDirectory) -> str:
    """In place of `stop_request`."""
    while (request := read_request(directory)) is None:
        time.sleep(0.01)
    return request


RunDirectory.stop_request = wait_for_request  # type: ignore[method-assign]
sys.exit(main(sys.argv[1:]))

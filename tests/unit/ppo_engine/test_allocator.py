"""Whether freed memory is kept, counted in new pages of processes that take a block repeatedly."""

import ctypes
import os
import subprocess
import sys

import pytest

ROUNDS, PAGES = 5, 16_384
TAKING_A_BLOCK = f"""
import ctypes, resource
from ppo_engine.allocator import keep_freed_memory
kept = {{kept}}
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def take():
    block = library.malloc({PAGES} * 4096)
    ctypes.memset(block, 1, {PAGES} * 4096)
    library.free(block)
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    take()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="the C library is not glibc",
)


def new_pages(kept: str, **environment: str) -> tuple[str, int]:
    """What `kept` gives, and the pages that blocks took after the first."""
    result = subprocess.run(
        [sys.executable, "-c", TAKING_A_BLOCK.format(kept=kept)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found, pages = result.stdout.split()
    return found, int(pages)


def test_freed_memory_is_used_again() -> None:
    found, pages = new_pages("keep_freed_memory()")
    assert found == "True"
    assert pages < PAGES / 10

    _, otherwise = new_pages("None")
    assert otherwise > ROUNDS * PAGES / 2


def test_settings_of_the_user_stand() -> None:
    found, pages = new_pages("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="1000000")
    assert found == "False"
    assert pages > ROUNDS * PAGES / 2

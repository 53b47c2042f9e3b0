"""What the C library does with memory that is freed."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings, from its `malloc.h`."""
_MOST = 2**30
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Where users say themselves what they want."""


def keep_freed_memory() -> bool:
    """Lets the process keep what it frees, for the next pass; whether the C library does.

    glibc gives large blocks back at once.  The next pass then gets them anew, page by page and
    each page zeroed, which may take a tenth of its time.  The most that a process holds stays
    what it is.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # The second one alone would be worse than nothing: with it every block of more than 128 KiB
    # comes from the system, unless the first one says otherwise.
    return bool(mallopt(_MMAP_THRESHOLD, _MOST) and mallopt(_TRIM_THRESHOLD, _MOST))

"""`python -m tests.fakes.dying_worker`: a worker that kills itself at a named point.

`TRIMTAB_TEST_DIE_BEHIND` is a pattern: once a file whose path matches has got its final name, the
process is gone, before it can do anything else.  The product has no such hook: the call that gives
names, `os.replace`, is wrapped here.
"""

import os
import signal
import sys
from fnmatch import fnmatch
from typing import Any

import worker.__main__  # sets REMAP_SIGTERM, before anything imports celery

_replace = os.replace


def main() -> int:
    """Wrap the call, then be a worker."""
    pattern = os.environ["TRIMTAB_TEST_DIE_BEHIND"]

    def replace(source: Any, target: Any, **options: Any) -> None:
        _replace(source, target, **options)
        if fnmatch(str(target), pattern):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    return worker.__main__.main()


if __name__ == "__main__":
    sys.exit(main())

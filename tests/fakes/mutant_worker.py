"""`python -m tests.fakes.mutant_worker`: a worker with one safeguard taken out, for the controls.

`TRIMTAB_TEST_WITHOUT` says which: `fence` forgets the attempt in every write of a holder, `digest`
believes a checkpoint whatever its hash.  The product has no switch for either, and must not.
"""

import os
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement

import worker.__main__  # sets REMAP_SIGTERM, before anything imports celery
from core import attempts, models
from core.attempts import Holder
from core.states import HELD
from core.storage import ArtifactStore

_job = models.job.c
_fetch = ArtifactStore.fetch


def unfenced(holder: Holder) -> tuple[ColumnElement[bool], ...]:
    """The fence without the attempt."""
    return (_job.id == holder.job_id, _job.lease_until.is_not(None), _job.status.in_(HELD))


def unverified(store: ArtifactStore, key: str, destination: Path, **_: Any) -> Path:
    """The object, whatever its digest."""
    return _fetch(store, key, destination)


def main() -> int:
    """Take the safeguard out, then be a worker."""
    match os.environ["TRIMTAB_TEST_WITHOUT"]:
        case "fence":
            attempts._fence = unfenced
        case "digest":
            ArtifactStore.fetch = unverified  # type: ignore[method-assign]
        case other:
            raise SystemExit(f"no such safeguard: {other}")
    return worker.__main__.main()


if __name__ == "__main__":
    sys.exit(main())

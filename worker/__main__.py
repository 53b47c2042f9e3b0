"""`python -m worker`: takes jobs from the queue and supervises their trainers, one at a time."""

import os
import sys

# billiard reads it at import: SIGTERM then ends the running task by its own stop path (a
# checkpoint, a released job) instead of waiting for the task's end.
os.environ["REMAP_SIGTERM"] = "SIGQUIT"


def main() -> int:
    """Run the worker until it is told to stop."""
    from core import logs  # noqa: PLC0415 - after REMAP_SIGTERM, as everything that imports celery
    from worker.celery_app import make_celery  # noqa: PLC0415
    from worker.presence import announce  # noqa: PLC0415
    from worker.settings import WorkerSettings  # noqa: PLC0415
    from worker.tasks import register  # noqa: PLC0415

    settings = WorkerSettings.from_environment()
    logs.configure(log_format=settings.log_format)
    app = make_celery(settings.redis_url.get_secret_value(), queue=settings.queue)
    register(app, settings)
    announce(settings)
    worker = app.Worker(
        hostname=f"{settings.label}@{settings.queue}",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    sys.exit(main())

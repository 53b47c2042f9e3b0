"""Celery as a doorbell: it carries a job's id to a worker and promises nothing else.

Each setting and what it prevents: `docs/adr/` 3. Import this module only after `REMAP_SIGTERM` is
set (`worker/__main__.py`), which billiard reads at import.
"""

from celery import Celery
from kombu import Exchange, Queue

REDIS_SOCKET_SECONDS = 10.0
VISIBILITY_SECONDS = 3600.0
"""Spans only the moment between taking a message and acknowledging it."""


def make_celery(
    redis_url: str, *, queue: str, socket_seconds: float = REDIS_SOCKET_SECONDS
) -> Celery:
    """A Celery app that sends to and consumes from one queue."""
    app = Celery("trimtab", broker=redis_url, set_as_current=False)
    app.conf.update(
        # Redelivery is the reaper's work: late acknowledgement would run long jobs twice.
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        # Solo and thread pools can be neither stopped nor killed.
        worker_pool="prefork",
        worker_concurrency=1,
        worker_max_tasks_per_child=50,
        # Results live in Postgres.
        result_backend=None,
        task_ignore_result=True,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        event_serializer="json",
        # Outlive any outage of Redis.
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_SECONDS,
            "socket_timeout": socket_seconds,
            "socket_connect_timeout": socket_seconds,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        # Our own stop path.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=0.0,
        # The dispatcher comes round again anyway.
        task_publish_retry=False,
        # No unread queue by a typing error.
        task_queues=[Queue(queue, Exchange(queue, type="direct"), routing_key=queue)],
        task_default_queue=queue,
        task_default_exchange=queue,
        task_default_routing_key=queue,
        task_create_missing_queues=False,
        # Noise; and nobody gives orders over Redis.
        worker_send_task_events=False,
        task_send_sent_event=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=False,
    )
    return app

import pytest
from kombu import serialization

from worker.celery_app import make_celery

URL = "redis://localhost:1/0"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_acks_late", False),
        ("worker_disable_prefetch", True),
        ("worker_prefetch_multiplier", 1),
        ("worker_pool", "prefork"),
        ("worker_concurrency", 1),
        ("worker_max_tasks_per_child", 50),
        ("result_backend", None),
        ("task_ignore_result", True),
        ("task_serializer", "json"),
        ("accept_content", ["json"]),
        ("broker_connection_retry_on_startup", True),
        ("broker_connection_max_retries", None),
        ("worker_cancel_long_running_tasks_on_connection_loss", False),
        ("worker_soft_shutdown_timeout", 0.0),
        ("task_publish_retry", False),
        ("task_create_missing_queues", False),
        ("worker_send_task_events", False),
        ("worker_hijack_root_logger", False),
        ("worker_enable_remote_control", False),
    ],
)
def test_a_doorbell_promises_nothing(name: str, value: object) -> None:
    assert make_celery(URL, queue="cpu").conf[name] == value


def test_there_is_one_queue() -> None:
    conf = make_celery(URL, queue="gpu").conf

    assert [queue.name for queue in conf.task_queues] == ["gpu"]
    assert conf.task_default_queue == "gpu"


def test_dead_sockets_are_noticed() -> None:
    options = make_celery(URL, queue="cpu").conf.broker_transport_options

    assert options["visibility_timeout"] == 3600
    assert options["socket_timeout"] == 10
    assert options["socket_keepalive"] is True


def test_pickled_messages_are_refused() -> None:
    accepted = make_celery(URL, queue="cpu").conf.accept_content

    with pytest.raises(serialization.ContentDisallowed):
        serialization.loads(b"", "application/x-python-serialize", "binary", accept=accepted)

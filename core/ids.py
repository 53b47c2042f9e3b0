"""Public ids and the keys behind them."""

from dataclasses import dataclass
from typing import NoReturn
from uuid import UUID

from core.errors import CheckpointNotFound, DomainError, FileNotFound_, JobNotFound

_HEX = 32


def public_job_id(job_id: UUID) -> str:
    """`ftjob-...`."""
    return f"ftjob-{job_id.hex}"


def public_file_id(file_id: UUID) -> str:
    """`file-...`; also the id under which an artifact's bytes can be fetched."""
    return f"file-{file_id.hex}"


def public_event_id(job_id: UUID, seq: int) -> str:
    """`ftevent-<job>-<seq>`."""
    return f"ftevent-{job_id.hex}-{seq}"


def public_checkpoint_id(job_id: UUID, attempt: int, step: int) -> str:
    """`ftckpt_<job>-<attempt>-<step>`."""
    return f"ftckpt_{job_id.hex}-{attempt}-{step}"


def public_clip_id(job_id: UUID, attempt: int, step: int) -> str:
    """`clip_<job>-<attempt>-<step>`."""
    return f"clip_{job_id.hex}-{attempt}-{step}"


def public_sample_id(job_id: UUID, attempt: int, step: int, row: int) -> str:
    """`smp_<job>-<attempt>-<step>-<row>`."""
    return f"smp_{job_id.hex}-{attempt}-{step}-{row}"


def public_token_id(job_id: UUID, attempt: int, step: int, row: int, position: int) -> str:
    """The sample's id and the token's place in the response."""
    return f"{public_sample_id(job_id, attempt, step, row)}-{position}"


def job_id_of(public: str) -> UUID:
    """The key of a job; JobNotFound when no job can have this id."""
    return _parse(public, "ftjob-", JobNotFound)


def file_id_of(public: str) -> UUID:
    """The key of a file; FileNotFound_ when no file can have this id."""
    return _parse(public, "file-", FileNotFound_)


def checkpoint_of(public: str) -> tuple[UUID, int, int]:
    """Job, attempt and step of a checkpoint's id; CheckpointNotFound when it is none."""
    head, _, step = public.rpartition("-")
    job, _, attempt = head.rpartition("-")
    if not (_is_count(step) and _is_count(attempt)):
        _refuse(public, CheckpointNotFound)
    return _parse(job, "ftckpt_", CheckpointNotFound), int(attempt), int(step)


def event_seq_of(public: str, job_id: UUID) -> int | None:
    """The number in an event's id, or None when it is no event of this job."""
    head, _, seq = public.rpartition("-")
    return int(seq) if head == f"ftevent-{job_id.hex}" and _is_count(seq) else None


@dataclass(frozen=True, slots=True)
class SamplePlace:
    """Where a job's sample is found."""

    attempt: int
    step: int
    row: int


def sample_place_of(public: str, job_id: UUID) -> SamplePlace | None:
    """The place in a sample's id, or None when it is no sample of this job."""
    head, *numbers = public.split("-")
    if head != f"smp_{job_id.hex}" or len(numbers) != 3 or not all(map(_is_plain, numbers)):
        return None
    return SamplePlace(*map(int, numbers))


def token_place_of(public: str, job_id: UUID) -> tuple[SamplePlace, int] | None:
    """Sample and position in a token's id, or None when it is no token of this job."""
    head, _, position = public.rpartition("-")
    sample = sample_place_of(head, job_id)
    return (sample, int(position)) if sample and _is_plain(position) else None


def _is_plain(text: str) -> bool:
    """Whether a number is written as we write it: each thing has one id."""
    return _is_count(text) and str(int(text)) == text


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9  # fits Postgres' integer


def _parse(public: str, prefix: str, error: type[DomainError]) -> UUID:
    digits = public.removeprefix(prefix)
    if not public.startswith(prefix) or len(digits) != _HEX or not set(digits) <= _DIGITS:
        _refuse(public, error)
    return UUID(hex=digits)


_DIGITS = frozenset("0123456789abcdef")


def _refuse(public: str, error: type[DomainError]) -> NoReturn:
    raise error(f"{error.__doc__} Got {public[:64]!a}.")

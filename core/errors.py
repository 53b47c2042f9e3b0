"""Everything a user or a worker can be told that went wrong, without a word about HTTP.

DomainError
├── InvalidRequest              what was sent cannot be done as it stands
│   ├── InvalidSpec                 a list of faults in a job
│   ├── InvalidTrainingFile         rows that cannot be trained on
│   ├── InvalidValidationFile       the same, for the held-out prompts
│   ├── InvalidFilePurpose          the file was uploaded for something else
│   ├── FileExpired                 the file reached its expiry
│   ├── InvalidCursor               `after` names nothing
│   └── InvalidIdempotencyKey       the header is no usable key
├── NotFound                    nothing of that name belongs to the caller
│   ├── JobNotFound, FileNotFound_, ModelNotFound, CheckpointNotFound, ArtifactNotFound
│   └── NoAdapter                   the job ended without one
├── Conflict                    right request, wrong moment; permanent
│   ├── JobAlreadyFinished, CancelPending, AdapterNotReady, FileInUse
│   └── IdempotencyInProgress       the only one worth a retry
├── IdempotencyKeyReused        the same key came with another request
├── ArtifactExpired             it was there and has been removed
├── InvalidApiKey               nobody knows this key, or it has ended
├── InsufficientScope           the key may not do this
└── ServerFault                   ours, never the caller's
    ├── AttemptLost                 another attempt holds the job
    ├── StoredFileCorrupt           bytes differ from their digest
    └── DatabaseUnavailable         Postgres does not answer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a request, and where."""

    pointer: str
    """JSON pointer of the value, such as `/method/ppo/hyperparameters/clip_range`."""
    code: str
    """Stable word for the kind of fault."""
    detail: str
    """What to change."""
    line: int | None = None
    """Line of the file, where the fault is in one."""

    @property
    def param(self) -> str | None:
        """The pointer as OpenAI writes it, with dots; None for the whole body."""
        return self.pointer.lstrip("/").replace("/", ".") or None


class DomainError(Exception):
    """The request could not be served."""

    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str | None = None, *, param: str | None = None, faults: Sequence[Fault] = ()
    ) -> None:
        text = message or _first_line(type(self))
        super().__init__(text)
        self.message = text
        self.param = param
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.param, self.faults))


def _first_line(kind: type[DomainError]) -> str:
    """The message of an error raised without one: the first line of its docstring."""
    return (kind.__doc__ or kind.code).strip().splitlines()[0]


def _rebuild(
    kind: type[DomainError], message: str, param: str | None, faults: tuple[Fault, ...]
) -> DomainError:
    """The error again, on the other side of a pickle."""
    return kind(message, param=param, faults=faults)


class InvalidRequest(DomainError):
    """The request cannot be done as it stands."""

    code = "invalid_value"


class InvalidSpec(InvalidRequest):
    """The job has faults; `faults` lists all of them and the first is the message."""

    code = "invalid_value"

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        faults: Sequence[Fault] = (),
    ) -> None:
        if faults:
            message, param = message or faults[0].detail, param or faults[0].param
        super().__init__(message, param=param, faults=faults)

    @property
    def first_code(self) -> str:
        """The code of the first fault, which is the code of the answer."""
        return self.faults[0].code if self.faults else self.code


class InvalidTrainingFile(InvalidRequest):
    """The training file has rows that cannot be used."""

    code = "invalid_training_file"


class InvalidValidationFile(InvalidRequest):
    """The validation file has rows that cannot be used."""

    code = "invalid_validation_file"


class InvalidFilePurpose(InvalidRequest):
    """The file was uploaded for another purpose."""

    code = "invalid_file_purpose"


class FileExpired(InvalidRequest):
    """The file has expired; upload it again."""

    code = "file_expired"


class InvalidCursor(InvalidRequest):
    """The cursor `after` names nothing in this list."""

    code = "invalid_cursor"


class InvalidIdempotencyKey(InvalidRequest):
    """An idempotency key is 1 to 255 visible ASCII characters."""

    code = "invalid_idempotency_key"


class NotFound(DomainError):
    """There is nothing of that name."""

    code = "not_found"


class JobNotFound(NotFound):
    """There is no such job."""

    code = "job_not_found"


class FileNotFound_(NotFound):  # noqa: N801 - the builtin has the plain name
    """There is no such file."""

    code = "file_not_found"


class ModelNotFound(NotFound):
    """The model is not offered here."""

    code = "model_not_found"


class CheckpointNotFound(NotFound):
    """There is no such checkpoint."""

    code = "checkpoint_not_found"


class ArtifactNotFound(NotFound):
    """The job has no such artifact."""

    code = "artifact_not_found"


class NoAdapter(NotFound):
    """The job ended without an adapter."""

    code = "no_adapter"


class Conflict(DomainError):
    """The request does not fit the present state."""

    code = "conflict"


class JobAlreadyFinished(Conflict):
    """The job has finished; its state will not change any more."""

    code = "job_already_finished"


class CancelPending(Conflict):
    """The job is being cancelled; that cannot be taken back."""

    code = "cancel_pending"


class AdapterNotReady(Conflict):
    """The adapter does not exist yet."""

    code = "adapter_not_ready"


class FileInUse(Conflict):
    """A job that has not finished uses this file."""

    code = "file_in_use"


class IdempotencyInProgress(Conflict):
    """The first request with this key is still running; ask again in a second."""

    code = "idempotency_in_progress"


class IdempotencyKeyReused(DomainError):
    """The idempotency key belongs to another request."""

    code = "idempotency_key_reused"


class ArtifactExpired(DomainError):
    """The artifact was removed by retention."""

    code = "artifact_expired"


class InvalidApiKey(DomainError):
    """The API key is not valid."""

    code = "invalid_api_key"


class InsufficientScope(DomainError):
    """The API key lacks the right for this."""

    code = "insufficient_scope"


class ServerFault(DomainError):
    """Something on our side failed."""

    code = "internal_error"


class AttemptLost(ServerFault):
    """The attempt no longer holds the job; nothing was written."""

    code = "attempt_lost"


class StoredFileCorrupt(ServerFault):
    """A stored file differs from the digest written when it was stored."""

    code = "stored_file_corrupt"


class DatabaseUnavailable(ServerFault):
    """The database does not answer."""

    code = "database_unavailable"

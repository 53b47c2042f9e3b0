"""Everything the command line tells its user as one sentence, and the exit code that goes with it.

TrimtabError
├── Failed        1  a job or an operation failed
├── WrongUsage    2  wrong usage, or input that cannot be taken
├── Cancelled     3  the job was cancelled
├── Unreachable   4  no server there, or it refused the key
└── ApiError      1, 2 or 4  the server's own answer, with its code
"""

from collections.abc import Mapping
from typing import Any


class TrimtabError(Exception):
    """The command cannot go on."""

    exit_code = 1


class Failed(TrimtabError):
    """A job or an operation failed."""


class WrongUsage(TrimtabError):
    """Wrong usage, or input that cannot be taken."""

    exit_code = 2


class Cancelled(TrimtabError):
    """The job was cancelled."""

    exit_code = 3


class Unreachable(TrimtabError):
    """No server answers there."""

    exit_code = 4


class ApiError(TrimtabError):
    """The server refused; its message, stable code and request id."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(status, problem)
        self.status = status
        self.problem = dict(problem)

    @property
    def code(self) -> str:
        """The stable code, such as `job_not_found`."""
        return str(self._error.get("code") or "unknown")

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """4 for a refused key, 2 for input that cannot be taken, 1 for the rest."""
        if self.status in (401, 403):
            return 4
        return 2 if self.status in (400, 404, 409, 413, 415, 422) else 1

    @property
    def _error(self) -> Mapping[str, Any]:
        error = self.problem.get("error")
        return error if isinstance(error, Mapping) else {}

    def __str__(self) -> str:
        detail = self._error.get("message") or self.problem.get("detail") or "no reason given"
        lines = [f"{detail} [{self.code}]"]
        faults = self.problem.get("errors") or []
        lines += [f"  {_place(fault)}{fault.get('detail')}" for fault in faults[:20]]
        if len(faults) > 20:
            lines.append(f"  ... and {len(faults) - 20} more")
        if request_id := self.problem.get("request_id"):
            lines.append(f"  (HTTP {self.status}, request {request_id})")
        return "\n".join(lines)


def _place(fault: Mapping[str, Any]) -> str:
    """Where a fault stands: a line, a pointer, or nothing."""
    if fault.get("line"):
        return f"line {fault['line']}: "
    return f"{fault['pointer']}: " if fault.get("pointer") else ""

"""Every error code of the API: its usual status, what it means and what to do about it.

The answers, `GET /v1/errors/{code}` and the documentation all read this one table.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCode:
    """One code: status (where the place does not decide otherwise), meaning, remedy."""

    status: int
    title: str
    remedy: str
    is_permanent: bool = True
    """Whether the same request can never succeed; clients are told not to retry 409 and 429."""


def _bad(title: str, remedy: str) -> ErrorCode:
    return ErrorCode(status=400, title=title, remedy=remedy)


def _missing(title: str) -> ErrorCode:
    return ErrorCode(
        status=404,
        title=title,
        remedy="Check the id. Things of another tenant are answered as if they did not exist.",
    )


ERROR_CODES: dict[str, ErrorCode] = {
    "invalid_json": _bad(
        "The body is not valid JSON", "Correct the text at the line and column given."
    ),
    "invalid_multipart": _bad(
        "The body is not a valid multipart form",
        "Send multipart/form-data with the parts `file` and `purpose`.",
    ),
    "missing_required_parameter": _bad(
        "A required field is missing", "Add the field named in `errors`."
    ),
    "unknown_parameter": _bad(
        "A field or query parameter is unknown", "Remove it, or use the name offered."
    ),
    "unsupported_parameter": _bad(
        "A parameter is not supported", "Leave it out; `detail` says why."
    ),
    "conflicting_parameters": _bad("Two parameters contradict each other", "Give only one."),
    "invalid_type": _bad("A value has the wrong type", "Send the type named in `detail`."),
    "invalid_value": _bad("A value is not allowed", "Use one of the values in `detail`."),
    "invalid_combination": _bad(
        "Values do not fit together", "Change one of the fields that `errors` points to."
    ),
    "integer_below_min_value": _bad("An integer is too small", "Stay inside the bounds."),
    "integer_above_max_value": _bad("An integer is too large", "Stay inside the bounds."),
    "decimal_below_min_value": _bad("A number is too small", "Stay inside the bounds."),
    "decimal_above_max_value": _bad("A number is too large", "Stay inside the bounds."),
    "string_below_min_length": _bad("A string is too short", "Send a longer one."),
    "string_above_max_length": _bad("A string is too long", "Shorten it."),
    "array_below_min_length": _bad("A list is too short", "Send more items."),
    "array_above_max_length": _bad("A list or map is too long", "Send fewer items."),
    "invalid_cursor": _bad(
        "The cursor is not one of this list", "Use `last_id` of the page before as `after`."
    ),
    "invalid_idempotency_key": _bad(
        "The Idempotency-Key header is malformed", "Use 1 to 255 visible ASCII characters."
    ),
    "method_not_supported": _bad(
        "This training method is not offered", "Use `ppo`, the method this server offers."
    ),
    "model_not_found": ErrorCode(
        status=404,
        title="No such model",
        remedy="Use a model of `GET /v1/models`; an operator adds more with `trimtab models add`.",
    ),
    "file_not_found": _missing("No such file"),
    "job_not_found": _missing("No such fine-tuning job"),
    "checkpoint_not_found": _missing("No such checkpoint"),
    "artifact_not_found": _missing("No such artifact"),
    "sample_not_found": ErrorCode(
        status=404,
        title="No such sample among the stored tokens",
        remedy="Take a `sample_id` from `GET J/clip/tokens` without one.",
    ),
    "token_table_not_found": ErrorCode(
        status=404,
        title="No tokens are stored of this step",
        remedy="Leave `step` out for the newest step that has some; see `stored_samples`.",
    ),
    "token_table_too_large": _bad(
        "The stored tokens of this step are too many to search",
        "Download the file named in `detail`, or store fewer samples per step.",
    ),
    "error_not_found": ErrorCode(
        status=404, title="No such error code", remedy="See the table in docs/api.md."
    ),
    "unknown_url": ErrorCode(
        status=404, title="No such address", remedy="See `GET /v1/openapi.json` for all addresses."
    ),
    "invalid_file_purpose": _bad(
        "The file was uploaded for another purpose", "Upload it again with purpose `fine-tune`."
    ),
    "file_expired": _bad("The file has expired", "Upload it again."),
    "artifact_expired": ErrorCode(
        status=410, title="The artifact was removed", remedy="Run the job again."
    ),
    "invalid_training_file": _bad(
        "The training file has faults", "Correct the lines in `errors` and upload it again."
    ),
    "invalid_validation_file": _bad(
        "The validation file has faults", "Correct the lines in `errors` and upload it again."
    ),
    "invalid_grader": _bad("The reward is not usable", "Correct what `errors` points to."),
    "grader_not_supported": _bad(
        "This kind of reward is not offered", "Use one of the kinds in `detail`."
    ),
    "checksum_mismatch": _bad(
        "The received bytes have another checksum", "Send the file again; check `sha256`."
    ),
    "invalid_api_key": ErrorCode(
        status=401,
        title="No valid API key",
        remedy="Send `Authorization: Bearer <key>` with a key that is neither expired nor revoked.",
    ),
    "insufficient_scope": ErrorCode(
        status=403,
        title="The API key lacks a right",
        remedy="Use a key that has the scope named in `detail`.",
    ),
    "method_not_allowed": ErrorCode(
        status=405,
        title="The method is not allowed here",
        remedy="Use one of the methods in the `Allow` header.",
    ),
    "job_already_finished": ErrorCode(
        status=409,
        title="The job has already ended",
        remedy="An ended job does not change. Start a new one, with its checkpoint as `model`.",
    ),
    "cancel_pending": ErrorCode(
        status=409,
        title="The job is being cancelled",
        remedy="A cancel cannot be taken back. Start a new job with its checkpoint as `model`.",
    ),
    "adapter_not_ready": ErrorCode(
        status=409,
        title="There is no adapter yet",
        remedy="Wait for the job's first checkpoint, or for its end.",
    ),
    "no_adapter": ErrorCode(
        status=404,
        title="The job ended before its first checkpoint",
        remedy="See `error` of the job; a smaller `checkpoint_interval` keeps more.",
    ),
    "file_in_use": ErrorCode(
        status=409,
        title="A job still needs the file",
        remedy="Wait until the jobs that use it have ended, or cancel them.",
    ),
    "idempotency_in_progress": ErrorCode(
        status=409,
        title="The first request with this key is still running",
        remedy="Repeat the request after a second.",
        is_permanent=False,
    ),
    "precondition_failed": ErrorCode(
        status=412,
        title="The job has changed since",
        remedy="Read the job again and repeat with its new ETag.",
    ),
    "request_too_large": ErrorCode(
        status=413, title="The request is too large", remedy="Send at most the size in `detail`."
    ),
    "file_too_large": ErrorCode(
        status=413, title="The file is too large", remedy="Split it into smaller files."
    ),
    "unsupported_media_type": ErrorCode(
        status=415,
        title="The media type is not accepted here",
        remedy="Send the Content-Type named in `detail`.",
    ),
    "range_not_satisfiable": ErrorCode(
        status=416,
        title="The range lies beyond the end",
        remedy="The file is complete if you already have the size in `Content-Range`.",
    ),
    "idempotency_key_reused": ErrorCode(
        status=422,
        title="The Idempotency-Key was used for another request",
        remedy="Use a new key for a new request.",
    ),
    "too_many_streams": ErrorCode(
        status=429, title="Too many open streams", remedy="Close one of the open streams first."
    ),
    "internal_error": ErrorCode(
        status=500,
        title="The server failed",
        remedy="This is our fault. Give the request id to the operator.",
    ),
    "database_unavailable": ErrorCode(
        status=503,
        title="The database does not answer",
        remedy="Repeat the request in a few seconds; nothing was stored.",
    ),
    "storage_unavailable": ErrorCode(
        status=503,
        title="The file store does not answer",
        remedy="Repeat the request in a few seconds; nothing was stored.",
    ),
}

"""The shape of errors on routes in OpenAI's style; elsewhere they have KServe's."""

from __future__ import annotations

import re
from typing import Any

from runtime.errors import DiffusionError, GenerationFailed, Gone, ModelNotFound, Unauthorized, all_errors
from runtime.jobs.record import JobError

# Where errors have OpenAI's shape.
PATHS = re.compile(r"/openai(/.*)?|/v1/(images|videos?|jobs)(/.*)?", re.DOTALL)
RETRIED = (429, 503)  # by the SDK on its own; the rest would fail again

_PARAM = re.compile(r"(?:instances\[\d+\]: )?(?:([A-Za-z][\w-]*)(?:\[\d+\])*: |'([^']{1,80})' is not a field)")


def error_body(path: str, status: int, message: str, error: BaseException | None = None) -> dict[str, Any]:
    """A refusal as the routes at `path` tell it."""
    if not PATHS.fullmatch(path):
        return {"error": message}
    kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    found = _PARAM.match(message) if status in (400, 404, 413) else None
    param = (found[1] or found[2]) if found else None
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": None if param == "body" else param,
            "code": _code(status, message, error),
        }
    }


def error_headers(path: str, status: int) -> dict[str, str]:
    return {} if status in RETRIED or not PATHS.fullmatch(path) else {"x-should-retry": "false"}


def _code(status: int, message: str, error: BaseException | None) -> str:
    if status == 400:
        if "is not a field of" in message:
            return "unknown_parameter"
        return "missing_required_parameter" if ": missing;" in message else "invalid_value"
    if isinstance(error, Unauthorized):
        return "invalid_api_key"
    if isinstance(error, ModelNotFound):
        return "model_not_found"
    if status == 429:
        return "rate_limit_exceeded"
    if isinstance(error, Gone):
        return "expired"
    if isinstance(error, DiffusionError):
        return error.code
    return {404: "not_found", 405: "method_not_allowed"}.get(status, "internal_error" if status >= 500 else "refused")


def raised(error: JobError) -> DiffusionError:
    """Why a job failed, as the error that a synchronous request would have met; one that a client would try again is
    a plain failure here, as this job will not end otherwise."""
    if error.http_status in RETRIED:
        return GenerationFailed(error.message)
    classes = all_errors()
    same = [c for c in classes if c("").code == error.code] or [
        c for c in classes if c.http_status == error.http_status
    ]
    return (same or [DiffusionError])[0](error.message)

"""What both job stores need to know of a job."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runtime.jobs.record import JobError, JobProgress, JobRequest, Outcome

LONG = 64 * 2**10  # bytes of a value in a row that is a picture rather than a parameter
_ID = re.compile(r"[a-z0-9]{1,16}_[0-9a-f]{28}")


def is_id(text: str) -> bool:
    """Whether `new_id` may have made this. Clients send what they like: anything else is nobody's id, and no key."""
    return _ID.fullmatch(text) is not None


def place(job_id: str) -> str:
    """What jobs of all apis are ordered by: the id without its api."""
    return job_id.rpartition("_")[2]


def born(job_id: str) -> float:
    """When the id was made, in seconds since 1970."""
    return int(place(job_id)[:12], 16) / 1000


def brief(request: JobRequest) -> JobRequest:
    """The request without the long values of its rows: its source pictures. It itself where it has none."""
    if all(_length(value) <= LONG for row in request.rows for value in row.values()):
        return request
    return replace(request, rows=tuple(_without_long(row) for row in request.rows))


def _without_long(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if _length(value) <= LONG}


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list | tuple) else 0


def cancelled() -> Outcome:
    """The outcome of a job that was cancelled while nobody had it."""
    return Outcome(time.time(), error=JobError("cancelled", "the job was cancelled", 499))


def server_died() -> Outcome:
    """The outcome of a job whose attempts are used up."""
    message = "the server ended while it ran this job, and ended again when it was run once more"
    return Outcome(time.time(), error=JobError("server_died", message, 500))


def progress_of(outcome: Outcome) -> JobProgress:
    return JobProgress("failed") if outcome.error else JobProgress("completed", 1.0, 0.0)

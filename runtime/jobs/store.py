"""What a job store does, whichever it is: sqlite.py for one server, s3.py for several over one bucket.

A store is used from threads, never from the event loop; every method may block. What a method promises is on disk, or
in the bucket, when it returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.jobs.record import Job, JobProgress, JobRequest, Outcome


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Seconds, and bytes. A presigned URL lives no longer than its result, a result no longer than its record, and
    `max_bytes` of results are kept at most: the oldest go first."""

    url: float
    result: float
    record: float
    max_bytes: int


class Duplicate(Exception):
    """A job with this idempotency key is there already."""

    def __init__(self, job_id: str, fingerprint: str) -> None:
        super().__init__(job_id)
        self.job_id, self.fingerprint = job_id, fingerprint


class Unavailable(Exception):
    """The store cannot be reached or written; the message tells the operator why, without a secret."""


class JobStore(Protocol):
    """Jobs. Every method raises Unavailable where the store fails after its own retries."""

    def create(self, request: JobRequest) -> None:
        """Keep a new job, owned by this process and queued. Raises Duplicate for a key that a kept job has."""

    def find(self, key: str) -> tuple[str, str] | None:
        """(job id, fingerprint) of the kept job with this idempotency key."""

    def get(self, job_id: str) -> Job | None:
        """The job, with the progress that its owner told last; None where there is none (see `gone`)."""

    def gone(self, job_id: str) -> bool:
        """Whether a record of this id expired less than one record's lifetime ago: 410, where others get 404."""

    def page(self, apis: tuple[str, ...], after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        """Jobs of these apis behind the id `after`, and whether more follow."""

    def take(self) -> list[JobRequest]:
        """Unfinished jobs that nobody runs: all of them at a start, those of dead owners later. They are this
        process's from now on, oldest first. One whose attempts are used up is failed instead, code `server_died`."""

    def start(self, job_id: str) -> bool:
        """Count an attempt: the job begins to run. False where it is no longer this process's."""

    def beat(self, progress: Mapping[str, JobProgress]) -> dict[str, str]:
        """Renew this process's claim on its jobs and tell how far they are. What must stop, by id, and why:
        "cancelled" (asked for elsewhere) or "lost" (another process has it now)."""

    def finish(self, job_id: str, outcome: Outcome) -> bool:
        """Keep the outcome; False where another came first, which stays."""

    def cancel(self, job_id: str) -> None:
        """Ask the owner, whichever process it is, to stop a job. One that nobody owns is failed at once."""

    def delete(self, job_id: str) -> None:
        """Forget a finished job and its results."""

    def sweep(self) -> None:
        """Drop what has expired: results past their lifetime or over `max_bytes`, records, and marks of records."""

    def release(self) -> None:
        """At a clean stop: unfinished jobs become anybody's at once."""

    def close(self) -> None: ...


class ResultStore(Protocol):
    """Media of results, by key ("JOB/0-1.png"). Every method raises Unavailable."""

    def put(self, key: str, data: bytes, content_type: str, metadata: Mapping[str, str]) -> None: ...

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) in chunks. Raises KeyError where there is no such object any more."""

    def url(self, key: str, seconds: float, filename: str) -> str | None:
        """A URL that whoever has it may GET for so long; None where the store has none and the server serves it."""

    def delete(self, keys: list[str]) -> None: ...


def describe(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`metadata` as an object store takes it, 2 KB in all at most: short lines of ASCII."""
    lines = {name: " ".join(str(value).split()) for name, value in metadata.items()}
    return {name: line.encode("ascii", "backslashreplace").decode()[:400] for name, line in lines.items()}

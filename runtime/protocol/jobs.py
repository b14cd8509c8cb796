"""Jobs on the wire: what is told of one, whichever protocol it came by."""

from __future__ import annotations

from typing import Any

from runtime.jobs.record import Job


def encode_job(job: Job, base: str, result_seconds: float) -> dict[str, Any]:
    """What is told of a job, whichever protocol it came by. `base` is where the jobs' routes are."""
    progress, outcome = job.progress, job.outcome
    told: dict[str, Any] = {
        "id": job.id,
        "object": "job",
        "api": job.request.api,
        "status": job.status,
        "progress": percent(job),
        "created_at": int(job.request.created),
        "attempts": job.attempts,
    }
    if job.started is not None:
        told["started_at"] = int(job.started)
    if outcome is None:
        named = ("stage", progress.stage), ("step", progress.step), ("total", progress.total)
        told |= {name: value for name, value in (*named, ("eta_seconds", rounded(progress.eta))) if value is not None}
        return told
    told["completed_at"] = int(outcome.ended)
    if outcome.error is not None:
        return told | {"error": {"code": outcome.error.code, "message": outcome.error.message}}
    told |= {"expires_at": int(outcome.ended + result_seconds), "available": job.available}
    if job.available:
        told["result"] = f"{base}/{job.id}/result"
        told["content"] = [
            {"url": f"{base}/{job.id}/content/{i}", "content_type": item.content_type, "bytes": item.size}
            for i, item in enumerate(outcome.media)
        ]
    return told


def percent(job: Job) -> int:
    """0 to 100; 100 when it is completed, and no sooner."""
    return 100 if job.status == "completed" else min(99, int(job.progress.fraction * 100))


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)

"""OpenAI's videos API and the peers' additions to it: wire to fields, jobs and results to wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import InvalidRequest, shown
from runtime.families.base import Schema
from runtime.jobs.record import Job
from runtime.protocol.jobs import percent, rounded
from runtime.protocol.openai import IGNORED, VIDEO_PICTURES, Asked, as_number, chosen, split, typed
from runtime.protocol.v1 import describe
from runtime.protocol.wire import Base64
from runtime.types import GenerationRequest, GenerationResult, Media

LIST_DEFAULT, LIST_MOST = 20, 100
VARIANTS = ("video", "thumbnail")


def decode_video(raw: Mapping[str, Any], form: bool, schema: Schema, media: Media, inline: bool) -> Asked:
    """A body of /v1/video/generations (`inline`: it gives the video in its answer), /v1/videos or /v1/videos/sync.
    Raises InvalidRequest."""
    if media != "video":
        raise InvalidRequest("model: the served model makes pictures; send the request to /v1/images/generations")
    values, pictures = split(raw, VIDEO_PICTURES)
    if pictures and "image" not in schema.parameters:
        reason = schema.refused.get("image", "this model takes no source pictures")
        raise InvalidRequest(f"{pictures[0][0]}: can't be used: {reason}")
    values = typed(values, schema) if form else values
    if "seconds" in values:  # a string in OpenAI's JSON too
        values["seconds"] = as_number("number", values["seconds"])
    if values.pop("n", 1) != 1:
        raise InvalidRequest(f"n: {shown(raw['n'])} can't be used: a request makes one video")
    response_format = chosen(values, "response_format", ("b64_json", "url"))
    ignored = sorted(IGNORED & values.keys() - schema.parameters.keys())
    if not inline and raw.get("response_format"):
        ignored.append("response_format")
    fields = {name: value for name, value in values.items() if name not in ignored}
    return Asked(fields, pictures, response_format, False, tuple(ignored))


def envelope(request: GenerationRequest, model: str, ignored: Sequence[str]) -> dict[str, Any]:
    """What a video object tells of a request before there is a result."""
    return {
        "model": model,
        "ignored": list(ignored),
        "size": f"{request.width}x{request.height}",
        "seed": request.seed,
        "num_frames": request.num_frames,
        "fps": request.fps,
    }


def encode_video(job: Job, result_seconds: float) -> dict[str, Any]:
    """OpenAI's video object of a job, with what else is known. `result_seconds`: how long results are kept."""
    progress, outcome, known = job.progress, job.outcome, job.request.envelope
    told: dict[str, Any] = {
        "id": job.id,
        "object": "video",
        "model": known["model"],
        "status": job.status,
        "progress": percent(job),
        "created_at": int(job.request.created),
        "completed_at": int(outcome.ended) if outcome and not outcome.error else None,
        "expires_at": int(outcome.ended + result_seconds) if outcome and not outcome.error else None,
        "prompt": job.request.rows[0].get("prompt"),
        "size": known["size"],
        "seconds": clip_seconds(known["num_frames"], known["fps"]),
        "quality": "standard",
        "error": None,
        "remixed_from_video_id": None,
        "seed": known["seed"],
        "num_frames": known["num_frames"],
        "fps": known["fps"],
        "ignored": list(known["ignored"]),
    }
    if outcome is None:
        steps = {"stage": progress.stage, "step": progress.step, "total": progress.total}
        told |= {"eta_seconds": rounded(progress.eta), **{k: v for k, v in steps.items() if v is not None}}
    elif outcome.error is not None:
        told["error"] = {"code": outcome.error.code, "message": outcome.error.message}
    else:
        (result,) = outcome.results
        item = result.media[0]
        told |= {
            "size": f"{item.width}x{item.height}",
            "eta_seconds": 0.0,
            "stage_durations": dict(result.timings),
            "inference_time_s": inference_seconds(result.timings),
            "bytes": item.size,
            "engine_variant": result.engine_variant,
            "model_revision": result.model_revision,
        }
    return told


def encode_page(jobs: Sequence[Job], more: bool, result_seconds: float) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [encode_video(job, result_seconds) for job in jobs],
        "first_id": jobs[0].id if jobs else None,
        "last_id": jobs[-1].id if jobs else None,
        "has_more": more,
    }


def page_of(query: Mapping[str, str]) -> tuple[str | None, int, bool]:
    """`after`, `limit` and whether the newest come first. Raises InvalidRequest."""
    limit = as_number("integer", query.get("limit", LIST_DEFAULT))
    if not isinstance(limit, int) or not 1 <= limit <= LIST_MOST:
        raise InvalidRequest(f"limit: {shown(query['limit'])} is not an integer from 1 to {LIST_MOST}")
    order = chosen(dict(query), "order", ("desc", "asc"))
    return query.get("after"), limit, order == "desc"


def encode_generation(
    result: GenerationResult, known: Mapping[str, Any], identity: str, created: float, url: str | None = None
) -> dict[str, Any]:
    """The answer of /v1/video/generations."""
    item = result.media[0]
    told = describe(result)
    return {
        "id": identity,
        "created": int(created),
        "model": known["model"],
        "data": [{**({"url": url} if url else {"b64_json": Base64(item.data)}), "seed": item.seed}],
        "output_format": item.format,
        "size": f"{item.width}x{item.height}",
        "seconds": clip_seconds(item.num_frames, item.fps),
        **told,
        "ignored": list(known["ignored"]),
    }


def clip_seconds(num_frames: int | None, fps: int | None) -> str:
    """The length of a clip as OpenAI tells it, a string; asked for, it gives the same frames again."""
    return f"{((num_frames or 1) - 1) / (fps or 1):.6g}"


def inference_seconds(timings: Mapping[str, float]) -> float:
    """All that isn't waiting."""
    return round(timings.get("total", 0.0) - timings.get("wait", 0.0), 4)

"""OpenAI's videos over HTTP, and what the peers add: /v1/videos, /v1/videos/sync, /v1/video/generations."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from kserve.model_repository import ModelRepository

from runtime import media
from runtime.errors import InvalidRequest, NotFound, shown
from runtime.jobs.record import Job
from runtime.logs import request_id
from runtime.metrics import Count
from runtime.model import DiffusionModel
from runtime.protocol.openai import VIDEO_SCHEMA, encode_estimate
from runtime.protocol.openai_video import (
    VARIANTS,
    decode_video,
    encode_generation,
    encode_page,
    encode_video,
    envelope,
    inference_seconds,
    page_of,
)
from runtime.routes.bodies import fields_of
from runtime.routes.images import at_urls
from runtime.routes.jobs import accepted, content, wants_async
from runtime.routes.openai import both, check_name, filled, served
from runtime.routes.responses import Chunked, json_response, two_bodies
from runtime.types import Estimate, GenerationResult


def router(repository: ModelRepository) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/videos", openapi_extra=two_bodies(VIDEO_SCHEMA))
    async def create(request: Request) -> Response:
        model = served(repository)
        with model.counted("openai") as count:
            wanted = await read(repository, request)
            if wanted.dry_run:
                estimate = await made(model, request, wanted, count)
                assert isinstance(estimate, Estimate)
                return json_response(encode_estimate(estimate, wanted.envelope))
            count.prompts = 0  # a job is counted when it ends
            job = await submitted(model, request, wanted)
        return video(model, job)

    @routes.post("/videos/sync", openapi_extra=two_bodies(VIDEO_SCHEMA))
    async def sync(request: Request) -> Response:
        model = served(repository)
        with model.counted("openai") as count:
            wanted = await read(repository, request)
            result = await made(model, request, wanted, count)
        if isinstance(result, Estimate):
            return json_response(encode_estimate(result, wanted.envelope))
        headers = {
            "x-model": model.name,
            "x-seed": str(result.request.seed),
            "x-inference-time-s": str(inference_seconds(result.timings)),
            "x-stage-durations": orjson.dumps(dict(result.timings)).decode(),
        }
        return Chunked([result.media[0].data], "video/mp4", headers)

    @routes.post("/video/generations", openapi_extra=two_bodies(VIDEO_SCHEMA))
    async def generations(request: Request) -> Response:
        model = served(repository)
        with model.counted("openai") as count:
            wanted = await read(repository, request, inline=True)
            later = wants_async(request.headers)
            if (later or wanted.response_format == "url") and not wanted.dry_run:
                count.prompts = 0
                job = await submitted(model, request, wanted)
                return accepted(model, job, request) if later else await by_url(model, request, job)
            result = await made(model, request, wanted, count)
        if isinstance(result, Estimate):
            return json_response(encode_estimate(result, wanted.envelope))
        return json_response(encode_generation(result, wanted.envelope, request_id.get(), time.time()))

    @routes.get("/videos")
    async def page(request: Request) -> Response:
        model = served(repository)
        jobs, more = await model.jobs.page(("videos",), *page_of(request.query_params))
        return json_response(encode_page(jobs, more, model.jobs.lifetimes.result))

    @routes.get("/videos/{video_id}")
    async def retrieve(video_id: str) -> Response:
        model = served(repository)
        return video(model, await known_video(model, video_id))

    @routes.delete("/videos/{video_id}")
    async def delete(video_id: str) -> Response:
        """Stops a video that waits or is being made, forgets one that has ended."""
        model = served(repository)
        await known_video(model, video_id)
        await model.jobs.remove(video_id)
        return json_response({"id": video_id, "object": "video.deleted", "deleted": True})

    @routes.get("/videos/{video_id}/content")
    @routes.head("/videos/{video_id}/content", include_in_schema=False)
    async def download(video_id: str, request: Request) -> Response:
        model = served(repository)
        job = await known_video(model, video_id)
        variant = request.query_params.get("variant", VARIANTS[0])
        if variant not in VARIANTS:
            raise InvalidRequest(f"variant: {shown(variant)} is not one of {', '.join(VARIANTS)}")
        if variant == "video":
            return await content(model, request, job, 0)
        stored = await model.jobs.media(video_id, 0)
        picture = await asyncio.to_thread(lambda: media.thumbnail(b"".join(model.jobs.read(stored))))
        return Chunked([picture], "image/webp")

    return both(routes)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checked request: the checker's fields with their seed, what its job keeps beside them, and `body`, which stands
    for it where an Idempotency-Key is repeated."""

    fields: dict[str, Any]
    envelope: dict[str, Any]
    response_format: str
    dry_run: bool
    body: bytes


async def read(repository: ModelRepository, request: Request, inline: bool = False) -> Wanted:
    """Raises InvalidRequest."""
    model = served(repository)
    checker = model.checker  # 503 before the body is read
    raw, form, body = await fields_of(request)
    check_name(repository, raw.get("model"))
    asked = decode_video(raw, form, checker.schema, checker.media, inline)
    fields = await filled(model, asked)
    checked = model.check([fields], "", request.headers)
    (draft,) = checked.drafts
    if asked.pictures and not fields.keys() & {"size", "width", "height"}:
        (draft,) = await checked.complete()  # the picture sets the size
    known = envelope(draft, model.name, asked.ignored)
    return Wanted({**fields, "seed": draft.seed}, known, asked.response_format, checked.dry_run, body)


async def made(model: DiffusionModel, request: Request, wanted: Wanted, count: Count) -> GenerationResult | Estimate:
    headers = request.headers
    results: list[Any] = await model.once(
        headers, wanted.body, lambda: model.generate([wanted.fields], "", headers, count)
    )
    made: GenerationResult | Estimate = results[0]
    return made


async def submitted(model: DiffusionModel, request: Request, wanted: Wanted) -> Job:
    return await model.jobs.submit("videos", [wanted.fields], "", request.headers, wanted.envelope, wanted.body)


async def by_url(model: DiffusionModel, request: Request, job: Job) -> Response:
    """The job's video as a URL, once it's there."""
    result, (url,) = await at_urls(model, request, job)
    return json_response(encode_generation(result, job.request.envelope, job.id, job.request.created, url))


def video(model: DiffusionModel, job: Job) -> Response:
    """The video object; the SDK's `poll` asks again when the header says."""
    told = encode_video(job, model.jobs.lifetimes.result)
    pause = min(5.0, max(0.25, (job.progress.eta or 0.0) / 20))
    return json_response(
        told, headers={"openai-poll-after-ms": str(int(pause * 1000))} if job.outcome is None else None
    )


async def known_video(model: DiffusionModel, video_id: str) -> Job:
    """Raises NotFound and Gone."""
    job: Job = await model.jobs.get(video_id)
    if job.request.api != "videos":
        raise NotFound(f"video {shown(video_id)} is not known")
    return job

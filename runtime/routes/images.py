"""OpenAI's images over HTTP: /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from kserve.model_repository import ModelRepository

from runtime.errors import DiffusionError, InvalidRequest
from runtime.jobs.record import CONTENT_TYPES, Job
from runtime.logs import log, request_id, unexpected, with_request_id
from runtime.model import DiffusionModel
from runtime.protocol.openai import (
    EDIT_SCHEMA,
    GENERATION_SCHEMA,
    completed_event,
    decode_image,
    encode_estimate,
    encode_images,
    event_name,
)
from runtime.protocol.openai_errors import error_body, raised
from runtime.routes.bodies import fields_of
from runtime.routes.events import EventStream, progress
from runtime.routes.jobs import accepted, wants_async
from runtime.routes.openai import both, check_name, filled, served
from runtime.routes.responses import Chunked, json_response, two_bodies
from runtime.scheduler import Job as Running
from runtime.types import Estimate, GenerationResult


def router(repository: ModelRepository) -> APIRouter:
    routes = APIRouter(prefix="/v1/images", tags=["OpenAI"])

    @routes.post("/generations", openapi_extra=two_bodies(GENERATION_SCHEMA))
    async def generations(request: Request) -> Response:
        return await draw(repository, request, edit=False)

    @routes.post("/edits", openapi_extra=two_bodies(EDIT_SCHEMA))
    async def edits(request: Request) -> Response:
        return await draw(repository, request, edit=True)

    return both(routes)


async def draw(repository: ModelRepository, request: Request, edit: bool) -> Response:
    model = served(repository)
    checker, headers = model.checker, request.headers  # 503 before the body is read
    with model.counted("openai") as count:
        raw, form, body = await fields_of(request)
        check_name(repository, raw.get("model"))
        asked = decode_image(raw, form, edit, checker.schema, checker.media)
        fields = await filled(model, asked)
        known = {"model": model.name, "edit": edit, "ignored": asked.ignored}
        if asked.stream and "idempotency-key" in headers:
            raise InvalidRequest("stream: a stream can't be joined by an Idempotency-Key; leave one of them out")
        as_job = wants_async(headers) or asked.response_format == "url"
        if (asked.stream or as_job) and not model.check([fields], "", headers).dry_run:
            count.prompts = 0  # it is counted when it ends
            if asked.stream:
                return await streamed(model, request, fields, known)
            job = await model.jobs.submit("images", [fields], "", headers, known, body)
            return accepted(model, job, request) if wants_async(headers) else await by_url(model, request, job)
        if asked.response_format == "file" and fields.get("n", 1) != 1:
            raise InvalidRequest(f"n: {fields['n']} pictures; with response_format: file it must be 1")
        (result,) = await model.once(headers, body, lambda: model.generate([fields], "", headers, count))
    if isinstance(result, Estimate):
        return json_response(encode_estimate(result, known))
    if asked.response_format == "file":
        (item,) = result.media
        name = {"content-disposition": f'attachment; filename="{request_id.get()}.{item.format}"'}
        return Chunked([item.data], CONTENT_TYPES[item.format], name)
    return json_response(encode_images([result], known, request_id.get(), time.time(), []))


async def by_url(model: DiffusionModel, request: Request, job: Job) -> Response:
    """The job's pictures as URLs, once they are there."""
    result, urls = await at_urls(model, request, job)
    return json_response(encode_images([result], job.request.envelope, job.id, job.request.created, urls))


async def at_urls(model: DiffusionModel, request: Request, job: Job) -> tuple[GenerationResult, list[str]]:
    """The job's only result, without its bytes, and where they are; waits for it."""
    done = await waited(model, request, job)
    assert done.outcome is not None
    (stored,) = done.outcome.results
    urls = [await model.jobs.url(done, i, str(request.base_url)) for i in range(len(stored.media))]
    return stored.restored([b""] * len(stored.media)), urls


async def waited(model: DiffusionModel, request: Request, job: Job) -> Job:
    """The job once it is completed; a client that leaves ends it, unless an Idempotency-Key lets it come back.

    Raises what a synchronous request raises.
    """
    done: Job = await model.jobs.wait(job.id, keep="idempotency-key" in request.headers)
    if done.outcome is not None and done.outcome.error is not None:
        raise raised(done.outcome.error)
    return done


async def streamed(
    model: DiffusionModel, request: Request, fields: dict[str, Any], known: dict[str, Any]
) -> EventStream:
    """Progress, then the pictures, as events. What is refused before the request waits has its own status."""
    jobs: list[Running] = []
    waiting = asyncio.Event()

    def watch(enqueued: list[Running]) -> None:
        jobs.extend(enqueued)
        waiting.set()

    async def work() -> GenerationResult:
        with model.counted("openai") as count:
            (result,) = await model.generate([fields], "", request.headers, count, watch)
        assert isinstance(result, GenerationResult)
        return result

    async def events() -> AsyncGenerator[dict[str, Any]]:
        try:
            async for told in progress(model, jobs, task):
                yield {"type": f"{event_name(known)}.progress", **told}
            result = await task
            for i, item in enumerate(result.media):
                yield completed_event(result, item, i, known, time.time())
        except DiffusionError as error:
            text = with_request_id(str(error), request_id.get()) if error.http_status >= 500 else str(error)
            log(logging.INFO, "refused", status=error.http_status, path=request.scope["path"], error=text)
            yield {"type": "error", **error_body(request.scope["path"], error.http_status, text, error)}
        except Exception as error:
            yield {"type": "error", **error_body(request.scope["path"], 500, unexpected(error, request_id.get()))}

    task = asyncio.create_task(work())
    admitted = asyncio.create_task(waiting.wait())
    try:
        await asyncio.wait([task, admitted], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.is_set():
            await task  # raises: it was refused
    except BaseException:
        task.cancel()
        raise
    finally:
        admitted.cancel()
    return EventStream(events(), task)

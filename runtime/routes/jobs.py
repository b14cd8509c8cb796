"""Jobs over HTTP: how far one is, its result, its media, and an end to it. Every protocol's jobs are here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from kserve import InferResponse
from kserve.model_repository import ModelRepository

from runtime.access import is_signed
from runtime.errors import NotFound, NotReady, shown
from runtime.jobs.record import Job
from runtime.model import DiffusionModel
from runtime.protocol import v1, v2
from runtime.protocol.jobs import encode_job
from runtime.protocol.openai import encode_images
from runtime.protocol.openai_errors import raised
from runtime.protocol.openai_video import encode_generation
from runtime.routes.content import Pieces, asked_range, headers_of, unchanged, wanted_range
from runtime.routes.openai import base_of, both, served
from runtime.routes.responses import infer_response, json_response


def wants_async(headers: Mapping[str, str]) -> bool:
    """Whether the request says `Prefer: respond-async` (RFC 7240)."""
    preferences = headers.get("prefer", "").split(",")
    return any(preference.split(";")[0].strip().lower() == "respond-async" for preference in preferences)


def accepted(model: DiffusionModel, job: Job, request: Request) -> Response:
    """202: the job is kept, and Location tells where to ask for it."""
    base = f"{base_of(request)}/jobs"
    headers = {"location": f"{base}/{job.id}", "preference-applied": "respond-async"}
    return json_response(encode_job(job, base, model.jobs.lifetimes.result), 202, headers)


async def result_of(model: DiffusionModel, job: Job) -> Any:
    """What the protocol that the job came by answers when it's done. Raises the job's error, and NotReady before."""
    if job.outcome is None:
        eta = job.progress.eta or 1.0
        state = "runs" if job.status == "in_progress" else "waits"
        raise NotReady(f"job {job.id} still {state}", retry_after=min(30, max(1, math.ceil(eta))))
    if job.outcome.error is not None:
        raise raised(job.outcome.error)
    results, known = await model.jobs.results(job), job.request.envelope
    if job.request.api == "images":
        return encode_images(results, known, job.id, job.request.created, [])
    if job.request.api == "videos":
        return encode_generation(results[0], known, job.id, job.request.created)
    if job.request.api == "v2":
        return v2.encode(results, v2.from_envelope(known, model.name), model.name, known["id"] or job.id)
    return v1.encode(results, model.name)


async def content(model: DiffusionModel, request: Request, job: Job, index: int) -> Response:
    """Picture or video `index` of a job, or the range of it that is asked for."""
    media = await model.jobs.media(job.id, index)
    modified = job.outcome.ended if job.outcome else 0.0
    headers = headers_of(f"{job.id}-{index}", modified, f"{job.id}-{index}.{media.format}")
    if unchanged(request, headers):
        return Response(status_code=304, headers=headers)
    try:
        part = asked_range(wanted_range(request, headers), media.size)
    except ValueError:
        return Response(status_code=416, headers={**headers, "content-range": f"bytes */{media.size}"})
    start, end = part or (0, media.size)
    headers["content-length"] = str(end - start)
    if part:
        headers["content-range"] = f"bytes {start}-{end - 1}/{media.size}"

    chunks = iter(()) if request.method == "HEAD" else model.jobs.read(media, start, end)
    return Pieces(chunks, 206 if part else 200, headers, media.content_type)


def router(repository: ModelRepository) -> APIRouter:
    routes = APIRouter(tags=["Jobs"])

    @routes.get("/v1/jobs/{job_id}")
    async def status(job_id: str, request: Request) -> Response:
        model = served(repository)
        job = await model.jobs.get(job_id)
        return json_response(encode_job(job, f"{base_of(request)}/jobs", model.jobs.lifetimes.result))

    @routes.get("/v1/jobs/{job_id}/result")
    async def result(job_id: str) -> Response:
        model = served(repository)
        job = await model.jobs.get(job_id)
        told = await result_of(model, job)
        if isinstance(told, InferResponse):
            return infer_response(told, v2.from_envelope(job.request.envelope, model.name))
        return json_response(told)

    @routes.get("/v1/jobs/{job_id}/content/{index}")
    @routes.head("/v1/jobs/{job_id}/content/{index}", include_in_schema=False)
    async def media(job_id: str, index: str, request: Request) -> Response:
        model = served(repository)
        if not (index.isascii() and index.isdigit() and len(index) < 6):
            raise NotFound(f"job {shown(job_id)} has no content {shown(index)}")
        if is_signed(request.method, request.scope["path"], request.scope["query_string"]):
            model.jobs.require_signature(job_id, int(index), request.query_params)
        job = await model.jobs.get(job_id)
        return await content(model, request, job, int(index))

    @routes.delete("/v1/jobs/{job_id}")
    async def remove(job_id: str) -> Response:
        """Stops a job that waits or runs, forgets one that has ended."""
        job = await served(repository).jobs.remove(job_id)
        return json_response({"id": job.id, "object": "job.deleted", "deleted": True, "status": job.status})

    return both(routes)

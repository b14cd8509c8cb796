"""What the routes in OpenAI's style share: their two places, their models, and sources of a request."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from kserve.model_repository import ModelRepository

from runtime.errors import InvalidRequest, NotReady, shown
from runtime.model import DiffusionModel, find_model
from runtime.protocol.openai import Asked, encode_model, source
from runtime.routes.responses import json_response
from runtime.urls import fetch_picture

PREFIX = "/openai"  # KServe's place for OpenAI's routes; the SDK's base_url is then …/openai/v1


def both(routes: APIRouter) -> APIRouter:
    """`routes` at /v1 and at /openai/v1; documented once."""
    placed = APIRouter()
    placed.include_router(routes)
    placed.include_router(routes, prefix=PREFIX, include_in_schema=False)
    return placed


def base_of(request: Request) -> str:
    """Where the routes are that a request came to: "/v1" or "/openai/v1"."""
    return f"{PREFIX}/v1" if request.scope["path"].startswith(PREFIX) else "/v1"


def served(repository: ModelRepository) -> DiffusionModel:
    """The model, for requests that name none."""
    model: DiffusionModel = next(iter(repository.get_models().values()))
    return model


def check_name(repository: ModelRepository, name: Any) -> None:
    """Raises ModelNotFound for a name that isn't served; none, null and "" mean the model that is there."""
    if name is None or name == "":
        return
    if not isinstance(name, str):
        raise InvalidRequest(f"model: {shown(name)} is not a string")
    find_model(repository, name)


async def filled(model: DiffusionModel, asked: Asked) -> dict[str, Any]:
    """The request's fields, its pictures among them, those that are URLs fetched. Raises InvalidRequest."""
    if not asked.pictures:
        return asked.fields
    settings, most = model.settings, model.checker.schema.parameters["image"].max_items
    if len(asked.pictures) > most:
        raise InvalidRequest(
            f"{asked.pictures[most][0]}: {len(asked.pictures)} pictures; this model takes at most {most}"
        )

    sources = [(name, *source(name, value)) for name, value in asked.pictures]
    if any(is_url for _, is_url, _ in sources):  # nobody is asked for a picture while a field is wrong
        model.check([{**asked.fields, "image": ["-"] * len(sources)}], "", {})

    async def read(name: str, is_url: bool, value: Any) -> Any:
        if not is_url:
            return value
        return await fetch_picture(value, name, settings.allowed_image_hosts, settings.max_source_image_bytes)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(*source)) for source in sources]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return {**asked.fields, "image": [task.result() for task in tasks]}


def router(repository: ModelRepository) -> APIRouter:
    routes, created = APIRouter(tags=["OpenAI"]), int(time.time())

    @routes.get("/v1/models")
    async def models() -> Response:
        """KServe's list and OpenAI's in one."""
        found = repository.get_models()
        data = [encode_model(name, created) for name in found]
        return json_response({"models": list(found), "object": "list", "data": data})

    @routes.get("/v1/models/{model_name}")  # line breaks and all, which a path has not
    @routes.get("/v1/models/{model_name:path}", include_in_schema=False)  # an alias may have a slash
    async def model(model_name: str) -> Response:
        found = find_model(repository, model_name)
        if not await found.healthy():
            raise NotReady(f"the model is not ready ({found.describe()})", retry_after=5)
        return json_response({"name": found.name, "ready": True, **encode_model(model_name, created)})

    placed = both(routes)

    @placed.get("/health", tags=["OpenAI"])
    async def health() -> Response:
        """200 once requests are served, 503 before and while the server drains."""
        found = served(repository)
        if not await found.healthy():
            return json_response({"status": "unavailable", "error": found.describe()}, 503)
        return json_response({"status": "ok"})

    return placed

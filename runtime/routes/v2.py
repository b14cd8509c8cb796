"""v2 over HTTP: health, metadata, readiness, infer and the repository."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from kserve import InferResponse
from kserve.model_repository import ModelRepository

from runtime.model import DiffusionModel, find_model
from runtime.protocol import v2
from runtime.protocol.wire import parse
from runtime.routes.jobs import accepted, wants_async
from runtime.routes.responses import JSON_LENGTH, infer_response, json_body, json_response


def router(repository: ModelRepository) -> APIRouter:
    routes = APIRouter(prefix="/v2", tags=["V2"])

    def models() -> list[DiffusionModel]:
        return list(repository.get_models().values())

    @routes.get("")
    async def server_metadata() -> Response:
        return json_response(v2.SERVER)

    @routes.get("/health/live")
    async def live() -> Response:
        return json_response({"live": True})

    @routes.get("/health/ready")
    async def ready() -> Response:
        for model in models():
            if not await model.healthy():
                return json_response({"ready": False, "error": f"{model.name}: {model.describe()}"}, 503)
        return json_response({"ready": True})

    @routes.get("/models")
    async def list_models() -> Response:
        return json_response({"models": [model.name for model in models()]})

    @routes.get("/models/{model_name}")
    @routes.get("/models/{model_name}/versions/{model_version}", include_in_schema=False)
    async def model_metadata(model_name: str, request: Request) -> Response:
        return json_response(find_model(repository, model_name, _version(request)).metadata())

    @routes.get("/models/{model_name}/ready")
    @routes.get("/models/{model_name}/versions/{model_version}/ready", include_in_schema=False)
    async def model_ready(model_name: str, request: Request) -> Response:
        model = find_model(repository, model_name, _version(request))
        if not await model.healthy():
            return json_response({"name": model.name, "ready": False, "error": model.describe()}, 503)
        return json_response({"name": model.name, "ready": True})

    @routes.post("/models/{model_name}/infer", openapi_extra=json_body(v2.SCHEMA))
    @routes.post("/models/{model_name}/versions/{model_version}/infer", include_in_schema=False)
    async def infer(model_name: str, request: Request) -> Response:
        model = find_model(repository, model_name, _version(request))
        _ = model.checker  # 503 before the body is read
        body = await request.body()
        decoded = v2.rest_request(body, request.headers.get(JSON_LENGTH), model.name)
        if wants_async(request.headers):
            rows, label = model.decoded(decoded)
            job = await model.jobs.submit("v2", rows, label, request.headers, v2.envelope(decoded), body)
            return accepted(model, job, request)
        response = await model.answer(decoded, request.headers, body)
        assert isinstance(response, InferResponse)
        return infer_response(response, decoded)

    @routes.get("/repository/index")
    @routes.post("/repository/index")
    async def index(request: Request) -> Response:
        only_ready = False
        if request.method == "POST" and (body := await request.body()):
            asked = parse(body)
            only_ready = isinstance(asked, dict) and asked.get("ready") is True
        entries: list[dict[str, Any]] = []
        for model in models():
            healthy = await model.healthy()
            if healthy or not only_ready:
                reason = "" if healthy else model.describe()
                entries.append({"name": model.name, "state": "READY" if healthy else "UNAVAILABLE", "reason": reason})
        return json_response(entries)

    @routes.post("/repository/models/{model_name}/load")
    async def load(model_name: str) -> Response:
        model = find_model(repository, model_name)
        await model.load_from_api()
        return json_response({"name": model.name, "load": True})

    @routes.post("/repository/models/{model_name}/unload")
    async def unload(model_name: str) -> Response:
        model = find_model(repository, model_name)
        await model.unload_from_api()
        return json_response({"name": model.name, "unload": True})

    return routes


def _version(request: Request) -> str:
    """The version in the path; a query parameter of that name means nothing."""
    return str(request.path_params.get("model_version", ""))

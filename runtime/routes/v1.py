"""v1 over HTTP: /v1/models/{name}:predict. The models themselves are told by openai.py, in both worlds' words."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from kserve.model_repository import ModelRepository

from runtime.errors import NotImplementedHere
from runtime.model import find_model
from runtime.protocol import v1
from runtime.protocol.wire import parse
from runtime.routes.jobs import accepted, wants_async
from runtime.routes.responses import json_body, json_response


def router(repository: ModelRepository) -> APIRouter:
    routes = APIRouter(tags=["V1"])

    @routes.post("/v1/models/{model_name}:predict", openapi_extra=json_body(v1.SCHEMA))
    async def predict(model_name: str, request: Request) -> Response:
        model = find_model(repository, model_name)
        _ = model.checker  # 503 before the body is read
        body = await request.body()
        payload = parse(body)  # whatever the content type: curl's default is a form's
        if wants_async(request.headers):
            rows, label = model.decoded(payload)
            job = await model.jobs.submit("v1", rows, label, request.headers, {}, body)
            return accepted(model, job, request)
        return json_response(await model.answer(payload, request.headers, body))

    @routes.post("/v1/models/{model_name}:explain")
    async def explain(model_name: str) -> Response:
        find_model(repository, model_name)
        raise NotImplementedHere("this model has no explainer")

    return routes

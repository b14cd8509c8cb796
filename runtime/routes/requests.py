"""Progress over HTTP: what waits, what runs and how far it is; and an explicit cancel."""

from __future__ import annotations

from fastapi import APIRouter, Response
from kserve.model_repository import ModelRepository

from runtime.errors import NotFound, shown
from runtime.model import find_model
from runtime.routes.responses import json_response


def router(repository: ModelRepository) -> APIRouter:
    routes = APIRouter(prefix="/v2/models/{model_name}/requests", tags=["requests"])

    @routes.get("")
    async def requests(model_name: str) -> Response:
        scheduler = find_model(repository, model_name).scheduler
        told = {"requests": scheduler.jobs(), "wait_seconds": round(scheduler.wait_seconds(), 3)}
        return json_response(told)

    @routes.get("/{request_id}")
    async def request(model_name: str, request_id: str) -> Response:
        for job in reversed(find_model(repository, model_name).scheduler.jobs()):
            if job["id"] == request_id:
                return json_response(job)
        raise NotFound(f"request {shown(request_id)} is not known; it waits, runs or ended among the last 100")

    @routes.delete("/{request_id}")
    async def cancel(model_name: str, request_id: str) -> Response:
        if not find_model(repository, model_name).scheduler.cancel(request_id):
            raise NotFound(f"request {shown(request_id)} neither waits nor runs")
        return json_response({"id": request_id, "state": "cancelled"})

    return routes

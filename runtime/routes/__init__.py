"""HTTP routes of ours. They are registered before KServe's, and the first that matches wins."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from kserve.model_repository import ModelRepository

from runtime.routes import images, jobs, openai, requests, ui, v1, v2, videos

# One line for each HTTP surface.
ROUTERS: tuple[Callable[[ModelRepository], APIRouter], ...] = (
    v1.router,
    v2.router,
    requests.router,
    openai.router,
    images.router,
    videos.router,
    jobs.router,
    ui.router,
)

"""The page to try the model, at /ui: files of runtime/ui, which call the API on relative URLs."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response
from kserve.model_repository import ModelRepository

from runtime.errors import NotFound, shown

FOLDER = Path(__file__).resolve().parent.parent / "ui"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
# Nothing from elsewhere and nothing inline; blob: and data: are pictures and videos that the page itself has made.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for each time, and answered with 304 while it is the same
}


def router(repository: ModelRepository) -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    files = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    page = files.pop("index.html")

    def check_enabled() -> None:
        if not all(model.settings.enable_ui for model in repository.get_models().values()):
            raise NotFound("the page is off; ENABLE_UI=true turns it on")

    @routes.api_route("/ui", methods=["GET", "HEAD"])
    async def redirect() -> Response:
        """Relative, so that it holds below any prefix that a proxy takes off."""
        check_enabled()
        return Response(status_code=307, headers={**HEADERS, "location": "ui/"})

    @routes.api_route("/ui/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        check_enabled()
        return answer(request, page, ".html")

    @routes.api_route("/ui/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        check_enabled()
        if name not in files:
            raise NotFound(f"the page has no file {shown(name)}")
        return answer(request, files[name], Path(name).suffix)

    return routes


def answer(request: Request, content: bytes, suffix: str) -> Response:
    """`content`, or 304 for who has it."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**HEADERS, "etag": tag}
    known = {part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")}
    if tag in known:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[suffix])

"""Responses that go out in chunks, so that a 100 MB body never holds the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import Response
from kserve import InferRequest, InferResponse
from starlette.types import Receive, Scope, Send

from runtime.protocol.v2 import rest_response
from runtime.protocol.wire import CHUNK, Base64, pieces

JSON_LENGTH = "inference-header-content-length"


def chunks(parts: Iterable[bytes | bytearray | Base64]) -> Iterator[bytes | memoryview]:
    """`parts` in pieces that are worth a send each; base64 is encoded on the way."""
    small = bytearray()
    for part in parts:
        if isinstance(part, Base64) or len(part) > CHUNK:
            if small:
                yield bytes(small)
                small.clear()
            if isinstance(part, Base64):
                yield from part.chunks()
            else:
                view = memoryview(part)
                yield from (view[i : i + CHUNK] for i in range(0, len(view), CHUNK))
        else:
            small += part
    if small:
        yield bytes(small)


class Chunked(Response):
    """A body given in parts, with its true Content-Length. Base64 parts are encoded while they are sent."""

    def __init__(
        self, parts: Iterable[bytes | bytearray | Base64], media_type: str, headers: dict[str, str] | None = None
    ) -> None:
        self._parts = list(parts)
        length = sum(map(len, self._parts))
        super().__init__(media_type=media_type, headers={**(headers or {}), "content-length": str(length)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for chunk in chunks(self._parts):
            await send({"type": "http.response.body", "body": bytes(chunk), "more_body": True})
            await asyncio.sleep(0)  # a client that reads as fast as this writes must not keep others waiting
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`value` as JSON; `Base64` objects in it are streamed."""
    response = Chunked(pieces(value), "application/json", headers)
    response.status_code = status
    return response


def infer_response(response: InferResponse, request: InferRequest) -> Response:
    """A v2 answer, with binary data behind its JSON where `request` asks for that."""
    parts, json_length = rest_response(response, request)
    if json_length is None:
        return Chunked(parts, "application/json")
    return Chunked(parts, "application/octet-stream", {JSON_LENGTH: str(json_length)})


def json_body(schema: dict[str, Any]) -> dict[str, Any]:
    """A route's `openapi_extra` for a body that it reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def two_bodies(schema: dict[str, Any]) -> dict[str, Any]:
    """Likewise, for a body that is JSON or a form."""
    kinds = ("application/json", "multipart/form-data")
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}

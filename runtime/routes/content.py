"""Media of finished jobs over HTTP: whole, or the range that a player asks for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from email.utils import formatdate, parsedate_to_datetime

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

_RANGE = re.compile(r"\s*bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*", re.ASCII | re.IGNORECASE)


class Pieces(Response):
    """A body whose chunks a blocking iterator gives, read by threads. Nothing is sent before the first is there."""

    def __init__(self, chunks: Iterator[bytes], status: int, headers: dict[str, str], media_type: str) -> None:
        super().__init__(status_code=status, headers=headers, media_type=media_type)
        self._pieces = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        piece = await asyncio.to_thread(next, self._pieces, None)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while piece is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await asyncio.to_thread(next, self._pieces, None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def asked_range(value: str | None, size: int) -> tuple[int, int] | None:
    """[start, end) of a Range header; None for the whole: no header, several ranges, or one that isn't understood.

    Raises ValueError for a range that no byte lies in.
    """
    found = _RANGE.fullmatch(value or "")
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:  # the last so many
        if int(found[2]) == 0 or size == 0:
            raise ValueError
        return max(0, size - int(found[2])), size
    start, last = int(found[1]), int(found[2]) if found[2] else size - 1
    if found[2] and last < start:
        return None
    if start >= size:
        raise ValueError
    return start, min(last + 1, size)


def headers_of(tag: str, modified: float, filename: str) -> dict[str, str]:
    return {
        "accept-ranges": "bytes",
        "etag": f'"{tag}"',
        "last-modified": formatdate(modified, usegmt=True),
        "cache-control": "private, no-cache",
        "content-disposition": f'inline; filename="{filename}"',
    }


def unchanged(request: Request, headers: dict[str, str]) -> bool:
    """Whether the client has what would be sent."""
    if (tags := request.headers.get("if-none-match")) is not None:
        known = [tag.strip().removeprefix("W/") for tag in tags.split(",")]
        return headers["etag"] in known or "*" in known
    return _not_later(headers["last-modified"], request.headers.get("if-modified-since"))


def wanted_range(request: Request, headers: dict[str, str]) -> str | None:
    """The Range header, unless If-Range names another state of the content."""
    if (condition := request.headers.get("if-range")) is not None and condition.strip() not in (
        headers["etag"],
        headers["last-modified"],
    ):
        return None
    return request.headers.get("range")


def _not_later(modified: str, since: str | None) -> bool:
    try:
        return since is not None and parsedate_to_datetime(modified) <= parsedate_to_datetime(since)
    except (ValueError, TypeError):
        return False

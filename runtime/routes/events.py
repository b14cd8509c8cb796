"""Server-sent events: progress while a request runs, then its result."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from runtime.model import DiffusionModel
from runtime.protocol.wire import pieces
from runtime.routes.responses import chunks
from runtime.scheduler import Job

LOOK_SECONDS = 0.1  # between two looks at a job
QUIET_SECONDS = 10.0  # a proxy must not take a long step for a dead connection

Event = dict[str, Any]


class EventStream(Response):
    """Events as they come, each named by its `type`; `Base64` objects in them are streamed. `work`, which they tell of,
    ends with the connection."""

    def __init__(self, events: AsyncGenerator[Event], work: asyncio.Task[Any]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._events, self._work = events, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    parts = [f"event: {event['type']}\ndata: ".encode(), *pieces(event), b"\n\n"]
                    for chunk in chunks(parts):
                        await send({"type": "http.response.body", "body": bytes(chunk), "more_body": True})
                        await asyncio.sleep(0)  # others' turn
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._work.cancel()


async def progress(model: DiffusionModel, jobs: Sequence[Job], task: asyncio.Task[Any]) -> AsyncIterator[Event]:
    """How far the request is that `task` waits for, at each step forward until it ends; of several jobs the last."""
    told, when = None, 0.0
    while not task.done():
        now = time.monotonic()
        job = model.scheduler.describe(jobs[-1])
        mark = job["state"], job.get("stage"), job.get("step"), job.get("position")
        if (mark != told or now - when > QUIET_SECONDS) and "eta_seconds" in job:
            told, when = mark, now
            status = "queued" if job["state"] == "queued" else "in_progress"
            names = [name for name in ("stage", "step", "total", "position", "eta_seconds") if name in job]
            yield {"status": status, "progress": job.get("progress", 0.0)} | {name: job[name] for name in names}
        await asyncio.wait([task], timeout=LOOK_SECONDS)

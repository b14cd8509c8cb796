"""Retries that don't pay twice: a request with an Idempotency-Key outlives its connection, and its retry joins it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import Conflict, InvalidRequest, shown

MAX_KEPT = 64  # results that stay for a retry; the oldest goes first
MAX_KEY_LENGTH = 256


def key_of(headers: Mapping[str, str], join_by_id: bool, identity: str | None = None) -> str | None:
    """The request's Idempotency-Key; with `join_by_id` its X-Request-ID or its own `identity` where it has none.

    Raises InvalidRequest.
    """
    key = headers.get("idempotency-key") or (headers.get("x-request-id") or identity if join_by_id else None)
    if key and len(key) > MAX_KEY_LENGTH:
        raise InvalidRequest(f"Idempotency-Key: {shown(key)} is longer than {MAX_KEY_LENGTH} characters")
    return key or None


async def digest(body: bytes) -> str:
    """What stands for a body; in a thread, as bodies are large."""
    return await asyncio.to_thread(lambda: hashlib.sha256(body).hexdigest())


def conflict(key: str) -> Conflict:
    return Conflict(f"Idempotency-Key: {key[:80]!r} came with another body; use a new key for a new request")


@dataclass(eq=False)
class Entry:
    digest: str
    task: asyncio.Task[Any]
    waiters: int = 0
    ended: float | None = None
    abandon: asyncio.TimerHandle | None = None


class Idempotency:
    """Requests by (credential, key). All methods belong to the event loop."""

    def __init__(self, hold_seconds: float) -> None:
        self._hold = hold_seconds
        self._entries: dict[tuple[str, str], Entry] = {}

    async def run(self, key: tuple[str, str], digest: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """The result of `work`, of the request with this key that runs, or of the one that has just succeeded.

        When the last caller leaves, the work goes on for the hold time and is then cancelled. A failure is not
        kept: its retry runs again. Raises Conflict where the key came with another body, and what `work` raises.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(digest, asyncio.ensure_future(work()))
            entry.task.add_done_callback(lambda task: self._ended(key, task))
        elif entry.digest != digest:
            raise conflict(key[1])
        entry.waiters += 1
        if entry.abandon is not None:
            entry.abandon.cancel()
            entry.abandon = None
        try:
            return await asyncio.shield(entry.task)
        finally:
            entry.waiters -= 1
            if entry.waiters == 0 and not entry.task.done():
                entry.abandon = asyncio.get_running_loop().call_later(self._hold, self._abandon, key, entry)

    def _abandon(self, key: tuple[str, str], entry: Entry) -> None:
        del self._entries[key]  # first: a retry that comes now must not join what is being stopped
        entry.task.cancel()

    def _ended(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        entry = self._entries.get(key)
        if entry is None or entry.task is not task:
            return
        entry.ended = asyncio.get_running_loop().time()
        if entry.abandon is not None:
            entry.abandon.cancel()
        if task.cancelled() or task.exception() is not None:
            del self._entries[key]
            return
        asyncio.get_running_loop().call_later(self._hold, self._forget, key, entry)
        ended = {key: entry.ended for key, entry in self._entries.items() if entry.ended is not None}
        for oldest in sorted(ended, key=lambda key: ended[key])[:-MAX_KEPT]:
            del self._entries[oldest]

    def _forget(self, key: tuple[str, str], entry: Entry) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]

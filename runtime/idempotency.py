"""Retries that don't pay twice: a request with an Idempotency-Key outlives its connection, and its retry joins it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from runtime.errors import Conflict

MAX_KEPT = 64  # results that stay for a retry; the oldest goes first
MAX_KEY_LENGTH = 256


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
            raise Conflict(f"Idempotency-Key: {key[1][:80]!r} came with another body; use a new key for a new request")
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

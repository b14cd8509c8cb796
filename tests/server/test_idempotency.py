"""Retries that join: the same key runs once, another body is a conflict, a lost connection is held for a while."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runtime.errors import Conflict, OutOfMemory
from runtime.idempotency import MAX_KEPT, Idempotency

KEY = ("", "key")


class Work:
    """Counts its runs; each ends when `finish` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.runs = 0
        self.cancelled = 0
        self.finish = asyncio.Event()
        self._error = error

    async def __call__(self) -> Any:
        self.runs += 1
        try:
            await self.finish.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._error is not None:
            raise self._error
        return {"run": self.runs}


def test_callers_at_the_same_time_share_one_run_and_a_later_one_its_result() -> None:
    async def scenario() -> None:
        kept, work = Idempotency(60), Work()
        calls = [asyncio.create_task(kept.run(KEY, "body", work)) for _ in range(3)]
        await asyncio.sleep(0)
        work.finish.set()
        results = [*await asyncio.gather(*calls), await kept.run(KEY, "body", work)]
        assert results == [{"run": 1}] * 4 and work.runs == 1

    asyncio.run(scenario())


def test_another_body_is_a_conflict_and_another_credential_is_not() -> None:
    async def scenario() -> None:
        kept, work = Idempotency(60), Work()
        work.finish.set()
        await kept.run(KEY, "body", work)
        with pytest.raises(Conflict, match="'key' came with another body"):
            await kept.run(KEY, "other", work)
        assert await kept.run(("somebody", "key"), "other", work) == {"run": 2}

    asyncio.run(scenario())


def test_a_failure_is_not_kept() -> None:
    async def scenario() -> None:
        kept, failing, work = Idempotency(60), Work(OutOfMemory("too large")), Work()
        failing.finish.set()
        work.finish.set()
        with pytest.raises(OutOfMemory):
            await kept.run(KEY, "body", failing)
        assert await kept.run(KEY, "body", work) == {"run": 1}

    asyncio.run(scenario())


def test_a_lost_connection_is_held_and_joined_again() -> None:
    async def scenario() -> None:
        kept, work = Idempotency(60), Work()
        lost = asyncio.create_task(kept.run(KEY, "body", work))
        await asyncio.sleep(0)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        retry = asyncio.create_task(kept.run(KEY, "body", work))
        await asyncio.sleep(0)
        work.finish.set()
        assert await retry == {"run": 1}
        assert (work.runs, work.cancelled) == (1, 0)

    asyncio.run(scenario())


def test_what_nobody_comes_back_for_is_stopped() -> None:
    async def scenario() -> None:
        kept, work = Idempotency(0.01), Work()
        lost = asyncio.create_task(kept.run(KEY, "body", work))
        await asyncio.sleep(0)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        while not work.cancelled:
            await asyncio.sleep(0.005)
        work.finish.set()
        assert await kept.run(KEY, "body", work) == {"run": 2}

    asyncio.run(scenario())


def test_results_are_forgotten_by_age_and_by_number() -> None:
    async def scenario() -> None:
        kept, work = Idempotency(0.02), Work()
        work.finish.set()
        await kept.run(KEY, "body", work)
        await asyncio.sleep(0.05)
        assert await kept.run(KEY, "another body by now", work) == {"run": 2}
        many = Idempotency(60)
        for i in range(MAX_KEPT + 2):
            await many.run(("", str(i)), "body", work)
        runs = work.runs
        await many.run(("", str(MAX_KEPT + 1)), "body", work)
        assert work.runs == runs
        await many.run(("", "0"), "body", work)
        assert work.runs == runs + 1

    asyncio.run(scenario())


def test_a_result_leaves_memory_without_another_call() -> None:
    async def main() -> int:
        kept = Idempotency(0.05)

        async def work() -> bytes:
            return bytes(10)

        await kept.run(("", "k"), "d", work)
        assert len(kept._entries) == 1
        await asyncio.sleep(0.3)
        return len(kept._entries)

    assert asyncio.run(main()) == 0

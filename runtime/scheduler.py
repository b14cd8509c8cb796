"""Admit requests, hand them to the engine first come, first served, and give back what it made."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from runtime.engine.client import UNLOADED, EngineClient, EngineDied, Ticket
from runtime.errors import InvalidRequest, NotReady, QueueFull
from runtime.logs import log
from runtime.types import GenerationRequest, GenerationResult, Progress

MAX_ATTEMPTS = 2  # a request whose engine died is run once more


@dataclass(eq=False)
class Job:
    """One admitted request. `result` is what its caller waits for; cancelling it cancels the job."""

    request: GenerationRequest
    request_id: str
    on_progress: Callable[[Progress], None]
    result: asyncio.Future[GenerationResult]
    number: int = field(default_factory=itertools.count(1).__next__)  # first come, first served
    admitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    attempts: int = 0
    ticket: Ticket | None = None


class Scheduler:
    """One request on the device at a time; the next starts while the last one's result is encoded."""

    def __init__(self, engine: EngineClient, max_queue_size: int) -> None:
        self._engine = engine
        self._max_queue_size = max_queue_size
        self._waiting: deque[Job] = deque()
        self._wake = asyncio.Event()
        self._running: dict[asyncio.Task[None], Job] = {}
        self.draining = False

    @property
    def depth(self) -> int:
        return len(self._waiting)

    async def generate(
        self,
        requests: list[GenerationRequest],
        request_id: str,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> list[GenerationResult]:
        """Run `requests` and return their results in order. All are admitted, or none.

        Raises QueueFull, NotReady and what the engine raises; when one fails the others are cancelled.
        Cancelling the caller cancels them all.
        """
        if self.draining:
            raise NotReady("the server is shutting down", retry_after=5)
        if len(requests) > self._max_queue_size:
            most = f"{self._max_queue_size} fit in one call (MAX_QUEUE_SIZE)"
            raise InvalidRequest(f"instances: {len(requests)} prompts; at most {most}")
        if self.depth + len(requests) > self._max_queue_size:
            raise QueueFull(
                f"{self.depth} prompts wait and at most {self._max_queue_size} may; try again later", retry_after=5
            )
        loop = asyncio.get_running_loop()
        jobs = [Job(request, request_id, on_progress, loop.create_future()) for request in requests]
        self._waiting.extend(jobs)
        self._wake.set()
        try:
            return list(await asyncio.gather(*(job.result for job in jobs)))
        finally:
            for job in jobs:
                self._cancel(job)

    def _cancel(self, job: Job) -> None:
        """Stop what is left of a job; nothing for one that is over."""
        if job.result.done() and not job.result.cancelled():
            job.result.exception()  # looked at: a sibling's failure is not "never retrieved"
            return
        job.result.cancel()
        with contextlib.suppress(ValueError):
            self._waiting.remove(job)
        if job.ticket is not None:
            self._engine.cancel(job.ticket)

    async def run(self) -> None:
        """The dispatcher; runs for the server's life."""
        while True:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            await self._engine.ready.wait()
            if not self._waiting:  # cancelled while the engine came up
                continue
            job = self._waiting.popleft()
            if job.result.done():  # aborted while it waited
                continue
            try:
                job.ticket = ticket = self._engine.submit(job.request, job.on_progress, job.request_id)
            except NotReady:  # the engine died between the two lines
                self._waiting.appendleft(job)
                continue
            job.started, job.attempts = time.monotonic(), job.attempts + 1
            task = asyncio.create_task(self._deliver(job, ticket))
            self._running[task] = job
            task.add_done_callback(lambda task: self._running.pop(task, None))
            await ticket.device_free.wait()

    async def _deliver(self, job: Job, ticket: Ticket) -> None:
        try:
            result = await ticket.result
        except EngineDied as error:
            if job.attempts < MAX_ATTEMPTS and self._engine.state != UNLOADED and not job.result.done():
                log(logging.WARNING, "the engine ended under a request; it runs once more", request_id=job.request_id)
                job.ticket = None
                self._waiting.append(job)
                self._waiting = deque(sorted(self._waiting, key=lambda waiting: waiting.number))
                self._wake.set()
            elif not job.result.done():
                job.result.set_exception(error)
        except Exception as error:
            if not job.result.done():
                job.result.set_exception(error)
        else:
            if not job.result.done():
                waited = (job.started or job.admitted) - job.admitted
                timings = {"wait": waited, **result.timings, "total": time.monotonic() - job.admitted}
                job.result.set_result(
                    replace(result, timings={stage: round(seconds, 4) for stage, seconds in timings.items()})
                )

    async def drain(self) -> None:
        """Refuse new work and return when everything admitted is delivered."""
        self.draining = True
        while jobs := [*self._waiting, *self._running.values()]:
            await asyncio.wait([job.result for job in jobs])
            await asyncio.sleep(0)  # lets the finished deliveries leave the books

    def abort(self, message: str) -> None:
        """Tell everybody who still waits that it is over."""
        for job in [*self._waiting, *self._running.values()]:
            if not job.result.done():
                job.result.set_exception(NotReady(message, retry_after=5))

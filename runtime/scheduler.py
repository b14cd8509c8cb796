"""Admit requests by their predicted cost, hand them to the engine first come, first served, tell how far they are."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.cost import CostModel, area
from runtime.engine.client import UNLOADED, EngineClient, EngineDied, Ticket
from runtime.errors import Cancelled, DeadlineExceeded, InvalidRequest, NotReady, OutOfMemory, QueueFull
from runtime.logs import log, trace_id
from runtime.types import GenerationRequest, GenerationResult, Progress

MAX_ATTEMPTS = 2  # a request whose engine died is run once more
KEEP_FINISHED = 100  # jobs whose end can still be asked for
LOG_PROGRESS_SECONDS = 30.0

QUEUED, RUNNING = "queued", "running"


@dataclass(eq=False)
class Job:
    """One admitted request. `result` is what its caller waits for; cancelling it cancels the job."""

    request: GenerationRequest
    request_id: str
    name: str
    result: asyncio.Future[GenerationResult] = field(repr=False)
    cost: float
    trace_id: str | None
    number: int = field(default_factory=itertools.count(1).__next__)  # first come, first served
    admitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    expired: bool = False
    ticket: Ticket | None = field(default=None, repr=False)
    progress: Progress | None = None
    logged: float = 0.0

    @property
    def state(self) -> str:
        if not self.result.done():
            return RUNNING if self.started is not None else QUEUED
        if self.expired:
            return "expired"
        if self.result.cancelled() or isinstance(self.result.exception(), Cancelled):
            return "cancelled"
        return "failed" if self.result.exception() else "completed"

    def left(self) -> float:
        """Predicted device seconds that are left."""
        if self.started is None:
            return self.cost
        spent, progress = time.monotonic() - self.started, self.progress
        if progress is not None and progress.stage == "denoise" and progress.step:
            return max(0.0, spent / progress.step * (progress.total - progress.step))
        return max(0.0, self.cost - spent)


class Scheduler:
    """One request on the device at a time; the next starts while the last one's result is encoded."""

    def __init__(self, engine: EngineClient, max_queue_size: int, max_queue_seconds: float) -> None:
        self._engine = engine
        self._max_queue_size = max_queue_size
        self._max_queue_seconds = max_queue_seconds
        self._waiting: deque[Job] = deque()
        self._wake = asyncio.Event()
        self._running: dict[asyncio.Task[None], Job] = {}
        self._finished: deque[dict[str, Any]] = deque(maxlen=KEEP_FINISHED)  # told, not kept: results are large
        self._promised: list[float] = []  # costs admitted whose pictures are still being decoded
        self._largest: GenerationRequest | None = None
        self.costs = CostModel()
        self.on_advance: Callable[[str, int], None] = lambda stage, steps: None
        self.draining = False

    @property
    def depth(self) -> int:
        return len(self._waiting)

    def wait_seconds(self) -> float:
        """Predicted seconds until a request that came now would start."""
        running = sum(job.left() for job in self._running.values() if not job.result.done())
        return running + sum(job.cost for job in self._waiting) + sum(self._promised)

    @contextlib.contextmanager
    def admit(self, costs: list[float]) -> Iterator[None]:
        """Promise a place in the queue for requests of these predicted costs; before their pictures are decoded.

        Raises NotReady, QueueFull, and InvalidRequest for more prompts than ever fit. A queue that is empty takes
        anything: one long video must not be refused for ever.
        """
        if self.draining:
            raise NotReady("the server is shutting down", retry_after=5)
        if len(costs) > self._max_queue_size:
            raise InvalidRequest(
                f"instances: {len(costs)} prompts; at most {self._max_queue_size} fit in one call (MAX_QUEUE_SIZE)"
            )
        ahead, cost, waiting = self.wait_seconds(), sum(costs), self.depth + len(self._promised)
        if waiting + len(costs) > self._max_queue_size:
            raise QueueFull(
                f"{waiting} prompts wait and at most {self._max_queue_size} may; try again later",
                retry_after=max(1, math.ceil(ahead / 2)),
            )
        if ahead and ahead + cost > self._max_queue_seconds:
            raise QueueFull(
                f"about {ahead:.0f} s of work wait and this is {cost:.0f} s more; at most "
                f"{self._max_queue_seconds:.0f} s may wait; try again later",
                retry_after=max(1, math.ceil(ahead + cost - self._max_queue_seconds)),
            )
        self._promised += costs
        try:
            yield
        finally:
            for cost in costs:
                self._promised.remove(cost)

    def enqueue(self, requests: list[GenerationRequest], request_id: str) -> list[Job]:
        """Jobs for requests that were admitted; to be called inside `admit`."""
        loop = asyncio.get_running_loop()
        jobs = []
        for i, request in enumerate(requests):
            name = request_id if len(requests) == 1 else f"{request_id}-{i}"
            cost, trace = self.costs.predict(request), trace_id.get() or None
            jobs.append(Job(request, request_id, name, loop.create_future(), cost, trace))
        self._waiting.extend(jobs)
        self._wake.set()
        return jobs

    async def results(self, jobs: list[Job], seconds: float) -> list[GenerationResult]:
        """The jobs' results, in order. When one fails, or `seconds` pass, or the caller is cancelled, the
        rest are stopped.

        Raises DeadlineExceeded, NotReady and what the engine raises.
        """
        try:
            async with asyncio.timeout(seconds):
                return list(await asyncio.gather(*(job.result for job in jobs)))
        except TimeoutError:
            for job in jobs:
                job.expired = job.result.cancelled()
            raise DeadlineExceeded(f"timeout: {seconds:g} s passed before the result was there") from None
        finally:
            for job in jobs:
                self._stop(job)

    def cancel(self, name: str) -> bool:
        """Stop the job `name`; False where there is none that waits or runs."""
        for job in self._active():
            if job.name == name and not job.result.done():
                job.result.set_exception(Cancelled("the request was cancelled"))
                self._stop(job)
                return True
        return False

    def _active(self) -> list[Job]:
        return [*self._running.values(), *self._waiting]

    def _stop(self, job: Job) -> None:
        """Stop what is left of a job; nothing for one that is over."""
        if not job.result.done():
            job.result.cancel()
        elif not job.result.cancelled():
            job.result.exception()  # looked at: a sibling's failure is not "never retrieved"
        if job.ticket is not None:
            self._engine.cancel(job.ticket)  # nothing for one that has left the engine
        if job in self._waiting:  # remove() alone would put the job's repr, its pictures in it, into an error
            self._waiting.remove(job)
        if job.ended is None:
            job.ended = time.monotonic()
            self._finished.append(self.describe(job))

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
                job.ticket = ticket = self._engine.submit(
                    job.request, self._on_progress(job), job.request_id, self.costs.step(job.request)
                )
            except NotReady:  # the engine died between the two lines
                self._waiting.appendleft(job)
                continue
            job.started, job.attempts = time.monotonic(), job.attempts + 1
            task = asyncio.create_task(self._deliver(job, ticket))
            self._running[task] = job
            task.add_done_callback(lambda task: self._running.pop(task, None))
            await ticket.device_free.wait()

    def _on_progress(self, job: Job) -> Any:
        def advanced(progress: Progress) -> None:
            before = job.progress.step if job.progress and job.progress.stage == progress.stage else 0
            job.progress = progress
            self.on_advance(progress.stage, max(0, progress.step - before))
            now = time.monotonic()
            if now - max(job.logged, job.started or now) > LOG_PROGRESS_SECONDS:
                job.logged = now
                log(logging.INFO, "progress", **_ids(job), **progress_fields(job))

        return advanced

    async def _deliver(self, job: Job, ticket: Ticket) -> None:
        try:
            result = await ticket.result
        except EngineDied as error:
            if job.attempts < MAX_ATTEMPTS and self._engine.state != UNLOADED and not job.result.done():
                log(logging.WARNING, "the engine ended under a request; it runs once more", **_ids(job))
                job.ticket = job.started = job.progress = None
                self._waiting = deque(sorted([*self._waiting, job], key=lambda waiting: waiting.number))
                self._wake.set()
            elif not job.result.done():
                job.result.set_exception(error)
        except OutOfMemory as error:
            if not job.result.done():
                job.result.set_exception(OutOfMemory(f"{error}{self._what_fits(job.request)}"))
        except Exception as error:
            if not job.result.done():
                job.result.set_exception(error)
        else:
            self.costs.learn(job.request, result.timings)
            if self._largest is None or area(job.request) > area(self._largest):
                self._largest = job.request
            if not job.result.done():
                waited = (job.started or job.admitted) - job.admitted
                timings = {"wait": waited, **result.timings, "total": time.monotonic() - job.admitted}
                job.result.set_result(
                    replace(result, timings={stage: round(seconds, 4) for stage, seconds in timings.items()})
                )

    def _what_fits(self, request: GenerationRequest) -> str:
        if self._largest is None or area(self._largest) >= area(request):
            return ""
        size = f"{self._largest.width} x {self._largest.height}"
        return f"; {size}{f' x {self._largest.num_frames} frames' if self._largest.num_frames else ''} has worked"

    def jobs(self) -> list[dict[str, Any]]:
        """What waits, runs and has just ended, newest last."""
        active = sorted({job for job in self._active() if not job.result.done()}, key=lambda job: job.number)
        return [*self._finished, *map(self.describe, active)]

    def describe(self, job: Job) -> dict[str, Any]:
        """One job as the progress routes tell it; never its prompt."""
        now = time.monotonic()
        ahead = 0.0
        told: dict[str, Any] = {
            "id": job.name,
            "state": job.state,
            "seconds": round((job.ended or now) - job.admitted, 3),
            "predicted_seconds": round(job.cost, 3),
        }
        if job.state == QUEUED:
            before = [other for other in self._waiting if other.number < job.number]
            running = [other for other in self._running.values() if not other.result.done()]
            ahead = sum(other.left() for other in [*before, *running])
            told["position"] = len(before) + 1
        if job.state in (QUEUED, RUNNING):
            told |= {**progress_fields(job), "eta_seconds": round(ahead + job.left(), 3)}
        return told

    def progress(self) -> float:
        """How far the running job is, from 0 to 1."""
        for job in self._running.values():
            if job.progress is not None and not job.result.done():
                return job.progress.step / max(1, job.progress.total)
        return 0.0

    async def drain(self) -> None:
        """Refuse new work and return when everything admitted is delivered."""
        self.draining = True
        while jobs := self._active():
            await asyncio.wait([job.result for job in jobs])
            await asyncio.sleep(0)  # lets the finished deliveries leave the books

    def abort(self, message: str) -> None:
        """Tell everybody who still waits that it is over."""
        for job in self._active():
            if not job.result.done():
                job.result.set_exception(NotReady(message, retry_after=5))


def _ids(job: Job) -> dict[str, Any]:
    """For lines that the dispatcher logs, outside the request's own context."""
    return {"request_id": job.request_id, "trace_id": job.trace_id}


def progress_fields(job: Job) -> dict[str, Any]:
    if job.progress is None:
        return {}
    return {"stage": job.progress.stage, "step": job.progress.step, "total": job.progress.total}

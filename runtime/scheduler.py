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
from runtime.engine.client import UNLOADED, EngineClient, EngineDied, Order, Ticket
from runtime.errors import Cancelled, DeadlineExceeded, InvalidRequest, NotReady, OutOfMemory, QueueFull
from runtime.logs import log, trace_id
from runtime.settings import Settings
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
    batch_key: GenerationRequest | None = field(default=None, repr=False)
    deadline: float = math.inf
    batch_pictures: int = 0  # of the pass that it runs in, its own among them
    number: int = field(default_factory=itertools.count(1).__next__)  # first come, first served
    admitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    expired: bool = False
    ticket: Ticket | None = field(default=None, repr=False)
    progress: Progress | None = None
    steps: dict[str, int] = field(default_factory=dict)  # by stage, through all of its pictures
    fraction: float = 0.0  # from 0 to 1, never back but when it is run once more
    advanced: float = 0.0  # when it last went on
    paced: tuple[float, float] | None = None  # when its first denoising step was done, and the fraction then
    logged: float = 0.0
    on_start: Callable[[], None] = field(default=lambda: None, repr=False)

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
        now = time.monotonic()
        if self.paced is not None and self.fraction > self.paced[1]:  # its own speed
            spent, done = self.advanced - self.paced[0], self.fraction - self.paced[1]
            return max(0.0, spent / done * (1 - self.fraction) - (now - self.advanced))
        if self.paced is not None:
            return max(0.0, self.cost * (1 - self.fraction) - (now - self.advanced))
        return max(0.0, self.cost * max(1.0, self.batch_pictures / self.request.n) - (now - self.started))


class Scheduler:
    """One batch on the device at a time, of one request unless MAX_BATCH_SIZE says otherwise; the next starts while
    the last one's results are encoded."""

    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self._engine = engine
        self._max_queue_size = settings.max_queue_size
        self._max_queue_seconds = float(settings.max_queue_seconds)
        self._max_batch_size = settings.max_batch_size
        self._max_batch_wait = settings.max_batch_wait_ms / 1000
        self._waiting: deque[Job] = deque()
        self._wake = asyncio.Event()
        self._running: dict[asyncio.Task[None], Job] = {}
        self._finished: deque[dict[str, Any]] = deque(maxlen=KEEP_FINISHED)  # told, not kept: results are large
        self._promised: list[float] = []  # costs admitted whose pictures are still being decoded
        self._largest: GenerationRequest | None = None
        self.costs = CostModel()
        self.on_advance: Callable[[str, int], None] = lambda stage, steps: None
        self.on_batch: Callable[[int], None] = lambda pictures: None
        self.draining = False

    @property
    def depth(self) -> int:
        return len(self._waiting)

    def wait_seconds(self) -> float:
        """Predicted seconds until a request that came now would start."""
        running = max((job.left() for job in self._running.values() if not job.result.done()), default=0.0)
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

    def enqueue(
        self,
        requests: list[GenerationRequest],
        request_id: str,
        batch_key: Callable[[GenerationRequest], GenerationRequest | None],
        deadline: float = math.inf,
        on_start: Callable[[], None] = lambda: None,
    ) -> list[Job]:
        """Jobs for requests that were admitted; to be called inside `admit`. Jobs of equal keys may run together.
        `deadline` is on the monotonic clock; `on_start` is called when one of them begins to run."""
        loop = asyncio.get_running_loop()
        jobs = []
        for i, request in enumerate(requests):
            name = request_id if len(requests) == 1 else f"{request_id}-{i}"
            cost, trace = self.costs.predict(request), trace_id.get() or None
            key = batch_key(request) if self._max_batch_size > 1 else None
            future = loop.create_future()
            jobs.append(Job(request, request_id, name, future, cost, trace, key, deadline, on_start=on_start))
        self._waiting.extend(jobs)
        self._wake.set()
        return jobs

    async def results(self, jobs: list[Job], seconds: float, begun: float) -> list[GenerationResult]:
        """The jobs' results, in order. When one fails, or `seconds` (infinity: never) have passed since `begun`, or
        the caller is cancelled, the rest are stopped.

        Raises DeadlineExceeded, NotReady and what the engine raises.
        """
        try:
            async with asyncio.timeout(None if seconds == math.inf else begun + seconds - time.monotonic()):
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
        self._wake.set()  # for whom it kept waiting
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
            await self._company()
            batch = self._next_batch()
            if not batch:  # cancelled or aborted while it waited
                continue
            pictures = sum(job.request.n for job in batch)
            rows = min(pictures, self._max_batch_size) if batch[0].batch_key and not batch[0].attempts else 1
            orders = [Order(job.request, self._on_progress(job), job.request_id) for job in batch]
            step_seconds = max(self.costs.step(job.request) for job in batch) * rows
            try:
                tickets = self._engine.submit(orders, rows, step_seconds)
            except NotReady:  # the engine died meanwhile
                self._waiting.extendleft(reversed(batch))
                continue
            self.on_batch(rows)
            for job, ticket in zip(batch, tickets, strict=True):
                job.ticket, job.started, job.attempts = ticket, time.monotonic(), job.attempts + 1
                job.batch_pictures = pictures
                job.on_start()
                task = asyncio.create_task(self._deliver(job, ticket))
                self._running[task] = job
                task.add_done_callback(lambda task: self._running.pop(task, None))
            for ticket in tickets:
                await ticket.device_free.wait()

    async def _company(self) -> None:
        """Let the first of the queue wait for others to run with, MAX_BATCH_WAIT_MS after it came at most, and for
        half of the time that its deadline leaves."""
        while self._waiting and (first := self._waiting[0]).batch_key is not None and not first.attempts:
            spare = max(0.0, first.deadline - first.admitted - first.cost) / 2
            left = first.admitted + min(self._max_batch_wait, spare) - time.monotonic()
            if self.draining or left <= 0 or sum(job.request.n for job in self._mates(first)) >= self._max_batch_size:
                return
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), left)

    def _next_batch(self) -> list[Job]:
        """Take the first of the queue and what may run with it. Nobody's place changes but that of its company."""
        while self._waiting and self._waiting[0].result.done():
            self._waiting.popleft()
        if not self._waiting:
            return []
        batch = self._mates(self._waiting[0])
        self._waiting = deque(job for job in self._waiting if job not in batch)
        return batch

    def _mates(self, first: Job) -> list[Job]:
        """`first` and the waiting jobs that fit into one pass with it, in order. One that has seen an engine die
        runs alone."""
        batch, room = [first], self._max_batch_size - first.request.n
        if first.batch_key is None or first.attempts:
            return batch
        for job in itertools.islice(self._waiting, 1, None):
            if job.request.n <= room and job.batch_key == first.batch_key and not (job.attempts or job.result.done()):
                batch.append(job)
                room -= job.request.n
        return batch

    def _on_progress(self, job: Job) -> Any:
        def advanced(progress: Progress) -> None:
            before = job.steps.get(progress.stage, 0)
            job.progress, job.advanced = progress, (now := time.monotonic())
            job.steps[progress.stage] = progress.step
            job.fraction = max(job.fraction, self._fraction(job.request, progress))
            if progress.stage == "denoise" and job.paced is None:
                job.paced = (now, job.fraction)
            self.on_advance(progress.stage, max(0, progress.step - before))
            if now - max(job.logged, job.started or now) > LOG_PROGRESS_SECONDS:
                job.logged = now
                log(logging.INFO, "progress", **_ids(job), **progress_fields(job))

        return advanced

    def _fraction(self, request: GenerationRequest, progress: Progress) -> float:
        """How much of the predicted seconds lies behind `progress`, whose steps count all n pictures."""
        seconds = self.costs.stages(request)
        if progress.stage not in seconds or not sum(seconds.values()):
            seconds = {progress.stage: 1.0}
        order = list(seconds)
        before = sum(seconds[stage] for stage in order[: order.index(progress.stage)])
        done = min(1.0, progress.step / max(1, progress.total)) * request.n  # pictures through this stage
        finished = max(0, math.ceil(done) - 1)
        return (finished + (before + (done - finished) * seconds[progress.stage]) / sum(seconds.values())) / request.n

    async def _deliver(self, job: Job, ticket: Ticket) -> None:
        try:
            result = await ticket.result
        except EngineDied as error:
            if job.attempts < MAX_ATTEMPTS and self._engine.state != UNLOADED and not job.result.done():
                log(logging.WARNING, "the engine ended under a request; it runs once more", **_ids(job))
                job.ticket = job.started = job.progress = None
                job.steps, job.fraction, job.paced = {}, 0.0, None
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
            self.costs.learn(job.request, result.costs)
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
        told: dict[str, Any] = {
            "id": job.name,
            "state": job.state,
            "seconds": round((job.ended or now) - job.admitted, 3),
            "predicted_seconds": round(job.cost, 3),
        }
        if job.state == QUEUED:
            told["position"] = len(self._before(job)) + 1
        told |= progress_fields(job)  # also of one that has ended: how far it came
        if job.state in (QUEUED, RUNNING):
            told["eta_seconds"] = round(self.eta(job), 3)
        return told

    def eta(self, job: Job) -> float:
        """Predicted seconds until a job that waits or runs is done, what is before it in the queue included."""
        if job.state != QUEUED:
            return job.left()
        running = [other.left() for other in self._running.values() if not other.result.done()]
        return sum(other.left() for other in self._before(job)) + max(running, default=0.0) + job.left()

    def _before(self, job: Job) -> list[Job]:
        return [other for other in self._waiting if other.number < job.number]

    def progress(self) -> float:
        """How far the running job is, from 0 to 1."""
        return next((job.fraction for job in self._running.values() if not job.result.done()), 0.0)

    async def drain(self) -> None:
        """Refuse new work and return when everything admitted is delivered."""
        self.draining = True
        self._wake.set()
        while (jobs := self._active()) or self._promised:
            if results := [job.result for job in jobs if not job.result.done()]:
                await asyncio.wait(results)
            # Lets deliveries leave the books, cancelled forwards end, and pictures that are being decoded become jobs.
            await asyncio.sleep(0.02)

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
    told = {"stage": job.progress.stage, "step": job.progress.step, "total": job.progress.total}
    return {**told, "progress": round(job.fraction, 4)}

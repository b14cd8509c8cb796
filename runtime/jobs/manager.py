"""Jobs: requests that outlive their connection. The manager runs them, the stores remember them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from runtime.errors import (
    Cancelled,
    Conflict,
    DiffusionError,
    GenerationFailed,
    Gone,
    InvalidRequest,
    NotFound,
    NotReady,
    Unauthorized,
    shown,
)
from runtime.families.base import normalise
from runtime.idempotency import MAX_KEY_LENGTH
from runtime.jobs.record import Job, JobError, JobProgress, JobRequest, Outcome, StoredMedia, StoredResult, new_id
from runtime.jobs.store import Duplicate, JobStore, Lifetimes, ResultStore, Unavailable, describe
from runtime.logs import credential, log, request_id, unexpected
from runtime.metadata import metadata_of
from runtime.types import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from runtime import scheduler
    from runtime.model import Checked, DiffusionModel

LOCAL_SECONDS, REMOTE_SECONDS = 0.2, 1.0  # between two looks at a job that is watched
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 5.0  # after the store failed
ALMOST = 0.99  # of the progress until the results are kept


@dataclass(eq=False)
class _Active:
    """A job of this process that has not ended."""

    request: JobRequest
    jobs: list[scheduler.Job] = field(default_factory=list)  # none while it waits for the model
    attempts: int = 0
    started: float | None = None
    stop: str = ""  # why it is being stopped: cancelled, lost, or stopping with the server
    task: asyncio.Task[None] | None = None
    counted: asyncio.Task[None] | None = None  # keeps that an attempt was begun

    def view(self) -> Job:
        return Job(self.request, self.attempts, self.started, self.progress())

    def progress(self) -> JobProgress:
        if not self.jobs:
            return JobProgress()
        total = sum(job.cost for job in self.jobs) or float(len(self.jobs))
        done = sum((1.0 if job.ended else job.fraction) * (job.cost or 1.0) for job in self.jobs)
        running = next((job for job in self.jobs if job.started and not job.ended), None)
        step = running.progress if running else None
        return JobProgress(
            "queued" if self.started is None else "in_progress",
            min(ALMOST, done / total),
            round(sum(job.left() for job in self.jobs if not job.ended), 3),
            step.stage if step else None,
            step.step if step else None,
            step.total if step else None,
        )


class Jobs:
    """All jobs of the server. For the event loop; what blocks runs in threads. Every method raises NotReady where the
    store cannot be reached."""

    def __init__(
        self,
        model: DiffusionModel,
        open_stores: Callable[[], tuple[JobStore, ResultStore]],
        lifetimes: Lifetimes,
        lease_seconds: float,
        tell_prompts: bool,
    ) -> None:
        """`open_stores` is called in a thread once `run` begins; until then nothing is known of any job.
        `tell_prompts`: whether prompts may stand beside the results in an object store."""
        self._model = model
        self._open_stores = open_stores
        self._stores: tuple[JobStore, ResultStore] | None = None
        self._lifetimes = lifetimes
        self._beat_seconds = lease_seconds / 3
        self._tell_prompts = tell_prompts
        self._active: dict[str, _Active] = {}
        self._secret = secrets.token_bytes(32)
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def opened(self) -> bool:
        return self._stores is not None

    @property
    def _store(self) -> JobStore:
        return self._pair()[0]

    @property
    def _outputs(self) -> ResultStore:
        return self._pair()[1]

    def _pair(self) -> tuple[JobStore, ResultStore]:
        if self._stores is None:
            raise NotReady("the store of jobs is being opened", retry_after=5)
        return self._stores

    # --- what routes ask

    async def submit(
        self,
        api: str,
        rows: list[dict[str, Any]],
        label: str,
        headers: Mapping[str, str],
        envelope: Mapping[str, Any],
        body: bytes = b"",
    ) -> Job:
        """Check, admit and keep a job; on return it survives a restart. `label` names a row in messages as in
        DiffusionModel.generate; `body` is what an Idempotency-Key in `headers` stands for: the same key and body give
        the job that is there already. A caller that leaves meanwhile takes the job with it, unless it has a key.
        Raises what a synchronous request raises before it runs."""
        key, fingerprint = await self._key(headers, body)
        # Once the store has it, it must be run: no cancel may come between.
        task = asyncio.create_task(self._submit(api, rows, label, headers, envelope, key, fingerprint))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not key:
                self._background(self._forsaken(task))
            raise

    async def _submit(
        self,
        api: str,
        rows: list[dict[str, Any]],
        label: str,
        headers: Mapping[str, str],
        envelope: Mapping[str, Any],
        key: str,
        fingerprint: str,
    ) -> Job:
        if key and (found := await self._call(self._store.find, key)):
            return await self._joined(found[0], found[1], fingerprint, headers)
        with self._model.counted("jobs") as count:
            count.prompts, count.outcome = len(rows), None  # it is counted when it has ended
            checked = self._model.check(rows, label, headers)
            if checked.dry_run:
                raise InvalidRequest("dry_run: a dry run gives no job; leave Prefer: respond-async out")
            with self._model.scheduler.admit(checked.costs):
                requests = await checked.complete()
                kept = await asyncio.to_thread(_kept, rows, checked)
                request = JobRequest(new_id(api), api, time.time(), kept, envelope, key, fingerprint)
                try:
                    await self._call(self._store.create, request)
                except Duplicate as duplicate:
                    return await self._joined(duplicate.job_id, duplicate.fingerprint, fingerprint, headers)
                active = self._active[request.id] = _Active(request)
                try:
                    self._enqueue(active, requests)
                except DiffusionError:  # draining since; the next server runs it
                    del self._active[request.id]
                    raise
        log(logging.INFO, "job accepted", job=request.id, api=api, prompts=len(rows))
        self._begin(active, checked)
        return active.view()

    async def get(self, job_id: str) -> Job:
        """Raises NotFound and Gone."""
        if active := self._active.get(job_id):
            return active.view()
        job: Job | None = await self._call(self._store.get, job_id)
        if job is not None:
            return job
        if await self._call(self._store.gone, job_id):
            raise Gone(f"job {shown(job_id)} has expired (JOB_TTL_S)")
        raise NotFound(f"job {shown(job_id)} is not known here")

    async def page(
        self, apis: tuple[str, ...], after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Job], bool]:
        """Jobs behind the id `after`, and whether more follow. Raises NotFound for an `after` that is not known."""
        if after is not None:
            await self.get(after)
        jobs, more = await self._call(self._store.page, apis, after, limit, newest_first)
        return [active.view() if (active := self._active.get(job.id)) else job for job in jobs], more

    async def remove(self, job_id: str) -> Job:
        """Cancel a job that waits or runs (it is `failed` with code `cancelled` then), forget one that has ended.
        The job as it was before. Raises NotFound and Gone."""
        job = await self.get(job_id)
        if active := self._active.get(job_id):
            self._stop(active, "cancelled")
            assert active.task is not None
            await asyncio.wait([active.task])
            ended = await self.get(job_id)
            if ended.status == "completed":  # it was too late to cancel
                await self._call(self._store.delete, job_id)
        else:
            await self._call(self._store.delete if job.outcome else self._store.cancel, job_id)
        return job

    async def watch(self, job_id: str) -> AsyncIterator[Job]:
        """The job at each step forward, the last time when it has ended. Raises NotFound and Gone."""
        told: Job | None = None
        while True:
            active = self._active.get(job_id)
            job = await self.get(job_id)
            if told is None or (job.progress, job.outcome) != (told.progress, told.outcome):
                told = job
                yield job
            if job.outcome is not None:
                return
            if active is not None and active.task is not None:
                await asyncio.wait([active.task], timeout=LOCAL_SECONDS)
            else:
                await asyncio.sleep(REMOTE_SECONDS)

    async def wait(self, job_id: str) -> Job:
        """The job once it has ended. Raises NotFound, Gone, and NotReady when the server stops before."""
        if (active := self._active.get(job_id)) and active.task:
            await asyncio.wait([active.task])
        async for job in self.watch(job_id):
            if self._stopping and job.outcome is None:
                raise NotReady("the server is shutting down; the job goes on when it is back", retry_after=5)
        return job

    async def results(self, job: Job) -> list[GenerationResult]:
        """The results of a completed job, bytes and all. Raises Gone where they have expired."""
        outcome = _completed(job)

        def read() -> list[GenerationResult]:
            return [r.restored([b"".join(self.read(item)) for item in r.media]) for r in outcome.results]

        try:
            return await self._call(read)  # type: ignore[no-any-return]
        except KeyError:
            raise _expired(job.id) from None

    async def media(self, job_id: str, index: int) -> StoredMedia:
        """Picture or video `index` of a completed job. Raises NotFound, Gone, and NotReady while it is not there."""
        outcome = _completed(await self.get(job_id))
        if not 0 <= index < len(outcome.media):
            raise NotFound(f"job {shown(job_id)} has {len(outcome.media)} results, counted from 0; there is no {index}")
        return outcome.media[index]

    def read(self, media: StoredMedia, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Its bytes [start, end) in chunks; blocks: for a thread. Raises KeyError once they have expired."""
        return self._outputs.read(media.key, start, end)

    async def url(self, job: Job, index: int, base_url: str) -> str:
        """A URL of limited life for picture or video `index`: the store's own, or one of this server below `base_url`
        that needs no key."""
        media = await self.media(job.id, index)
        name = f"{job.id}-{index}.{media.format}"
        if theirs := await self._call(self._outputs.url, media.key, self._lifetimes.url, name):
            return str(theirs)
        expires = str(int(time.time() + self._lifetimes.url))
        query = urlencode({"expires": expires, "signature": self._signature(job.id, index, expires)})
        return f"{base_url.rstrip('/')}/v1/jobs/{job.id}/content/{index}?{query}"

    def require_signature(self, job_id: str, index: int, query: Mapping[str, str]) -> None:
        """Raises Unauthorized unless `query` is that of a URL which `url` has given and which still works."""
        expires, signature = query.get("expires", ""), query.get("signature", "")
        good = hmac.compare_digest(signature.encode(), self._signature(job_id, index, expires).encode())
        if not (good and expires.isdigit() and int(expires) > time.time()):
            raise Unauthorized("this URL has expired or is not one that this server gave")

    def _signature(self, job_id: str, index: int, expires: str) -> str:
        return hmac.digest(self._secret, f"{job_id}/{index}/{expires}".encode(), "sha256").hex()

    # --- running them

    async def run(self) -> None:
        """Take what a server before this one has left, renew the claim on what runs, drop what has expired; for the
        server's life. Raises StartupError where the stores cannot be opened."""
        self._stores = await asyncio.to_thread(self._open_stores)
        swept = -math.inf
        while True:
            try:
                for request in await asyncio.to_thread(self._store.take):
                    log(logging.INFO, "job taken", job=request.id)
                    active = self._active[request.id] = _Active(request)
                    self._begin(active, None)
                progress = {job_id: active.progress() for job_id, active in self._active.items()}
                for job_id, why in (await asyncio.to_thread(self._store.beat, progress)).items():
                    if mine := self._active.get(job_id):
                        self._stop(mine, why)
                if time.monotonic() - swept > SWEEP_SECONDS:
                    swept = time.monotonic()
                    await asyncio.to_thread(self._store.sweep)
            except Unavailable as error:
                log(logging.WARNING, "the job store fails; jobs go on", error=str(error))
            await asyncio.sleep(self._beat_seconds)

    def stop_taking(self) -> None:
        """The server drains: what runs may end, what waits stays in the store for the next server."""
        self._stopping = True
        for active in list(self._active.values()):
            if active.started is None:
                self._stop(active, "stopping")

    async def settled(self) -> None:
        """Return when the results of what has run are kept."""
        if tasks := [active.task for active in self._active.values() if active.task]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Leave what has not ended to the next server. Nothing runs any more."""
        self.stop_taking()
        for active in list(self._active.values()):
            self._stop(active, "stopping")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.settled(), 5)
        if self._stores is None:
            return
        with contextlib.suppress(Unavailable):
            await asyncio.to_thread(self._store.release)
        await asyncio.to_thread(self._store.close)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(self._tasks.discard)

    async def _forsaken(self, submitted: asyncio.Task[Job]) -> None:
        with contextlib.suppress(DiffusionError):
            await self.remove((await submitted).id)

    def _enqueue(self, active: _Active, requests: list[GenerationRequest]) -> None:
        active.jobs = self._model.enqueue(requests, active.request.id, on_start=lambda: self._started(active))

    def _begin(self, active: _Active, checked: Checked | None) -> None:
        active.task = asyncio.create_task(self._work(active, checked))

    def _started(self, active: _Active) -> None:
        """One of the job's prompts begins to run: count the attempt, and stop if another server has the job."""
        if active.started is not None:
            return
        active.started, active.attempts = time.time(), active.attempts + 1

        async def count() -> None:
            try:
                if not await asyncio.to_thread(self._store.start, active.request.id):
                    self._stop(active, "lost")
            except Unavailable as error:
                log(logging.WARNING, "an attempt could not be kept", job=active.request.id, error=str(error))

        active.counted = asyncio.create_task(count())

    def _stop(self, active: _Active, why: str) -> None:
        if active.stop:
            return
        active.stop = why
        for job in active.jobs:
            self._model.scheduler.cancel(job.name)
        if not active.jobs and active.task is not None:
            active.task.cancel()  # it waits for the model

    async def _work(self, active: _Active, checked: Checked | None) -> None:
        """From an accepted job to its outcome in the store."""
        job_id = active.request.id
        request_id.set(job_id)
        try:
            try:
                if checked is None:
                    checked = await self._again(active)
                begun = time.monotonic() - (time.time() - active.request.created)
                with self._model.counted("jobs") as count:
                    count.prompts = len(active.jobs)
                    results = await self._model.finish(active.jobs, checked.timeout, begun)
                outcome = Outcome(time.time(), await self._keep(active.request, results))
            finally:
                await self._counted(active)
        except asyncio.CancelledError:
            if active.stop != "cancelled":
                self._active.pop(job_id, None)
                return
            outcome = Outcome(time.time(), error=_job_error(Cancelled("the job was cancelled")))
        except DiffusionError as error:
            if active.stop in ("lost", "stopping") or (isinstance(error, NotReady) and self._stopping):
                self._active.pop(job_id, None)  # another server, or the next one, has it
                return
            if active.stop == "cancelled":
                error = Cancelled("the job was cancelled")
            outcome = Outcome(time.time(), error=_job_error(error))
        except Exception as error:
            outcome = Outcome(time.time(), error=_job_error(GenerationFailed(unexpected(error, job_id))))
        await self._end(active, outcome)

    async def _again(self, active: _Active) -> Checked:
        """Check and enqueue a job that another process has accepted, once the model is there."""
        while True:
            while not await self._model.healthy():  # noqa: ASYNC110 (it has no event for all that it depends on)
                await asyncio.sleep(0.2)
            with contextlib.suppress(NotReady):  # the engine has died since
                checked = self._model.check([dict(row) for row in active.request.rows], "", {})
                self._enqueue(active, await checked.complete())
                return checked
            await asyncio.sleep(0.2)

    async def _counted(self, active: _Active) -> None:
        if active.counted is not None:
            await asyncio.wait([active.counted])

    async def _keep(self, request: JobRequest, results: list[GenerationResult]) -> tuple[StoredResult, ...]:
        """Put the media into the result store. Raises NotReady where it fails."""
        token = secrets.token_hex(4)  # two servers that run one job must not write over each other's files

        def put() -> tuple[StoredResult, ...]:
            stored = []
            for row, result in enumerate(results):
                told = StoredResult.of(
                    result, [f"{request.id}/{token}-{row}-{i}.{m.format}" for i, m in enumerate(result.media)]
                )
                for media, item in zip(told.media, result.media, strict=True):
                    facts = metadata_of(
                        result.request, media.seed, self._model.name, told.model_revision, self._tell_prompts
                    )
                    facts["job"] = request.id
                    self._outputs.put(media.key, item.data, media.content_type, describe(facts))
                stored.append(told)
            return tuple(stored)

        return await self._call(put)  # type: ignore[no-any-return]

    async def _end(self, active: _Active, outcome: Outcome) -> None:
        """Keep the outcome, as often as it takes while the server lives."""
        job_id = active.request.id
        while True:
            try:
                first = await asyncio.to_thread(self._store.finish, job_id, outcome)
                if not first and outcome.results:
                    await asyncio.to_thread(self._outputs.delete, [media.key for media in outcome.media])
                break
            except Unavailable as error:
                log(logging.WARNING, "an outcome could not be kept; trying again", job=job_id, error=str(error))
                if self._stopping:
                    break
                await asyncio.sleep(RETRY_SECONDS)
        self._active.pop(job_id, None)
        status = "failed" if outcome.error else "completed"
        log(logging.INFO, f"job {status}", job=job_id, error=outcome.error.message if outcome.error else None)

    async def _key(self, headers: Mapping[str, str], body: bytes) -> tuple[str, str]:
        """Digests of the credential with its Idempotency-Key, and of the body; empty without a key."""
        key = headers.get("idempotency-key")
        if not key:
            return "", ""
        if len(key) > MAX_KEY_LENGTH:
            raise InvalidRequest(f"Idempotency-Key: {shown(key)} is longer than {MAX_KEY_LENGTH} characters")
        scoped = hashlib.sha256(f"{credential.get()}\n{key}".encode()).hexdigest()
        return scoped, await asyncio.to_thread(lambda: hashlib.sha256(body).hexdigest())

    async def _joined(self, job_id: str, kept: str, fingerprint: str, headers: Mapping[str, str]) -> Job:
        if kept != fingerprint:
            key = headers["idempotency-key"][:80]
            raise Conflict(f"Idempotency-Key: {key!r} came with another body; use a new key for a new request")
        return await self.get(job_id)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function` in a thread. Raises NotReady for Unavailable."""
        try:
            return await asyncio.to_thread(function, *arguments)
        except Unavailable as error:
            log(logging.ERROR, "the job store failed", error=str(error))
            raise NotReady("the store of jobs and results cannot be reached", retry_after=5) from error


def _completed(job: Job) -> Outcome:
    """The outcome with results. Raises NotReady before it is there, Gone after, and NotFound for a failed job."""
    if job.outcome is None:
        raise NotReady(f"job {job.id} is {job.status}: there is no result yet", retry_after=1)
    if job.outcome.error is not None:
        raise NotFound(f"job {job.id} failed: {job.outcome.error.message}")
    if not job.available:
        raise _expired(job.id)
    return job.outcome


def _expired(job_id: str) -> Gone:
    return Gone(f"the results of job {shown(job_id)} have expired (RESULT_TTL_S, MAX_RESULT_BYTES)")


def _job_error(error: DiffusionError) -> JobError:
    return JobError(error.code, str(error), error.http_status)


def _kept(rows: list[dict[str, Any]], checked: Checked) -> tuple[dict[str, Any], ...]:
    """The rows as they are run again: seeds fixed, deadlines from headers in them, pictures as text."""
    kept = []
    for row, values in zip(rows, checked.values, strict=True):
        own = {**normalise(row), "seed": values["seed"]}
        if checked.timeout != math.inf:
            own["timeout"] = checked.timeout
        if "image" in own:
            own["image"] = [base64.b64encode(p).decode() if isinstance(p, bytes) else p for p in values["images"]]
        kept.append(own)
    return tuple(kept)

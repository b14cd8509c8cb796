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
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlencode

from runtime.errors import (
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
from runtime.idempotency import conflict, digest, key_of
from runtime.jobs.active import Active
from runtime.jobs.ids import new_id
from runtime.jobs.record import Job, JobError, JobRequest, Outcome, StoredMedia, StoredResult, cancelled
from runtime.jobs.store import Duplicate, JobStore, Lifetimes, ResultStore, Unavailable, describe
from runtime.logs import credential, log, request_id, unexpected
from runtime.metadata import metadata_of
from runtime.types import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from runtime.model import Checked, DiffusionModel

T = TypeVar("T")

LOOK_SECONDS = 1.0  # between two looks at another server's job that is waited for
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 5.0  # after the store failed
KEEP_SECONDS = 120.0  # in which a result that cannot be kept is tried again
CANCEL_SECONDS = 20.0  # until a cancelled job is kept as such
STORE_THREADS = 16  # of their own: a store that hangs must not hold what else waits for a thread


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
        self.lifetimes = lifetimes
        self._beat_seconds = lease_seconds / 3
        self._tell_prompts = tell_prompts
        self._active: dict[str, Active] = {}
        self._secret = secrets.token_bytes(32)
        self._pool = ThreadPoolExecutor(STORE_THREADS, "jobs")
        self._heart = ThreadPoolExecutor(1, "jobs-heartbeat")
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
        key = key_of(headers, self._model.settings.join_by_request_id)
        scoped, fingerprint = "", ""
        if key is not None:
            scoped = hashlib.sha256(f"{credential.get()}\n{key}".encode()).hexdigest()
            fingerprint = await digest(body)
        draft = JobRequest(new_id(api), api, time.time(), (), envelope, scoped, fingerprint)
        # Once the store has it, it must be run: no cancel may come between.
        task = asyncio.create_task(self._submit(draft, rows, label, headers, key or ""))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._background(self._forsaken(task, keep=key is not None))
            raise

    async def _submit(
        self, draft: JobRequest, rows: list[dict[str, Any]], label: str, headers: Mapping[str, str], key: str
    ) -> Job:
        if key and (found := await self._call(self._store.find, draft.key)):
            return await self._joined(*found, draft, key)
        with self._model.counted("jobs") as count:
            count.prompts = len(rows)
            checked = self._model.check(rows, label, headers)
            if checked.dry_run:
                raise InvalidRequest("dry_run: a dry run gives no job; leave Prefer: respond-async out")
            with self._model.scheduler.admit(checked.costs):
                requests = await checked.complete()
                request = replace(draft, rows=await asyncio.to_thread(_kept, rows, checked))
                try:
                    await self._call(self._store.create, request)
                except Duplicate as duplicate:
                    count.outcome = None
                    return await self._joined(duplicate.job_id, duplicate.fingerprint, draft, key)
                active = self._active[request.id] = Active(request, self._model.scheduler.eta)
                self._enqueue(active, checked, requests)
            count.outcome = None  # it is counted when it has ended
        log(logging.INFO, "job accepted", job=request.id, api=request.api, prompts=len(rows))
        self._begin(active, checked)
        if self._stopping:
            self._stop(active, "stopping")
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
            await asyncio.wait([active.task], timeout=CANCEL_SECONDS)
            if job_id in self._active:
                raise _unreachable()
            ended = await self.get(job_id)
            if ended.outcome is None:  # the server stops, and had left it to the next one
                await self._call(self._store.finish, job_id, cancelled())
            elif ended.outcome.error is None:  # it was too late to cancel
                await self._call(self._store.delete, job_id)
        elif job.outcome is None and self._stopping:  # left to the next server, which must not run it
            await self._call(self._store.finish, job_id, cancelled())
        else:
            await self._call(self._store.delete if job.outcome else self._store.cancel, job_id)
        return job

    async def wait(self, job_id: str, keep: bool) -> Job:
        """The job once it has ended. Without `keep` a caller that leaves stops it. Raises NotFound, Gone, and NotReady
        when the server stops before."""
        try:
            while True:
                if (active := self._active.get(job_id)) and active.task:
                    await asyncio.wait([active.task])
                job = await self.get(job_id)
                if job.outcome is not None:
                    return job
                if self._stopping:
                    raise NotReady("the server is shutting down; the job goes on when it is back", retry_after=5)
                await asyncio.sleep(LOOK_SECONDS)
        except asyncio.CancelledError:
            if not keep:
                self._background(self._forget(job_id))
            raise

    async def results(self, job: Job) -> list[GenerationResult]:
        """The results of a completed job, bytes and all. Raises Gone where they have expired."""
        outcome = _completed(job)
        return await self._call(
            lambda: [r.restored([b"".join(self.read(item)) for item in r.media]) for r in outcome.results]
        )

    async def media(self, job_id: str, index: int) -> StoredMedia:
        """Picture or video `index` of a completed job. Raises NotFound, Gone, and NotReady while it is not there."""
        outcome = _completed(await self.get(job_id))
        if not 0 <= index < len(outcome.media):
            raise NotFound(f"job {shown(job_id)} has {len(outcome.media)} results, counted from 0; there is no {index}")
        return outcome.media[index]

    def read(self, media: StoredMedia, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Its bytes [start, end) in chunks; blocks: for a thread. Raises Gone once they have expired."""
        try:
            yield from self._outputs.read(media.key, start, end)
        except KeyError:
            raise _expired(media.key.partition("/")[0]) from None
        except Unavailable as error:
            raise _unreachable(error) from error

    async def url(self, job: Job, index: int, base_url: str) -> str:
        """A URL of limited life for picture or video `index`: the store's own, or one of this server below `base_url`
        that needs no key."""
        media = await self.media(job.id, index)
        name = f"{job.id}-{index}.{media.format}"
        if theirs := await self._call(self._outputs.url, media.key, self.lifetimes.url, name):
            return theirs
        expires = str(int(time.time() + self.lifetimes.url))
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
        # Each for itself: a claim must not wait for what takes long.
        await asyncio.gather(
            self._repeat(self._beat, self._beat_seconds),
            self._repeat(self._take, self._beat_seconds),
            self._repeat(self._sweep, SWEEP_SECONDS),
        )

    async def _repeat(self, work: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            try:
                await work()
            except Unavailable as error:
                log(logging.WARNING, "the job store fails; jobs go on", error=str(error))
            except Exception as error:  # a fault of ours in the upkeep of jobs must not end what is served
                log(logging.ERROR, "the upkeep of jobs failed; it is tried again", exc_info=error)
            await asyncio.sleep(seconds)

    async def _beat(self) -> None:
        progress = {job_id: active.progress() for job_id, active in self._active.items()}
        loop = asyncio.get_running_loop()
        for job_id, why in (await loop.run_in_executor(self._heart, self._store.beat, progress)).items():
            if active := self._active.get(job_id):
                self._stop(active, "cancelled" if why == "cancelled" else "lost")

    async def _take(self) -> None:
        for request in await self._in_thread(self._store.take):
            kept = await self._in_thread(self._store.get, request.id)
            log(logging.INFO, "job taken", job=request.id)
            active = Active(request, self._model.scheduler.eta, kept.attempts if kept else 0)
            self._active[request.id] = active
            self._begin(active, None)

    async def _sweep(self) -> None:
        await self._in_thread(self._store.sweep)

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

    async def close(self, seconds: float) -> None:
        """Leave what has not ended to the next server, within so many seconds. Nothing runs any more."""
        self.stop_taking()
        for active in list(self._active.values()):
            self._stop(active, "stopping")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.settled()
                await self._release()

    async def _release(self) -> None:
        if self._stores is None:
            return
        with contextlib.suppress(Unavailable):
            await self._in_thread(self._store.release)
        await self._in_thread(self._store.close)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(self._tasks.discard)

    async def _forsaken(self, submitted: asyncio.Task[Job], keep: bool) -> None:
        with contextlib.suppress(DiffusionError):
            job = await submitted
            if not keep:
                await self.remove(job.id)

    async def _forget(self, job_id: str) -> None:
        with contextlib.suppress(DiffusionError):
            await self.remove(job_id)

    def _enqueue(self, active: Active, checked: Checked, requests: list[GenerationRequest]) -> None:
        identity = active.request.id
        active.prompts = self._model.enqueue(checked, requests, identity, on_start=lambda: self._started(active))

    def _begin(self, active: Active, checked: Checked | None) -> None:
        active.task = asyncio.create_task(self._work(active, checked))

    def _started(self, active: Active) -> None:
        """One of the job's prompts begins to run: count the attempt, and stop if another server has the job."""
        if active.started is not None:
            return
        active.started, active.attempts = time.time(), active.attempts + 1

        async def count() -> None:
            try:
                if not await self._in_thread(self._store.start, active.request.id):
                    self._stop(active, "lost")
            except Unavailable as error:
                log(logging.WARNING, "an attempt could not be kept", job=active.request.id, error=str(error))

        active.counted = asyncio.create_task(count())

    def _stop(self, active: Active, why: Literal["cancelled", "lost", "stopping"]) -> None:
        if active.stop:
            return
        active.stop = why
        if why != "cancelled":
            active.count.outcome = None  # who runs it counts it
        for job in active.prompts:
            self._model.scheduler.cancel(job.name)
        if not active.prompts and active.task is not None:
            active.task.cancel()  # it waits for the model

    async def _work(self, active: Active, checked: Checked | None) -> None:
        """From an accepted job to its outcome in the store."""
        job_id = active.request.id
        request_id.set(job_id)
        try:
            try:
                if checked is None:
                    checked = await self._again(active)
                begun = time.monotonic() - (time.time() - active.request.created)
                with self._model.counted("jobs") as active.count:
                    active.count.prompts = len(active.prompts)
                    results = await self._model.finish(active.prompts, checked.timeout, begun)
                    outcome = Outcome(time.time(), await self._keep(active.request, results))
            finally:
                await self._counted(active)
        except asyncio.CancelledError:
            if active.stop != "cancelled":
                self._active.pop(job_id, None)
                return
            outcome = cancelled()
        except DiffusionError as error:
            if active.stop in ("lost", "stopping") or (isinstance(error, NotReady) and self._stopping):
                self._active.pop(job_id, None)  # another server, or the next one, has it
                return
            outcome = cancelled() if active.stop == "cancelled" else Outcome(time.time(), error=_job_error(error))
        except Exception as error:
            outcome = Outcome(time.time(), error=_job_error(GenerationFailed(unexpected(error, job_id))))
        await self._end(active, outcome)

    async def _again(self, active: Active) -> Checked:
        """Check and enqueue a job that another process has accepted, once the model is there."""
        while True:
            while not await self._model.healthy():  # noqa: ASYNC110 (it has no event for all that it depends on)
                await asyncio.sleep(0.2)
            with contextlib.suppress(NotReady):  # the engine has died since
                checked = self._model.check([dict(row) for row in active.request.rows], "", {})
                self._enqueue(active, checked, await checked.complete())
                return checked
            await asyncio.sleep(0.2)

    async def _counted(self, active: Active) -> None:
        if active.counted is not None:
            await asyncio.wait([active.counted])

    async def _keep(self, request: JobRequest, results: list[GenerationResult]) -> tuple[StoredResult, ...]:
        """Put the media into the result store; what took minutes to draw is not lost to a short outage. Raises NotReady
        where it fails for longer."""
        token = secrets.token_hex(4)  # two servers that run one job must not write over each other's files

        def put() -> tuple[StoredResult, ...]:
            stored = tuple(
                StoredResult.of(
                    result, [f"{request.id}/{token}-{row}-{i}.{m.format}" for i, m in enumerate(result.media)]
                )
                for row, result in enumerate(results)
            )
            done: list[str] = []
            try:
                for told, result in zip(stored, results, strict=True):
                    for media, item in zip(told.media, result.media, strict=True):
                        facts = metadata_of(
                            result.request, media.seed, self._model.name, told.model_revision, self._tell_prompts
                        )
                        facts["job"] = request.id
                        self._outputs.put(media.key, item.data, media.content_type, describe(facts))
                        done.append(media.key)
            except Unavailable:
                with contextlib.suppress(Unavailable):
                    self._outputs.delete(done)
                raise
            return stored

        begun = time.monotonic()
        while True:
            try:
                return await self._in_thread(put)
            except Unavailable as error:
                if self._stopping or time.monotonic() - begun > KEEP_SECONDS:
                    raise _unreachable(error) from error
                log(logging.WARNING, "a result could not be kept; trying again", job=request.id, error=str(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def _end(self, active: Active, outcome: Outcome) -> None:
        """Keep the outcome, as often as it takes while the server lives."""
        job_id, status = active.request.id, "failed" if outcome.error else "completed"
        while True:
            try:
                if not await self._in_thread(self._store.finish, job_id, outcome):
                    status = "was ended by another server first"
                    if outcome.results:
                        await self._in_thread(self._outputs.delete, [media.key for media in outcome.media])
                break
            except Unavailable as error:
                log(logging.WARNING, "an outcome could not be kept; trying again", job=job_id, error=str(error))
                if self._stopping:
                    status = "is left to the next server"
                    break
                await asyncio.sleep(RETRY_SECONDS)
        self._active.pop(job_id, None)
        log(logging.INFO, f"job {status}", job=job_id, error=outcome.error.message if outcome.error else None)

    async def _joined(self, job_id: str, fingerprint: str, draft: JobRequest, key: str) -> Job:
        if fingerprint != draft.fingerprint:
            raise conflict(key)
        return await self.get(job_id)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function` in a thread. Raises NotReady for Unavailable."""
        try:
            return await self._in_thread(function, *arguments)
        except Unavailable as error:
            raise _unreachable(error) from error


def _unreachable(error: Unavailable | None = None) -> NotReady:
    log(logging.ERROR, "the job store failed", error=str(error) if error else None)
    return NotReady("the store of jobs and results cannot be reached", retry_after=5)


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

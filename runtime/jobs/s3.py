"""Jobs of several servers over one bucket: who owns which. What is kept of them, `s3_records.py` tells.

    owners/OWNER              a server; the object's age is its lease, its body the progress of all its jobs
    open/ID/NNNNNN            a claim on an unfinished job, body: the owner. The highest number has it
    open/ID/cancel            somebody wants it cancelled

A claim is made once, so that of several servers one takes a dead one's job, by the next number. Everything that may
happen at the same time is decided by such an object: who keeps a job (request.json), who has it (the claim), how it
ended (outcome.json). A server is dead when its heartbeat is older than the lease, or not there; the age is the store's.

Requests: a beat takes 2, whatever the number of jobs (one more for each thousand that are unfinished in the bucket);
`create` 2, 4 with an idempotency key, 1 more with pictures; `start` 2; `finish` 3 or 4; `take` 1 where all jobs are
this server's, else 2, 1 for each claim not seen before and some 3 for each job that is taken; `get` none for a job of
this server's, 1 for a finished one, 3 for one that another runs; `cancel` 4.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from runtime.jobs.bucket import Bucket
from runtime.jobs.ids import is_id, sort_key
from runtime.jobs.record import MAX_ATTEMPTS, Job, JobProgress, JobRequest, Outcome, brief, cancelled, server_died
from runtime.jobs.s3_records import Records, State
from runtime.jobs.store import Lifetimes, Unavailable
from runtime.outputs import Results

FORGOTTEN = 10  # leases after which a dead server's heartbeat is removed
SLACK = 1.0  # seconds: both times of an age are whole ones
THREADS = 8


@dataclass(eq=False, slots=True)
class _Mine:
    """A job of this server's. It is `kept` once `create` has returned; `began` is the key of the attempt that runs,
    `pictures` whether there is an input.json."""

    request: JobRequest
    epoch: int
    attempts: int = 0
    started: float | None = None
    kept: bool = False
    pictures: bool = False
    began: str = ""
    progress: JobProgress = field(default_factory=JobProgress)


@dataclass(slots=True)
class _Open:
    """An unfinished job, as the listing of claims tells."""

    epoch: int = 0
    cancel: bool = False
    keys: list[str] = field(default_factory=list)


class S3Jobs:
    """See `runtime.jobs.store.JobStore`."""

    def __init__(
        self, bucket: Bucket, results: Results, lifetimes: Lifetimes, lease_seconds: float, owner: str
    ) -> None:
        """Writes the first heartbeat. Raises Unavailable."""
        self._bucket, self._results, self._lease, self._owner = bucket, results, lease_seconds, owner
        self._records = Records(bucket, results, lifetimes)
        self._mine: dict[str, _Mine] = {}
        self._lock, self._taking, self._beating = threading.Lock(), threading.Lock(), threading.Lock()
        self._released = False
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="jobs-s3")
        self._renewed = time.monotonic()
        bucket.put(f"owners/{owner}", b"{}")

    def create(self, request: JobRequest) -> None:
        if request.key:
            self._records.claim_key(request)
        with self._lock:  # before the claim, so that `take` does not think it is left over
            short = brief(request)
            mine = self._mine[request.id] = _Mine(short, 1, pictures=short is not request)
        try:
            claimed = self._bucket.create(_claim(request.id, 1), self._owner.encode())
            if not claimed or not self._records.keep(request):
                raise Unavailable(f"{self._bucket.uri}: it took too long to keep the job; try again")
            mine.kept = True
        except BaseException:
            self._drop(request.id, mine)  # `take` clears up
            raise

    def find(self, key: str) -> tuple[str, str] | None:
        return self._records.find(key)

    def get(self, job_id: str) -> Job | None:
        if not is_id(job_id):
            return None
        if (own := self._own(job_id)) is not None:
            return own
        state = self._records.state(job_id)
        job = self._records.job(state)
        if job is None or job.outcome is not None:
            return job
        return self._told(job, state, self._opened(job_id).get(job_id), {})

    def gone(self, job_id: str) -> bool:
        return is_id(job_id) and self._records.gone(job_id)

    def page(self, apis: tuple[str, ...], after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        states, more = self._records.page(apis, after, limit, newest_first)
        jobs: list[Job] = []
        opened, heartbeats = None, dict[str, Any]()
        for state, job in zip(states, self._pool.map(self._records.job, states), strict=True):
            if job is not None and job.outcome is None:
                opened = self._opened() if opened is None else opened
                job = self._own(job.id) or self._told(job, state, opened.get(job.id), heartbeats)
            if job is not None:
                jobs.append(job)
        return jobs, more

    def take(self) -> list[JobRequest]:
        taken: list[JobRequest] = []
        with self._taking:
            # Claims first: a server that comes between the two listings is not taken for a dead one.
            opened = {job_id: found for job_id, found in self._opened().items() if not self._has(job_id)}
            ages = {e.key.split("/")[1]: e.age for e in self._bucket.list("owners/")} if opened else {}
            owners = self._pool.map(lambda item: self._owner_of(*item), opened.items())
            for (job_id, found), owner in sorted(
                zip(opened.items(), owners, strict=True), key=lambda t: sort_key(t[0][0])
            ):
                if owner != self._owner and ages.get(owner, float("inf")) <= self._lease + SLACK:
                    continue
                try:
                    request = self._take_over(job_id, found)
                except Unavailable:
                    if not taken:
                        raise
                    break  # those that are ours must be run; the others' turn comes
                if request is not None:
                    taken.append(request)
        return taken

    def _take_over(self, job_id: str, found: _Open) -> JobRequest | None:
        epoch = found.epoch + 1
        if self._has(job_id) or not self._bucket.create(_claim(job_id, epoch), self._owner.encode()):
            return None
        state = self._records.state(job_id)
        if "request.json" not in state.objects and not self._records.void(job_id):
            state = self._records.state(job_id)  # kept this very moment
        if state.outcome is not None or not state.there:
            self._clear(job_id)
            return None
        if found.cancel or len(state.starts) >= MAX_ATTEMPTS:
            self.finish(job_id, cancelled() if found.cancel else server_died())
            return None
        request = self._records.whole(state)
        if request is None:
            self._clear(job_id)
            return None
        started = state.starts[-1].modified if state.starts else None
        with self._lock:
            self._mine[job_id] = _Mine(
                *(brief(request), epoch, len(state.starts), started), kept=True, pictures="input.json" in state.objects
            )
        return request

    def start(self, job_id: str) -> bool:
        mine = self._mine.get(job_id)
        if mine is None:
            return False
        number = mine.attempts + 1
        while not self._bucket.create(key := f"jobs/{job_id}/starts/{number:03d}", _attempt(self._owner, mine.epoch)):
            if self._epoch(job_id) != mine.epoch:  # who has it now started it
                self._drop(job_id, mine)
                return False
            number += 1  # left by one who had it before
        # Asked for after the attempt is written: who takes it later sees the attempt, who took it before is seen here.
        if self._epoch(job_id) != mine.epoch:
            self._bucket.delete(key)
            self._drop(job_id, mine)
            return False
        mine.attempts, mine.started, mine.began = mine.attempts + 1, time.time(), key
        mine.progress = JobProgress("in_progress")
        return True

    def beat(self, progress: Mapping[str, JobProgress]) -> dict[str, str]:
        with self._lock:
            mine = {job_id: job for job_id, job in self._mine.items() if job.kept}
            for job_id, told in progress.items():
                if job_id in mine:
                    mine[job_id].progress = told
        body = {job_id: {**asdict(job.progress), "attempts": job.attempts} for job_id, job in mine.items()}
        renewed = time.monotonic()
        with self._beating:
            if self._released:
                return {}
            self._bucket.put(f"owners/{self._owner}", orjson.dumps(body), patience=self._lease / 2)
        self._renewed = renewed
        opened, stop = self._opened(), {}
        for job_id, job in mine.items():
            found = opened.get(job_id, _Open())
            if found.epoch != job.epoch:
                if self._drop(job_id, job):
                    stop[job_id] = "lost"
            elif found.cancel:
                stop[job_id] = "cancelled"
        return stop

    def finish(self, job_id: str, outcome: Outcome) -> bool:
        kept = self._bucket.create(f"jobs/{job_id}/outcome.json", outcome.to_json())
        with self._lock:
            mine = self._mine.pop(job_id, None)
        self._clear(job_id, pictures=mine is None or mine.pictures)
        return kept

    def cancel(self, job_id: str) -> None:
        if not is_id(job_id):
            return
        state = self._records.state(job_id)
        if not state.there or state.outcome is not None:
            return
        found = self._opened(job_id).get(job_id, _Open())
        owner = self._owner_of(job_id, found)
        if self._has(job_id) or (owner and self._alive(owner)):
            self._bucket.put(f"open/{job_id}/cancel", b"")
        else:
            self.finish(job_id, cancelled())

    def delete(self, job_id: str) -> None:
        if is_id(job_id):
            self._records.delete(job_id)

    def sweep(self) -> None:
        self._records.sweep()
        dead = [e for e in self._bucket.list("owners/") if e.age > FORGOTTEN * (self._lease + SLACK)]
        for entry in dead:
            self._bucket.delete(entry.key)

    def release(self) -> None:
        """A run that a clean stop interrupts is not counted: the server did not die of it."""
        with self._beating:  # one that is on its way would bring the heartbeat back
            self._released = True
        with self._lock:
            left = list(self._mine.values())
            self._mine.clear()
        for mine in left:
            if mine.began and self._epoch(mine.request.id) == mine.epoch:
                self._bucket.delete(mine.began)
        self._bucket.delete(f"owners/{self._owner}")

    def close(self) -> None:
        self._pool.shutdown()
        self._bucket.close()
        self._results.close()

    def _own(self, job_id: str) -> Job | None:
        """A job of this server's, from memory; not after a pause in which another may have taken it."""
        mine = self._mine.get(job_id)
        if mine is None or not mine.kept or time.monotonic() - self._renewed > self._lease:
            return None
        return Job(mine.request, mine.attempts, mine.started, mine.progress)

    def _told(self, job: Job, state: State, found: _Open | None, heartbeats: dict[str, Any]) -> Job:
        """The job with what its owner's heartbeat says of it. `heartbeats` are those read already."""
        owner = self._owner_of(job.id, found) if found else ""
        if not found or not owner:
            return job
        if owner not in heartbeats:
            heartbeats[owner] = orjson.loads(self._bucket.get(f"owners/{owner}") or b"{}")
        told = dict(heartbeats[owner].get(job.id) or {"attempts": 0})
        if told.pop("attempts") == job.attempts:
            return job.told(JobProgress(**told))
        begun = self._records.read_once(state.starts[-1].key) if state.starts else None
        if begun == _attempt(owner, found.epoch):  # since the last beat
            return job.told(JobProgress("in_progress"))
        return job

    def _opened(self, job_id: str = "") -> dict[str, _Open]:
        """Unfinished jobs, those of which something is claimed or asked; or one of them."""
        opened: dict[str, _Open] = {}
        for entry in self._bucket.list(f"open/{job_id}/" if job_id else "open/"):
            _, found_id, name = entry.key.split("/", 2)
            if is_id(found_id):
                found = opened.setdefault(found_id, _Open())
                found.keys.append(entry.key)
                if name == "cancel":
                    found.cancel = True
                elif name.isdigit():
                    found.epoch = max(found.epoch, int(name))
        return opened

    def _epoch(self, job_id: str) -> int:
        return self._opened(job_id).get(job_id, _Open()).epoch

    def _owner_of(self, job_id: str, found: _Open) -> str:
        """Whose the highest claim is; empty where there is none. A claim is read once."""
        text = self._records.read_once(_claim(job_id, found.epoch)) if found.epoch else None
        return text.decode("ascii", "replace") if text else ""

    def _alive(self, owner: str) -> bool:
        age = self._bucket.age(f"owners/{owner}")
        return age is not None and age <= self._lease + SLACK

    def _has(self, job_id: str) -> bool:
        return job_id in self._mine

    def _drop(self, job_id: str, mine: _Mine) -> bool:
        """Own it no longer; False where that is so already."""
        with self._lock:
            if self._mine.get(job_id) is not mine:
                return False
            del self._mine[job_id]
            return True

    def _clear(self, job_id: str, pictures: bool = True) -> None:
        """Remove what an ended job needs no more. What is left where this fails, `take` finds."""
        try:
            if pictures:
                self._bucket.delete(f"jobs/{job_id}/input.json")
            for key in self._opened(job_id).get(job_id, _Open()).keys:
                self._bucket.delete(key)
        except Unavailable:
            return


def _claim(job_id: str, epoch: int) -> str:
    return f"open/{job_id}/{epoch:06d}"


def _attempt(owner: str, epoch: int) -> bytes:
    return f"{owner} {epoch}".encode()

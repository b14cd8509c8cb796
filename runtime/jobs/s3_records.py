"""What a bucket keeps of jobs, whoever owns them; `s3.py` tells who does. Below the prefix:

    jobs/ID/request.json      the request without its pictures; made once, so that a job is kept by one server. Two
                              bytes, {}, where it was given up before it was kept, or deleted: no job any more
    jobs/ID/input.json        the whole request where the above is not; removed when the job ends
    jobs/ID/starts/NNN        an attempt; its time is when that began
    jobs/ID/outcome.json      made once: the first outcome stays
    jobs/ID/expired           the results are no longer there
    keys/DIGEST/NNNNNN        idempotency: job id and fingerprint. The last one counts; it is replaced by the next
                              number, made once, when its job is there no more
    gone/ID                   a record of this id expired; its age counts
    results/ID/NAME           the ResultStore's

A key's order is its age, so that one listing tells the states of 250 jobs and more, oldest first. What is never
changed is read once and remembered.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import orjson

from runtime.jobs.bucket import Bucket, Entry
from runtime.jobs.ids import created_at, is_id, sort_key
from runtime.jobs.record import Job, JobProgress, JobRequest, Outcome, brief, progress_of
from runtime.jobs.store import Duplicate, Lifetimes, Unavailable
from runtime.outputs import Results, overdue

VOID = b"{}"
KEEPING_SECONDS = 5.0  # that a server may take between its claim of an idempotency key and its job
WINDOWS = (600.0, 2 * 3600.0, 24 * 3600.0)  # seconds back that newest-first listings look, one after the other
REMEMBERED, LONGEST = 4096, 64 * 2**10  # objects, and bytes of one


@dataclass(frozen=True, slots=True)
class State:
    """What a listing tells of a job."""

    id: str
    objects: dict[str, Entry]

    @property
    def there(self) -> bool:
        """Whether it was kept, and has not been deleted."""
        return "request.json" in self.objects and not self.void

    @property
    def void(self) -> bool:
        return "request.json" in self.objects and self.objects["request.json"].size == len(VOID)

    @property
    def outcome(self) -> Entry | None:
        return self.objects.get("outcome.json")

    @property
    def starts(self) -> list[Entry]:
        return [entry for name, entry in self.objects.items() if name.startswith("starts/")]


@dataclass(frozen=True, slots=True)
class _Holder:
    """Who has an idempotency key, for `age` seconds."""

    number: int
    job_id: str
    fingerprint: str
    age: float


class Records:
    """Records of jobs. Every method raises Unavailable; safe to use from threads."""

    def __init__(self, bucket: Bucket, results: Results, lifetimes: Lifetimes) -> None:
        self._bucket, self._results, self._lifetimes = bucket, results, lifetimes
        self._known: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read_once(self, key: str) -> bytes | None:
        """An object that does not change as long as it is there."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        data = self._bucket.get(key)
        if data is not None and len(data) <= LONGEST and data != VOID:
            with self._lock:
                self._known[key] = data
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        return data

    def state(self, job_id: str) -> State:
        """One request."""
        return State(job_id, {_name(entry): entry for entry in self._bucket.list(f"jobs/{job_id}/")})

    def keep(self, request: JobRequest) -> bool:
        """One request, two for a job with pictures; False where it was given up meanwhile."""
        short = brief(request)
        if short is not request:
            self._bucket.put(f"jobs/{request.id}/input.json", request.to_json())
        return self._bucket.create(f"jobs/{request.id}/request.json", short.to_json())

    def void(self, job_id: str) -> bool:
        """Make sure that a job that is not kept never will be; False where it is kept."""
        key = f"jobs/{job_id}/request.json"
        return self._bucket.create(key, VOID) or self._bucket.get(key) == VOID

    def kept(self, job_id: str) -> bool:
        return (self._bucket.get(f"jobs/{job_id}/request.json") or VOID) != VOID

    def whole(self, state: State) -> JobRequest | None:
        """The request, pictures and all; None where the job ended meanwhile."""
        name = "input.json" if "input.json" in state.objects else "request.json"
        text = self._bucket.get(f"jobs/{state.id}/{name}")
        return JobRequest.from_json(text) if text and text != VOID else None

    def job(self, state: State) -> Job | None:
        """The job, without progress; at most two requests, none for one that was read before."""
        text = self.read_once(f"jobs/{state.id}/request.json") if state.there else None
        if text is None or text == VOID:
            return None
        starts, ended, outcome = state.starts, state.outcome, None
        if ended is not None:
            told = self.read_once(f"jobs/{state.id}/outcome.json")
            if told is None:  # deleted meanwhile
                return None
            outcome = Outcome.from_json(told)
        return Job(
            JobRequest.from_json(text),
            len(starts),
            starts[-1].modified if starts else None,
            progress_of(outcome) if outcome else JobProgress(),
            outcome,
            "expired" not in state.objects and (ended is None or ended.age <= self._lifetimes.result),
        )

    def find(self, key: str) -> tuple[str, str] | None:
        """Three requests."""
        holder = self._holder(key)
        return (holder.job_id, holder.fingerprint) if holder and self.kept(holder.job_id) else None

    def claim_key(self, request: JobRequest) -> None:
        """Two requests. Raises Duplicate for a key that a kept job has."""
        body = orjson.dumps([request.id, request.fingerprint])
        for _ in range(10):
            if holder := self._holder(request.key):
                kept = self._kept_soon(holder.job_id, KEEPING_SECONDS - holder.age)
                if kept or not self.void(holder.job_id):
                    raise Duplicate(holder.job_id, holder.fingerprint)
            if self._bucket.create(f"keys/{request.key}/{holder.number + 1 if holder else 1:06d}", body):
                return
        raise Unavailable(f"{self._bucket.uri}: too many requests with one idempotency key at once; try again")

    def _holder(self, key: str) -> _Holder | None:
        entries = list(self._bucket.list(f"keys/{key}/"))
        text = self.read_once(entries[-1].key) if entries else None
        if text is None:
            return None
        job_id, fingerprint = orjson.loads(text)
        return _Holder(int(entries[-1].key.rpartition("/")[2]), job_id, fingerprint, entries[-1].age)

    def _kept_soon(self, job_id: str, patience: float) -> bool:
        """Whether the job is kept, or will be in a moment by the server that claimed its key just now."""
        end = time.monotonic() + patience
        while True:
            text = self._bucket.get(f"jobs/{job_id}/request.json")
            if text is not None or time.monotonic() > end:
                return text is not None and text != VOID
            time.sleep(0.1)

    def page(
        self, apis: tuple[str, ...], after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[State], bool]:
        """Jobs that were kept, and whether more follow. Oldest first a request or two for each api; newest first up to
        four, and one more for each thousand objects on the page's way."""
        if after is not None and not is_id(after):
            return [], False
        walk = self._down if newest_first else self._up
        runs = [walk(api.removesuffix("s"), sort_key(after) if after else None) for api in apis]
        found: list[State] = []
        for state in heapq.merge(*runs, key=lambda state: sort_key(state.id), reverse=newest_first):
            if state.there:
                found.append(state)
                if len(found) > limit:
                    return found[:limit], True
        return found, False

    def _up(self, prefix: str, after: str | None) -> Iterator[State]:
        return self._states(f"jobs/{prefix}_", f"jobs/{prefix}_{after}/~" if after else "")

    def _down(self, prefix: str, before: str | None) -> Iterator[State]:
        """No store lists backwards: ever longer windows of time, each read forwards. The first is open to the future,
        as the clocks that ids are made by may be ahead of ours."""
        newest = int(before[:12], 16) / 1000 if before else time.time()
        upper = f"{before}" if before else "~"
        for window in (*WINDOWS, None):
            lower = "" if window is None else f"{max(0, int((newest - window) * 1000)):012x}"
            found = []
            for state in self._states(f"jobs/{prefix}_", f"jobs/{prefix}_{lower}"):
                if sort_key(state.id) >= upper:
                    break
                found.append(state)
            yield from reversed(found)
            upper = lower

    def _states(self, prefix: str, after: str = "") -> Iterator[State]:
        entries = (entry for entry in self._bucket.list(prefix, after) if is_id(_id(entry)))
        for job_id, group in groupby(entries, _id):
            yield State(job_id, {_name(entry): entry for entry in group})

    def gone(self, job_id: str) -> bool:
        age = self._bucket.age(f"gone/{job_id}")
        return age is not None and age <= self._lifetimes.record

    def delete(self, job_id: str) -> None:
        state = self.state(job_id)
        if state.there and state.outcome:
            # It stays taken: a server that was paused meanwhile cannot bring the job back.
            self._bucket.put(f"jobs/{job_id}/request.json", VOID)
            self._remove(state, but="request.json")

    def _remove(self, state: State, but: str = "") -> None:
        self._results.drop(state.id)
        for name in sorted(state.objects, key=lambda name: name != "request.json"):  # that first: then it is no job
            if name != but:
                self._bucket.delete(f"jobs/{state.id}/{name}")
        with self._lock:
            for name in state.objects:
                self._known.pop(f"jobs/{state.id}/{name}", None)

    def sweep(self) -> None:
        """Some ten requests, one more for each thousand results, and about six for each job that expires."""
        for job_id in overdue(self._results.held(), self._lifetimes):
            if is_id(job_id):
                state = self.state(job_id)
                if state.there and state.outcome is None:
                    continue  # it is still being written
                if state.outcome and "expired" not in state.objects:
                    self._bucket.put(f"jobs/{job_id}/expired", b"")  # before they are: what is promised is there
            self._results.drop(job_id)
        for state in list(self._old()):
            if state.there and state.outcome is None:
                continue  # it waits still
            if state.there and state.outcome and state.outcome.age <= self._lifetimes.record:
                continue
            if state.there:
                self._bucket.put(f"gone/{state.id}", b"")
            self._remove(state)
        for entry in list(self._bucket.list("gone/")):
            if entry.age > self._lifetimes.record:
                self._bucket.delete(entry.key)
        for entry in list(self._bucket.list("keys/")):
            if entry.age > 2 * self._lifetimes.record + KEEPING_SECONDS:
                text = self._bucket.get(entry.key)
                if text is not None and not self.kept(orjson.loads(text)[0]):
                    self._bucket.delete(entry.key)
        for entry in list(self._bucket.list("probe/")):
            if entry.age > 3600:
                self._bucket.delete(entry.key)

    def _old(self) -> Iterator[State]:
        """Jobs born longer than a record's lifetime ago: the first ones of each api, so that the others are skipped."""
        after = "jobs/"
        while after:
            states: Iterable[State] = self._states("jobs/", after)
            after = ""
            for state in states:
                age = min((e.age + e.modified for e in state.objects.values()), default=0.0) - created_at(state.id)
                if age <= self._lifetimes.record:
                    after = f"jobs/{state.id.rpartition('_')[0]}_g"  # behind every hexadecimal number
                    break
                yield state


def _id(entry: Entry) -> str:
    return entry.key.split("/")[1]


def _name(entry: Entry) -> str:
    return entry.key.split("/", 2)[-1]

"""What every job store promises, over a SQLite file and over a bucket of a real S3 server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from runtime.jobs import s3_records
from runtime.jobs.ids import new_id
from runtime.jobs.record import JobError, JobProgress, JobRequest, Outcome, StoredMedia, StoredResult
from runtime.jobs.store import Duplicate, Lifetimes
from tests.jobs.conftest import LIFETIMES

WAIT_SECONDS = 60
PICTURE = "A" * 200_000


def request(api: str = "images", prompt: str = "a cat", **changes: Any) -> JobRequest:
    return JobRequest(new_id(api), api, time.time(), ({"prompt": prompt, "seed": 7},), {"model": "tiny"}, **changes)


def outcome(job_id: str, size: int = 10, name: str = "0-0.png") -> Outcome:
    media = StoredMedia(f"{job_id}/{name}", size, "png", 64, 64, 7)
    return Outcome(time.time(), (StoredResult({"prompt": "a cat", "seed": 7}, (media,), {"total": 1.0}, "cpu", "r1"),))


def failure() -> Outcome:
    return Outcome(time.time(), error=JobError("out_of_memory", "too large", 507))


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)
    return found


# --- one server


def test_the_life_of_a_job(place):
    jobs, _ = place.open()
    job = request()
    jobs.create(job)
    found = jobs.get(job.id)
    assert found.request == job and found.status == "queued" and found.attempts == 0 and found.started is None
    assert jobs.start(job.id)
    found = jobs.get(job.id)
    assert found.status == "in_progress" and found.attempts == 1 and abs(found.started - time.time()) < 30
    told = JobProgress("in_progress", 0.5, 3.0, "denoise", 2, 4)
    assert jobs.beat({job.id: told}) == {}
    assert jobs.get(job.id).progress == told
    end = outcome(job.id)
    assert jobs.finish(job.id, end)
    found = jobs.get(job.id)
    assert found.status == "completed" and found.outcome == end and found.available and found.attempts == 1
    assert found.progress.fraction == 1.0
    assert jobs.take() == [] and jobs.beat({}) == {}


def test_the_first_outcome_stays(place):
    jobs, _ = place.open()
    job = request()
    jobs.create(job)
    jobs.start(job.id)
    end = failure()
    assert jobs.finish(job.id, end)
    assert not jobs.finish(job.id, outcome(job.id))
    assert jobs.get(job.id).outcome == end and jobs.get(job.id).status == "failed"
    assert not jobs.start(job.id)


def test_ids_that_nobody_made(place):
    jobs, _ = place.open()
    for name in ("", "image_1", "../../etc/passwd", "image_" + "0" * 28, "a" * 5000, "x/../y", "image_\0", "ü"):
        assert jobs.get(name) is None and not jobs.gone(name)
        jobs.cancel(name)
        jobs.delete(name)
        assert not jobs.start(name)
        assert jobs.page(("images",), name or "-", 5, True) == ([], False)


def test_pictures_are_kept_until_the_end_and_not_told(place):
    jobs, _ = place.open()
    row = {"prompt": "a cat", "image": [PICTURE, "small"], "mask": {"url": PICTURE}}
    job = JobRequest(new_id("images"), "images", time.time(), (row, {"prompt": "b"}))
    jobs.create(job)
    assert jobs.get(job.id).request.rows == ({"prompt": "a cat"}, {"prompt": "b"})
    place.dies(jobs)
    jobs, _ = place.open()
    assert jobs.get(job.id).request.rows == ({"prompt": "a cat"}, {"prompt": "b"})
    assert jobs.take() == [job]
    assert jobs.start(job.id) and jobs.finish(job.id, outcome(job.id))
    assert jobs.get(job.id).request.rows == ({"prompt": "a cat"}, {"prompt": "b"})


def test_pages(place):
    jobs, _ = place.open()
    made = []
    for i in range(7):
        job = request(("images", "videos", "v1")[i % 3], prompt=str(i))
        jobs.create(job)
        made.append(job)
        time.sleep(0.003)
    jobs.start(made[0].id)
    jobs.finish(made[1].id, outcome(made[1].id))

    def ids(*asked: Any) -> tuple[list[str], bool]:
        found, more = jobs.page(*asked)
        return [job.request.rows[0]["prompt"] for job in found], more

    every = ("images", "videos", "v1")
    assert ids(every, None, 10, True) == (list("6543210"), False)
    assert ids(every, None, 7, False) == (list("0123456"), False)
    assert ids(every, None, 3, False) == (list("012"), True)
    assert ids(every, made[2].id, 3, False) == (list("345"), True)
    assert ids(every, made[2].id, 4, False) == (list("3456"), False)
    assert ids(every, made[5].id, 2, True) == (list("43"), True)
    assert ids(("videos",), None, 10, True) == (list("41"), False)
    assert ids(("videos",), made[3].id, 10, True) == (list("1"), False)
    assert ids(("v2",), None, 10, True) == ([], False)
    assert ids(every, made[0].id, 10, True) == ([], False)
    found, _ = jobs.page(every, None, 10, False)
    assert [job.status for job in found[:3]] == ["in_progress", "completed", "queued"]


def test_many_jobs_page_by_page(place):
    jobs, _ = place.open()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: request("videos", str(i)), range(60)))
        list(pool.map(jobs.create, made))
    expected = sorted(job.id for job in made)
    seen, after, more = [], None, True
    while more:
        found, more = jobs.page(("videos",), after, 7, True)
        seen += [job.id for job in found]
        after = seen[-1]
    assert seen == expected[::-1]


def test_cancel_and_delete(place):
    jobs, results = place.open()
    job = request()
    jobs.create(job)
    jobs.delete(job.id)  # unfinished: it stays
    assert jobs.get(job.id) is not None
    jobs.cancel(job.id)
    assert jobs.beat({}) == {job.id: "cancelled"}
    results.put(f"{job.id}/0-0.png", b"0123456789", "image/png", {})
    jobs.finish(job.id, outcome(job.id))
    assert jobs.beat({}) == {}
    jobs.delete(job.id)
    assert jobs.get(job.id) is None and not jobs.gone(job.id)
    assert jobs.page(("images",), None, 5, True) == ([], False)
    with pytest.raises(KeyError):
        results.read(f"{job.id}/0-0.png")
    jobs.delete(job.id)
    jobs.cancel(job.id)


def test_one_job_for_each_key(place):
    jobs, _ = place.open()
    first = request(key="k1", fingerprint="f1")
    assert jobs.find("k1") is None
    jobs.create(first)
    with pytest.raises(Duplicate) as raised:
        jobs.create(request(key="k1", fingerprint="f2"))
    assert (raised.value.job_id, raised.value.fingerprint) == (first.id, "f1") == jobs.find("k1")
    jobs.create(request(key="k2"))
    jobs.create(request())
    jobs.create(request())
    jobs.finish(first.id, outcome(first.id))
    with pytest.raises(Duplicate):
        jobs.create(request(key="k1"))
    jobs.delete(first.id)
    assert jobs.find("k1") is None
    second = request(key="k1", fingerprint="f3")
    jobs.create(second)
    assert jobs.find("k1") == (second.id, "f3")


def test_a_key_that_many_want_at_once(place, monkeypatch):
    monkeypatch.setattr(s3_records, "KEEPING_SECONDS", WAIT_SECONDS)  # on a slow machine who has it is not given up
    stores = [place.open()[0] for _ in range(1 if place.kind == "sqlite" else 3)]
    for round_ in range(4):
        barrier = threading.Barrier(6)

        def attempt(i: int, key: str = f"key{round_}", barrier: threading.Barrier = barrier) -> str | Duplicate:
            job = request(key=key, fingerprint=str(i))
            barrier.wait()
            try:
                stores[i % len(stores)].create(job)
            except Duplicate as duplicate:
                return duplicate
            return job.id

        with ThreadPoolExecutor(6) as pool:
            told = list(pool.map(attempt, range(6)))
        (winner,) = [item for item in told if isinstance(item, str)]
        assert {item.job_id for item in told if isinstance(item, Duplicate)} == {winner}
        assert [job.id for job in stores[0].page(("images",), None, 100, True)[0]].count(winner) == 1
    assert len(stores[0].page(("images",), None, 100, True)[0]) == 4


# --- restarts


def test_after_a_death_all_is_there(place):
    jobs, results = place.open()
    made = sorted((request(prompt=str(i)) for i in range(6)), key=lambda job: job.id)
    for job in made:
        jobs.create(job)
    for job in made[:2]:
        jobs.start(job.id)
        results.put(f"{job.id}/0-0.png", b"0123456789", "image/png", {"seed": "7"})
        jobs.finish(job.id, outcome(job.id))
    jobs.start(made[2].id)
    place.dies(jobs)

    jobs, results = place.open()
    assert jobs.take() == made[2:]
    assert jobs.take() == []
    assert [job.status for job in jobs.page(("images",), None, 9, False)[0]] == ["completed"] * 2 + ["queued"] * 4
    assert b"".join(results.read(f"{made[0].id}/0-0.png")) == b"0123456789"
    assert jobs.get(made[2].id).attempts == 1
    for job in made[2:]:
        assert jobs.start(job.id)
        assert jobs.finish(job.id, outcome(job.id))
    assert jobs.get(made[2].id).attempts == 2
    place.dies(jobs)
    assert place.open()[0].take() == []


def test_a_job_that_kills_its_servers(place):
    job = request()
    jobs, _ = place.open()
    jobs.create(job)
    jobs.start(job.id)
    place.dies(jobs)
    jobs, _ = place.open()
    assert jobs.take() == [job] and jobs.start(job.id)
    place.dies(jobs)
    jobs, _ = place.open()
    assert jobs.take() == []
    found = jobs.get(job.id)
    assert found.status == "failed" and found.attempts == 2
    assert found.outcome.error.code == "server_died" and found.outcome.error.http_status == 500


def test_a_clean_stop_is_no_attempt(place):
    job = request()
    for _ in range(4):
        jobs, _ = place.open()
        if jobs.get(job.id) is None:
            jobs.create(job)
        else:
            assert jobs.take() == [job]
        assert jobs.start(job.id)
        assert jobs.get(job.id).attempts == 1
        jobs.release()
        assert jobs.beat({job.id: JobProgress("in_progress", 0.5)}) == {}
        place.close(jobs)
    jobs, _ = place.open()
    assert jobs.get(job.id).status == "queued"


def test_cancelling_what_nobody_has(place):
    jobs, _ = place.open()
    job = request()
    jobs.create(job)
    place.dies(jobs)
    jobs, _ = place.open()
    jobs.cancel(job.id)
    found = jobs.get(job.id)
    assert found.status == "failed" and found.outcome.error.code == "cancelled"
    assert found.outcome.error.http_status == 499
    assert jobs.take() == []


# --- what expires


def finished(jobs: Any, results: Any, size: int = 10, **changes: Any) -> str:
    job = request(**changes)
    jobs.create(job)
    jobs.start(job.id)
    results.put(f"{job.id}/0-0.png", b"x" * size, "image/png", {})
    jobs.finish(job.id, outcome(job.id, size))
    return job.id


def gone_from(results: Any, key: str) -> bool:
    try:
        return not list(results.read(key))
    except KeyError:
        return True


def test_results_expire_before_records(place):
    jobs, results = place.open()
    old = finished(jobs, results)
    jobs.sweep()
    assert jobs.get(old).available and not gone_from(results, f"{old}/0-0.png")
    place.close(jobs)
    jobs, results = place.open(Lifetimes(url=1, result=1, record=3600, max_bytes=2**30))
    until(lambda: not jobs.get(old).available)

    def swept() -> bool:
        jobs.sweep()
        return gone_from(results, f"{old}/0-0.png")

    until(swept)
    found = jobs.get(old)
    assert found.status == "completed" and not found.available and found.outcome.media[0].size == 10
    waiting = request()
    jobs.create(waiting)
    jobs.sweep()
    assert jobs.get(waiting.id).available


def test_gone_and_then_unknown(place):
    jobs, results = place.open(Lifetimes(url=2, result=4, record=4, max_bytes=2**30))
    waiting = request()
    jobs.create(waiting)
    began = 0.0

    def swept(condition: Callable[[], bool]) -> Callable[[], bool]:
        def ask() -> bool:
            nonlocal began
            began = time.monotonic()
            jobs.sweep()
            return condition()

        return ask

    for key in "abcde":  # once more where the machine stood still: gone is told for seconds only
        old = finished(jobs, results, key=key, fingerprint="f")
        assert jobs.get(old) is not None and not jobs.gone(old)
        until(swept(lambda old=old: jobs.get(old) is None))
        gone = jobs.gone(old)
        if time.monotonic() - began < 2:
            break
    assert gone and gone_from(results, f"{old}/0-0.png")
    assert jobs.find(key) is None
    assert [job.id for job in jobs.page(("images",), None, 5, True)[0]] == [waiting.id]
    jobs.create(again := request(key=key))
    assert jobs.find(key) == (again.id, "")
    until(swept(lambda: not jobs.gone(old)))
    assert jobs.get(waiting.id).status == "queued" and jobs.get(again.id) is not None


def test_the_oldest_results_make_room(place):
    jobs, results = place.open(Lifetimes(url=600, result=3600, record=7200, max_bytes=2500))
    kept = []
    for _ in range(4):
        kept.append(finished(jobs, results, 1000))
        time.sleep(1.1)  # times of objects are whole seconds
    other, _ = place.open(LIFETIMES) if place.kind == "s3" else (jobs, None)
    threads = [threading.Thread(target=jobs.sweep), threading.Thread(target=other.sweep)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [jobs.get(job_id).available for job_id in kept] == [False, False, True, True]
    assert [gone_from(results, f"{job_id}/0-0.png") for job_id in kept] == [True, True, False, False]


def test_results_that_are_being_written_stay(place):
    jobs, results = place.open(Lifetimes(url=600, result=3600, record=7200, max_bytes=50))
    job = request()
    jobs.create(job)
    jobs.start(job.id)
    results.put(f"{job.id}/0-0.png", b"x" * 100, "image/png", {})
    jobs.sweep()
    assert not gone_from(results, f"{job.id}/0-0.png")


def test_from_many_threads(place):
    jobs, _ = place.open()

    def run(i: int) -> str:
        job = request(prompt=str(i))
        jobs.create(job)
        assert jobs.start(job.id)
        jobs.beat({job.id: JobProgress("in_progress", 0.5)})
        assert jobs.get(job.id).progress.fraction == 0.5
        assert jobs.take() == []
        assert jobs.finish(job.id, outcome(job.id))
        return job.id

    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(run, range(18)))
    assert all(jobs.get(job_id).status == "completed" for job_id in done)

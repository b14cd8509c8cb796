"""Several servers over one bucket: who has which job, when one is slow, dies, or all begin at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest

from runtime.errors import StartupError
from runtime.jobs import s3_records
from runtime.jobs.bucket import PATIENCE
from runtime.jobs.open import open_stores
from runtime.jobs.record import JobProgress, JobRequest
from runtime.jobs.store import Duplicate, Unavailable
from runtime.storage.options import StorageOptions
from tests.jobs.conftest import LEASE, LIFETIMES, options_of
from tests.jobs.links import link_to
from tests.jobs.seaweed import READER, SECRET
from tests.jobs.test_job_stores import PICTURE, failure, outcome, request, until
from tests.storage.servers import FRESH, rclone

TINY = 2.0  # seconds of a lease


@pytest.fixture
def place(s3_place):
    return s3_place


@contextlib.contextmanager
def beating(*stores: Any) -> Iterator[None]:
    """The stores beat, as often as their servers would."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
            for jobs in stores:
                jobs.beat({})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def keys(jobs: Any, prefix: str) -> list[str]:
    return [entry.key for entry in jobs._bucket.list(prefix)]


@pytest.fixture
def asked() -> Callable[[Any], Counter[str]]:
    """`asked(jobs)`: counts the requests of a store from now on, by operation."""

    def count(jobs: Any) -> Counter[str]:
        counted: Counter[str] = Counter()
        jobs._bucket._client.meta.events.register(
            "before-call.s3", lambda model, **_: counted.update([model.name]), unique_id="counted"
        )
        return counted

    return count


# --- any server answers for any job


def test_one_runs_another_tells(place):
    one, results = place.open()
    other, others_results = place.open()
    one.create(job := request())
    assert other.get(job.id).status == "queued" and other.take() == []
    assert one.start(job.id)
    found = other.get(job.id)
    assert found.status == "in_progress" and found.attempts == 1 and abs(found.started - time.time()) < 30
    told = JobProgress("in_progress", 0.25, 9.0, "denoise", 1, 4)
    one.beat({job.id: told})
    assert other.get(job.id).progress == told == other.page(("images",), None, 5, True)[0][0].progress
    results.put(f"{job.id}/0-0.png", b"0123456789", "image/png", {})
    end = outcome(job.id)
    one.finish(job.id, end)
    assert other.get(job.id).outcome == end and other.get(job.id).available
    assert b"".join(others_results.read(f"{job.id}/0-0.png")) == b"0123456789"
    other.delete(job.id)
    assert one.get(job.id) is None
    assert (
        not keys(one, "open/") and keys(one, "jobs/") == [f"jobs/{job.id}/request.json"] and not keys(one, "results/")
    )


def test_cancelling_what_another_runs(place):
    one, _ = place.open()
    other, _ = place.open()
    one.create(job := request())
    one.start(job.id)
    other.cancel(job.id)
    assert other.get(job.id).outcome is None
    assert one.beat({}) == {job.id: "cancelled"}
    one.finish(job.id, failure())
    assert one.beat({}) == {} and not keys(one, "open/")
    other.cancel(job.id)
    assert not keys(one, "open/")


def test_cancelled_and_then_its_server_dies(place):
    one, _ = place.open()
    other, _ = place.open()
    one.create(job := request())
    other.cancel(job.id)
    place.dies(one)
    assert other.take() == []
    assert other.get(job.id).outcome.error.code == "cancelled" and not keys(other, "open/")


def test_a_clean_stop_frees_at_once(place):
    one, _ = place.open()
    other, _ = place.open()
    made = [request(prompt=str(i)) for i in range(3)]
    for job in made:
        one.create(job)
    one.start(made[0].id)
    one.release()
    place.close(one)
    assert {job.id for job in other.take()} == {job.id for job in made}
    assert other.get(made[0].id).attempts == 0


# --- leases


def test_who_beats_keeps_its_jobs(place):
    lease = 8  # a machine that stands still for longer fails this
    one, _ = place.open(lease=lease)
    other, _ = place.open(lease=lease)
    one.create(job := request())
    end = time.monotonic() + lease + 3
    with beating(one, other):
        while time.monotonic() < end:
            assert other.take() == []
            time.sleep(0.2)
        assert one.start(job.id)
    assert one.finish(job.id, outcome(job.id))


def test_a_server_that_was_paused_loses_its_jobs(place):
    one, _ = place.open()  # which does not take the other for dead in its turn
    other, _ = place.open(lease=TINY)
    made = [request(prompt=str(i)) for i in range(3)]
    for job in made:
        one.create(job)
    one.start(made[0].id)
    taken = []
    until(lambda: (taken.extend(other.take()), len(taken) == 3)[1])
    assert sorted(job.id for job in taken) == sorted(job.id for job in made)
    assert not one.start(made[1].id)
    assert other.start(made[0].id) and other.get(made[0].id).attempts == 2
    assert one.beat({made[0].id: JobProgress("in_progress", 0.9)}) == {made[0].id: "lost", made[2].id: "lost"}
    assert one.beat({}) == {} and one.take() == []
    assert not one.start(made[0].id)
    assert other.finish(made[0].id, end := outcome(made[0].id))
    assert not one.finish(made[0].id, failure())
    assert one.get(made[0].id).outcome == end
    # Who is first is first, also when it is the one that was paused: the seed makes the results equal.
    other.start(made[1].id)
    assert one.finish(made[1].id, first := outcome(made[1].id))
    assert other.beat({}) == {made[1].id: "lost"} and not other.finish(made[1].id, failure())
    assert other.get(made[1].id).outcome == first
    assert keys(other, "open/") == [f"open/{made[2].id}/000001", f"open/{made[2].id}/000002"]


def test_an_attempt_of_the_paused_one_does_not_count(place):
    """It wrote that it begins, and only then saw that the job is another's."""
    one, _ = place.open()
    other, _ = place.open()
    one.create(job := request())
    one._bucket.delete(f"owners/{one._owner}")
    assert other.take() == [job]
    assert not one.start(job.id)
    assert not keys(one, f"jobs/{job.id}/starts/")
    assert other.start(job.id) and other.get(job.id).attempts == 1


def test_many_take_what_one_left(place):
    """Each job has one new server, also when they ask at the same moment, and when they have only just begun."""
    dead, _ = place.open()
    made = [request(prompt=str(i)) for i in range(12)]
    for job in made:
        dead.create(job)
    place.dies(dead)
    barrier = threading.Barrier(4)

    def begin(_: int) -> list[JobRequest]:
        barrier.wait()
        jobs, _ = place.open()
        return jobs.take()

    with ThreadPoolExecutor(4) as pool:
        taken = [job.id for some in pool.map(begin, range(4)) for job in some]
    assert sorted(taken) == sorted(job.id for job in made)
    assert len(keys(place.opened[0], "open/")) == 2 * 12
    for jobs in place.opened:
        assert jobs.beat({}) == {} and jobs.take() == []


def test_processes_that_die(place, server, object_store, output_uri):
    """kill -9 of one that runs a job; two others, started at the same moment, share what it left."""
    environment = {**object_store.env, "OUTPUT_URI": output_uri}
    first = server(**environment)
    assert first.told() == "ready"
    made = {first.ask("create", str(i)) for i in range(6)}
    running = min(made)
    assert first.ask("start", running)
    first.kill()
    jobs, _ = place.open()
    for owner in keys(jobs, "owners/"):  # its lease ends; the others', however slow they are, do not
        jobs._bucket.delete(owner)
    others = [server(**environment) for _ in range(2)]
    assert [other.told() for other in others] == ["ready", "ready"]
    taken: list[list[str]] = [[], []]

    def ask() -> bool:
        for other in others:
            other.tell("take")
        for mine, other in zip(taken, others, strict=True):
            mine += other.told()
        assert all(other.ask("beat", {}) == {} for other in others)
        return sum(map(len, taken)) >= 6

    until(ask)
    assert sorted(taken[0] + taken[1]) == sorted(made)
    for mine, other in zip(taken, others, strict=True):
        assert all(other.ask("start", job) and other.ask("finish", job) for job in mine)
    assert [(job.id, job.status) for job in jobs.page(("videos",), None, 9, False)[0]] == [
        (job, "completed") for job in sorted(made)
    ]
    assert jobs.get(running).attempts == 2 and not keys(jobs, "open/")


# --- crashes between two requests


def test_a_crash_before_the_job_is_kept(place):
    """The claim is there, the job is not: nobody was promised anything, and nothing stays."""
    jobs, _ = place.open()
    job = request()
    jobs._bucket.put(f"open/{job.id}/000001", b"dead")
    assert jobs.take() == [] and not keys(jobs, "open/") and jobs.get(job.id) is None
    late, _ = place.open()
    with pytest.raises(Unavailable):  # it was only slow; its client is told to try again
        late.create(job)
    assert late.take() == [] and late.get(job.id) is None and not keys(jobs, "open/")


def test_a_crash_between_key_and_job(place, monkeypatch):
    monkeypatch.setattr(s3_records, "KEEPING_SECONDS", 0.5)
    jobs, _ = place.open()
    slow, job = request(key="k", fingerprint="f"), request(key="k", fingerprint="f")
    jobs._bucket.put("keys/k/000001", orjson.dumps([slow.id, "f"]))
    assert jobs.find("k") is None
    jobs.create(job)
    assert jobs.find("k") == (job.id, "f")
    assert not jobs._records.keep(slow)  # it was only slow: two jobs of one key there are not
    with pytest.raises(Duplicate):
        jobs.create(request(key="k"))


def test_a_crash_after_the_outcome(place):
    jobs, _ = place.open()
    jobs.create(job := request())
    jobs._bucket.put(f"jobs/{job.id}/outcome.json", outcome(job.id).to_json())
    place.dies(jobs)
    jobs, _ = place.open()
    assert jobs.take() == [] and not keys(jobs, "open/")
    assert jobs.get(job.id).status == "completed" and jobs.get(job.id).attempts == 0


def test_what_create_left_is_run(place, object_store, monkeypatch):
    """The answer to the last request of `create` is lost: its client tries again, the job is there once."""
    with link_to(object_store.endpoint) as link:
        place.options = options_of(monkeypatch, {**object_store.env, "AWS_S3_ENDPOINT": link.url})
        jobs, _ = place.open()
        jobs.create(first := request(key="k", fingerprint="f"))
        jobs._mine.pop(first.id)  # as if `create` had raised in the end
        with pytest.raises(Duplicate):
            jobs.create(request(key="k", fingerprint="f"))
        assert jobs.take() == [first] and jobs.take() == []
        place.close(jobs)


def test_pictures_go_when_the_job_ends(place):
    one, _ = place.open()
    other, _ = place.open()
    for who in one, other:
        job = JobRequest(request().id, "images", 1.0, ({"prompt": "p", "image": PICTURE},))
        one.create(job)
        assert keys(one, f"jobs/{job.id}/input.json")
        who.finish(job.id, outcome(job.id))
        assert not keys(one, f"jobs/{job.id}/input.json")
        assert other.get(job.id).request.rows == ({"prompt": "p"},)


# --- the network


def test_lost_answers(place, object_store, monkeypatch):
    """The store did what it was asked and the answer was lost: asked again, what was made once is known as ours."""
    with link_to(object_store.endpoint) as link:
        place.options = options_of(monkeypatch, {**object_store.env, "AWS_S3_ENDPOINT": link.url})
        jobs, results = place.open()

        def lossy(call: Callable[[], Any]) -> Any:
            link.lose = 1
            made = call()
            assert link.lose == 0
            return made

        job = request(key="k")
        lossy(lambda: jobs.create(job))
        assert lossy(lambda: jobs.start(job.id)) is True
        assert lossy(lambda: jobs.beat({})) == {}
        lossy(lambda: results.put(f"{job.id}/0-0.png", b"x", "image/png", {}))
        assert lossy(lambda: jobs.finish(job.id, outcome(job.id))) is True
        assert jobs.finish(job.id, failure()) is False
        found = lossy(lambda: jobs.get(job.id))
        assert found.status == "completed" and found.attempts == 1
        place.close(jobs)


def test_a_store_that_goes_away_and_comes_back(place, object_store, monkeypatch):
    with link_to(object_store.endpoint) as link:
        place.options = options_of(monkeypatch, {**object_store.env, "AWS_S3_ENDPOINT": link.url})
        jobs, results = place.open()
        jobs._bucket._patience = results._bucket._patience = 0.5
        jobs.create(job := request())
        link.down = True
        calls: list[Callable[[], Any]] = [
            lambda: jobs.create(request()),
            lambda: jobs.get(request().id),
            lambda: jobs.start(job.id),
            lambda: jobs.finish(job.id, outcome(job.id)),
            lambda: jobs.take(),
            lambda: jobs.page(("images",), None, 5, True),
            lambda: results.put(f"{job.id}/0-0.png", b"x", "image/png", {}),
            lambda: results.read(f"{job.id}/0-0.png"),
        ]
        for call in calls:
            with pytest.raises(Unavailable) as raised:
                call()
            line = str(raised.value)
            assert "\n" not in line and SECRET not in line and "Signature" not in line and "gave up" in line
        assert jobs.get(job.id).status == "queued"  # what it has itself, it knows
        link.down = False
        jobs._bucket._patience = PATIENCE
        assert jobs.start(job.id) and jobs.finish(job.id, outcome(job.id))
        place.close(jobs)


# --- what is asked of the store


def test_requests(place, asked):
    one, _ = place.open()
    other, _ = place.open()
    counted = asked(one)
    made = sorted((request(prompt=str(i)) for i in range(30)), key=lambda job: job.id)
    one.create(made[0])
    assert counted == {"PutObject": 2}
    counted.clear()
    for job in made[1:]:
        one.create(job)
    counted.clear()
    one.beat({job.id: JobProgress("queued") for job in made})
    assert counted == {"PutObject": 1, "ListObjectsV2": 1}
    counted.clear()
    one.take()
    assert counted == {"ListObjectsV2": 1}
    counted.clear()
    one.get(made[3].id)
    assert not counted
    one.start(made[3].id)
    assert counted == {"PutObject": 1, "ListObjectsV2": 1}
    counted.clear()
    one.finish(made[3].id, outcome(made[3].id))
    assert counted == {"PutObject": 1, "ListObjectsV2": 1, "DeleteObject": 1}
    counted.clear()
    one.get(made[3].id)
    one.get(made[3].id)
    assert counted == {"ListObjectsV2": 2, "GetObject": 2}
    for job in made[10:]:
        one.finish(job.id, outcome(job.id))
    counted = asked(other)
    assert len(other.page(("images",), None, 5, True)[0]) == 5
    assert counted == {"ListObjectsV2": 1, "GetObject": 10}
    counted.clear()
    other.page(("images",), None, 5, True)
    assert counted == {"ListObjectsV2": 1}
    counted.clear()
    other.get(made[5].id)
    assert counted == {"ListObjectsV2": 2, "GetObject": 3}
    counted.clear()
    other.get(made[5].id)
    assert counted == {"ListObjectsV2": 2, "GetObject": 1}


def test_newest_first_looks_back_in_windows(place, monkeypatch):
    """Jobs of all ages are found, each once, whatever the windows."""
    jobs, _ = place.open()
    now = int(time.time() * 1000)
    ages = [0, 1, 590, 610, 7_190, 7_210, 86_390, 86_410, 600_000, -120]
    made = [f"video_{now - age * 1000:012x}{i:016x}" for i, age in enumerate(ages)]
    for job_id in made:
        jobs.create(JobRequest(job_id, "videos", 1.0, ({"prompt": "p"},)))
    found, more = jobs.page(("videos",), None, 20, True)
    assert [job.id for job in found] == sorted(made, reverse=True) and not more
    found, more = jobs.page(("videos",), made[4], 2, True)
    assert [job.id for job in found] == [made[5], made[6]] and more


# --- stores that will not do


def refused(uri: str, options: StorageOptions) -> str:
    with pytest.raises(StartupError) as raised:
        open_stores(None, uri, options, LIFETIMES, LEASE)
    line = str(raised.value)
    assert "OUTPUT_URI" in line and "\n" not in line and SECRET not in line and "Signature" not in line
    return line


def test_a_store_without_if_none_match(tmp_path, monkeypatch):
    with rclone(tmp_path / "s3", *FRESH) as store:
        options = options_of(monkeypatch, store.environment)
        assert "there is no such bucket" in refused("s3://nowhere/x", options)
        (tmp_path / "s3" / "bkt").mkdir()
        line = refused("s3://bkt/x", options)
    assert "s3://bkt/x: the store does not honour If-None-Match" in line and "DATA_DIR" in line
    assert not list((tmp_path / "s3" / "bkt").rglob("*.*"))


def test_stores_that_refuse(object_store, bucket, monkeypatch):
    options = options_of(monkeypatch, object_store.env)
    for uri in "http://127.0.0.1/x", "s3://", "s3://a b/x", "gs://bkt/x":
        refused(uri, options)
    line = refused("s3://key:TESTSECRET@bkt/x", options)
    assert "credentials do not belong in it" in line and "TESTSECRET" not in line
    options = options_of(monkeypatch, {**object_store.env, "AWS_SECRET_ACCESS_KEY": "wrong"})
    assert "access denied" in refused(f"s3://{bucket}/x", options)
    options = options_of(monkeypatch, {**object_store.env, "AWS_ACCESS_KEY_ID": READER})
    assert "need s3:ListBucket, s3:GetObject, s3:PutObject" in refused(f"s3://{bucket}/x", options)
    options = options_of(monkeypatch, {**object_store.env, "AWS_ACCESS_KEY_ID": "nobody"})
    assert "AWS_ACCESS_KEY_ID" in refused(f"s3://{bucket}/x", options)


def test_a_store_that_is_not_there(object_store, monkeypatch):
    monkeypatch.setattr("runtime.jobs.open.PATIENCE", 0.5)
    with socket.socket() as silent:  # bound and not listening: nobody else comes to be there
        silent.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = options_of(monkeypatch, {**object_store.env, "AWS_S3_ENDPOINT": endpoint})
        assert "cannot be reached" in refused("s3://bkt/x", options)


def test_more_than_a_listing_holds(place):
    """A listing ends after a thousand keys; what follows is asked for."""
    _, results = place.open()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: results.put(f"job{i % 3}/{i}.png", b"x", "image/png", {}), range(1_050)))
    assert sorted((item.job, item.size) for item in results.held()) == [("job0", 350), ("job1", 350), ("job2", 350)]

"""What every result store promises, over a folder and over a bucket of a real S3 server."""

from __future__ import annotations

import os
import random
import resource
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

from runtime.jobs.ids import new_id
from runtime.jobs.store import Unavailable, describe
from runtime.outputs import FolderResults, Held, overdue
from tests.jobs.conftest import LIFETIMES, options_of
from tests.jobs.links import link_to
from tests.jobs.seaweed import SECRET
from tests.jobs.test_job_stores import until

MIB = 2**20


def test_put_read_delete(place):
    _, results = place.open()
    job = new_id("videos")
    data = random.Random(1).randbytes(3 * MIB + 17)
    results.put(f"{job}/0-0.mp4", data, "video/mp4", describe({"seed": 7, "prompt": " eine  Katze,\tgrößer\r\n" * 40}))
    results.put(f"{job}/1-0.png", b"", "image/png", {})
    for start, end in (0, None), (0, 1), (5, 5), (MIB - 1, 2 * MIB + 1), (len(data) - 3, None), (0, len(data)):
        assert b"".join(results.read(f"{job}/0-0.mp4", start, end)) == data[start:end], (start, end)
    assert b"".join(results.read(f"{job}/0-0.mp4", len(data) - 2, len(data) + 50)) == data[-2:]
    assert list(results.read(f"{job}/0-0.mp4", len(data) + 5)) == []
    assert max(map(len, results.read(f"{job}/0-0.mp4"))) <= MIB
    assert list(results.read(f"{job}/1-0.png")) == []
    unread = results.read(f"{job}/0-0.mp4")
    next(unread)
    unread.close()
    results.put(f"{job}/0-0.mp4", b"another", "video/mp4", {})
    assert b"".join(results.read(f"{job}/0-0.mp4")) == b"another"
    results.delete([f"{job}/0-0.mp4", f"{job}/1-0.png", f"{job}/never.png"])
    with pytest.raises(KeyError):
        results.read(f"{job}/0-0.mp4")
    assert results.held() == []


def test_keys_that_would_escape(place):
    _, results = place.open()
    for key in (
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a",
        "a/b/c",
        "a/.b",
        "a/..",
        "./a",
        "a/",
        "",
        "a\0/b",
        "a/b\n",
        "ü/a",
    ):
        for call in (
            lambda key=key: results.put(key, b"x", "image/png", {}),
            lambda key=key: results.read(key),
            lambda key=key: results.delete([key]),
        ):
            with pytest.raises(ValueError, match="no key of a result"):
                call()


def test_what_is_held(place):
    _, results = place.open()
    one, two = new_id("images"), new_id("images")
    results.put(f"{one}/0-0.png", b"x" * 10, "image/png", {})
    results.put(f"{one}/0-1.png", b"x" * 5, "image/png", {})
    results.put(f"{two}/0-0.png", b"x", "image/png", {})
    held = {item.job: item for item in results.held()}
    assert {job: item.size for job, item in held.items()} == {one: 15, two: 1}
    assert all(-2 < item.age < 60 for item in held.values())
    results.drop(one)
    results.drop(one)
    assert [item.job for item in results.held()] == [two]


def test_which_results_are_dropped():
    held = [Held("old", 1, 4000), Held("b", 400, 30), Held("a", 500, 10), Held("c", 300, 50), Held("d", 50, 60)]
    lifetimes = LIFETIMES.__class__(url=1, result=3600, record=7200, max_bytes=1000)
    assert sorted(overdue(held, lifetimes)) == ["c", "d", "old"]


# --- a folder


def test_a_folder_has_no_urls(sqlite_place):
    _, results = sqlite_place.open()
    assert results.url("a/b.png", 60, "x.png") is None


def test_the_disk_refuses_in_the_middle(tmp_path):
    """The limit on the size of a file stands for whatever the system refuses in the middle."""
    results = FolderResults(tmp_path / "results")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(Unavailable, match="a file of this size is not allowed"):
            results.put("job/0-0.mp4", b"x" * 2 * MIB, "video/mp4", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "results").rglob("*"))


def test_a_folder_that_went_away_or_is_not_ours(tmp_path):
    results = FolderResults(tmp_path / "results")
    (tmp_path / "results").rmdir()
    with pytest.raises(Unavailable):
        results.put("job/0-0.png", b"x", "image/png", {})
    (tmp_path / "results").mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:  # who may write everywhere
        for folder in tmp_path, *tmp_path.parents[:2]:
            folder.chmod(0o711)
        os.seteuid(65534)
    try:
        with pytest.raises(Unavailable, match="may not write here"):
            results.put("job/0-0.png", b"x", "image/png", {})
    finally:
        os.seteuid(user)


def test_what_a_killed_process_left(tmp_path):
    results = FolderResults(tmp_path)
    (tmp_path / "job").mkdir()
    old, new = tmp_path / "job" / ".partial-old", tmp_path / "job" / ".partial-new"
    for path in old, new:
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert results.held() == []
    assert not old.exists() and new.exists()


# --- an object store


def test_signed_urls(s3_place):
    _, results = s3_place.open()
    job = new_id("images")
    results.put(f"{job}/0-0.png", b"0123456789", "image/png", {"seed": "7"})
    url = results.url(f"{job}/0-0.png", 600.9, 'a "strange"\r\nname.png')
    assert "X-Amz-Expires=600&" in url and "X-Amz-Algorithm=AWS4-HMAC-SHA256" in url and SECRET not in url
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"0123456789"
        assert answer.headers["Content-Type"] == "image/png" and answer.headers["x-amz-meta-seed"] == "7"
        assert answer.headers["Content-Disposition"] == 'inline; filename="a__strange___name.png"'
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=2-4"})) as answer:
        assert (answer.status, answer.read()) == (206, b"234")

    def refused(url: str) -> int:
        try:
            with urllib.request.urlopen(url) as answer:
                return 0 if answer.status == 200 else answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert refused(url.replace("0-0.png", "0-1.png")) == 403
    short = results.url(f"{job}/0-0.png", 1.9, "x.png")
    assert until(lambda: refused(short)) == 403 and refused(url) == 0
    week = results.url(f"{job}/0-0.png", 10**9, "x.png")
    assert urllib.parse.parse_qs(urllib.parse.urlsplit(week).query)["X-Amz-Expires"] == ["604800"]
    with pytest.raises(ValueError, match="a URL for"):
        results.url(f"{job}/0-0.png", 0.5, "x.png")


def test_a_read_that_breaks_goes_on(s3_place, object_store, monkeypatch):
    with link_to(object_store.endpoint) as link:
        s3_place.options = options_of(monkeypatch, {**object_store.env, "AWS_S3_ENDPOINT": link.url})
        jobs, results = s3_place.open()
        data = random.Random(2).randbytes(32 * MIB)  # more than the sockets between hold
        results.put("job/0-0.mp4", data, "video/mp4", {})
        parts = results.read("job/0-0.mp4", 5, 31 * MIB)
        got = next(parts)
        link.lose = 1  # the rest of this answer
        got += b"".join(parts)
        assert link.lose == 0 and got == data[5 : 31 * MIB]
        parts = results.read("job/0-0.mp4")
        got = next(parts)
        results.put("job/0-0.mp4", b"replaced" * 4 * MIB, "video/mp4", {})
        link.lose = 1
        with pytest.raises(Unavailable):  # rather than a mixture of two
            list(parts)
        s3_place.close(jobs)

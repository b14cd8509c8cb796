"""Jobs through real servers: they survive a kill, move between servers, and give the bytes of a synchronous call."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import shutil
import signal
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.jobs.holds import frozen
from tests.jobs.seaweed import Store

if TYPE_CHECKING:
    from tests.conftest import Serve, Server

Start = Callable[..., "Server"]

QUICK: dict[str, Any] = {"prompt": "a dog", "num_inference_steps": 2, "size": "64x64", "num_frames": 5}
LONG: dict[str, Any] = {"prompt": "a slow dog", "num_inference_steps": 100, "size": "256x192", "num_frames": 33}
ENDLESS: dict[str, Any] = {**LONG, "num_inference_steps": 200, "size": "480x320"}  # is cancelled, or its server killed
SECONDS = 180


def wait_for(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


def post(server: Server, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    status, answer = server.json("POST", "/v1/videos", body, headers)
    assert status == 200, answer
    return answer


def look(server: Server, job_id: str) -> dict[str, Any]:
    status, answer = server.json("GET", f"/v1/videos/{job_id}")
    assert status == 200, answer
    return answer


def ended(server: Server, job_id: str) -> dict[str, Any]:
    return wait_for(lambda: (told := look(server, job_id))["status"] in ("completed", "failed") and told, "its end")


def digest(server: Server, job_id: str) -> str:
    status, _, content = server.request("GET", f"/v1/videos/{job_id}/content")
    assert status == 200, content
    return hashlib.sha256(content).hexdigest()


def reference(server: Server, body: dict[str, Any]) -> str:
    """The digest of what a synchronous call gives."""
    prediction = server.predict({**body})[0]
    return hashlib.sha256(base64.b64decode(prediction["video"]["b64"])).hexdigest()


@pytest.fixture
def shared(object_store: Store, output_uri: str, start: Start) -> Callable[..., Server]:
    """`shared()`: one more server over this test's prefix of the object store. A server that is slow for its lease is
    taken for a dead one: it is short only where one dies."""

    def begin(*flags: str, lease: int = 30) -> Server:
        flags = ("--output_uri", output_uri, "--job_lease_s", str(lease), *flags)
        return start("wan-ti2v-5b", *flags, **object_store.env)

    return begin


# --- one server


def test_a_killed_server_loses_no_job(start: Start, tmp_path: Path) -> None:
    """kill -9 with three queued, one running and two finished: after the restart all six are there and finish."""
    flags = ("--data_dir", str(tmp_path / "data"))
    first = start("wan-ti2v-5b", *flags)
    first.wait_ready()
    seeds = range(10, 16)
    wanted = {seed: reference(first, {**QUICK, "seed": seed}) for seed in seeds if seed != 12}
    finished = [post(first, {**QUICK, "seed": seed})["id"] for seed in (10, 11)]
    for job in finished:
        assert ended(first, job)["status"] == "completed"
    slow = {**LONG, "num_inference_steps": 200, "seed": 12}
    running = post(first, slow)["id"]
    wait_for(lambda: look(first, running)["progress"] > 0, "progress")
    with frozen(first):
        assert look(first, running)["status"] == "in_progress"
        queued = [post(first, {**QUICK, "seed": seed})["id"] for seed in (13, 14, 15)]
        assert [look(first, job)["status"] for job in queued] == ["queued"] * 3
        first.process.kill()
        first.process.wait()

    second = start("wan-ti2v-5b", *flags)
    second.wait_ready()
    jobs = [*finished, running, *queued]
    listed = second.json("GET", "/v1/videos?order=asc")[1]["data"]
    assert [job["id"] for job in listed] == jobs
    for job in jobs:
        told = ended(second, job)
        assert told["status"] == "completed", told
    wanted[12] = reference(second, slow)
    assert [digest(second, job) for job in jobs] == [wanted[seed] for seed in seeds]
    assert look(second, running)["seed"] == 12
    assert second.stop() == 0


def test_a_job_whose_server_dies_twice_is_failed(start: Start, tmp_path: Path) -> None:
    flags = ("--data_dir", str(tmp_path / "data"))
    job = ""
    for attempt in (1, 2):
        server = start("wan-ti2v-5b", *flags)
        server.wait_ready()
        job = job or post(server, {**ENDLESS, "seed": 1})["id"]
        wait_for(lambda server=server, job=job: look(server, job)["progress"] > 0, "progress")
        wait_for(lambda attempt=attempt: attempts_on_disk(tmp_path / "data") == attempt, "an attempt that is kept")
        server.process.kill()
        server.process.wait()
    server = start("wan-ti2v-5b", *flags)
    server.wait_ready()
    told = ended(server, job)
    assert (told["status"], told["error"]["code"]) == ("failed", "server_died")
    assert server.stop() == 0


def attempts_on_disk(folder: Path) -> int:
    """Of the only job that was kept there; read from a copy, as the server has the file for itself."""
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("results"))
    with contextlib.closing(sqlite3.connect(copy / "jobs.sqlite3")) as database:
        try:
            found = database.execute("SELECT attempts FROM jobs").fetchone()
        except sqlite3.DatabaseError:  # copied while it was written
            return 0
    return found[0] if found else 0


def test_sigterm_ends_what_runs_and_keeps_what_waits(start: Start, tmp_path: Path) -> None:
    flags = ("--data_dir", str(tmp_path / "data"), "--grace_period", "60")
    first = start("wan-ti2v-5b", *flags)
    first.wait_ready()
    with frozen(first):
        running = post(first, {**LONG, "seed": 1, "num_inference_steps": 20})["id"]
        waiting, unwanted = (post(first, {**LONG, "seed": seed, "num_inference_steps": 20})["id"] for seed in (2, 3))
        wait_for(lambda: look(first, running)["status"] == "in_progress", "a job that runs")
        first.process.send_signal(signal.SIGTERM)
        wait_for(lambda: first.request("GET", "/v2/health/ready")[0] == 503, "draining")
        assert first.request("DELETE", f"/v1/videos/{unwanted}")[0] == 200
    assert first.process.wait(SECONDS) == 0
    second = start("wan-ti2v-5b", *flags)
    told = wait_for(lambda: second.process.poll() is None and _look_early(second, running), "an answer")
    assert told["status"] == "completed"
    second.wait_ready()
    assert ended(second, waiting)["status"] == "completed"
    assert ended(second, unwanted)["error"]["code"] == "cancelled"
    log = second.log.read_text()
    assert f'"job taken","job":"{waiting}"' in log and running not in log.split('"job taken"')[1][:80]


def _look_early(server: Server, job: str) -> dict[str, Any] | None:
    """Jobs can be asked for while the model loads."""
    try:
        status, told = server.json("GET", f"/v1/videos/{job}")
    except OSError:
        return None
    return told if status == 200 else None


def test_two_servers_in_one_folder(start: Start, tmp_path: Path) -> None:
    first = start("sd15", "--data_dir", str(tmp_path / "data"))
    first.wait_ready()
    second = start("sd15", "--data_dir", str(tmp_path / "data"))
    assert second.process.wait(SECONDS) == 1
    (line,) = [line for line in second.log.read_text().splitlines() if line.startswith("diffusion-runtime: ")]
    assert "DATA_DIR" in line or str(tmp_path / "data") in line
    assert first.stop() == 0


def test_progress_and_cancel(serve: Serve) -> None:
    """Progress never goes back; a cancelled job is failed with that code, and the engine stops at the next step."""
    server = serve("wan-ti2v-5b")
    job = post(server, {**ENDLESS, "seed": 5})["id"]
    seen: list[int] = []

    def further() -> bool:
        seen.append(look(server, job)["progress"])
        return len(set(seen)) > 4

    wait_for(further, "five different values of progress")
    assert seen == sorted(seen) and seen[-1] < 100
    assert server.json("DELETE", f"/v1/videos/{job}") == (
        200,
        {"id": job, "object": "video.deleted", "deleted": True},
    )
    told = look(server, job)
    assert (told["status"], told["error"]["code"]) == ("failed", "cancelled")
    last = server.json("GET", f"/v2/models/tiny/requests/{job}")[1]
    assert last["state"] == "cancelled" and last["step"] < last["total"]
    time.sleep(0.3)
    assert server.json("GET", f"/v2/models/tiny/requests/{job}")[1]["step"] <= last["step"] + 1
    assert server.json("DELETE", f"/v1/videos/{job}")[0] == 200  # and forgets it
    assert server.request("GET", f"/v1/videos/{job}")[0] == 404


def test_the_same_key_is_the_same_job(serve: Serve) -> None:
    server = serve("wan-ti2v-5b")
    body = {**QUICK, "prompt": "a cat", "seed": 6}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: post(server, body, Idempotency_Key="once"), range(4)))
    assert len({answer["id"] for answer in answers}) == 1
    assert ended(server, answers[0]["id"])["status"] == "completed"
    assert post(server, body, Idempotency_Key="once")["id"] == answers[0]["id"]
    status, told = server.json("POST", "/v1/videos", {**body, "seed": 7}, {"Idempotency-Key": "once"})
    assert status == 409 and "another body" in told["error"]["message"]


@pytest.mark.parametrize("family", ["sd15", "glm-image", "wan-i2v-a14b"])
def test_v1_and_v2_answer_later_as_they_answer_at_once(serve: Serve, family: str, picture: str) -> None:
    server = serve(family)
    row: dict[str, Any] = {"prompt": "a fox", "seed": 3}
    if family != "sd15":
        row["image"] = picture
    bodies = {
        "/v1/models/tiny:predict": {"instances": [row, {**row, "seed": 4}]},
        "/v2/models/tiny/infer": {
            "id": "mine",
            "inputs": [
                {
                    "name": name,
                    "datatype": "BYTES" if isinstance(value, str) else "INT64",
                    "shape": [1],
                    "data": [value],
                }
                for name, value in row.items()
            ],
        },
    }
    for path, body in bodies.items():
        status, at_once = server.json("POST", path, body)
        assert status == 200, at_once
        status, headers, content = server.request("POST", path, body, {"Prefer": "respond-async, wait=5"})
        assert status == 202 and headers["preference-applied"] == "respond-async", content
        location = headers["location"]
        wait_for(lambda at=location: server.json("GET", at)[1]["status"] == "completed", "its end")
        status, later = server.json("GET", f"{location}/result")
        assert status == 200 and without_times(later) == without_times(at_once)
    binary = {**bodies["/v2/models/tiny/infer"], "parameters": {"binary_data_output": True}}
    expected = server.request("POST", "/v2/models/tiny/infer", binary)
    location = server.request("POST", "/v2/models/tiny/infer", binary, {"Prefer": "respond-async"})[1]["location"]
    wait_for(lambda: server.json("GET", location)[1]["status"] == "completed", "its end")
    status, headers, content = server.request("GET", f"{location}/result")
    tail = int(expected[1]["inference-header-content-length"])
    assert content[int(headers["inference-header-content-length"]) :][:1000] == expected[2][tail:][:1000]


def without_times(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("{"):
        return without_times(json.loads(value))
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("timings",)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def picture() -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_what_is_wrong_is_told_at_once(serve: Serve) -> None:
    server = serve("wan-ti2v-5b")
    before = len(server.json("GET", "/v1/videos?limit=100")[1]["data"])
    for body, word in (
        ({**QUICK, "num_frames": 6}, "num_frames"),
        ({**QUICK, "image": "no picture"}, "image"),
        ({**QUICK, "dry_run": True, "nope": 1}, "nope"),
    ):
        status, told = server.json("POST", "/v1/videos", body)
        assert status == 400 and word in told["error"]["message"], told
    assert len(server.json("GET", "/v1/videos?limit=100")[1]["data"]) == before


# --- several servers over one object store


def test_any_server_answers_for_any_job(shared: Callable[..., Server]) -> None:
    first, second = shared(lease=9), shared(lease=9)
    for server in (first, second):
        server.wait_ready()
    job = post(first, {**LONG, "seed": 21})["id"]
    seen = []
    wait_for(lambda: seen.append(look(second, job)["progress"]) or seen[-1] > 0, "progress seen from elsewhere")
    assert ended(second, job)["status"] == "completed" and seen == sorted(seen)
    assert digest(second, job) == digest(first, job) == reference(second, {**LONG, "seed": 21})
    doomed = post(first, {**ENDLESS, "seed": 22})["id"]
    wait_for(lambda: 0 < look(second, doomed)["progress"] < 100, "progress seen from elsewhere while it runs")
    assert second.request("DELETE", f"/v1/videos/{doomed}")[0] == 200
    assert ended(first, doomed)["error"]["code"] == "cancelled"
    assert [server.stop() for server in (first, second)] == [0, 0]


def test_a_dead_servers_jobs_are_taken_over(shared: Callable[..., Server]) -> None:
    first, second = shared(lease=3), shared(lease=3)
    for server in (first, second):
        server.wait_ready()
    with frozen(first):  # it finishes none of them
        jobs = [post(first, {**body, "seed": seed})["id"] for body, seed in ((LONG, 31), (QUICK, 32), (QUICK, 33))]
        own = post(second, {**QUICK, "seed": 34})["id"]
        wait_for(lambda: look(first, jobs[0])["status"] == "in_progress", "a job that runs")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    for job in (*jobs, own):
        assert ended(second, job)["status"] == "completed"
    assert digest(second, jobs[1]) == reference(second, {**QUICK, "seed": 32})
    log = second.log.read_text()
    assert [log.count(f'"job completed","request_id":"{job}"') for job in (*jobs, own)] == [1] * 4
    assert second.stop() == 0


def test_a_stopped_servers_jobs_are_taken_at_once(shared: Callable[..., Server]) -> None:
    first = shared("--grace_period", "60")
    first.wait_ready()
    with frozen(first):
        running = post(first, {**LONG, "seed": 41, "num_inference_steps": 20})["id"]
        waiting = [post(first, {**LONG, "seed": seed, "num_inference_steps": 60})["id"] for seed in (42, 43)]
        wait_for(lambda: look(first, running)["status"] == "in_progress", "a job that runs")
        first.process.send_signal(signal.SIGTERM)
        wait_for(lambda: first.request("GET", "/v2/health/ready")[0] == 503, "draining")
    assert first.process.wait(SECONDS) == 0
    pair = [shared(), shared()]  # both start at the same moment
    for server in pair:
        server.wait_ready()
    for job in (running, *waiting):
        assert ended(pair[0], job)["status"] == "completed"
    logs = [server.log.read_text() for server in pair]
    for job in waiting:
        assert sum(log.count(f'"job completed","request_id":"{job}"') for log in logs) == 1
    assert [server.stop() for server in pair] == [0, 0]


def test_results_are_fetched_from_the_store(shared: Callable[..., Server], object_store: Store) -> None:
    """response_format=url gives a presigned URL that needs no key and ends."""
    server = shared("--result_url_ttl_s", "600")
    server.wait_ready()
    body = {**QUICK, "seed": 51, "response_format": "url"}
    status, told = server.json("POST", "/v1/video/generations", body)
    assert status == 200, told
    url = told["data"][0]["url"]
    assert url.startswith(object_store.endpoint)
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["content-type"] == "video/mp4"
        assert answer.headers["x-amz-meta-seed"] == "51"
        assert '"num_frames": 5' in answer.headers["x-amz-meta-parameters"]
        assert "x-amz-meta-prompt" not in answer.headers
        assert hashlib.sha256(answer.read()).hexdigest() == reference(server, {**QUICK, "seed": 51})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url.replace("X-Amz-Signature=", "X-Amz-Signature=0"))
    assert "X-Amz-Signature" not in server.log.read_text()
    assert server.stop() == 0

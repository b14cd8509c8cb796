"""Under load and under fault: admission by cost, deadlines, dry runs, progress, cancel, retries, memory, hangs."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.conftest import Serve, Server

QUICK = {"prompt": "a fox", "num_inference_steps": 2, "seed": 3}
SLOW = {"prompt": "a fox", "num_inference_steps": 200, "size": "256x256", "seed": 3}
ENDLESS = {**SLOW, "n": 5}  # half a minute: nobody waits for its end
AT_ONCE = 200  # of the 1000 steps of ENDLESS: what stops at once draws fewer


def post(server: Server, fields: dict[str, Any], **headers: str) -> tuple[int, dict[str, str], Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    status, got, body = server.request("POST", f"/v1/models/{server.name}:predict", {"instances": [fields]}, named)
    return status, got, json.loads(body)


def requests(server: Server) -> list[dict[str, Any]]:
    told = server.json("GET", f"/v2/models/{server.name}/requests")[1]["requests"]
    assert isinstance(told, list)
    return told


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"never happened: {what}")


def running(server: Server, name: str) -> dict[str, Any] | None:
    return next((r for r in requests(server) if r["id"] == name and r["state"] == "running" and "step" in r), None)


def metric(server: Server, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    total = 0.0
    for line in server.request("GET", "/metrics")[2].decode().splitlines():
        if line.startswith((f"{name}{{", f"{name} ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


def engine_of(server: Server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children()
    return next(child for child in children if "runtime.engine.worker" in child.cmdline())


@contextlib.contextmanager
def paused(server: Server) -> Iterator[psutil.Process]:
    """The engine does nothing meanwhile: what runs and what waits stays as it is, on however fast a machine."""
    engine = engine_of(server)
    engine.suspend()
    try:
        yield engine
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.resume()


def known(server: Server, name: str, *states: str) -> bool:
    """Whether the request `name` is told of, in one of these states or in any."""
    return any(told["id"] == name and (not states or told["state"] in states) for told in requests(server))


@pytest.fixture
def reference(serve: Serve) -> str:
    return str(serve("sd15").predict(QUICK)[0]["image"]["b64"])


# --- dry run, deadline


def test_a_dry_run_tells_seconds_and_makes_nothing(serve: Serve) -> None:
    server = serve("sd15")
    server.predict(QUICK)
    images = metric(server, "diffusion_images_total")
    for status, _, answer in (post(server, {**QUICK, "dry_run": True}), post(server, QUICK, X_Dry_Run="true")):
        assert status == 200
        told = answer["predictions"][0]
        assert told["dry_run"] is True and told["predicted_seconds"] > 0 and told["predicted_wait_seconds"] >= 0
        assert told["seed"] == 3 and told["width"] == 64 and "image" not in told
    longer = post(server, {**QUICK, "dry_run": True, "num_inference_steps": 100})[2]["predictions"][0]
    assert longer["predicted_seconds"] > told["predicted_seconds"]
    status, answer = server.json(
        "POST",
        "/v2/models/tiny/infer",
        {
            "inputs": [{"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["a fox", "a wolf"]}],
            "parameters": {"dry_run": True},
        },
    )
    assert status == 200 and [o["name"] for o in answer["outputs"]] == ["metadata"]
    first, second = map(json.loads, answer["outputs"][0]["data"])
    assert second["predicted_wait_seconds"] > first["predicted_wait_seconds"]
    assert metric(server, "diffusion_images_total") == images
    assert post(server, {"prompt": "a fox", "width": 63, "dry_run": True})[0] == 400


@pytest.mark.parametrize("way", ["field", "header"])
def test_a_deadline_stops_the_engine(serve: Serve, reference: str, way: str) -> None:
    server = serve("sd15")
    expired = metric(server, "diffusion_requests_total", outcome="expired")
    if way == "field":
        status, headers, answer = post(server, {**ENDLESS, "timeout": 0.3}, X_Request_ID=f"late-{way}")
    else:
        status, headers, answer = post(server, ENDLESS, X_Request_Timeout="0.3", X_Request_ID=f"late-{way}")
    assert status == 504 and answer["error"].startswith("timeout: 0.3 s passed") and f"late-{way}" in answer["error"]
    assert headers["x-request-id"] == f"late-{way}"
    assert next(r for r in requests(server) if r["id"] == f"late-{way}")["state"] == "expired"
    steps = metric(server, "diffusion_steps_total")
    assert server.predict(QUICK)[0]["image"]["b64"] == reference
    assert metric(server, "diffusion_steps_total") - steps < AT_ONCE  # the late one did not go on
    assert metric(server, "diffusion_requests_total", outcome="expired") == expired + 1


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon", "1e9"])
def test_a_deadline_that_does_not_fit_is_refused(serve: Serve, value: str) -> None:
    status, _, answer = post(serve("sd15"), QUICK, X_Request_Timeout=value)
    assert status == 400 and answer["error"].startswith("X-Request-Timeout:")


# --- progress and cancel


def test_progress_moves_and_cancel_stops_the_engine(serve: Serve, reference: str) -> None:
    server = serve("sd15")
    with ThreadPoolExecutor(2) as pool:
        first, second = "slow", "waiting"
        with paused(server):
            slow = pool.submit(post, server, ENDLESS, X_Request_ID=first)
            wait_for(lambda: known(server, first, "running"), "one runs")
            waiting = pool.submit(post, server, ENDLESS, X_Request_ID=second)
            wait_for(lambda: known(server, second, "queued"), "the other one waits")
        wait_for(lambda: running(server, first), "it goes on")
        seen = []
        while len(set(seen)) < 5:
            now = running(server, first)
            # Of 1000 steps: where the first took seconds, so will the others.
            assert now and now["stage"] == "denoise" and 0 <= now["eta_seconds"] < 6000
            seen.append(now["step"])
        assert seen == sorted(seen) and seen[-1] <= now["total"]
        queued = server.json("GET", f"/v2/models/tiny/requests/{second}")[1]
        assert queued["state"] == "queued" and queued["position"] == 1
        for name in (second, first):
            assert server.json("DELETE", f"/v2/models/tiny/requests/{name}")[0] == 200
        assert {slow.result()[0], waiting.result()[0]} == {499}
    assert {r["state"] for r in requests(server) if r["id"] in ("slow", "waiting")} == {"cancelled"}
    assert server.json("DELETE", f"/v2/models/tiny/requests/{first}")[0] == 404
    steps = metric(server, "diffusion_steps_total")
    assert server.predict(QUICK)[0]["image"]["b64"] == reference
    assert metric(server, "diffusion_steps_total") - steps < AT_ONCE
    assert metric(server, "diffusion_requests_total", outcome="cancelled") >= 2


def test_prompts_are_in_no_progress_route(serve: Serve) -> None:
    server = serve("sd15")
    server.predict({**QUICK, "prompt": "a secret garden"})
    assert "secret" not in json.dumps(requests(server))


# --- admission by cost


def test_more_than_may_wait_is_refused_with_the_wait(start: Callable[..., Server]) -> None:
    server = start("sd15", "--max_queue_seconds", "1")
    server.wait_ready()
    server.predict({**SLOW, "num_inference_steps": 20})  # the cost model knows this size now
    with ThreadPoolExecutor(1) as pool:
        # An empty queue takes what is longer than the limit: it would be refused for ever otherwise.
        accepted = pool.submit(post, server, ENDLESS, X_Request_ID="long")
        wait_for(lambda: running(server, "long"), "the long one runs")
        status, headers, answer = post(server, ENDLESS)
        assert status == 429 and "s of work wait" in answer["error"]
        assert 1 <= int(headers["retry-after"]) < 3600
        picture = {**SLOW, "image": "not decoded, as there is no room"}
        assert post(server, picture)[0] == 400  # this model takes none, and that is told first
        assert server.json("DELETE", "/v2/models/tiny/requests/long")[0] == 200
        assert accepted.result()[0] == 499
    assert post(server, QUICK)[0] == 200
    assert metric(server, "diffusion_requests_total", outcome="refused") == 1
    assert server.stop() == 0


# --- retries


def test_a_retry_joins_and_a_lost_connection_is_held(serve: Serve) -> None:
    server = serve("sd15")
    fields = {**SLOW, "num_inference_steps": 60}
    images = metric(server, "diffusion_images_total")
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(post, server, fields, Idempotency_Key="twice") for _ in range(2)]
        one, two = (answer.result() for answer in answers)
    assert one[0] == two[0] == 200 and one[2] == two[2]
    assert post(server, fields, Idempotency_Key="twice")[2] == one[2]
    assert metric(server, "diffusion_images_total") == images + 1
    status, _, answer = post(server, {**fields, "seed": 4}, Idempotency_Key="twice")
    assert status == 409 and "twice" in answer["error"]
    # A client that gives up while it runs; the retry gets the picture that went on being drawn.
    with paused(server), pytest.raises(OSError):
        server.request(
            "POST", "/v1/models/tiny:predict", {"instances": [fields]}, {"Idempotency-Key": "lost"}, timeout=1
        )
    assert post(server, fields, Idempotency_Key="lost")[0] == 200
    assert metric(server, "diffusion_images_total") == images + 2


def test_a_dry_run_by_header_is_another_request_than_the_real_one(serve: Serve) -> None:
    server = serve("sd15")
    assert post(server, QUICK, Idempotency_Key="dry", X_Dry_Run="true")[0] == 200
    status, _, answer = post(server, QUICK, Idempotency_Key="dry")
    assert status == 409 and "dry" in answer["error"]


def test_ids_join_where_that_is_asked_for(serve: Serve) -> None:
    joining, plain = serve("sd15", "--join_by_request_id", "true"), serve("sd15")
    for server, drawn in ((joining, 1), (plain, 2)):
        images = metric(server, "diffusion_images_total")
        answers = [post(server, QUICK, X_Request_ID="the-same") for _ in range(2)]
        assert [status for status, _, _ in answers] == [200, 200]
        assert metric(server, "diffusion_images_total") == images + drawn
    fields = {
        "id": "v2-the-same",
        "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a fox"]}],
        "parameters": {"num_inference_steps": 2, "seed": 3},
    }
    images = metric(joining, "diffusion_images_total")
    told = [joining.json("POST", "/v2/models/tiny/infer", fields) for _ in range(2)]
    assert [status for status, _ in told] == [200, 200] and told[0][1]["outputs"] == told[1][1]["outputs"]
    assert metric(joining, "diffusion_images_total") == images + 1


# --- faults


def test_out_of_memory_is_507_and_the_next_request_works(start: Callable[..., Server], reference: str) -> None:
    server = start("sd15")
    server.wait_ready()
    assert server.predict(QUICK)[0]["image"]["b64"] == reference
    engine = engine_of(server)
    size = engine.memory_info().vms
    resource.prlimit(engine.pid, resource.RLIMIT_AS, (size + 48 * 2**20, resource.RLIM_INFINITY))
    status, _, answer = post(server, {**QUICK, "size": "768x768", "num_inference_steps": 1})
    assert status == 507 and "768 x 768" in answer["error"] and "64 x 64 has worked" in answer["error"]
    assert server.predict(QUICK)[0]["image"]["b64"] == reference
    resource.prlimit(engine.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert engine_of(server).pid == engine.pid
    assert metric(server, "diffusion_requests_total", outcome="out_of_memory") == 1
    assert server.stop() == 0


def test_a_hung_engine_is_replaced_and_its_request_runs_again(start: Callable[..., Server], reference: str) -> None:
    server = start("sd15", "--engine_timeout", "6")  # no less: a busy machine may keep a sound engine silent
    server.wait_ready()
    engine = engine_of(server)
    os.kill(engine.pid, signal.SIGSTOP)
    assert server.predict(QUICK)[0]["image"]["b64"] == reference
    assert engine_of(server).pid != engine.pid and not psutil.pid_exists(engine.pid)
    assert metric(server, "diffusion_engine_restarts_total") == 1
    assert "the engine hung" in server.log.read_text()
    assert server.stop() == 0


# --- metrics


def test_metrics_tell_every_stage(serve: Serve) -> None:
    server = serve("sd15")
    before = {name: metric(server, name) for name in ("diffusion_images_total", "diffusion_steps_total")}
    server.predict({**QUICK, "n": 2})
    assert metric(server, "diffusion_images_total") == before["diffusion_images_total"] + 2
    assert metric(server, "diffusion_steps_total") > before["diffusion_steps_total"]
    for stage in ("wait", "prepare", "denoise", "decode", "encode", "total"):
        assert metric(server, "diffusion_stage_seconds_count", stage=stage) > 0
    assert metric(server, "diffusion_stage_seconds_bucket", stage="total", le="3600.0") > 0
    assert metric(server, "diffusion_ready") == 1 and metric(server, "diffusion_queue_depth") == 0
    assert metric(server, "diffusion_model_load_seconds", stage="loading") > 0
    assert metric(server, "diffusion_host_memory_bytes") > 10**8
    assert metric(server, "diffusion_requests_total", protocol="v1", outcome="ok") > 0
    told = server.request("GET", "/metrics")[2].decode().splitlines()
    ours = [line for line in told if line.startswith("diffusion")]
    assert ours and all('model_name="tiny"' in line for line in ours)


def test_threads_of_clients_all_get_their_own_picture(serve: Serve) -> None:
    server = serve("sd15")
    wanted = {seed: server.predict({**QUICK, "seed": seed})[0]["image"]["b64"] for seed in range(4)}
    got: dict[int, list[str]] = {seed: [] for seed in wanted}

    def ask(seed: int) -> None:
        got[seed].append(server.predict({**QUICK, "seed": seed})[0]["image"]["b64"])

    threads = [threading.Thread(target=ask, args=(i % 4,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {seed: [wanted[seed]] * 4 for seed in wanted}

"""The queue, the engine process and the stop of a real server: who is answered, in which order, and what is left."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import itertools
import json
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from PIL import Image

from tests.e2e.test_load import AT_ONCE, metric, paused, running

if TYPE_CHECKING:
    from tests.conftest import Gate, Serve, Server

Start = Callable[..., "Server"]

QUICK: dict[str, Any] = {"prompt": "a dog", "num_inference_steps": 1}
SLOW: dict[str, Any] = {"prompt": "a slow dog", "num_inference_steps": 200, "seed": 1}  # about a second
ENDLESS: dict[str, Any] = {**SLOW, "n": 10, "size": "256x256"}  # most of a minute
BROKEN: dict[str, Any] = {**QUICK, "prompt": "~", "seed": 2}  # what `broken_model` cannot draw
SECONDS = 60  # until something that must happen counts as missing
SOON = 10  # what takes a moment; far less than what is left of ENDLESS


class Call:
    """One v1 call, sent and not waited for: by then it is in the queue, unless it is not to be `queued`."""

    def __init__(self, server: Server, *instances: dict[str, Any], queued: bool = True) -> None:
        self._server, self.name = server, f"call{next(NUMBERS)}"
        self._connection = http.client.HTTPConnection(server.http.removeprefix("http://"), timeout=SECONDS)
        body, headers = json.dumps({"instances": instances}), {"X-Request-ID": self.name}
        self._connection.request("POST", f"/v1/models/{server.name}:predict", body, headers)
        self.socket = self._connection.sock
        CALLS.append(self)
        if queued:
            wait_for(lambda: self.answered or self.states, "the call is in the queue")

    @property
    def states(self) -> list[str]:
        """Of its instances."""
        told = self._server.json("GET", f"/v2/models/{self._server.name}/requests")[1]["requests"]
        return [one["state"] for one in told if one["id"].partition("-")[0] == self.name]

    @property
    def answered(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def answer(self) -> tuple[int, Any]:
        with contextlib.closing(self._connection):
            response = self._connection.getresponse()
            return response.status, json.loads(response.read())

    def pictures(self) -> list[str]:
        status, body = self.answer()
        assert status == 200, body
        return [prediction["image"]["b64"] for prediction in body["predictions"]]

    def leave(self) -> None:
        self._connection.close()


CALLS: list[Call] = []
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def no_call_stays_open() -> Iterator[None]:
    yield
    while CALLS:
        CALLS.pop().leave()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def engine_of(server: Server) -> psutil.Process:
    """The engine process."""
    (engine,) = psutil.Process(server.process.pid).children()
    assert "runtime.engine.worker" in engine.cmdline()
    return engine


def log_lines(server: Server) -> list[dict[str, Any]]:
    made = []
    for line in server.log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            made.append(json.loads(line))
    return made


def states(server: Server) -> list[str]:
    return [told["state"] for told in server.json("GET", f"/v2/models/{server.name}/requests")[1]["requests"]]


def steps(server: Server) -> float:
    return metric(server, "diffusion_steps_total")


def wait_seconds(server: Server) -> float:
    told: float = server.json("GET", f"/v2/models/{server.name}/requests")[1]["wait_seconds"]
    return told


def ready(server: Server) -> bool:
    return server.request("GET", "/v2/health/ready")[0] == 200


@pytest.fixture
def watched(start: Start) -> Iterator[Callable[..., tuple[Server, psutil.Process]]]:
    """A ready server of the test's own and its engine, of which nothing may be left afterwards."""
    engines: list[psutil.Process] = []

    def begin(*flags: str, model: str | Path = "sd15", **environment: str) -> tuple[Server, psutil.Process]:
        server = start(model, *flags, **environment)
        server.wait_ready()
        engines.append(engine_of(server))
        return server, engines[-1]

    yield begin
    _, alive = psutil.wait_procs(engines, SECONDS)
    assert not alive


@pytest.fixture
def sd15(serve: Serve) -> Server:
    return serve("sd15")


def reference(server: Server, *instances: dict[str, Any]) -> list[str]:
    """The pictures of each instance drawn alone."""
    return [server.predict(instance)[0]["image"]["b64"] for instance in instances]


# --- order


def test_first_come_first_served(sd15: Server) -> None:
    instances = [{**QUICK, "seed": seed} for seed in (5, 3, 9, 0, 7, 2)]
    wanted = reference(sd15, *instances)
    with paused(sd15):
        first = Call(sd15, SLOW)
        calls = [Call(sd15, instance) for instance in instances]
        assert not first.answered and not any(call.answered for call in calls)
    assert [call.pictures() for call in calls] == [[picture] for picture in wanted]
    assert first.answered and first.pictures()
    finished = [line["seed"] for line in log_lines(sd15) if line["message"] == "request"]
    assert finished[-7:] == [SLOW["seed"], *(instance["seed"] for instance in instances)]


def test_one_calls_instances_come_back_in_order(sd15: Server) -> None:
    instances = [
        {**QUICK, "seed": seed, "prompt": prompt, "num_inference_steps": steps}
        for seed, prompt, steps in ((1, "a", 30), (2, "b", 1), (3, "c", 10), (2, "b", 1))
    ]
    wanted = reference(sd15, *instances)
    assert len(set(wanted)) == 3
    first, second = Call(sd15, *instances), Call(sd15, *reversed(instances))
    assert first.pictures() == wanted
    assert second.pictures() == wanted[::-1]


def test_waiting_is_told(sd15: Server) -> None:
    with paused(sd15):
        first, second = Call(sd15, SLOW), Call(sd15, {**QUICK, "seed": 1})
        wait_for(lambda: first.states == ["running"], "the first one runs")
        time.sleep(0.5)  # which the second one waits at least
    (_, slow), (_, quick) = first.answer(), second.answer()
    timings = quick["predictions"][0]["timings"]
    assert timings["wait"] >= 0.5
    assert slow["predictions"][0]["timings"]["wait"] < timings["wait"] < timings["total"]


# --- leaving and failing


def test_a_call_that_left_the_queue_never_runs(sd15: Server) -> None:
    wanted = reference(sd15, {**QUICK, "seed": 4})
    drawn, seen = steps(sd15), len(log_lines(sd15))
    with paused(sd15):
        working, leaver, last = Call(sd15, SLOW), Call(sd15, {**ENDLESS, "seed": 77}), Call(sd15, {**QUICK, "seed": 4})
        leaver.leave()
        wait_for(lambda: any(line.get("seed") == 77 for line in log_lines(sd15)[seen:]), "it is told as cancelled")
        assert not working.answered
    assert last.pictures() == wanted
    assert working.answered and working.pictures()
    assert steps(sd15) - drawn < SLOW["num_inference_steps"] + AT_ONCE
    (line,) = [line for line in log_lines(sd15)[seen:] if line.get("seed") == 77]
    assert line["outcome"] == "cancelled" and set(line["timings"]) == {"total"}


def test_leaving_a_running_call_frees_the_engine(sd15: Server) -> None:
    wanted = reference(sd15, {**QUICK, "seed": 4})
    with paused(sd15):
        leaver, following = Call(sd15, ENDLESS), Call(sd15, {**QUICK, "seed": 4})
    wait_for(lambda: running(sd15, leaver.name), "it draws")
    assert not following.answered
    leaver.leave()
    wait_for(lambda: leaver.states == ["cancelled"], "it is cancelled")
    drawn = steps(sd15)
    assert following.pictures() == wanted
    assert steps(sd15) - drawn < AT_ONCE


def test_leaving_a_call_of_several_instances_leaves_all(sd15: Server) -> None:
    with paused(sd15):
        leaver, following = Call(sd15, *[{**ENDLESS, "n": 3}] * 4), Call(sd15, {**QUICK, "seed": 4})
    wait_for(lambda: running(sd15, f"{leaver.name}-0"), "the first one draws")
    leaver.leave()
    wait_for(lambda: leaver.states == ["cancelled"] * 4, "all are cancelled")
    drawn = steps(sd15)
    assert following.pictures()
    assert steps(sd15) - drawn < AT_ONCE


@pytest.fixture
def broken_model(tiny_models: Path, tmp_path: Path) -> Path:
    """A checkpoint with a defect that occurs: a word of its tokenizer is beyond the rows of its embedding."""
    folder = Path(shutil.copytree(tiny_models / "sd15", tmp_path / "broken"))
    file = folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["~</w>"] = 60_000
    file.write_text(json.dumps(tokenizer))
    return folder


def test_a_failure_is_its_own(watched: Callable[..., Any], broken_model: Path) -> None:
    sd15, engine = watched(model=broken_model)
    instances = [{**QUICK, "seed": seed} for seed in (1, 2, 3)]
    wanted = reference(sd15, *instances)
    drawn = steps(sd15)
    with paused(sd15):
        calls = [Call(sd15, instance) for instance in (SLOW, instances[0], BROKEN, instances[1])]
        mixed, last = Call(sd15, {**QUICK, "seed": 9}, BROKEN, ENDLESS), Call(sd15, instances[2])
    status, body = calls[2].answer()
    assert status == 500
    assert list(body) == ["error"] and "internal error" in body["error"]
    assert mixed.answer()[0] == 500
    assert [call.pictures() for call in (calls[1], calls[3], last)] == [[picture] for picture in wanted]
    assert calls[0].pictures()
    assert steps(sd15) - drawn < SLOW["num_inference_steps"] + AT_ONCE  # the failed call's third is not drawn
    assert engine.is_running() and ready(sd15)
    assert sd15.stop() == 0


# --- limits


def test_a_full_queue_refuses_and_says_when_to_come_again(watched: Callable[..., Any]) -> None:
    server, _ = watched("--max_queue_size", "3")
    wanted = reference(server, {**QUICK, "seed": 1})
    with paused(server):
        working = Call(server, ENDLESS)
        wait_for(lambda: working.states == ["running"], "it runs")
        waiting = [Call(server, {**QUICK, "seed": 1}) for _ in range(2)]
        body = {"instances": [QUICK, QUICK]}  # one fits, two do not: none is admitted
        status, headers, answer = server.request("POST", f"/v1/models/{server.name}:predict", body)
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert "2 prompts wait and at most 3 may" in json.loads(answer)["error"]
        waiting.append(Call(server, {**QUICK, "seed": 1}))
        assert Call(server, QUICK).answer()[0] == 429
        assert ready(server)
    working.leave()
    assert [call.pictures() for call in waiting] == [wanted] * 3
    assert server.stop() == 0


# --- ends


def test_a_killed_engine_is_replaced_and_nobody_notices(watched: Callable[..., Any], gate: Gate) -> None:
    server, engine = watched(**gate.environment)
    instances = [{**QUICK, "seed": seed} for seed in (1, 2, 3, 4)]
    slow, *wanted = reference(server, SLOW, *instances)
    gate.shut("loading")  # for the next one
    with paused(server):
        working = Call(server, SLOW)
        calls = [Call(server, instance) for instance in instances[:2]]
        several = Call(server, *instances[2:])
        wait_for(lambda: working.states == ["running"], "it runs")
        engine.kill()
    wait_for(lambda: not ready(server), "not ready after the engine's death")
    status, answer = server.json("GET", f"/v2/models/{server.name}/ready")
    assert (status, answer["ready"]) == (503, False)
    assert server.json("GET", "/v2/health/live")[0] == 200
    assert server.json("POST", f"/v1/models/{server.name}:predict", {"instances": [QUICK]})[0] == 503
    gate.open("loading")
    wait_for(lambda: ready(server), "ready again")
    assert working.pictures() == [slow]
    assert [call.pictures() for call in calls] == [[picture] for picture in wanted[:2]]
    assert several.pictures() == wanted[2:]
    assert engine_of(server).pid != engine.pid
    assert server.stop() == 0


def test_a_killed_server_leaves_no_engine(watched: Callable[..., Any]) -> None:
    server, engine = watched()
    Call(server, ENDLESS)
    family = [engine, *engine.children(recursive=True)]
    server.process.kill()
    _, alive = psutil.wait_procs(family, SOON)
    assert not alive


def test_sigterm_finishes_what_was_accepted(watched: Callable[..., Any]) -> None:
    server, engine = watched()
    instances = [{**QUICK, "seed": seed} for seed in (1, 2, 3)]
    slow, *wanted = reference(server, {**SLOW, "n": 1}, *instances)
    with paused(server):
        working, first, several = Call(server, SLOW), Call(server, instances[0]), Call(server, *instances[1:])
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not ready(server), "draining")
        status, headers, body = server.request("POST", f"/v1/models/{server.name}:predict", {"instances": [QUICK]})
        assert (status, headers["retry-after"]) == (503, "5")
        assert "shutting down" in json.loads(body)["error"]
        assert server.json("GET", "/v2/health/live")[0] == 200
    assert working.pictures() == [slow]
    assert first.pictures() == wanted[:1]
    assert several.pictures() == wanted[1:]
    assert server.process.wait(SECONDS) == 0
    _, alive = psutil.wait_procs([engine], SOON)
    assert not alive


def test_sigterm_answers_grpc_calls_that_run_and_refuses_new_ones(watched: Callable[..., Any]) -> None:
    server, _ = watched()
    (slow,) = reference(server, {**SLOW, "n": 1})

    def message(**fields: Any) -> Any:
        asked = pb.ModelInferRequest(model_name=server.name)
        asked.inputs.add(name="prompt", shape=[1], datatype="BYTES").contents.bytes_contents.append(
            fields.pop("prompt").encode()
        )
        for name, value in fields.items():
            asked.parameters[name].int64_param = value
        return asked

    with grpc.insecure_channel(server.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        with paused(server):
            working = stub.ModelInfer.future(message(**SLOW), timeout=SECONDS)
            wait_for(lambda: "running" in states(server), "the call runs")
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not ready(server), "draining")
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(message(**QUICK), timeout=SECONDS)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert ("retry-after", "5") in refused.value.trailing_metadata()
        (picture, _) = working.result().raw_output_contents or working.result().outputs
    data = picture if isinstance(picture, bytes) else picture.contents.bytes_contents[0]
    assert data.endswith(base64.b64decode(slow))  # raw contents have a length in front
    assert server.process.wait(SECONDS) == 0


def test_sigterm_while_a_source_picture_is_decoded(watched: Callable[..., Any]) -> None:
    """Admitted, and no job yet: it was accepted all the same."""
    server, _ = watched(model="wan-ti2v-5b")
    file = io.BytesIO()
    Image.linear_gradient("L").resize((6000, 6000)).convert("RGB").save(file, "PNG", compress_level=1)
    body = {**QUICK, "image": base64.b64encode(file.getvalue()).decode()}

    def admitted(call: Call) -> bool:
        return bool(wait_seconds(server) or call.states or call.answered)

    for _ in range(5):  # it takes a part of a second, which may be missed
        call = Call(server, body, queued=False)
        wait_for(partial(admitted, call), "it is admitted")
        if decoding := not (call.states or call.answered):  # promised a place, not yet in it
            break
        assert call.answer()[0] == 200
    assert decoding
    server.process.send_signal(signal.SIGTERM)
    assert call.answer()[0] == 200
    assert server.process.wait(SECONDS) == 0


def test_a_large_answer_reaches_a_slow_reader_within_the_grace_period(watched: Callable[..., Any]) -> None:
    server, _ = watched("--grace_period", "60")
    host, port = server.http.removeprefix("http://").split(":")
    fields = {"prompt": "x", "size": "512x512", "num_inference_steps": 1, "n": 10, "seed": 1}
    body = json.dumps({"instances": [fields, fields]}).encode()
    with socket.create_connection((host, int(port)), timeout=2 * SECONDS) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(
            b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        got = client.recv(65536)
        head, _, rest = got.partition(b"\r\n\r\n")
        (length,) = (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l"))
        have = len(rest)
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        while have < length and (part := client.recv(65536)):
            have += len(part)
            time.sleep(0.2 if time.monotonic() - begun < 7 else 0)
    assert have == length
    assert server.process.wait(SECONDS) == 0


def test_a_drain_that_waits_for_a_cancelled_forward_does_not_spin(watched: Callable[..., Any]) -> None:
    server, engine = watched()
    call = Call(server, {**ENDLESS, "size": "768x768"})
    wait_for(lambda: states(server) == ["running"], "runs")
    engine.suspend()  # stands for a long forward
    (told,) = server.json("GET", f"/v2/models/{server.name}/requests")[1]["requests"]
    server.json("DELETE", f"/v2/models/{server.name}/requests/{told['id']}")
    assert call.answer()[0] == 499
    server.process.send_signal(signal.SIGTERM)
    process = psutil.Process(server.process.pid)
    time.sleep(0.5)
    before = sum(process.cpu_times()[:2])
    time.sleep(2)
    used = sum(process.cpu_times()[:2]) - before
    engine.resume()
    assert used < 1.0  # of two seconds; a loop without a pause takes both
    assert server.process.wait(SECONDS) == 0


def test_sigterm_answers_everybody_before_the_grace_period_ends(watched: Callable[..., Any]) -> None:
    server, _ = watched("--grace_period", "4")
    with paused(server):
        working, waiting = Call(server, ENDLESS), Call(server, QUICK)
    wait_for(lambda: running(server, working.name), "it draws")
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for call in (working, waiting):
        status, body = call.answer()
        assert status == 503
        assert "send the request again" in body["error"]
    assert server.process.wait(SECONDS) == 0
    assert time.monotonic() - began < 4


def test_a_second_sigterm_ends_at_once(watched: Callable[..., Any]) -> None:
    server, engine = watched()
    Call(server, ENDLESS)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: not ready(server), "draining")
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(SECONDS) == 1
    assert time.monotonic() - began < SOON
    _, alive = psutil.wait_procs([engine], SOON)
    assert not alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_loading_is_quick_and_clean(start: Start, gate: Gate, number: signal.Signals) -> None:
    gate.shut("loading")  # who waited for its end would wait for ever
    server = start("sd15", **gate.environment)

    def engines() -> list[psutil.Process]:
        children = psutil.Process(server.process.pid).children()
        return [child for child in children if "runtime.engine.worker" in child.cmdline()]

    def live() -> bool:
        with contextlib.suppress(OSError):
            return server.request("GET", "/v2/health/live")[0] == 200
        return False

    wait_for(live, "live")
    wait_for(engines, "an engine")  # a moment after its fork its command line is still the server's
    engine = engine_of(server)
    assert not ready(server)
    began = time.monotonic()
    server.process.send_signal(number)
    assert server.process.wait(SECONDS) == 0, server.log.read_text()
    assert time.monotonic() - began < SOON
    _, alive = psutil.wait_procs([engine], SOON)
    assert not alive

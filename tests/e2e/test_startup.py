"""From the start of the process to READY, and every way a start can fail."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import READY_SECONDS, Gate, Serve, Server

Start = Callable[..., Server]
PROMPT = {"prompt": "a fox", "num_inference_steps": 2, "seed": 5}


def wait_live(server: Server) -> None:
    """Until the first 200 of the liveness probe."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if server.request("GET", "/v2/health/live", timeout=5)[0] == 200:
                return
        time.sleep(0.01)
    raise AssertionError(server.log.read_text())


def ends_with(server: Server) -> tuple[int, list[str]]:
    """The exit status and the lines that are no JSON log lines."""
    status = server.process.wait(READY_SECONDS)
    return status, [line for line in server.log.read_text().splitlines() if not line.startswith("{")]


def test_live_at_once_and_ready_only_when_loaded(start: Start, gate: Gate) -> None:
    gate.shut("loading")
    server = start("glm-image", **gate.environment)
    wait_live(server)
    status, body = server.json("GET", "/v2/models/tiny/ready")
    assert status == 503 and body["ready"] is False and body["error"].startswith("loading")
    assert server.json("GET", "/v2/health/ready")[0] == 503
    assert server.json("GET", "/v1/models/tiny")[0] == 503
    assert server.json("GET", "/v2/repository/index")[1][0]["state"] == "UNAVAILABLE"
    assert server.json("GET", "/v2/models/tiny")[1]["inputs"] == []
    for path, call in (
        ("/v1/models/tiny:predict", {"instances": [PROMPT]}),
        ("/v2/models/tiny/infer", {"inputs": []}),
    ):
        status, headers, content = server.request("POST", path, call)
        assert status == 503 and "loading" in json.loads(content)["error"]
        assert int(headers["retry-after"]) > 0 and headers["x-request-id"]
    gate.open("loading")
    server.wait_ready()
    assert server.json("GET", "/v2/health/ready") == (200, {"ready": True})
    status, told = server.json("GET", "/v1/models/tiny")
    assert (status, told["name"], told["ready"]) == (200, "tiny", True)
    assert server.stop() == 0


def test_stages_are_told_while_the_model_loads(start: Start, gate: Gate) -> None:
    stages = ("loading", "warming")
    for stage in stages:
        gate.shut(stage)
    server = start("glm-image", **gate.environment)
    wait_live(server)
    for stage in stages:
        deadline = time.monotonic() + READY_SECONDS
        while not (answer := server.json("GET", "/v2/models/tiny/ready"))[1].get("error", "").startswith(f"{stage}, "):
            assert answer[0] == 503 and time.monotonic() < deadline, f"{answer}\n{server.log.read_text()}"
            time.sleep(0.01)
        gate.open(stage)
    server.wait_ready()
    assert server.stop() == 0


def test_a_stage_is_as_long_as_it_was_however_late_the_server_hears_of_it(start: Start, gate: Gate) -> None:
    for stage in ("loading", "warming"):
        gate.shut(stage)
    begun = time.monotonic()
    server = start("sd15", **gate.environment)
    gate.wait_held("loading")
    server.process.send_signal(signal.SIGSTOP)
    gate.open("loading")
    gate.wait_held("warming")
    loaded = time.monotonic()
    time.sleep(1)  # in which it warms up, for all the server knows later
    warmed = time.monotonic()
    gate.open("warming")
    server.process.send_signal(signal.SIGCONT)
    server.wait_ready()
    told = server.json("GET", "/v2/models/tiny")[1]["properties"]["load_seconds"]
    rounded = 0.0005
    assert told["loading"] <= loaded - begun + rounded
    assert told["warming"] >= warmed - loaded - rounded
    assert server.stop() == 0


def test_warmup_leaves_no_trace(serve: Serve, start: Start) -> None:
    """The first request gives the same bytes with and without a warm-up."""
    cold = start("glm-image", "--warmup", "false")
    cold.wait_ready()
    wanted = {**PROMPT, "size": "64x64"}
    first = cold.predict(wanted)[0]["image"]["b64"]
    assert "warmed up" not in cold.log.read_text()
    assert first == serve("glm-image").predict(wanted)[0]["image"]["b64"]
    assert cold.stop() == 0


def broken(tiny: Path, folder: Path, change: Callable[[Path], Any]) -> Path:
    shutil.copytree(tiny / "sd15", folder)
    change(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json"),
        (lambda f: (f / "generation_defaults.json").write_text('{"width": 63}'), "generation_defaults.json: width: 63"),
        (lambda f: (f / "generation_defaults.json").write_text("[1]"), "generation_defaults.json"),
        (lambda f: shutil.rmtree(f / "unet"), "unet"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10"), "vae"),
    ],
    ids=["no index", "index no JSON", "default that does not fit", "defaults no object", "no unet", "truncated vae"],
)
def test_a_folder_that_holds_no_model_ends_the_start(
    start: Start, tiny_models: Path, tmp_path: Path, change: Callable[[Path], Any], said: str
) -> None:
    status, lines = ends_with(start(broken(tiny_models, tmp_path / "model", change)))
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith("diffusion-runtime: ") and said in lines[0]


def test_a_missing_folder_ends_the_start(start: Start, tmp_path: Path) -> None:
    status, lines = ends_with(start(tmp_path / "nothing"))
    assert status == 1 and len(lines) == 1 and "nothing" in lines[0]


def test_bad_settings_end_the_start_with_a_line_each(start: Start) -> None:
    status, lines = ends_with(start("sd15", "--dtype", "int3", MAX_PIXELS="many", WARMUP="perhaps"))
    assert status == 1
    assert sorted(line.split(":")[1].strip().split("=")[0] for line in lines) == ["--dtype", "MAX_PIXELS", "WARMUP"]


def test_an_unknown_flag_ends_the_start(start: Start) -> None:
    status, lines = ends_with(start("sd15", "--modle_id", "x"))
    assert status == 1 and len(lines) == 1 and "--modle_id" in lines[0]


@pytest.mark.parametrize("flag", ["--http_port", "--grpc_port"])
def test_a_port_that_is_taken_ends_the_start(start: Start, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, lines = ends_with(start("sd15", flag, port))
    assert status == 1 and len(lines) == 1 and port in lines[0]


def test_optimizations_say_what_came_of_them(start: Start) -> None:
    server = start("wan-t2v-a14b", ENABLE_ATTENTION_SLICING="true", ENABLE_VAE_TILING="true", ENABLE_CPU_OFFLOAD="yes")
    server.wait_ready()
    told = server.json("GET", "/v2/models/tiny")[1]["properties"]
    assert told["optimizations"]["attention_slicing"].startswith("not_applicable")
    assert told["optimizations"]["cpu_offload"].startswith("not_applicable")
    assert told["optimizations"]["vae_tiling"].startswith("on")
    assert "vae_tiling" in told["engine_variant"]
    assert server.stop() == 0

"""What an engine does before its first request, and where what it compiles is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Gate, Server
from tests.e2e.test_startup import broken, ends_with

Start = Callable[..., Server]


def engine_of(server: Server) -> psutil.Process:
    (engine,) = psutil.Process(server.process.pid).children()
    return engine


def test_sizes_are_warmed_up_and_their_cost_is_known(start: Start, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    server = start(
        *("wan-i2v-a14b", "--warmup_sizes", "64x32, 32x64", "--attention_backend", "native"),
        CACHE_DIR=str(cache),
        TRITON_CACHE_DIR="",
        TORCHINDUCTOR_CACHE_DIR="",  # torch sets it in every process that imports it, this one too
    )
    server.wait_ready()
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    warmed = [line["size"] for line in lines if line["message"] == "warmed up"]
    assert warmed[1:] == ["64 x 32", "32 x 64"]
    told = server.json("GET", "/v2/models/tiny")[1]["properties"]
    assert told["engine_variant"].startswith("stock, native attention; ")
    environment = engine_of(server).environ()
    assert environment["TRITON_CACHE_DIR"] == f"{cache}/compiled/triton"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == f"{cache}/compiled/torchinductor"
    assert (cache / "compiled").stat().st_mode & 0o777 == 0o700
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WARMUP_SIZES": "64x64,100x64"}, "WARMUP_SIZES 100x64: width: 100"),
        ({"WARMUP_SIZES": "128x64", "MAX_PIXELS": "4096"}, "WARMUP_SIZES 128x64: width x height"),
        ({"TOKEN_WEIGHTS": "int8"}, "TOKEN_WEIGHTS=int8: needs GLM-Image's kernels"),
    ],
)
def test_what_the_model_cannot_do_ends_the_start(start: Start, environment: dict[str, str], said: str) -> None:
    status, lines = ends_with(start("glm-image", **environment))
    assert (status, len(lines)) == (1, 1) and said in lines[0]


def test_a_warm_up_that_fails_ends_the_start(start: Start, tiny_models: Path, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        """The denoiser loads as before, and wants a class at each step."""
        config = folder / "unet" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_bytes()), "class_embed_type": "identity"}))

    model = broken(tiny_models, tmp_path / "model", change)
    server = start(model)
    status, lines = ends_with(server)
    reason = "class_labels should be provided when num_class_embeds > 0"
    assert (status, lines) == (1, [f"diffusion-runtime: the warm-up of 64 x 64 failed: {reason}"])
    (told,) = [line for line in server.log.read_text().splitlines() if '"the warm-up failed"' in line]
    assert reason in json.loads(told)["traceback"]
    cold = start(model, WARMUP="false")
    cold.wait_ready()
    assert cold.stop() == 0


def test_what_is_compiled_is_kept_where_it_may_be(start: Start, tmp_path: Path) -> None:
    """A folder that cannot be made, and the operator's own."""
    (tmp_path / "file").touch()
    server = start(
        "sd15",
        CACHE_DIR=str(tmp_path / "file" / "cache"),
        TRITON_CACHE_DIR="/somewhere/else",
        TORCHINDUCTOR_CACHE_DIR="",
    )
    server.wait_ready()
    environment = engine_of(server).environ()
    assert environment["TRITON_CACHE_DIR"] == "/somewhere/else"
    assert (
        environment["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/diffusion-runtime-{os.getuid()}-compiled/torchinductor"
    )
    assert server.stop() == 0


def test_a_cache_that_hangs_does_not_keep_the_port_closed(start: Start, tmp_path: Path, gate: Gate) -> None:
    gate.shut("compiled")
    server = start(
        "sd15", CACHE_DIR=str(tmp_path / "cache"), TRITON_CACHE_DIR="", TORCHINDUCTOR_CACHE_DIR="", **gate.environment
    )
    server.wait_ready()
    gate.wait_held("compiled")
    home = f"{tmp_path}/diffusion-runtime-{os.getuid()}-compiled"
    assert engine_of(server).environ()["TRITON_CACHE_DIR"] == f"{home}/triton"
    assert f"{tmp_path}/cache/compiled does not answer" in server.log.read_text()
    assert server.stop() == 0
    assert not (tmp_path / "cache" / "compiled").exists()

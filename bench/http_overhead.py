"""What the way through HTTP costs: a call's seconds at its client, minus those of the engine and of encoding.

    python -m bench.http_overhead [--calls 30] [--results bench/results/http_overhead.json]

A tiny sd15 draws 1024 x 1024 pictures of coloured noise, PNGs of 2.6 MB (the largest possible has 3.1). One call at a
time, on a connection of its own, over v1 (JSON, base64), v2 (binary), OpenAI's route and gRPC. The server's log says
for each how long the engine drew and how long it encoded. Then Pillow's levels of compression, on noise and on a smooth
picture with a little grain.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tritonclient import grpc as triton_grpc

from bench.probes import lighten, wait_ready
from runtime.demo import free_port, run_module
from runtime.media import encode_image

SIDE = 1024
ENGINE = ("prepare", "tokens", "denoise", "decode")
FIELDS: dict[str, Any] = {"size": f"{SIDE}x{SIDE}", "num_inference_steps": 1}


def overheads(model: Path, folder: Path, calls: int) -> dict[str, Any]:
    port, grpc_port, log = free_port(), free_port(), folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "runtime", "--model_id", str(model), "--model_name", "m"),
                *("--http_port", str(port), "--grpc_port", str(grpc_port), "--log_format", "json"),
            ],
            stderr=output,
        )
    try:
        wait_ready(f"http://127.0.0.1:{port}")

        def post(path: str, body: dict[str, Any]) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            connection.close()
            assert response.status == 200, content[:500]
            return len(content)

        prompt = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["x"]}
        ways: dict[str, Callable[[int], int]] = {
            "v1, JSON": lambda seed: post(
                "/v1/models/m:predict", {"instances": [{"prompt": "x", "seed": seed, **FIELDS}]}
            ),
            "v2, binary": lambda seed: post(
                "/v2/models/m/infer",
                {"inputs": [prompt], "parameters": {"seed": seed, "binary_data_output": True, **FIELDS}},
            ),
            "OpenAI": lambda seed: post(
                "/v1/images/generations", {"model": "m", "prompt": "x", "seed": seed, **FIELDS}
            ),
            "gRPC": lambda seed: over_grpc(grpc_port, {"seed": seed, **FIELDS}),
        }
        found: dict[str, Any] = {}
        for name, call in ways.items():
            call(0)
            walls, sizes = [], []
            for seed in range(calls):
                begun = time.perf_counter()
                sizes.append(call(seed))
                walls.append(time.perf_counter() - begun)
            time.sleep(0.2)  # the last line of the log
            timings = [json.loads(line) for line in log.read_text().splitlines() if '"timings"' in line][-calls:]
            stages = [line["timings"] for line in timings]
            drawn = [sum(stage.get(part, 0.0) for part in ENGINE) for stage in stages]
            rest = sorted(1000 * (w - d - s["encode"]) for w, d, s in zip(walls, drawn, stages, strict=True))
            found[name] = {
                "bytes": sizes[0],
                "overhead_ms_median": round(statistics.median(rest), 1),
                "overhead_ms_max": round(rest[-1], 1),
                "encode_ms_median": round(1000 * statistics.median(s["encode"] for s in stages), 1),
                "engine_ms_median": round(1000 * statistics.median(drawn), 1),
            }
            print(name, found[name], flush=True)
        return found
    finally:
        server.terminate()
        server.wait()


def over_grpc(port: int, fields: dict[str, Any]) -> int:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        given = triton_grpc.InferInput("prompt", [1], "BYTES")
        given.set_data_from_numpy(np.array([b"x"], dtype=object))
        answer = client.infer("m", [given], parameters=fields)
        return int(answer.get_response().ByteSize())


def encodings() -> dict[str, Any]:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    steps = np.linspace(0, 1, SIDE)
    smooth = 255 * np.stack([np.outer(steps, steps), np.outer(1 - steps, steps), np.outer(steps, steps**2)], axis=-1)
    grain = np.random.default_rng(1).normal(0, 2, smooth.shape)
    found: dict[str, Any] = {}
    for name, pixels in (("noise", noise), ("smooth", np.clip(smooth + grain, 0, 255).astype(np.uint8))):
        picture = Image.fromarray(pixels)

        def level(number: int, picture: Image.Image = picture) -> bytes:
            file = io.BytesIO()
            picture.save(file, "PNG", compress_level=number)
            return file.getvalue()

        ways: dict[str, Callable[[], bytes]] = {
            "ours": lambda picture=picture: encode_image(picture, "png", None),  # type: ignore[misc]
            **{f"Pillow, level {n}": lambda n=n: level(n) for n in (0, 1, 3, 6)},  # type: ignore[misc]
        }
        for way, encode in ways.items():
            seconds = []
            for _ in range(5):
                begun = time.perf_counter()
                size = len(encode())
                seconds.append(time.perf_counter() - begun)
            found[f"{name}, {way}"] = {"ms": round(1000 * statistics.median(seconds), 1), "bytes": size}
            print(name, way, found[f"{name}, {way}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_module("runtime.tiny", folder, "--family", "sd15")
        lighten(Path(folder) / "sd15")
        calls = overheads(Path(folder) / "sd15", Path(folder), options.calls)
    told = {
        "versions": {name: version(name) for name in ("pillow", "kserve", "uvicorn", "torch")},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "calls": calls,
        "encodings": encodings(),
    }
    if options.results:
        options.results.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

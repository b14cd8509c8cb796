"""How long do health probes take while the engine loads, draws, and while results of 100 MB go out?

    python bench/probes.py [--results bench/results/probes.json]

A probing process of its own asks /v2/health/live on a new connection every 20 ms, as kubelet does every few
seconds, while this one loads the server. Prints one line a phase: count, median, 99th percentile, longest.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tritonclient import grpc as triton_grpc

from runtime.demo import free_port, post, run_module

PERIOD = 0.02


def probe(port: int, stop: Any, samples: Any) -> None:
    """Append (time, seconds) of each probe; a failed one counts as long as it took, with a mark."""
    while not stop.is_set():
        begun = time.monotonic()
        ok = False
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/v2/health/live")
            ok = connection.getresponse().status == 200
            connection.close()
        samples.append((begun, time.monotonic() - begun, ok))
        time.sleep(PERIOD)


def summary(samples: list[tuple[float, float, bool]]) -> dict[str, Any]:
    times = sorted(seconds * 1000 for _, seconds, _ in samples)
    return {
        "probes": len(times),
        "failed": sum(not ok for _, _, ok in samples),
        "median_ms": round(statistics.median(times), 1),
        "p99_ms": round(times[min(len(times) - 1, int(len(times) * 0.99))], 1),
        "max_ms": round(times[-1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_module("runtime.tiny", folder, "--family", "sd15")
        lighten(Path(folder) / "sd15")
        results = measure(Path(folder) / "sd15")
    if options.results:
        options.results.write_text(json.dumps(results, indent=2) + "\n")


def lighten(model: Path) -> None:
    """A UNet and a VAE of a few layers without attention: this is about bytes on their way out, not about drawing."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).save_pretrained(model / "vae")
    UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        block_out_channels=(4,),
        norm_num_groups=2,
        layers_per_block=1,
        cross_attention_dim=32,
    ).save_pretrained(model / "unet")


def measure(model: Path) -> dict[str, Any]:
    port, grpc_port = free_port(), free_port()
    begun = time.monotonic()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "runtime", "--model_id", str(model), "--model_name", "m"),
            *("--http_port", str(port), "--grpc_port", str(grpc_port), "--log_format", "json"),
        ],
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    while True:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
            connection.request("GET", "/v2/health/live")
            if connection.getresponse().status == 200:
                break
        time.sleep(0.01)
    results: dict[str, Any] = {"live_after_s": round(time.monotonic() - begun, 2), "cpus": os.cpu_count()}
    print(f"live after {results['live_after_s']} s", flush=True)
    with multiprocessing.Manager() as manager:
        stop, samples = manager.Event(), manager.list()
        prober = multiprocessing.Process(target=probe, args=(port, stop, samples))
        prober.start()

        def phase(name: str, work: Callable[[], Any]) -> Any:
            first = len(samples)
            started = time.monotonic()
            answer = work()
            results[name] = {**summary(list(samples)[first:]), "seconds": round(time.monotonic() - started, 1)}
            print(name, results[name], flush=True)
            return answer

        # 40 pictures of noise at 1024 x 1024: about 100 MB of PNG
        large = {"prompt": "x", "size": "1024x1024", "num_inference_steps": 1, "n": 10, "seed": 1}
        with contextlib.ExitStack() as stack:
            stack.callback(server.wait)
            stack.callback(server.send_signal, signal.SIGTERM)
            stack.callback(prober.join)
            stack.callback(stop.set)
            phase("loading", lambda: wait_ready(url))
            phase("drawing", lambda: post(f"{url}/v1/models/m:predict", {"instances": [{"prompt": "x"}] * 32}))
            v1 = phase("v1, JSON", lambda: raw(url, "/v1/models/m:predict", {"instances": [large] * 4}))
            results["bytes"] = len(v1)
            tensors = [{"name": "prompt", "shape": [4], "datatype": "BYTES", "data": ["x"] * 4}]
            fields = {k: v for k, v in large.items() if k != "prompt"}
            binary = {"inputs": tensors, "parameters": {**fields, "binary_data_output": True}}
            phase("v2, binary", lambda: raw(url, "/v2/models/m/infer", binary))
            phase("v2, gRPC", lambda: over_grpc(grpc_port, fields))
    return results


def wait_ready(url: str) -> None:
    while True:
        with contextlib.suppress(RuntimeError, OSError):
            post(f"{url}/v1/models/m:predict", {"instances": [{"prompt": "x", "num_inference_steps": 1}]})
            return
        time.sleep(0.1)


def raw(url: str, path: str, body: Any) -> bytes:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
    connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    content = response.read()
    assert response.status == 200, content[:500]
    return content


def over_grpc(port: int, fields: dict[str, Any]) -> None:
    import numpy

    with triton_grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        prompt = triton_grpc.InferInput("prompt", [4], "BYTES")
        prompt.set_data_from_numpy(numpy.array([b"x"] * 4, dtype=object))
        client.infer("m", [prompt], parameters=fields)


if __name__ == "__main__":
    main()

"""How long does the device go on after a client has left?

    python -m bench.cancel MODEL_FOLDER --fields '{"num_inference_steps": 20}' --results bench/results/cancel.json

Serves the model, sends the request, closes the connection at a random moment of the named stage, and reads from the
engine's log line `stopped` when the device was idle: an event behind all that had been sent to it. The clock runs from
the close of the socket to that moment, both in this machine's CLOCK_MONOTONIC. Beside it stands the length of one
forward, from the progress of a whole request's steps. Afterwards the same request must give its reference bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runtime.demo import free_port, post, wait_ready

MODEL = "m"


def body(fields: dict[str, Any]) -> bytes:
    return json.dumps({"instances": [{"prompt": "a red fox in the snow", "seed": 5, **fields}]}).encode()


def digest(port: int, fields: dict[str, Any]) -> tuple[str, dict[str, float]]:
    answer = post(f"http://127.0.0.1:{port}/v1/models/{MODEL}:predict", json.loads(body(fields)))
    prediction = answer["predictions"][0]
    media = prediction.get("video") or prediction["image"]
    return hashlib.sha256(base64.b64decode(media["b64"])).hexdigest(), prediction["timings"]


def progress(port: int, name: str) -> dict[str, Any]:
    """What the server tells of a request; nothing while it does not know it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/{MODEL}/requests", timeout=10) as answer:
        jobs: list[dict[str, Any]] = json.load(answer)["requests"]
    return next((job for job in jobs if job["id"] == name), {})


def stopped(log: Path, name: str) -> dict[str, Any] | None:
    for line in log.read_text().splitlines():
        if '"stopped"' in line and f'"{name}"' in line:
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def cancel(port: int, log: Path, name: str, fields: dict[str, Any], stage: str, wait: float) -> dict[str, Any] | None:
    """One request that is left `wait` seconds after its stage was first seen; None where it was over before."""
    content = body(fields)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            f"POST /v1/models/{MODEL}:predict HTTP/1.1\r\nHost: x\r\nX-Request-ID: {name}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            time.sleep(0.01)
            told = progress(port, name)
            if told.get("state") == "completed":
                return None
            if told.get("stage") == stage or (stage == "decode" and told.get("step") and told["step"] >= told["total"]):
                break
        time.sleep(wait)
        left = time.monotonic()
    while (line := stopped(log, name)) is None:
        if progress(port, name).get("state") == "completed":
            return None
        if time.monotonic() - left > 600:
            raise SystemExit(f"{name} was never stopped")
        time.sleep(0.01)
    return {"stage": stage, "idle_after_s": round(line["idle_at"] - left, 4), "in_engine_s": line["seconds"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--fields", type=json.loads, default={}, help="JSON of the request")
    parser.add_argument("--stages", nargs="*", default=["denoise", "decode"])
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "server.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "runtime", "--model_id", options.model, "--model_name", MODEL),
                    *("--http_port", str(port), "--enable_grpc", "false", "--log_format", "json"),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_ready(process, f"http://127.0.0.1:{port}", MODEL, log)
            reference, timings = digest(port, options.fields)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/{MODEL}", timeout=10) as answer:
                properties = json.load(answer)["properties"]
            runs = []
            chance = random.Random(1)
            for stage in options.stages:
                for i in range(options.repeat):
                    length = timings.get(stage, 1.0) * 0.6
                    wait = chance.uniform(0, min(length, 5.0))
                    if run := cancel(port, log, f"{stage}-{i}", options.fields, stage, wait):
                        runs.append(run)
                    print(run or f"{stage}: over before it was left", flush=True)
            same = digest(port, options.fields)[0] == reference
        finally:
            process.terminate()
            process.wait(120)
    told = {
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")},
        "device": properties["device"],
        "pipeline": properties["pipeline"],
        "fields": options.fields,
        "timings": timings,
        "same_bytes_afterwards": same,
        "runs": runs,
    }
    for stage in options.stages:
        idle = [run["idle_after_s"] for run in runs if run["stage"] == stage] or [float("nan")]
        print(f"{stage}: idle after {statistics.median(idle):.3f} s, at most {max(idle):.3f}; timings {timings}")
    print(f"the same bytes afterwards: {same}")
    if options.results:
        options.results.write_text(json.dumps(told, indent=1) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

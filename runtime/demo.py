"""See it work: serve tiny models, make a picture and a video through the API, save them, stop.

    python -m runtime.demo                    the demo, into ./demo-output
    python -m runtime.demo call --url URL     one call to a running endpoint, its result saved

Uses nothing but the standard library, as any client could.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT = "a red fox in the snow, morning light"
READY_SECONDS = 180


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m runtime.demo", description="See it work.")
    parser.add_argument("command", nargs="?", choices=["demo", "call"], default="demo")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for models, results and logs")
    parser.add_argument("--url", default="http://localhost:8080", help="endpoint that `call` talks to")
    parser.add_argument("--model", default="model", help="name of the endpoint's model")
    parser.add_argument("--protocol", choices=["v1", "v2"], default="v1", help="how `call` talks")
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        if options.command == "call":
            target = options.output / f"{options.model}-{options.protocol}"
            show(*call(options.url, options.model, options.protocol, {"prompt": options.prompt}, target))
        else:
            demo(options.output.resolve(), options.prompt)
    except (OSError, RuntimeError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


def demo(output: Path, prompt: str) -> None:
    """A picture of the tiny GLM-Image over v1, a video of the tiny Wan 2.2 over v2."""
    begun = time.monotonic()
    models = output / "models"
    step("writing the tiny models (random weights: the results are coloured noise)")
    for family in ("glm-image", "wan-t2v-a14b"):
        run_module("runtime.tiny", str(models), "--family", family)
    for family, protocol, fields in (
        ("glm-image", "v1", {"prompt": prompt, "size": "256x256", "seed": 7}),
        ("wan-t2v-a14b", "v2", {"prompt": prompt, "size": "256x256", "num_frames": 33, "fps": 16, "seed": 7}),
    ):
        step(f"serving {family}")
        with serving(models / family, output / f"{family}.log") as url:
            step(f"asking {family} over {protocol}")
            show(*call(url, family, protocol, fields, output / family))
    step(f"done in {time.monotonic() - begun:.0f} s; the servers are stopped; their logs are beside the results")


def run_module(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """A server on `folder` until the block ends; gives its URL once it is ready."""
    http, grpc = free_port(), free_port()
    command = [sys.executable, "-m", "runtime", "--model_id", str(folder), "--model_name", folder.name]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--http_port", str(http), "--grpc_port", str(grpc), "--log_format", "text"],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{http}"
    try:
        wait_ready(process, url, folder.name, log)
        yield url
    finally:
        process.terminate()
        if process.wait(60):
            raise RuntimeError(f"the server ended with status {process.returncode}; see {log}")


def wait_ready(process: subprocess.Popen[bytes], url: str, model: str, log: Path) -> None:
    told, deadline = "", time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(f"{url}/v2/models/{model}/ready", timeout=5):
                return
        except urllib.error.HTTPError as error:
            state = json.load(error)["error"]
            if state != told:
                told = state
                print(f"    {state}", flush=True)
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the model was not ready after {READY_SECONDS} s; see {log}")


def call(
    url: str, model: str, protocol: str, fields: dict[str, Any], target: Path
) -> tuple[Path, float, dict[str, Any]]:
    """One generation; returns the saved file, the seconds it took, and what the server tells about it."""
    begun = time.monotonic()
    if protocol == "v1":
        prediction = post(f"{url}/v1/models/{model}:predict", {"instances": [fields]})["predictions"][0]
        media = prediction.pop("video", None) or prediction.pop("image")
        content, kind, told = media["b64"], media["format"].lower(), prediction
    else:
        prompt = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [fields.pop("prompt")]}
        answer = post(f"{url}/v2/models/{model}/infer", {"inputs": [prompt], "parameters": fields})
        outputs = {output["name"]: output["data"][0] for output in answer["outputs"]}
        told = json.loads(outputs.pop("metadata"))
        content, kind = outputs.popitem()[1], told["format"]
    path = target.with_suffix(f".{kind}")
    path.write_bytes(base64.b64decode(content))
    return path, time.monotonic() - begun, told


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=3600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url} answered {error.code}: {error.read(2000).decode(errors='replace')}") from error


def show(path: Path, seconds: float, told: dict[str, Any]) -> None:
    frames = f", {told['num_frames']} frames" if "num_frames" in told else ""
    print(f"    {path}: {told['width']}x{told['height']}{frames}, seed {told['seed']}, {seconds:.1f} s")
    print(f"    seconds by stage: {told['timings']}", flush=True)


def step(text: str) -> None:
    print(f"==> {text}", flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())

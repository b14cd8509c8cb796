"""From an object store to READY: how fast, in how much memory, against the floor and the peers.

    python -m bench.cold_start --gigabytes 4 --results bench/results/cold_start.json

An S3 server on loopback (`rclone serve s3`) holds a Wan pipeline of random bfloat16 weights. Each arm starts from
nothing, arms take turns, and each is measured from its process's start: seconds to READY, bytes over the time in which
bytes came, and the peak of anonymous and shared memory of its whole process tree, read every 20 ms. Arms:

    floor            curl: the same bytes, eight ranges at a time, thrown away
    stream           this runtime, LOAD_MODE=stream, no cache
    stream+cache     this runtime, one pass into memory and into an empty CACHE_DIR
    cached, cold     this runtime, LOAD_MODE=cached, CACHE_DIR empty
    cached, warm     this runtime, CACHE_DIR filled
    cached, disk     the same, the cache's files dropped from the page cache first
    kserve + stock   KServe's storage initializer's Storage.download, then from_pretrained, each a process
    runai            run:ai's streamer into tensors, on a CPU thrown away; no pipeline is built

Where there is a GPU, every arm but the floor ends with the weights on it. The store's own files stay in the page
cache: it stands for a store elsewhere, not for this machine's disk. The last two arms need
`pip install kserve-storage==0.21.0 runai-model-streamer[s3]==0.17.0`; an arm whose package is missing is left out by
name, one that fails is told and the others go on; `--peers` names another Python that has the packages. `--arms` takes
the arms to run, in that order, and one may come twice; `--model` serves a folder that is there (hard links: BENCH_DIR
must be on its file system) instead of writing one. `--results` is written anew after every arm. No process of an arm
takes longer than BENCH_LIMIT seconds, and none begins BENCH_BUDGET seconds after the start. Of this runtime's own arms
`at_s` tells when each stage ended, in seconds from the process's start.

With `--local FOLDER` only this runtime's start from that folder is measured, with LOAD_MODE auto and stream: for a
machine with a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from runtime import __version__
from runtime.demo import free_port

KEY, SECRET = "BENCHKEY01234", "BENCHSECRET01234"
SAMPLE_SECONDS = 0.02
LIMIT_SECONDS = int(os.environ.get("BENCH_LIMIT", "900"))  # of one process of an arm
DEADLINE = time.monotonic() + int(os.environ.get("BENCH_BUDGET", "86400"))  # of all arms
MIB, GB = 2**20, 1e9
RANGE = 64 * MIB
# What lines of the log begin with, in the order of a start.
STAGES = (
    *("listening", "source opened", "libraries imported", "headers read", "loading ", "models planned"),
    *("buffers made", "component ", "downloaded ", "read ", "loaded ", "ready: "),
)

STOCK = """
import sys, torch, diffusers
pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16, local_files_only=True)
if torch.cuda.is_available():
    pipeline.to("cuda")
    torch.cuda.synchronize()
"""
KSERVE = """
import sys
from kserve_storage import Storage
Storage.download(*sys.argv[1:])
"""
RUNAI = """
import sys, torch
from runai_model_streamer import SafetensorsStreamer
device, kept = "cuda" if torch.cuda.is_available() else "cpu", []
with SafetensorsStreamer() as streamer:
    streamer.stream_files(sys.argv[1:])
    for name, tensor in streamer.get_tensors():
        if device == "cuda":
            kept.append(tensor.to(device))
if kept:
    torch.cuda.synchronize()
"""


def limit() -> float:
    return max(1.0, min(LIMIT_SECONDS, DEADLINE - time.monotonic()))


@dataclass
class Measured:
    """One run of one arm. `transfer_s` is the time in which the bytes came, where the arm tells it."""

    seconds: float
    transfer_s: float | None = None
    peak_private_mib: float = 0.0
    peak_resident_mib: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)


# --- memory


def private_bytes(process: psutil.Process) -> tuple[int, int]:
    """(anonymous and shared memory, all resident memory) of one process; the difference is mapped files."""
    found = {}
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    return found["RssAnon"] + found["RssShmem"], sum(found.values())


@contextlib.contextmanager
def watched(pid: int, measured: Measured) -> Iterator[None]:
    """Keep the peaks of the process tree under `pid` while the block runs."""
    stop = threading.Event()

    def watch() -> None:
        root = psutil.Process(pid)
        while not stop.is_set():
            private = resident = 0
            with contextlib.suppress(psutil.Error, OSError, KeyError):
                for process in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error, OSError, KeyError):
                        own, whole = private_bytes(process)
                        private, resident = private + own, resident + whole
            measured.peak_private_mib = max(measured.peak_private_mib, private / MIB)
            measured.peak_resident_mib = max(measured.peak_resident_mib, resident / MIB)
            stop.wait(SAMPLE_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- arms


def serve(environment: dict[str, str], folder: Path, *flags: str) -> Measured:
    """`python -m runtime` from its start to READY."""
    port = free_port()
    measured = Measured(0.0)
    log = folder / "server.log"
    patience = limit()
    begun, wall = time.monotonic(), time.time()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "runtime", "--http_port", str(port), "--enable_grpc", "false"),
                *("--model_name", "m", "--dtype", "bfloat16", "--warmup", "false", "--log_format", "json"),
                *("--log_level", "debug", *flags),
            ],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with watched(process.pid, measured):
            while True:
                if process.poll() is not None or time.monotonic() - begun > patience:
                    raise SystemExit(f"the server did not become ready:\n{log.read_text()[-3000:]}")
                if answers(f"http://127.0.0.1:{port}/v2/models/m/ready"):
                    break
                time.sleep(0.02)
            measured.seconds = time.monotonic() - begun
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/m", timeout=5) as answer:
            measured.told = json.load(answer)["properties"]
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    entries = list(logged(log))
    for entry in entries:
        if entry["message"].startswith(("downloaded ", "read ")):
            measured.transfer_s = entry["seconds"]
    measured.told = {name: measured.told[name] for name in ("bytes", "load_seconds", "device", "source")}
    measured.told["at_s"] = stages(entries, wall)
    return measured


def logged(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "message" in entry:
                yield entry


def stages(entries: list[dict[str, Any]], begun: float) -> dict[str, float]:
    """Seconds from the process's start to the end of each stage, by the log."""
    found = {}
    for entry in entries:
        for words in STAGES:
            if entry["message"].startswith(words):
                name = entry["message"] if words == "component " else words.strip()
                found[name] = round(datetime.fromisoformat(entry["time"]).timestamp() - begun, 3)
    return found


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def run(python: str, code: str, environment: dict[str, str], *arguments: str) -> Measured:
    """A Python process from its start to its end."""
    measured, begun = Measured(0.0), time.monotonic()
    process = subprocess.Popen(
        [python, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with watched(process.pid, measured):
        try:
            _, errors = process.communicate(timeout=limit())
        finally:
            process.kill()  # one that has ended is not minded
    measured.seconds = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(errors.decode()[-3000:])
    return measured


def floor(url: Callable[[str], str], files: dict[str, int], folder: Path) -> Measured:
    """Eight of curl's range requests at a time, to nowhere."""
    lines = []
    for name, size in files.items():
        for start in range(0, size, RANGE):
            lines += [
                f'url = "{url(name)}"',
                'output = "/dev/null"',
                f'range = "{start}-{min(start + RANGE, size) - 1}"',
                "fail",
                "next",
            ]
    config = folder / "curl.txt"
    config.write_text("\n".join(lines[:-1]))
    begun = time.monotonic()
    subprocess.run(
        ["curl", "--no-progress-meter", "--parallel", "--parallel-max", "8", "-K", str(config)],
        check=True,
        timeout=limit(),
    )
    seconds = time.monotonic() - begun
    return Measured(seconds, seconds)


# --- the store and the model


@contextlib.contextmanager
def store(folder: Path) -> Iterator[dict[str, str]]:
    """rclone as S3 over `folder`; the environment that reaches it."""
    port = free_port()
    program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or "rclone"
    process = subprocess.Popen(
        [
            *(program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"),
            *("--vfs-cache-mode", "off", "--config", "/dev/null", str(folder)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(2)
        yield {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",  # rclone answers ranges with the whole's checksum
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }
    finally:
        process.terminate()
        process.wait(30)


MODEL = """
import sys, torch, diffusers
from runtime import tiny
folder, gigabytes = sys.argv[1], float(sys.argv[2])
pipeline = tiny.FAMILIES["wan-ti2v-5b"]()
config = dict(pipeline.transformer.config)
size = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    one = diffusers.WanTransformer3DModel.from_config({**config, **size, "num_layers": 1})
each = sum(p.numel() for p in one.blocks.parameters()) * 2
layers = max(1, round(gigabytes * 1e9 / each))
with torch.device("meta"):
    big = diffusers.WanTransformer3DModel.from_config({**config, **size, "num_layers": layers})
big = big.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
for p in big.parameters():
    p.data.view(torch.uint8).random_(0, 60)
big = big.to(torch.bfloat16)
pipeline.register_modules(transformer=big)
pipeline.text_encoder.to(torch.bfloat16)
pipeline.save_pretrained(folder, max_shard_size="1GB")
"""


def write_model(folder: Path, gigabytes: float) -> None:
    """A complete Wan pipeline whose transformer has so many bytes."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", MODEL, str(folder), str(gigabytes)], check=True, timeout=600)


def presigner(environment: dict[str, str], prefix: str) -> Callable[[str], str]:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    return lambda name: str(
        client.generate_presigned_url("get_object", Params={"Bucket": "models", "Key": f"{prefix}/{name}"})
    )


def missing(python: str, package: str) -> bool:
    return subprocess.run([python, "-c", f"import {package}"], stderr=subprocess.DEVNULL).returncode != 0


def remote(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    model = scratch / "s3" / "models" / "wan"
    if options.model:
        shutil.copytree(options.model, model, copy_function=os.link)
    else:
        print(f"writing {options.gigabytes:g} GB", flush=True)
        write_model(model, options.gigabytes)
    files = {p.relative_to(model).as_posix(): p.stat().st_size for p in sorted(model.rglob("*.safetensors"))}
    uri, cache, initializer = "s3://models/wan", scratch / "cache", scratch / "initializer"
    results: dict[str, Any] = {"bytes": sum(files.values())}

    with store(scratch / "s3") as environment:
        url = presigner(environment, "wan")

        def kserve_and_stock() -> Measured:
            try:
                first = run(options.peers, KSERVE, environment, uri + "/", str(initializer))
                second = run(options.peers, STOCK, environment, str(initializer))
            finally:
                shutil.rmtree(initializer, ignore_errors=True)
            return Measured(
                first.seconds + second.seconds,
                first.seconds,
                max(first.peak_private_mib, second.peak_private_mib),
                max(first.peak_resident_mib, second.peak_resident_mib),
                {"initializer_s": first.seconds, "from_pretrained_s": second.seconds},
            )

        def ours(mode: str, *flags: str) -> Measured:
            return serve(environment, scratch, "--model_id", uri, "--load_mode", mode, *flags)

        def filling(mode: str) -> Measured:
            shutil.rmtree(cache, ignore_errors=True)
            return ours(mode, "--cache_dir", str(cache))

        def filled() -> Measured:
            if not cache.exists():
                raise SystemExit("there is no cache: name an arm that fills it before this one")
            return ours("cached", "--cache_dir", str(cache))

        def from_disk() -> Measured:
            forget([path for path in cache.rglob("*") if path.is_file()])
            return filled()

        arms: dict[str, Callable[[], Measured]] = {
            "floor": lambda: floor(url, files, scratch),
            "stream": lambda: ours("stream"),
            "stream+cache": lambda: filling("stream"),
            "cached, cold": lambda: filling("cached"),
            "cached, warm": filled,
            "cached, disk": from_disk,
            "kserve + stock": kserve_and_stock,
            "runai": lambda: run(options.peers, RUNAI, environment, *(f"{uri}/{name}" for name in files)),
        }
        order = options.arms or list(arms)
        if unknown := set(order) - set(arms):
            raise SystemExit(f"no such arm: {', '.join(sorted(unknown))}; there are: {', '.join(arms)}")
        for name, package in (("kserve + stock", "kserve_storage"), ("runai", "runai_model_streamer")):
            if name in order and missing(options.peers, package):
                print(f"{name}: left out, {package} is not installed", flush=True)
                order = [other for other in order if other != name]
        with ThreadPoolExecutor(len(files)) as pool:  # rclone hashes each file at its first request
            for answer in pool.map(lambda name: urllib.request.urlopen(url(name)), files):
                answer.close()
        for turn in range(options.repeat):
            for name in order:
                if time.monotonic() > DEADLINE:
                    print(f"{turn + 1} {name:15} left out, the time is over", flush=True)
                    results.setdefault("failed", []).append(f"{name}: left out, the time is over")
                    continue
                os.sync()  # what the arm before wrote is not written during this one
                try:
                    told = arms[name]()
                except (SystemExit, OSError, subprocess.SubprocessError) as error:
                    print(f"{turn + 1} {name:15} failed: {error}", flush=True)
                    results.setdefault("failed", []).append(f"{name}: {error}")
                else:
                    results.setdefault(name, []).append(told)
                    print(
                        f"{turn + 1} {name:15} {told.seconds:7.2f} s, {told.peak_private_mib:7.0f} MiB {told.told}",
                        flush=True,
                    )
                keep(options, results)
    return results


def local(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """This runtime from a folder; the page cache is dropped before each start where that is allowed."""
    folder = Path(options.local).absolute()
    files = list(folder.rglob("*.safetensors"))
    results: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in files)}
    for turn in range(options.repeat):
        begun = time.monotonic()
        dropped = forget(files)
        for path in files:
            subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M", "iflag=direct"], stderr=subprocess.DEVNULL)
        results.setdefault("disk, one reader, MiB/s", []).append(results["bytes"] / MIB / (time.monotonic() - begun))
        for mode in options.modes:
            for state in ("cold", "warm"):
                if state == "cold":
                    dropped = forget(files)
                told = serve({}, scratch, "--model_id", str(folder), "--load_mode", mode)
                results.setdefault(f"{mode}, {state}", []).append(told)
                print(
                    f"{turn + 1} {mode} {state} {told.seconds:.2f} s {told.peak_private_mib:.0f} MiB {told.told}",
                    flush=True,
                )
        results["page cache dropped"] = dropped
    return results


def forget(files: list[Path]) -> str:
    """Take the files out of the page cache; how."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return "posix_fadvise(DONTNEED)"


def line(name: str, runs: list[Measured], size: int, floor_rate: float | None) -> str:
    seconds = statistics.median(run.seconds for run in runs)
    transfers = [run.transfer_s for run in runs if run.transfer_s]
    rate = size / MIB / statistics.median(transfers) if transfers else None
    told = f"| {name} | {seconds:.1f} | " + (f"{rate:.0f}" if rate else "") + " | "
    told += (f"{floor_rate / rate:.2f}" if rate and floor_rate else "") + " | "
    return told + f"{max(run.peak_private_mib for run in runs):.0f} |"


def keep(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write --results."""
    told = {
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "safetensors")}
        | {"runtime": __version__},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "gigabytes": found["bytes"] / GB,
        "arms": {
            name: [vars(run) if isinstance(run, Measured) else run for run in runs] if isinstance(runs, list) else runs
            for name, runs in found.items()
        },
    }
    if options.results:
        options.results.write_text(json.dumps(told, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--model", type=Path, help="a model folder to serve instead of writing one")
    parser.add_argument("--arms", nargs="*", help="these arms, in this order")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--local", help="a model folder: measure the start from it alone")
    parser.add_argument("--modes", nargs="*", default=["auto", "stream"], help="LOAD_MODEs of --local")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has the peers' packages")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cold-start-", dir=os.environ.get("BENCH_DIR")) as name:
        found = local(options, Path(name)) if options.local else remote(options, Path(name))
    size = found["bytes"]
    arms = {name: runs for name, runs in found.items() if isinstance(runs, list) and isinstance(runs[0], Measured)}
    base = [size / MIB / run.seconds for run in arms.get("floor", [])]
    print(
        f"\n{size / GB:.2f} GB\n\n"
        "| arm | start to READY, s | MiB/s while bytes came | times the floor | peak private MiB |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, runs in arms.items():
        print(line(name, runs, size, statistics.median(base) if base else None))
    keep(options, found)
    return 1 if "failed" in found else 0


if __name__ == "__main__":
    sys.exit(main())

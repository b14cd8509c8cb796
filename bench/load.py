"""Does the server keep its word below, at and above what it can do?

    python -m bench.load --seconds 300 --results bench/results/load.json

A tiny sd15, a real server. First the reference: the SHA-256 of each kind of request's picture, drawn one by one. Then
for each factor Poisson arrivals at that multiple of the measured capacity, from a process of their own: open loop, so
an arrival waits for nobody, and its latency counts from when it was due. Nothing is sent twice. Each arrival must get
one answer: the reference's bytes, or a refusal (429, 503) with Retry-After. The server's log, one line a generation,
must show each accepted id once and no other. Meanwhile a third process probes /v2/health/live every 20 ms, and memory
is read every second.

The load comes over asyncio streams, one connection an arrival: arrivals are independent people, so a pool would either
let one wait behind another or hold as many connections anyway; and threads or a client library would spend more of the
CPUs that the server computes on. What the load process itself took stands in the results.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from bench.probes import probe, summary
from runtime import __version__
from runtime.demo import free_port, run_module, wait_ready

MODEL = "tiny"
STEPS = 20  # about 0.15 s on one core
KINDS = 12  # distinct requests
CLIENTS = 3  # of the closed loop that measures capacity: the queue is never empty
TIMEOUT = 120.0  # no answer by then: lost
REFUSALS = (429, 503)
COLUMNS = ("due_s", "kind", "status", "latency_ms", "outcome")

# What must hold; the exit status tells.
MIN_GOODPUT = 0.9  # of capacity, where more than it is offered
MAX_PROBE_P99_MS = 100.0
MAX_REFUSAL_P99_MS = 100.0
MAX_GROWTH_MIB = 16.0  # of the server or the engine, from the first minute to the last


# --- the load process


@dataclass(frozen=True)
class Arrival:
    """One request and how it ended: ok, wrong, refused, lost, duplicated or error (with `detail`)."""

    identity: str
    kind: int
    due: float  # seconds after the phase's start
    late: float  # seconds after that until it was sent: the client's own fault
    status: int
    seconds: float  # from due to the whole answer
    outcome: str
    detail: str = ""


@dataclass
class Load:
    """What the load process tells about a phase."""

    arrivals: list[Arrival]
    seconds: float
    cpu_seconds: float


def fields(kind: int) -> dict[str, Any]:
    size = {"width": 64, "height": 64, "num_inference_steps": STEPS}
    return {"prompt": f"a red fox, number {kind}", "seed": 1000 + 7 * kind, **size}


def message(kind: int, identity: str) -> bytes:
    body = json.dumps({"instances": [fields(kind)]}).encode()
    head = (
        f"POST /v1/models/{MODEL}:predict HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-ID: {identity}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def exchange(port: int, content: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(content)
        return await reader.read()
    finally:
        writer.close()


def picture_hash(prediction: dict[str, Any]) -> str:
    return hashlib.sha256(base64.b64decode(prediction["image"]["b64"], validate=True)).hexdigest()


def judge(raw: bytes, identity: str, kind: int, reference: str) -> tuple[int, str, str]:
    """Status, outcome and detail of an answer."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    words = lines[0].split(" ")
    if len(words) < 2 or not headers.get("content-length", "").isdigit():
        return 0, "lost", f"no response: {raw[:80]!r}"
    status, length = int(words[1]), int(headers["content-length"])
    if len(rest) < length:
        return status, "lost", f"{len(rest)} of {length} bytes"
    if len(rest) > length:
        return status, "duplicated", f"{len(rest) - length} bytes follow the response"
    if headers.get("x-request-id") != identity:
        return status, "wrong", f"X-Request-ID: {headers.get('x-request-id')}"
    if status in REFUSALS:
        wait = headers.get("retry-after", "")
        good = wait.isdigit() and int(wait) > 0
        return status, *(("refused", "") if good else ("error", f"Retry-After: {wait!r}"))
    if status != 200:
        return status, "error", rest[:200].decode(errors="replace")
    try:
        (prediction,) = json.loads(rest)["predictions"]
        seed, digest = prediction["seed"], picture_hash(prediction)
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        return status, "wrong", repr(error)[:200]
    if seed != fields(kind)["seed"] or digest != reference:
        return status, "wrong", f"seed {seed}, SHA-256 {digest}"
    return status, "ok", ""


async def ask(port: int, identity: str, kind: int, reference: str, begun: float, due: float) -> Arrival:
    sent = time.monotonic() - begun
    try:
        async with asyncio.timeout(TIMEOUT):
            raw = await exchange(port, message(kind, identity))
        status, outcome, detail = judge(raw, identity, kind, reference)
    except (OSError, TimeoutError) as error:
        status, outcome, detail = 0, "lost", repr(error)[:200]
    return Arrival(identity, kind, due, sent - due, status, time.monotonic() - begun - due, outcome, detail)


async def open_loop(
    port: int, name: str, references: list[str], rate: float, seconds: float, seed: int
) -> list[Arrival]:
    rng = random.Random(seed)
    due, begun = 0.0, time.monotonic()
    tasks: list[asyncio.Task[Arrival]] = []
    while (due := due + rng.expovariate(rate)) < seconds:
        kind = rng.randrange(KINDS)
        await asyncio.sleep(max(0.0, begun + due - time.monotonic()))
        identity = f"{name}-{len(tasks)}"
        tasks.append(asyncio.create_task(ask(port, identity, kind, references[kind], begun, due)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(port: int, name: str, references: list[str], clients: int, seconds: float) -> list[Arrival]:
    begun, arrivals = time.monotonic(), []

    async def client(number: int) -> None:
        count = number
        while (due := time.monotonic() - begun) < seconds:
            kind = count % KINDS
            arrivals.append(await ask(port, f"{name}-{count}", kind, references[kind], begun, due))
            count += clients

    await asyncio.gather(*map(client, range(clients)))
    return arrivals


def load(drive: Callable[..., Any], *arguments: Any) -> Load:
    """Run `drive`, open_loop or closed_loop, in this process: the load process."""
    begun, cpu = time.monotonic(), time.process_time()
    arrivals = asyncio.run(drive(*arguments))
    return Load(arrivals, time.monotonic() - begun, time.process_time() - cpu)


# --- the server and those who watch it


@contextlib.contextmanager
def serving(folder: Path, flags: list[str]) -> Iterator[tuple[int, psutil.Process, Path]]:
    """A ready server on the tiny sd15: its port, process and log."""
    run_module("runtime.tiny", str(folder), "--family", "sd15")
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "runtime", "--model_id", str(folder / "sd15"), "--model_name", MODEL]
    ports = ["--http_port", str(port), "--grpc_port", str(free_port())]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *ports, "--log_format", "json", *flags], stdout=output, stderr=output)
    try:
        wait_ready(process, f"http://127.0.0.1:{port}", MODEL, log)
        yield port, psutil.Process(process.pid), log
        process.terminate()
        if process.wait(60):
            raise RuntimeError(f"the server ended with status {process.returncode}")
    except BaseException:
        sys.stderr.write(log.read_text(errors="replace")[-4000:])
        raise
    finally:
        process.kill()
        process.wait()


@dataclass
class Memory:
    """Reads the resident memory of the server and its engine, in MiB, every second."""

    server: psutil.Process
    samples: list[tuple[float, float]] = field(default_factory=list)
    engines: set[int] = field(default_factory=set)

    def watch(self, stop: threading.Event) -> None:
        while not stop.wait(1):
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):  # ValueError: the engine is being replaced
                (engine,) = self.server.children()
                server_bytes, engine_bytes = self.server.memory_info().rss, engine.memory_info().rss
                self.engines.add(engine.pid)
                self.samples.append((round(server_bytes / 2**20, 1), round(engine_bytes / 2**20, 1)))

    def ends(self, who: int) -> dict[str, float]:
        """The mean of the first minute and of the last; of shorter runs, of the first and last quarter."""
        values = [sample[who] for sample in self.samples]
        span = max(1, min(60, len(values) // 4))
        start, end = statistics.fmean(values[:span]), statistics.fmean(values[-span:])
        return {"start_mib": round(start, 1), "end_mib": round(end, 1), "max_mib": max(values)}


@contextlib.contextmanager
def probing(port: int) -> Iterator[Callable[[float], dict[str, Any]]]:
    """Probes by a process of their own while the block runs. Gives a function: the summary since a time.

    They run while capacity is measured too: what they take from the CPUs must not look like a loss under load.
    """
    with multiprocessing.Manager() as manager:
        stop, samples = manager.Event(), manager.list()
        prober = multiprocessing.Process(target=probe, args=(port, stop, samples))
        prober.start()
        try:
            yield lambda since: summary([sample for sample in list(samples) if sample[0] >= since])
        finally:
            stop.set()
            prober.join()


def cpu_seconds(server: psutil.Process) -> dict[str, float]:
    """What server and engine have computed so far: tells a slow server from a machine that others use."""
    times = {"server": [server.cpu_times()], "engine": [child.cpu_times() for child in server.children()]}
    return {name: sum(spent.user + spent.system for spent in own) for name, own in times.items()}


def logged(log: Path, offset: int) -> tuple[Counter[str], list[str]]:
    """Ids of the generations that the log tells after `offset`, counted; and its lines of errors."""
    generated: Counter[str] = Counter()
    errors = []
    with log.open() as lines:
        lines.seek(offset)
        for text in lines:
            line = json.loads(text) if text.startswith("{") else {"level": "error", "message": text}
            if line["message"] == "request" and line.get("outcome") == "ok":
                generated[line["request_id"]] += 1
            elif line["level"] in ("error", "critical"):
                errors.append(text[:1000])
    return generated, errors


# --- phases


def percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    times = sorted(value * 1000 for value in seconds)
    return {
        "p50_ms": round(statistics.median(times), 1),
        "p99_ms": round(times[min(len(times) - 1, int(len(times) * 0.99))], 1),
        "max_ms": round(times[-1], 1),
    }


def report(
    factor: float, seconds: float, made: Load, generated: Counter[str], errors: list[str], memory: Memory
) -> dict[str, Any]:
    """The summary of a phase, but for the probes and the capacity."""
    arrivals = made.arrivals
    outcomes = Counter(arrival.outcome for arrival in arrivals)
    accepted = [arrival for arrival in arrivals if arrival.status == 200]
    refused = [arrival for arrival in arrivals if arrival.outcome == "refused"]
    ids = {arrival.identity for arrival in accepted}
    again = sum(count - 1 for count in generated.values())
    # Drawn although refused, or for nobody; what a lost answer was drawn for is counted as lost.
    unasked = set(generated) - ids - {arrival.identity for arrival in arrivals if arrival.outcome == "lost"}
    in_time = sum(a.outcome == "ok" and a.due + a.seconds <= seconds for a in arrivals)
    return {
        "factor": factor,
        "seconds": seconds,
        "offered": len(arrivals),
        "accepted": len(accepted),
        **{name: outcomes[name] for name in ("ok", "refused", "lost")},
        "duplicated": outcomes["duplicated"] + again,
        "wrong": outcomes["wrong"],
        "errors": outcomes["error"],
        "drawn_but_not_accepted": len(unasked),
        "accepted_but_not_logged": len(ids - set(generated)),
        "server_log_errors": len(errors),
        "offered_per_s": round(len(arrivals) / seconds, 3),
        "goodput_per_s": round(in_time / seconds, 3),
        "accepted_latency": percentiles([arrival.seconds for arrival in accepted]),
        "refusal_latency": percentiles([arrival.seconds for arrival in refused]),
        "sent_late": percentiles([arrival.late for arrival in arrivals]),
        "server_memory": memory.ends(0),
        "engine_memory": memory.ends(1),
        "engine_restarts": len(memory.engines) - 1,
        "details": [f"{a.identity}: {a.detail}" for a in arrivals if a.detail][:20] + errors[:5],
    }


def failures(told: dict[str, Any]) -> list[str]:
    """What of the promise a phase did not keep."""
    none = ("lost", "duplicated", "wrong", "errors", "drawn_but_not_accepted", "accepted_but_not_logged")
    broken = [f"{name}: {told[name]}" for name in (*none, "server_log_errors", "engine_restarts") if told[name]]
    if told["factor"] > 1 and told["goodput_of_capacity"] < MIN_GOODPUT:
        broken.append(f"goodput: {told['goodput_of_capacity']} of capacity")
    if told["probes"]["p99_ms"] >= MAX_PROBE_P99_MS or told["probes"]["failed"]:
        broken.append(f"probes: {told['probes']}")
    if told["refusal_latency"].get("p99_ms", 0) >= MAX_REFUSAL_P99_MS:
        broken.append(f"refusals: {told['refusal_latency']}")
    for who in ("server_memory", "engine_memory"):
        if told[who]["end_mib"] - told[who]["start_mib"] > MAX_GROWTH_MIB:
            broken.append(f"{who}: {told[who]}")
    return broken


def show(told: dict[str, Any]) -> None:
    print(f"\n{told['factor']} x capacity for {told['seconds']} s", flush=True)
    for name, value in told.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        if name not in ("factor", "seconds", "details", "failures"):
            print(f"  {name:24} {value}", flush=True)
    for line in (*told["details"], *(f"FAILED {failure}" for failure in told["failures"])):
        print(f"  {line}", flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), options.server_flag) as (port, server, log),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process,
        contextlib.ExitStack() as stack,
    ):
        references = [draw(port, kind) for kind in range(KINDS)]
        probes = stack.enter_context(probing(port))
        capacities: list[float] = []

        def capacity() -> float:
            name = f"capacity-{len(capacities)}"
            made = process.submit(load, closed_loop, port, name, references, CLIENTS, options.capacity_seconds).result()
            bad = [arrival for arrival in made.arrivals if arrival.outcome != "ok"]
            if bad:
                raise RuntimeError(f"{name}: {bad[0]}")
            capacities.append(len(made.arrivals) / max(a.due + a.seconds for a in made.arrivals))
            print(f"capacity: {capacities[-1]:.2f}/s", flush=True)
            return capacities[-1]

        capacity()
        phases, rows, memories = [], {}, {}
        for number, factor in enumerate(options.factor):
            offset, memory, stop = log.stat().st_size, Memory(server), threading.Event()
            watcher = threading.Thread(target=memory.watch, args=(stop,))
            watcher.start()
            arguments = (f"x{factor}", references, factor * capacities[-1], options.seconds, options.seed + number)
            begun, spent = time.monotonic(), cpu_seconds(server)
            try:
                made = process.submit(load, open_loop, port, *arguments).result()
            finally:
                stop.set()
                watcher.join()
            probed = probes(begun)
            cpu = {name: round(seconds - spent[name], 1) for name, seconds in cpu_seconds(server).items()}
            generated, errors = logged(log, offset)
            before, after = capacities[-1], capacity()  # a shared machine is not the same for twenty minutes
            told = report(factor, options.seconds, made, generated, errors, memory)
            told |= {"capacity_before": round(before, 3), "capacity_after": round(after, 3)}
            told["goodput_of_capacity"] = round(told["goodput_per_s"] / statistics.fmean((before, after)), 3)
            told |= {"probes": probed, "cpu_s": {**cpu, "load": round(made.cpu_seconds, 1)}}
            told["failures"] = failures(told)
            show(told)
            phases.append(told)
            rows[str(factor)] = [
                [round(a.due, 3), a.kind, a.status, round(a.seconds * 1000, 1), a.outcome] for a in made.arrivals
            ]
            memories[str(factor)] = memory.samples
        return {
            "config": {
                **{name: value for name, value in vars(options).items() if name != "results"},
                "kinds": KINDS,
                "request": fields(0),
                "clients": CLIENTS,
                "timeout": TIMEOUT,
            },
            "versions": versions(),
            "references": references,
            "capacities_per_s": [round(value, 3) for value in capacities],
            "phases": phases,
            "memory_columns": ["server_mib", "engine_mib"],
            "memory": memories,
            "request_columns": COLUMNS,
            "requests": rows,
        }


def draw(port: int, kind: int) -> str:
    raw = asyncio.run(exchange(port, message(kind, f"reference-{kind}")))
    (prediction,) = json.loads(raw.partition(b"\r\n\r\n")[2])["predictions"]
    return picture_hash(prediction)


def versions() -> dict[str, Any]:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    names = ("torch", "diffusers", "transformers", "kserve", "uvicorn")
    return {
        "runtime": __version__,
        "commit": commit,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def dump(results: dict[str, Any]) -> str:
    """JSON with one line a request and a sample: diffs of thousands of lines of one number each help nobody."""
    lines = []
    for name, value in results.items():
        if name in ("requests", "memory"):
            parts = [
                f"  {json.dumps(key)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
                for key, rows in value.items()
            ]
            lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n }")
        else:
            lines.append(f" {json.dumps(name)}: " + json.dumps(value, indent=1).replace("\n", "\n "))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description="Open-loop load on a real server.")
    parser.add_argument("--seconds", type=float, default=300, help="of each phase")
    parser.add_argument("--factor", type=float, action="append", help="multiple of capacity; repeat it (0.5, 1, 3)")
    parser.add_argument("--capacity-seconds", type=float, default=20, help="of each measurement of capacity")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals")
    parser.add_argument("--server-flag", action="append", default=[], metavar="=--FLAG=VALUE", help="for the server")
    parser.add_argument("--results", type=Path, help="file for the raw results")
    options = parser.parse_args()
    options.factor = options.factor or [0.5, 1.0, 3.0]
    results = measure(options)
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(dump(results))
    return 1 if any(phase["failures"] for phase in results["phases"]) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Fixtures: the tiny models, and real server processes that serve them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# pytest takes it for leave to print whole diffs: of two pictures that differ it computes one for hours.
os.environ.pop("CI", None)

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 120
STOP_SECONDS = 60


SEPARATE = ("gpu", "browser")  # markers of tests that need what not every machine has


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`-m gpu` runs the GPU tests and fails where there is no GPU, `-m browser` those in Chromium; without it they are
    left out by name."""
    left_out = [marker for marker in SEPARATE if marker not in (config.option.markexpr or "")]
    chosen = [item for item in items if not any(item.get_closest_marker(marker) for marker in left_out)]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_unconfigure() -> None:
    while held:
        held.popleft().close()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline of every family; parallel workers share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "tiny-models"
    subprocess.run([sys.executable, "-m", "runtime.tiny", str(folder)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


@dataclass
class Server:
    """A running `python -m runtime`. `http` is its base URL, `grpc` its gRPC address."""

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    log: Path
    name: str

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 120
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body; an error status is no exception."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.http + path, data=data, method=method, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()

    def json(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        status, _, content = self.request(method, path, body, headers)
        return status, json.loads(content)

    def predict(self, *instances: dict[str, Any], **parameters: Any) -> list[dict[str, Any]]:
        """The predictions of a v1 call that must succeed."""
        status, answer = self.json(
            "POST", f"/v1/models/{self.name}:predict", {"instances": list(instances), "parameters": parameters}
        )
        assert status == 200, answer
        return answer["predictions"]

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            with contextlib.suppress(OSError):
                if self.request("GET", f"/v2/models/{self.name}/ready")[0] == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready after {READY_SECONDS} s:\n{self.log.read_text()}")

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


held: deque[socket.socket] = deque()
MOST_HELD = 64


def free_ports(count: int) -> list[int]:
    """Ports for servers that start soon. They stay bound, though nobody listens there, while the next dozens are asked
    for: so nobody else is given them meanwhile, and a server that sets SO_REUSEADDR, as all do, may bind them beside
    us."""
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    held.extend(sockets)
    while len(held) > MOST_HELD:
        held.popleft().close()
    return ports


def clean_environment(**changes: str) -> dict[str, str]:
    """This environment without anything that is a setting of the runtime."""
    from runtime.settings import Settings

    names = {name.upper() for name in Settings.model_fields}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**{k: v for k, v in os.environ.items() if k not in names}, "PYTHONPATH": path, **changes}


def start_server(folder: Path, log: Path, *flags: str, name: str = "tiny", **environment: str) -> Server:
    """`python -m runtime` on free ports; returns at once."""
    http, grpc = free_ports(2)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "runtime", "--model_id", str(folder), "--model_name", name),
                *("--http_port", str(http), "--grpc_port", str(grpc), "--log_format", "json", *flags),
            ],
            cwd=log.parent,
            # A server that is killed leaves its temporary folder behind.
            env=clean_environment(TMPDIR=str(log.parent), **environment),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Server(process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", log, name)


Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def serve(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """`serve("sd15")`: a ready server on that tiny model, started once and shared; flags and settings make another."""
    running: dict[Any, Server] = {}
    numbers = itertools.count()  # one that ended is started again, and what it had said is kept
    logs = tmp_path_factory.mktemp("servers")

    def get(family: str, *flags: str, **environment: str) -> Server:
        key = (family, flags, tuple(sorted(environment.items())))
        if key not in running or running[key].process.poll() is not None:
            log = logs / f"{family}-{next(numbers)}.log"
            running[key] = start_server(tiny_models / family, log, *flags, **environment)
        running[key].wait_ready()
        return running[key]

    yield get
    statuses = {key: server.stop() for key, server in running.items()}
    assert not any(statuses.values()), f"a server did not stop cleanly: {statuses}"


@pytest.fixture
def start(tiny_models: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`start("sd15", …)`: a server of the test's own, not waited for; killed afterwards if it still runs."""
    started: list[Server] = []

    def begin(family: str | Path, *flags: str, **environment: str) -> Server:
        folder = family if isinstance(family, Path) else tiny_models / family
        server = start_server(folder, tmp_path / f"server-{len(started)}.log", *flags, **environment)
        started.append(server)
        return server

    yield begin
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


# Put before everything else that a server's processes import.
HOLD = """\
import os, sys, time

def wait(name):
    gate = os.path.join(os.path.dirname(__file__), name)
    if os.path.exists(gate + ".shut"):
        open(gate + ".held", "w").close()
    while os.path.exists(gate + ".shut"):
        time.sleep(0.01)

def audit(event, arguments):
    if event == "os.mkdir":
        wait(os.path.basename(os.fsdecode(arguments[0])))

sys.addaudithook(audit)
if "runtime.engine.worker" in sys.orig_argv:
    from multiprocessing.connection import Connection

    send = Connection.send

    def held(self, message):
        send(self, message)
        if stage := getattr(message, "name", None):
            wait(stage)

    Connection.send = held
"""


class Gate:
    """Servers that are started with `environment` stand still where a gate is shut: their engines once they have told
    the stage of that name, and whoever is to make a folder of that name, as if its disk hung. What is asked meanwhile
    is asked in time, on however fast a machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "sitecustomize.py").write_text(HOLD)
        self.environment = {"PYTHONPATH": os.pathsep.join((str(folder), clean_environment()["PYTHONPATH"]))}

    def shut(self, name: str) -> None:
        (self._folder / f"{name}.held").unlink(missing_ok=True)
        (self._folder / f"{name}.shut").touch()

    def open(self, name: str) -> None:
        (self._folder / f"{name}.shut").unlink()

    def wait_held(self, name: str) -> None:
        """Until somebody stands before it."""
        deadline = time.monotonic() + READY_SECONDS
        while not (self._folder / f"{name}.held").exists():
            assert time.monotonic() < deadline, f"nobody came to the gate {name!r}"
            time.sleep(0.01)


@pytest.fixture
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    return Gate(tmp_path_factory.mktemp("gate"))

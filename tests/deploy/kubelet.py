"""A stand-in of kubelet and of KServe's storage initializer: runs a template's pod in a sandbox of this machine.

What it does not do: pull the image (the code and this Python's packages stand at the image's paths), give a GPU
(DEVICE=auto takes the CPU), limit memory, or write the store's copy itself (a folder is the initializer's result).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT
from tests.deploy.manifests import Object, image, merged

NEW_NETWORK = 0x40000000
UNSHARE = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child")


def can_run() -> bool:
    return os.geteuid() == 0 and not subprocess.run([*UNSHARE, "true"], capture_output=True).returncode


def expanded(value: str, environment: dict[str, str]) -> str:
    """`$(NAME)` replaced as Kubernetes does: what is not known stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), value)


def environment_of(container: Object, secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """A container's variables: the image's, then envFrom, then env; a missing optional Secret gives nothing."""
    found = {"PATH": "/usr/bin:/bin", **image()["env"]}
    for source in container.get("envFrom", []):
        found |= secrets[source["secretRef"]["name"]]
    known: dict[str, str] = {}  # $(NAME) in `env` sees only what stands before it in `env`
    for variable in container.get("env", []):
        if "value" in variable:
            known[variable["name"]] = expanded(variable["value"], known)
        else:
            ref = variable["valueFrom"]["secretKeyRef"]
            secret = secrets.get(ref["name"])
            assert secret is not None or ref.get("optional")
            if secret is not None:
                known[variable["name"]] = secret[ref["key"]]
    return found | known


@dataclass
class Pod:
    """The pod of the InferenceService `name`. `models` is what lies at /mnt/models, as the initializer leaves it."""

    name: str
    folder: Path
    models: Path | None = None
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    more: dict[str, str] = field(default_factory=dict)  # variables beside the template's

    def __post_init__(self) -> None:
        self.merged = merged(self.name)
        self.container: Object = self.merged["container"]
        self.uid = random.randrange(1_000_000_000, 2_000_000_000)
        self.log = self.folder / "log"
        self.port = self.container["ports"][0]["containerPort"]
        self._spec().write_text(json.dumps(self._sandbox()))
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*UNSHARE, sys.executable, str(Path(__file__).with_name("sandbox.py")), str(self._spec())],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
            )
        while "made" not in self.text():
            assert self.process.poll() is None, self.text()
            time.sleep(0.01)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (self.pid,) = map(int, children)
        self.net = f"/proc/{self.pid}/ns/net"
        self._threads = ThreadPoolExecutor(8, initializer=self._enter)
        self.misses: list[str] = []
        self._over = threading.Event()

    def _spec(self) -> Path:
        return self.folder / "spec.json"

    def _sandbox(self) -> Object:
        root = self.folder / "root"
        root.mkdir()
        mounts: list[tuple[str, str, bool]] = []
        places = {mount["name"]: mount["mountPath"] for mount in self.container["volumeMounts"]}
        for volume in self.merged["spec"]["volumes"]:
            place = self.folder / "volumes" / volume["name"]
            place.mkdir(parents=True)
            if "secret" in volume:
                for key, value in self.secrets[volume["secret"]["secretName"]].items():
                    (place / key).write_text(value)
                mounts.append((str(place), places[volume["name"]], True))
                continue
            # kubelet makes an emptyDir writable for all; a claim belongs to the pod's group
            place.chmod(0o777 if "emptyDir" in volume else 0o2770)
            mounts.append((str(place), places[volume["name"]], False))
        mounts.sort(key=lambda mount: mount[1].count("/"))
        if self.models is not None:
            copy = self.folder / "models"
            shutil.copytree(self.models, copy)
            subprocess.run(["chmod", "-R", "a+rX,a-w", copy], check=True)
            mounts.append((str(copy), "/mnt/models", True))
        # The image: code, and this interpreter's packages where its virtual environment is.
        mounts.append((str(ROOT / "runtime"), "/app/runtime", True))
        mounts.append((sys.prefix, "/opt/venv", True))
        if not sys.base_prefix.startswith("/usr"):
            mounts.append((sys.base_prefix, sys.base_prefix, True))
        env = environment_of(self.container, self.secrets)
        arguments = [expanded(value, env) for value in self.container.get("args", [])]
        command = self.container.get("command") or image()["entrypoint"]
        return {
            "root": str(root),
            "mounts": mounts,
            "uid": self.uid,
            "env": env,
            "workdir": image()["workdir"],
            "command": [*command, *arguments],
        }

    def _enter(self) -> None:
        with Path(self.net).open() as namespace:
            assert not ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), NEW_NETWORK), "setns"

    def begin(self) -> None:
        """Start the container's process."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self.more).encode() + b"\n")
        self.process.stdin.close()
        self.begun = time.monotonic()

    def inside(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, done inside the pod's network."""
        return self._threads.submit(work).result()

    @contextlib.contextmanager
    def store(self, folder: Path, connection: dict[str, str]) -> Iterator[None]:
        """An S3 server over `folder` in the pod's network, as the data connection names it, until the block ends."""
        keys = f"{connection['AWS_ACCESS_KEY_ID']},{connection['AWS_SECRET_ACCESS_KEY']}"
        address = connection["AWS_S3_ENDPOINT"].removeprefix("http://")
        program = str(Path(sys.executable).with_name("rclone"))
        serve = [program, "serve", "s3", "--addr", address, "--auth-key", keys, "--config", "/dev/null", str(folder)]
        host, port = address.split(":")
        with (self.folder / "store.log").open("wb") as log:
            process = subprocess.Popen(["nsenter", f"--net={self.net}", *serve], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    self.inside(lambda: socket.create_connection((host, int(port)), 1).close())
                    break
                except OSError:
                    assert time.monotonic() < deadline and process.poll() is None, (
                        self.folder / "store.log"
                    ).read_text()
                    time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait()

    def call(
        self, method: str, path: str, body: Any = None, timeout: float = 60, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of a request to the pod, made inside its network."""
        return self._threads.submit(self._call, method, path, body, timeout, headers).result()

    def later(self, method: str, path: str, body: Any) -> Any:
        return self._threads.submit(self._call, method, path, body, 60)

    def _call(
        self, method: str, path: str, body: Any, timeout: float, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def probe(self, kind: str) -> bool:
        """One probe of the template, with its path, port and timeout."""
        probe = self.container[f"{kind}Probe"]
        assert probe["httpGet"]["port"] == self.port
        try:
            return 200 <= self.call("GET", probe["httpGet"]["path"], timeout=probe["timeoutSeconds"])[0] < 400
        except OSError:
            return False

    def start(self, hurry: float) -> None:
        """Begin, and probe as kubelet does until the pod is ready; periods are divided by `hurry`, the time that the
        template gives is not.

        Liveness is probed from the first startup success on, and goes on until the pod stops.
        """
        self.begin()
        for kind in ("startup", "readiness"):
            probe = self.container[f"{kind}Probe"]
            deadline = time.monotonic() + probe["failureThreshold"] * probe["periodSeconds"]
            while not self.probe(kind):
                assert self.process.poll() is None, self.text()
                assert time.monotonic() < deadline, f"kubelet would restart the pod: {kind}\n{self.text()}"
                time.sleep(probe["periodSeconds"] / hurry)
        self._prober = threading.Thread(target=self._live, args=(hurry,))
        self._prober.start()

    def _live(self, hurry: float) -> None:
        while not self._over.wait(self.container["livenessProbe"]["periodSeconds"] / hurry):
            if not self.probe("liveness"):
                self.misses.append(f"liveness after {time.monotonic() - self.begun:.1f} s")

    def engine(self) -> psutil.Process:
        """The engine process, as this machine sees it."""
        inside = psutil.Process(self.pid).children(recursive=True)
        return next(process for process in inside if "runtime.engine.worker" in process.cmdline())

    def terminate(self, then: Callable[[], None] = lambda: None) -> tuple[int, float]:
        """SIGTERM, without the preStop sleep before it; the exit status and the seconds it took. `then` is called once
        the signal is sent."""
        self._over.set()
        self._prober.join()
        begun = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        then()
        grace = self.merged["spec"]["terminationGracePeriodSeconds"]
        return self.process.wait(grace), time.monotonic() - begun

    def text(self) -> str:
        """The log of the container."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        self._over.set()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._threads.shutdown(cancel_futures=True)

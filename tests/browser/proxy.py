"""A reverse proxy that serves another server below a prefix, as an ingress or a notebook's proxy does."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "host"}


@contextlib.contextmanager
def below(prefix: str, target: str) -> Iterator[str]:
    """The URL at which `target` is served below `prefix`; everything else there is 404."""
    upstream = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            if not self.path.startswith(f"{prefix}/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            with contextlib.closing(http.client.HTTPConnection(upstream, timeout=60)) as connection:
                connection.request(self.command, self.path.removeprefix(prefix), body, headers)
                response = connection.getresponse()
                self.send_response_only(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in HOP:
                        self.send_header(name, value)
                self.send_header("connection", "close")
                self.end_headers()
                with contextlib.suppress(OSError):  # the browser left: so does the connection behind
                    while part := response.read1(65536):
                        self.wfile.write(part)
                        self.wfile.flush()

        do_GET = do_POST = do_DELETE = do_HEAD = forward

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}{prefix}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

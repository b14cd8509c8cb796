"""One pure-ASGI layer around every route: ids, keys, body limits, disconnects, errors in one shape."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from typing import Any

import orjson

from runtime.access import Keys, is_open, is_signed
from runtime.errors import DiffusionError, PayloadTooLarge, Unauthorized
from runtime.logs import credential, log, request_scope, trace_context, unexpected, with_request_id
from runtime.protocol.openai_errors import error_body, error_headers

PROBES = ("/v2/health/", "/metrics", "/health")


class Guard:
    """Runs the app in a task of its own, so that a client that leaves cancels what it asked for.

    (Starlette's BaseHTTPMiddleware hides disconnects from the routes below it.)
    """

    def __init__(self, app: Any, max_body_bytes: int, keys: Keys | None = None) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._keys = keys or Keys()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        pairs = [(key.decode("latin-1").lower(), value.decode("latin-1")) for key, value in scope["headers"]]
        headers = dict(pairs)
        trace, echoed = trace_context(pairs)
        with request_scope(headers.get("x-request-id"), trace) as identity:
            exchange = _Exchange(scope, receive, send, identity, echoed, self._max_body_bytes)
            await exchange.run(self._app, headers, self._keys)


class _Exchange:
    """One request and its response."""

    def __init__(
        self, scope: Any, receive: Any, send: Any, identity: str, echoed: Iterable[tuple[str, str]], max_body_bytes: int
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._identity = identity
        self._told = [(name.encode(), value.encode()) for name, value in (("x-request-id", identity), *echoed)]
        self._max_body_bytes = max_body_bytes
        self._received = 0
        self._body_read = asyncio.Event()
        self._status = 0
        self._begun = time.monotonic()

    async def run(self, app: Any, headers: dict[str, str], keys: Keys) -> None:
        try:
            method, path = self._scope["method"], self._scope["path"]
            if not is_open(method, path) and not is_signed(method, path, self._scope.get("query_string", b"")):
                credential.set(keys.require(headers))
            self._limit(int(headers["content-length"]) if headers.get("content-length", "").isdigit() else 0)
            work = asyncio.create_task(app(self._scope, self.receive, self.send))
            watch = asyncio.create_task(self._watch(work))
            try:
                await work
            finally:
                watch.cancel()
                work.cancel()
        except asyncio.CancelledError:
            if not self._gone:
                raise
            self._log(499, "the client left")
        except DiffusionError as error:
            await self._refuse(
                error, str(error) if error.http_status < 500 else with_request_id(str(error), self._identity)
            )
        except Exception as error:
            if not self._gone:
                await self._answer(500, unexpected(error, self._identity))

    _gone = False

    async def _watch(self, work: asyncio.Task[None]) -> None:
        """Cancel `work` when the client leaves after its request is read."""
        await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        work.cancel()

    async def receive(self) -> Any:
        if self._body_read.is_set():  # a route that looks for a disconnect: the watcher tells it by cancelling
            await asyncio.get_running_loop().create_future()
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone = True
        else:
            self._received += len(message.get("body", b""))
            self._limit(self._received)
        if not message.get("more_body", False):
            self._body_read.set()
        return message

    def _limit(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise PayloadTooLarge(f"body: {size} bytes; at most {self._max_body_bytes} fit (MAX_BODY_BYTES)")

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *self._told]}
        await self._send(message)

    async def _refuse(self, error: DiffusionError, text: str) -> None:
        self._log(error.http_status, text)
        headers = [] if error.retry_after is None else [(b"retry-after", str(error.retry_after).encode())]
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", b"Bearer"))
        await self._answer(error.http_status, text, headers, error)

    async def _answer(
        self,
        status: int,
        text: str,
        headers: list[tuple[bytes, bytes]] | None = None,
        error: DiffusionError | None = None,
    ) -> None:
        if self._status:  # the response has begun: it can only be cut short
            return
        path = self._scope["path"]
        body = orjson.dumps(error_body(path, status, text, error))
        start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
        start += [(name.encode(), value.encode()) for name, value in error_headers(path, status).items()]
        with contextlib.suppress(OSError):
            await self.send({"type": "http.response.start", "status": status, "headers": start})
            await self.send({"type": "http.response.body", "body": body})

    def _log(self, status: int, text: str) -> None:
        path = self._scope["path"]
        if status == 401 or not (path.startswith(PROBES) or path.endswith("/ready")):
            log(
                logging.INFO,
                "refused" if status != 499 else "cancelled",
                status=status,
                path=path[:200],
                error=text,
                seconds=round(time.monotonic() - self._begun, 4),
            )

"""The error tree, and how each class reaches a client: over HTTP through the real Guard and a real uvicorn, over gRPC
through the real interceptor."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import orjson
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from grpc import aio

from runtime import errors
from runtime.engine.client import EngineDied
from runtime.errors import DiffusionError, GenerationFailed, InvalidRequest, StartupError, all_errors, shown
from runtime.jobs.record import JobError
from runtime.logs import request_id
from runtime.middleware import Guard
from runtime.protocol.grpc import Errors
from runtime.protocol.openai_errors import error_body, raised

MAX_BODY = 1000
SECONDS = 60
CLASSES = {error.__name__: error for error in (*all_errors(), EngineDied)}

# What each class is, as the table at the head of errors.py says.
TABLE = {
    "InvalidRequest": (400, "INVALID_ARGUMENT"),
    "ModelNotFound": (404, "NOT_FOUND"),
    "Unauthorized": (401, "UNAUTHENTICATED"),
    "NotFound": (404, "NOT_FOUND"),
    "Conflict": (409, "ABORTED"),
    "Gone": (410, "NOT_FOUND"),
    "PayloadTooLarge": (413, "RESOURCE_EXHAUSTED"),
    "QueueFull": (429, "RESOURCE_EXHAUSTED"),
    "Cancelled": (499, "CANCELLED"),
    "GenerationFailed": (500, "INTERNAL"),
    "NotImplementedHere": (501, "UNIMPLEMENTED"),
    "NotReady": (503, "UNAVAILABLE"),
    "EngineDied": (503, "UNAVAILABLE"),
    "DeadlineExceeded": (504, "DEADLINE_EXCEEDED"),
    "OutOfMemory": (507, "RESOURCE_EXHAUSTED"),
}


# --- the tree


def test_every_class_is_in_the_table() -> None:
    assert set(CLASSES) == set(TABLE)
    declared = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, DiffusionError)
    }
    assert declared - {"DiffusionError"} == {error.__name__ for error in all_errors()}


@pytest.mark.parametrize("name", TABLE)
def test_status_and_code(name: str) -> None:
    error = CLASSES[name]
    assert (error.http_status, error.grpc_code) == TABLE[name]
    assert 400 <= error.http_status < 600
    assert isinstance(getattr(grpc.StatusCode, error.grpc_code), grpc.StatusCode)
    assert name == "EngineDied" or f"{name:19} {error.http_status}  {error.grpc_code}" in (errors.__doc__ or "")


def test_an_error_is_its_message() -> None:
    error = InvalidRequest("width: 5", retry_after=3)
    assert (str(error), error.retry_after) == ("width: 5", 3)
    assert InvalidRequest("x").retry_after is None
    assert not issubclass(StartupError, DiffusionError)  # no client ever reads one


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (None, "None"),
        ("a'b", '"a\'b"'),
        ("a\nb", "'a\\nb'"),
        (b"\xff", "b'\\xff'"),
        ([1, 2], "[1, 2]"),
        ("x" * 78, repr("x" * 78)),
    ],
)
def test_shown(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("value", ["x" * 10**7, b"x" * 10**7, ["x"] * 10**5, "\n" * 10**6, {"a": "b" * 10**6}])
def test_shown_is_short(value: Any) -> None:
    began = time.thread_time()  # not of those that the machine is shared with
    text = shown(value)
    assert len(text) == 80 and text.endswith("…") and "\n" not in text
    assert time.thread_time() - began < 1


# --- over HTTP


class Served:
    """A small app behind the real Guard, on a socket. `events` holds what its routes saw."""

    def __init__(self, port: int, events: dict[str, threading.Event]) -> None:
        self.port = port
        self.events = events

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, bytes))
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def small_app(events: dict[str, threading.Event]) -> FastAPI:
    app = FastAPI()

    @app.get("/ok")
    async def ok() -> dict[str, str]:
        return {"request_id": request_id.get()}

    @app.post("/raise/{name}")
    @app.post("/openai/raise/{name}")
    async def fail(name: str, retry: int | None = None) -> None:
        raise CLASSES[name](f"{name} says why", retry_after=retry)

    @app.post("/unexpected")
    @app.post("/openai/unexpected")
    async def unexpected() -> None:
        raise RuntimeError("secret-4711")

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(str(len(await request.body())))

    async def half(error: Exception) -> AsyncIterator[bytes]:
        yield b"begun"
        raise error

    @app.post("/half/{kind}")
    async def half_answer(kind: str) -> StreamingResponse:
        error = GenerationFailed("too late") if kind == "ours" else RuntimeError("secret-4711")
        return StreamingResponse(half(error), headers={"content-length": "1000"})

    @app.post("/slow")
    async def slow(request: Request) -> None:
        await request.body()
        events["begun"].set()
        try:
            await asyncio.sleep(2 * SECONDS)
        except asyncio.CancelledError:
            events["cancelled"].set()
            raise

    @app.post("/polls")
    async def polls(request: Request) -> None:
        await request.body()
        events["polling"].set()
        with contextlib.suppress(asyncio.CancelledError):
            await request.receive()  # a route that waits for the disconnect itself
            events["told"].set()
            return
        events["stopped"].set()

    app.add_middleware(Guard, max_body_bytes=MAX_BODY)
    return app


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    names = ("begun", "cancelled", "polling", "told", "stopped")
    events = {name: threading.Event() for name in names}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(small_app(events), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Served(listener.getsockname()[1], events)
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("name", TABLE)
def test_each_class_over_http(served: Served, name: str) -> None:
    status, headers, body = served.request("POST", f"/raise/{name}", headers={"x-request-id": "my-id"})
    assert status == TABLE[name][0]
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == "my-id"
    assert "retry-after" not in headers
    suffix = " (request my-id)" if status >= 500 else ""
    assert orjson.loads(body) == {"error": f"{name} says why{suffix}"}
    assert headers["content-length"] == str(len(body))


# Type and code on the routes in OpenAI's style.
OPENAI = {
    "InvalidRequest": ("invalid_request_error", "invalid_value"),
    "ModelNotFound": ("invalid_request_error", "model_not_found"),
    "Unauthorized": ("invalid_request_error", "invalid_api_key"),
    "NotFound": ("invalid_request_error", "not_found"),
    "Conflict": ("invalid_request_error", "conflict"),
    "Gone": ("invalid_request_error", "expired"),
    "PayloadTooLarge": ("invalid_request_error", "payload_too_large"),
    "QueueFull": ("rate_limit_error", "rate_limit_exceeded"),
    "Cancelled": ("invalid_request_error", "cancelled"),
    "GenerationFailed": ("server_error", "generation_failed"),
    "NotImplementedHere": ("server_error", "not_implemented_here"),
    "NotReady": ("server_error", "not_ready"),
    "EngineDied": ("server_error", "engine_died"),
    "DeadlineExceeded": ("server_error", "deadline_exceeded"),
    "OutOfMemory": ("server_error", "out_of_memory"),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_class_in_openais_shape(served: Served, name: str) -> None:
    status, headers, body = served.request("POST", f"/openai/raise/{name}?retry=7", headers={"x-request-id": "my-id"})
    assert status == TABLE[name][0]  # as everywhere
    kind, code = OPENAI[name]
    suffix = " (request my-id)" if status >= 500 else ""
    told = {"message": f"{name} says why{suffix}", "type": kind, "param": None, "code": code}
    assert orjson.loads(body) == {"error": told}
    assert headers["retry-after"] == "7" and headers["content-type"] == "application/json"
    # The SDK asks again on its own unless it's told that this is of no use.
    assert headers.get("x-should-retry") == (None if status in (429, 503) else "false")


def test_an_unexpected_error_in_openais_shape(served: Served) -> None:
    status, headers, body = served.request("POST", "/openai/unexpected")
    assert (status, headers["x-should-retry"]) == (500, "false")
    error = json.loads(body)["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", "internal_error", None)
    assert "secret" not in error["message"] and headers["x-request-id"] in error["message"]


@pytest.mark.parametrize("name", TABLE)
def test_a_failed_job_raises_what_a_request_does(name: str) -> None:
    error = CLASSES[name]("says why")
    again = raised(JobError(error.code, str(error), error.http_status))
    assert str(again) == "says why"
    if error.http_status in (429, 503):  # a client would send the same again, and this job will not end otherwise
        assert type(again) is GenerationFailed
    else:
        assert type(again) is CLASSES[name]


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ("width: 5 is not an integer", "width", "invalid_value"),
        ("prompt: missing; it must be a string", "prompt", "missing_required_parameter"),
        ("'colour' is not a field of this model; known fields: …", "colour", "unknown_parameter"),
        ("image[3]: the PNG file is damaged", "image", "invalid_value"),
        ("instances[2]: width: 5 is not", "width", "invalid_value"),
        ("body: not valid JSON", None, "invalid_value"),
        ("X-Request-Timeout: 'x' is not a number", "X-Request-Timeout", "invalid_value"),
        ("width x height: 9 is too many", None, "invalid_value"),
        ("this server: is odd", None, "invalid_value"),
    ],
)
def test_the_field_that_is_blamed(message: str, param: str | None, code: str) -> None:
    error = error_body("/v1/images/edits", 400, message, InvalidRequest(message))["error"]
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("name", ["QueueFull", "NotReady", "EngineDied"])
def test_retry_after(served: Served, name: str) -> None:
    _, headers, _ = served.request("POST", f"/raise/{name}?retry=7")
    assert headers["retry-after"] == "7"


def test_an_unexpected_error_tells_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    status, headers, body = served.request("POST", "/unexpected")
    identity = headers["x-request-id"]
    assert status == 500
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"error": f"internal error (request {identity}); the server's log has the details"}
    assert re.fullmatch("[0-9a-f]{32}", identity)
    (record,) = [r for r in caplog.records if r.name == "diffusion_runtime" and r.levelname == "ERROR"]
    assert record.getMessage() == "internal error: RuntimeError"
    assert record.exc_info is not None and "secret-4711" in str(record.exc_info[1])


def test_refusals_are_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "diffusion_runtime")
    served.request("POST", "/raise/InvalidRequest")
    (record,) = [r for r in caplog.records if r.name == "diffusion_runtime"]
    fields: dict[str, Any] = vars(record)["fields"]
    assert record.getMessage() == "refused"
    assert (fields["status"], fields["path"]) == (400, "/raise/InvalidRequest")
    assert fields["error"] == "InvalidRequest says why"
    assert 0 <= fields["seconds"] < SECONDS


@pytest.mark.parametrize("kind", ["ours", "other"])
def test_an_error_after_the_response_began_cuts_it_short(
    served: Served, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A client must not take half a body for a whole one."""
    with pytest.raises(http.client.IncompleteRead) as caught:
        served.request("POST", f"/half/{kind}")
    assert caught.value.partial == b"begun"
    assert not [record for record in caplog.records if record.name.startswith("uvicorn") and record.exc_info]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("my-id", True),
        ("a b;c=d", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("caf\xe9", False),
        ("tab\there", False),
    ],
)
def test_request_ids(served: Served, given: str, kept: bool) -> None:
    status, headers, body = served.request("GET", "/ok", headers={"X-Request-ID": given})
    assert status == 200
    identity = headers["x-request-id"]
    assert identity == json.loads(body)["request_id"]
    assert (identity == given) is kept
    if not kept:
        assert re.fullmatch("[0-9a-f]{32}", identity)


def test_each_request_has_an_id_of_its_own(served: Served) -> None:
    made = {served.request("GET", "/ok")[1]["x-request-id"] for _ in range(5)}
    assert len(made) == 5
    assert "x-request-id" in served.request("GET", "/no-such-route")[1]


def chunked(size: int) -> Iterator[bytes]:
    for start in range(0, size, 100):
        yield b"x" * min(100, size - start)


@pytest.mark.parametrize("form", [lambda size: b"x" * size, chunked], ids=["content-length", "chunked"])
def test_bodies_have_a_limit(served: Served, form: Callable[[int], Any]) -> None:
    assert served.request("POST", "/echo", form(MAX_BODY))[::2] == (200, str(MAX_BODY).encode())
    status, headers, body = served.request("POST", "/echo", form(MAX_BODY + 1))
    assert status == 413
    message = json.loads(body)["error"]
    assert message.startswith("body: ") and f"at most {MAX_BODY} fit (MAX_BODY_BYTES)" in message
    assert headers["x-request-id"]


def test_a_declared_length_is_refused_before_the_body_is_sent(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS) as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_leaves_cancels_its_route(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS) as client:
        for name in ("begun", "cancelled"):  # as they were left when this runs once more
            served.events[name].clear()
        client.sendall(b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        assert served.events["begun"].wait(SECONDS)
        assert not served.events["cancelled"].is_set()
    assert served.events["cancelled"].wait(SECONDS)
    assert served.request("GET", "/ok")[0] == 200


def test_a_route_that_waits_for_the_disconnect_is_cancelled_too(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS) as client:
        client.sendall(b"POST /polls HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert served.events["polling"].wait(SECONDS)
    assert served.events["stopped"].wait(SECONDS)
    assert not served.events["told"].is_set()


# --- over gRPC


class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """/test/<name> raises the class of that name, or a RuntimeError."""

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]

        async def answer(request: bytes, context: Any) -> bytes:
            if name == "ok":
                return request_id.get().encode()
            if name in CLASSES:
                raise CLASSES[name](f"{name} says why", retry_after=7 if request else None)
            raise RuntimeError("secret-4711")

        return grpc.unary_unary_rpc_method_handler(answer)


Answer = tuple[grpc.StatusCode, str, dict[str, str], dict[str, str]]


async def call_all(names: list[str], payload: bytes = b"") -> dict[str, Answer]:
    """Status, details, initial and trailing metadata of a call of each name."""
    server = aio.server(interceptors=(Errors(),))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    made: dict[str, Answer] = {}
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for name in names:
            call = channel.unary_unary(f"/test/{name}")(payload, metadata=(("x-request-id", "my-id"),), timeout=SECONDS)
            details = ""
            try:
                details = (await call).decode()
            except aio.AioRpcError as error:
                details = error.details() or ""
            initial, trailing = dict(await call.initial_metadata()), dict(await call.trailing_metadata())
            made[name] = (await call.code(), details, initial, trailing)
    await server.stop(0)
    return made


def test_each_class_over_grpc() -> None:
    made = asyncio.run(call_all([*TABLE, "ok", "unexpected"]))
    for name, (status, code) in TABLE.items():
        got, details, initial, trailing = made[name]
        assert got is getattr(grpc.StatusCode, code), name
        assert details == f"{name} says why" + (" (request my-id)" if status >= 500 else "")
        assert initial["x-request-id"] == "my-id"
        assert "retry-after" not in trailing
    assert made["ok"][:2] == (grpc.StatusCode.OK, "my-id")
    got, details, *_ = made["unexpected"]
    assert got is grpc.StatusCode.INTERNAL
    assert details == "internal error (request my-id); the server's log has the details"


def test_retry_after_over_grpc() -> None:
    made = asyncio.run(call_all(["NotReady", "QueueFull"], b"retry"))
    assert [trailing["retry-after"] for *_, trailing in made.values()] == ["7", "7"]

"""A real server on anything that a socket carries: an answer soon, never a 5xx, and the next good request works."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import grpc
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from schemathesis import GenerationMode

from tests.e2e.test_bad_input import unharmed
from tests.fuzz.inputs import changes, checked, more, mutated, texts, to_json, values
from tests.fuzz.test_fuzz_decoders import documents, messages, rest_bodies

if TYPE_CHECKING:
    from tests.conftest import Serve, Server

SECONDS = 60  # without an answer: a hang
# Whatever is asked for, it is drawn in a moment.
FLAGS = ("--max_pixels", "16384", "--max_steps", "8", "--max_n", "2", "--max_instances", "4")
NOT_IMPLEMENTED = re.compile(rb"no explainer|repository API is off|versions are not served")  # what 501 is for
LATE = re.compile(r"timeout: [0-9.e+-]+ s passed")  # what 504 is for: the request itself set the timeout
UVICORN = b"Invalid HTTP request received."  # what is no HTTP is refused before it reaches us


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    return serve("sd15", *FLAGS)


def exchange(server: Server, content: bytes, done: bool = False) -> bytes:
    """All that the server answers. `done`: nothing more is sent, and the server is told so."""
    address = urlsplit(server.http)
    received = b""
    with socket.create_connection((address.hostname, address.port), timeout=SECONDS) as connection:
        # A refusal may come, and the connection be closed, before all is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(content)
            if done:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**20):
                received += part
    return received


def is_meant(status: int, body: bytes) -> bool:
    """Whether a 5xx is the answer to what was asked for."""
    if status == 501:
        return not body or NOT_IMPLEMENTED.search(body) is not None
    return status == 504 and LATE.search(body.decode(errors="replace")) is not None


def assert_answer(received: bytes, method: bytes) -> None:
    """One whole response, no fault of the server's; refusals in the one shape, in few words."""
    while received.startswith(b"HTTP/1.1 1"):  # 100 Continue
        received = received.partition(b"\r\n\r\n")[2]
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    assert first.startswith("HTTP/1.1 "), received[:200]
    status = int(first.split(" ")[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert status < 500 or is_meant(status, body), received[:1000]
    if method == b"HEAD" or body == UVICORN:
        return
    assert int(headers["content-length"]) == len(body)
    if status >= 400:
        document = json.loads(body)
        assert list(document) == ["error"], body[:1000]
        error = document["error"]  # an object on the routes in OpenAI's style
        checked(error["message"] if isinstance(error, dict) else error)


METHODS = [b"GET", b"POST", b"POST", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE"]
ROUTES = [
    "/v1/models/tiny:predict",
    "/v2/models/tiny/infer",
    "/v1/models/model:predict",
    "/v1/models",
    "/v1/models/tiny",
    "/v1/models/tiny:explain",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models",
    "/v2/models/tiny",
    "/v2/models/tiny/ready",
    "/v2/models/tiny/versions/1/infer",
    "/v2/repository/index",
    "/v2/repository/models/tiny/load",
    "/v2/repository/models/tiny/unload",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
    "/v1/videos/video_1/content",
    "/v1/videos/sync",
    "/v1/jobs/image_1/content/0?signature=x",
    "/openai/v1/models/tiny",
    "/health",
    "/metrics",
    "/",
    "/openapi.json",
    "/docs",
]
# What may stand in a request line as it is; the rest is percent-encoded.
visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=12)
encoded = st.binary(max_size=8).map(lambda data: "".join(f"%{byte:02x}" for byte in data))
segments = st.sampled_from(["..", "%2e%2e", "tiny", "models", "v2", "", "x" * 3000]) | visible | encoded


@st.composite
def targets(draw: st.DrawFn) -> str:
    route = draw(st.sampled_from(ROUTES[:2]) | st.sampled_from(ROUTES))
    if draw(st.integers(0, 3)) == 0:
        parts = route.split("/")
        parts[draw(st.integers(1, len(parts) - 1))] = draw(segments)
        route = "/".join(parts)
    return route + draw(st.just("") | st.just("") | segments.map(lambda text: f"?{text}") | segments)


header_values = st.sampled_from(
    [b"", b"0", b"gzip", b"text/plain", b"*/*;q=2", b"100-continue", b"\xff\xfe", b"x" * 5000]
) | (st.binary(max_size=20).map(lambda data: data.translate(None, b"\r\n\0")))
header_names = st.sampled_from(
    [
        *(b"X-Request-ID", b"Content-Type", b"Accept", b"Accept-Encoding", b"Content-Encoding", b"Authorization"),
        *(b"Inference-Header-Content-Length", b"Expect", b"Range", b"If-Match", b"Cookie", b"Forwarded", b"Origin"),
        *(b"traceparent", b"X-Forwarded-For", b"X-HTTP-Method-Override", b"Host", b"TE", b"Trailer"),
    ]
)
headers = st.lists(st.tuples(header_names, header_values), max_size=5)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A body, and the headers that belong to it."""
    kind = draw(st.sampled_from(["v1", "v2", "v2", "value", "bytes", "none"]))
    own: list[tuple[bytes, bytes]] = []
    if kind == "v2":
        body, length = draw(rest_bodies())
        if length is not None:
            own.append(
                (b"Inference-Header-Content-Length", length.encode("latin-1", "replace").translate(None, b"\r\n\0"))
            )
    elif kind == "none":
        body = b""
    else:
        body = draw(st.binary(max_size=60) if kind == "bytes" else (documents if kind == "v1" else values).map(to_json))
    if draw(st.integers(0, 3)) == 0:
        body = mutated(body, draw(changes))
    if draw(st.integers(0, 9)) == 0:
        body, own = gzip.compress(body, mtime=0), [*own, (b"Content-Encoding", b"gzip")]
    return body, own


def request(method: bytes, target: str, headers: list[tuple[bytes, bytes]], body: bytes, chunked: bool) -> bytes:
    if chunked:
        pieces = [body[:7], body[7:]]
        body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"
        framing = (b"Transfer-Encoding", b"chunked")
    else:
        framing = (b"Content-Length", str(len(body)).encode())
    lines = [(b"Host", b"localhost"), *headers, framing, (b"Connection", b"close")]
    head = b"".join(name + b": " + value + b"\r\n" for name, value in lines)
    return method + b" " + target.encode() + b" HTTP/1.1\r\n" + head + b"\r\n" + body


requests = st.tuples(st.sampled_from(METHODS), targets(), headers, bodies(), st.booleans())


def test_requests(server: Server) -> None:
    """Any body, headers and path that HTTP allows."""

    @more(4)
    @given(sent=requests)
    def run(sent: tuple[bytes, str, Any, Any, bool]) -> None:
        method, target, headers, (body, own), chunked = sent
        assert_answer(exchange(server, request(method, target, [*headers, *own], body, chunked)), method)

    with unharmed(server):
        run()


def test_bytes(server: Server) -> None:
    """What is hardly HTTP, from a client that then says no more: an answer or none, but an end."""

    @more(3)
    @given(sent=requests, changes=changes)
    def run(sent: tuple[bytes, str, Any, Any, bool], changes: Any) -> None:
        method, target, headers, (body, own), chunked = sent
        content = mutated(request(method, target, [*headers, *own], body, chunked), changes)
        received = exchange(server, content, done=True)
        if re.search(rb"^HTTP/1\.1 5(?!01)", received):
            assert received.startswith(b"HTTP/1.1 504") and LATE.search(received.decode("latin-1")), received[:1000]

    @more(1)
    @given(content=st.binary(max_size=100))
    def garbage(content: bytes) -> None:
        assert not exchange(server, content, done=True).startswith(b"HTTP/1.1 5")

    with unharmed(server):
        run()
        garbage()


def test_upgrades(server: Server) -> None:
    """There is nothing to upgrade to."""

    @more(0.3)
    @given(target=targets(), protocol=st.sampled_from([b"websocket", b"h2c", b"TLS/1.0"]) | texts.map(to_json))
    def run(target: str, protocol: bytes) -> None:
        lines = [b"Host: localhost", b"Connection: Upgrade", b"Upgrade: " + protocol[:100]]
        lines += [b"Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==", b"Sec-WebSocket-Version: 13", b"", b""]
        received = exchange(server, b"GET " + target.encode() + b" HTTP/1.1\r\n" + b"\r\n".join(lines), done=True)
        assert not received.startswith((b"HTTP/1.1 5", b"HTTP/1.1 101")), received[:1000]

    with unharmed(server):
        run()


def test_grpc_calls(server: Server) -> None:
    fine = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"}

    def answered(ask: Any, content: Any) -> None:
        try:
            ask(content, timeout=SECONDS)
        except grpc.RpcError as error:
            late = error.code().name == "DEADLINE_EXCEEDED" and LATE.search(error.details())
            assert late or error.code().name in fine, (error.code(), error.details())
            checked(error.details())

    with unharmed(server), grpc.insecure_channel(server.grpc) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        @more(2)
        @given(message=messages(), ours=st.booleans(), changes=changes | st.just([]))
        def run(message: pb.ModelInferRequest, ours: bool, changes: Any) -> None:
            if ours:
                message.model_name, message.model_version = server.name, ""
            answered(ask, mutated(message.SerializeToString(), changes))

        @more(1)
        @given(
            method=st.sampled_from(["ModelMetadata", "ModelReady", "ServerLive", "RepositoryModelLoad", "Nope"]),
            data=st.binary(max_size=20),
        )
        def others(method: str, data: bytes) -> None:
            answered(channel.unary_unary(f"/inference.GRPCInferenceService/{method}"), data)

        run()
        others()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_openapi(server: Server, mode: GenerationMode) -> None:
    """What the server's own OpenAPI document promises, and what it rules out."""
    schema = schemathesis.openapi.from_url(f"{server.http}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    if mode == GenerationMode.NEGATIVE:  # any text is a legal name in a path: only bodies can be ruled out
        operations = [one for one in operations if one.body]
    assert "/v2/models/{model_name}/infer" in {operation.path for operation in operations}

    def fuzz(operation: Any) -> None:
        @more(0.2)
        @given(case=operation.as_strategy(generation_mode=mode), ours=st.booleans())
        def run(case: Any, ours: bool) -> None:
            if ours and "model_name" in (case.path_parameters or {}):
                case.path_parameters["model_name"] = server.name
            response = case.call(timeout=SECONDS)
            status, content = response.status_code, response.content
            fine = status < 500 or (content and is_meant(status, content))
            assert fine, f"{response.status_code} {response.content[:1000]!r}\n{case.as_curl_command()}"

        run()

    with unharmed(server):
        for operation in operations:
            fuzz(operation)

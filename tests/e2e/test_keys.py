"""Keys and trace ids on a real server, over v1, v2 REST and gRPC."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from tests.conftest import Serve, Server

Start = Callable[..., Server]
ONE, TWO = "first-key-4711", "second-key-4712"
KEYS = {"API_KEY": f"{ONE},{TWO}"}
WRONG = "wrong-key-4799"
PROMPT: dict[str, Any] = {"prompt": "a fox", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 7}
V1 = {"instances": [PROMPT]}
V2 = {
    "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a fox"]}],
    "parameters": {name: value for name, value in PROMPT.items() if name != "prompt"},
}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"

# Routes that need a key, and what they answer with one.
CLOSED: list[tuple[str, str, Any, int]] = [
    ("POST", "/v1/models/tiny:predict", V1, 200),
    ("POST", "/v2/models/tiny/infer", V2, 200),
    ("GET", "/v1/models", None, 200),
    ("GET", "/v2", None, 200),
    ("GET", "/v2/models", None, 200),
    ("GET", "/v2/models/tiny", None, 200),
    ("GET", "/v2/repository/index", None, 200),
    ("POST", "/v2/repository/index", {}, 200),
    ("POST", "/v2/repository/models/tiny/unload", None, 501),
    ("POST", "/v1/models/tiny:explain", {}, 501),
    ("GET", "/docs", None, 404),
    ("GET", "/openapi.json", None, None),
    ("GET", "/nothing", None, 404),
]
OPEN = ["/", "/health", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready", "/v1/models/tiny"]


def refused(answer: tuple[int, dict[str, str], bytes]) -> str:
    """The error of a 401, which must have the shape of every error."""
    status, headers, content = answer
    assert status == 401, content
    assert headers["www-authenticate"] == "Bearer" and headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    document = json.loads(content)
    assert list(document) == ["error"]
    assert not any(key in document["error"] for key in (ONE, TWO, WRONG))
    return document["error"]


@pytest.mark.parametrize(("method", "path", "body", "status"), CLOSED)
def test_a_key_is_needed(serve: Serve, method: str, path: str, body: Any, status: int | None) -> None:
    server = serve("sd15", **KEYS)
    assert "a key is needed" in refused(server.request(method, path, body))
    for wrong in ({"x-api-key": WRONG}, {"authorization": f"Bearer {WRONG}"}):
        assert "not valid" in refused(server.request(method, path, body, wrong))
    for empty in ({"x-api-key": ""}, {"authorization": "Bearer "}, {"authorization": f"Basic {ONE}"}):
        refused(server.request(method, path, body, empty))
    for right in (
        {"X-API-Key": ONE},
        {"Authorization": f"Bearer {TWO}"},
        {"X-API-Key": TWO, "Authorization": "Bearer sha256~a-token-of-the-proxy"},
        {"X-API-Key": WRONG, "Authorization": f"bearer {ONE}"},
    ):
        got = server.request(method, path, body, right)[0]
        assert got == status if status is not None else got != 401


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("headers", [{}, {"x-api-key": WRONG}, {"authorization": "Bearer x"}])
def test_probes_and_metrics_need_none(serve: Serve, path: str, headers: dict[str, str]) -> None:
    server = serve("sd15", **KEYS)
    assert server.request("GET", path, None, headers)[0] == 200
    assert server.request("POST", path, b"{}", headers)[0] == 401


TRICKS = [
    "//v1/models",
    "/v2/health/../models",
    "/v2/health/live/../../models",
    "/v2/health/..%2fmodels",
    "/v2/health/..%2Fmodels/tiny/infer",
    "/v2/health/%2e%2e/models",
    "/v2/health/live%2f..%2f..%2fmodels",
    "/v2/health/live/..;/models",
    "/v2/health/live%00",
    "/v2/health/live%0a",
    "/v2/health/live;x",
    "/v2/health/live/",
    "/v2/health/live%3f/../../models",
    "/v2/models/tiny/infer/ready",
    "/v2/models/tiny/infer%2fready",
    "/v2/models/tiny%2finfer%2f..%2f..%2fready",
    "/v2/models/tiny/infer%23/ready",
    "/v2/models/tiny/infer?/ready",
    "/v2/models/tiny/infer#/ready",
    "/v1/models/tiny:predict?/ready",
    "/v1/models/tiny%3Apredict",
    "/v1/models/tiny%2f",
    "/v1/models/%2e%2e%2fmodels",
    "/V2/models",
    "/v2/MODELS",
    "/V2/HEALTH/LIVE",
    "/metrics/../v2/models",
    "/metrics/",
    "/./v2/models",
    "/%2fv2/models",
    "/v2%2fmodels",
    "/%76%32/models",
    "/?/../v2/models".replace("?/", ""),
    "http://localhost/v2/models",
    "http://localhost/v2/health/live/../../models",
    "*",
]


@pytest.mark.parametrize("target", TRICKS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_spelling_of_a_path_opens_anything(serve: Serve, method: str, target: str) -> None:
    server = serve("sd15", **KEYS)
    with socket.create_connection(server.http.removeprefix("http://").split(":"), timeout=60) as client:  # type: ignore[arg-type]
        head = f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{{}}"
        client.sendall(head.encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.split(b" ")[1] in (b"401", b"400"), answer
    assert b"tiny" not in answer.partition(b"\r\n\r\n")[2]


def test_method_overrides_open_nothing(serve: Serve) -> None:
    server = serve("sd15", **KEYS)
    for header in (
        "X-HTTP-Method-Override",
        "X-Original-URL",
        "X-Rewrite-URL",
        "X-Forwarded-Prefix",
        "X-Forwarded-Path",
    ):
        for value in ("GET", "/v2/health/live", "/"):
            refused(server.request("GET", "/v2/models", None, {header: value}))
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"):
        assert server.request(method, "/v2/models")[0] == 401


def test_the_refusal_does_not_wait_for_the_body(serve: Serve) -> None:
    server = serve("sd15", **KEYS)
    host, port = server.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /v1/models/tiny:predict HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_refused_connection_can_be_used_again(serve: Serve) -> None:
    server = serve("sd15", **KEYS)
    connection = http.client.HTTPConnection(server.http.removeprefix("http://"), timeout=60)
    for key, status in ((WRONG, 401), (ONE, 400), ("", 401), (TWO, 400)):
        connection.request("POST", "/v1/models/tiny:predict", b"x" * 200_000, {"x-api-key": key})
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()


def test_websockets_are_refused(serve: Serve) -> None:
    server = serve("sd15", **KEYS)
    host, port = server.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(
            b"GET /v2/models HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert client.recv(100).split(b" ")[1] in (b"401", b"403")


# --- gRPC


def metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    return () if key is None else (("x-api-key", key),)


def infer_message() -> Any:
    message = pb.ModelInferRequest(model_name="tiny")
    message.inputs.add(name="prompt", shape=[1], datatype="BYTES").contents.bytes_contents.append(b"a fox")
    for name in ("width", "height", "num_inference_steps", "seed"):
        message.parameters[name].int64_param = PROMPT[name]
    return message


MESSAGES: dict[str, tuple[Any, str]] = {
    "ModelInfer": (infer_message, "OK"),
    "ServerMetadata": (pb.ServerMetadataRequest, "OK"),
    "ModelMetadata": (lambda: pb.ModelMetadataRequest(name="tiny"), "OK"),
    "RepositoryModelLoad": (lambda: pb.RepositoryModelLoadRequest(model_name="tiny"), "UNIMPLEMENTED"),
    "RepositoryModelUnload": (lambda: pb.RepositoryModelUnloadRequest(model_name="tiny"), "UNIMPLEMENTED"),
}
PROBES: dict[str, Any] = {
    "ServerLive": pb.ServerLiveRequest,
    "ServerReady": pb.ServerReadyRequest,
    "ModelReady": lambda: pb.ModelReadyRequest(name="tiny"),
}


def call(server: Server, method: str, message: Any, sent: Any) -> tuple[str, str, dict[str, Any]]:
    """The status's name, its details and the initial metadata."""
    with grpc.insecure_channel(server.grpc) as channel:
        try:
            _, done = getattr(GRPCInferenceServiceStub(channel), method).with_call(message, metadata=sent, timeout=60)
        except grpc.RpcError as error:
            return error.code().name, error.details(), dict(error.initial_metadata())
        return "OK", "", dict(done.initial_metadata())


@pytest.mark.parametrize("method", MESSAGES)
def test_a_key_is_needed_over_grpc(serve: Serve, method: str) -> None:
    server = serve("sd15", **KEYS)
    message, code = MESSAGES[method]
    for sent in ((), metadata(WRONG), metadata(""), (("authorization", f"Bearer {WRONG}"),), (("authorization", ONE),)):
        got, details, initial = call(server, method, message(), sent)
        assert got == "UNAUTHENTICATED"
        assert initial["x-request-id"] and "X-API-Key" in details
        assert not any(key in details for key in (ONE, TWO, WRONG))
    for sent in (
        metadata(ONE),
        (("authorization", f"Bearer {TWO}"),),
        (("x-api-key", TWO), ("authorization", "Bearer sha256~a-token-of-the-proxy")),
    ):
        assert call(server, method, message(), sent)[0] == code


@pytest.mark.parametrize("method", PROBES)
def test_probes_need_none_over_grpc(serve: Serve, method: str) -> None:
    server = serve("sd15", **KEYS)
    for sent in ((), metadata(WRONG)):
        assert call(server, method, PROBES[method](), sent)[0] == "OK"


@pytest.mark.parametrize(
    "method",
    [
        "/inference.GRPCInferenceService/modelinfer",
        "//inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ServerLive/../ModelInfer",
        "/inference.GRPCInferenceService/ServerLive/ModelInfer",
        "/inference.GRPCInferenceService/ServerLive?",
        "/grpc.health.v1.Health/Check",
        "/nothing/here",
    ],
)
def test_no_other_method_is_open(serve: Serve, method: str) -> None:
    server = serve("sd15", **KEYS)
    with grpc.insecure_channel(server.grpc) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"", timeout=60)
        assert caught.value.code().name in ("UNAUTHENTICATED", "UNIMPLEMENTED")
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(method)(iter([b""]), timeout=60))
        assert caught.value.code().name in ("UNAUTHENTICATED", "UNIMPLEMENTED")


def test_a_large_message_without_a_key_is_refused(serve: Serve) -> None:
    server = serve("sd15", **KEYS)
    message = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[bytes(64 * 2**20)])
    assert call(server, "ModelInfer", message, ())[0] == "UNAUTHENTICATED"
    assert call(server, "ModelInfer", message, metadata(ONE))[0] == "INVALID_ARGUMENT"


# --- the file


def test_a_file_of_keys_is_read_again_when_it_changes(start: Start, tmp_path: Path) -> None:
    """As a Secret's volume does it: links are swapped while the server runs."""

    def publish(version: str, content: str) -> None:
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(content)
        (tmp_path / "..tmp").symlink_to(version)
        (tmp_path / "..tmp").rename(tmp_path / "..data")

    def answers(key: str) -> tuple[int, str]:
        status = server.request("GET", "/v2/models", None, {"x-api-key": key})[0]
        return status, call(server, "ServerMetadata", pb.ServerMetadataRequest(), metadata(key))[0]

    def wait(key: str, answer: tuple[int, str]) -> None:
        deadline = time.monotonic() + 60
        while answers(key) != answer:
            assert time.monotonic() < deadline, f"{key}: {answers(key)}\n{server.log.read_text()}"
            time.sleep(0.1)

    yes, no = (200, "OK"), (401, "UNAUTHENTICATED")
    publish("..1", f"# old\n{ONE}\n")
    (tmp_path / "keys").symlink_to("..data/keys")
    server = start("sd15", API_KEY_FILE=str(tmp_path / "keys"))
    server.wait_ready()
    assert (answers(ONE), answers(TWO)) == (yes, no)
    publish("..2", f"{ONE}\n{TWO}\n")
    wait(TWO, yes)
    assert answers(ONE) == yes
    publish("..3", f"{TWO}\n")
    wait(ONE, no)
    assert answers(TWO) == yes
    (tmp_path / "..data").unlink()  # gone: the old keys stay
    time.sleep(1.2)
    assert (answers(ONE), answers(TWO)) == (no, yes)
    time.sleep(1.2)
    assert (answers(ONE), answers(TWO)) == (no, yes)
    assert server.stop() == 0
    text = server.log.read_text()
    assert text.count("the keys of before stay valid") == 1
    assert text.count("API_KEY_FILE was read again") == 2
    assert ONE not in text and TWO not in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"API_KEY": "short-7"}, "API_KEY: key 1 is shorter than 8 characters"),
        ({"API_KEY": f"{ONE},"}, None),
        ({"API_KEY": " , "}, "API_KEY: holds no key"),
        ({"API_KEY_FILE": "nothing-here"}, "API_KEY_FILE=nothing-here: No such file or directory"),
        ({"API_KEY_FILE": "/dev/null"}, "API_KEY_FILE=/dev/null: holds no key"),
        ({"API_KEY_FILE": "/dev/zero"}, "API_KEY_FILE=/dev/zero: larger than 1048576 bytes"),
    ],
)
def test_keys_that_cannot_be_used_end_the_start(start: Start, given: dict[str, str], said: str | None) -> None:
    server = start("sd15", **given)
    if said is None:
        server.wait_ready()
        return
    assert server.process.wait(60) == 1
    text = server.log.read_text()
    assert [line for line in text.splitlines() if not line.startswith("{")] == [f"diffusion-runtime: {said}"]
    assert "short-7" not in text


def test_no_key_is_ever_in_the_log(start: Start) -> None:
    server = start("sd15", "--api_key", ONE, LOG_LEVEL="debug", LOG_PROMPTS="true")
    server.wait_ready()
    for key in (ONE, WRONG):
        for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
            server.request("POST", "/v1/models/tiny:predict", V1, headers)
            server.request("POST", "/v1/models/tiny:predict", b"{", headers)
            server.request("GET", "/v2/nothing", None, headers)
            call(server, "ModelInfer", infer_message(), tuple(headers.items()))
            call(server, "ModelInfer", pb.ModelInferRequest(model_name="tiny"), tuple(headers.items()))
    assert server.stop() == 0
    text = server.log.read_text()
    refusals = [line for line in map(json.loads, text.splitlines()) if line.get("status") == 401]
    assert {line.get("path") or line.get("method") for line in refusals} == {
        "/v1/models/tiny:predict",
        "/v2/nothing",
        "/inference.GRPCInferenceService/ModelInfer",
    }
    assert all(line["request_id"] for line in refusals)
    assert ONE not in text and WRONG not in text


def test_without_keys_every_request_passes(serve: Serve) -> None:
    server = serve("sd15")
    for headers in ({}, {"x-api-key": WRONG}, {"authorization": "Bearer x"}):
        assert server.request("GET", "/v2/models", None, headers)[0] == 200
    assert call(server, "ServerMetadata", pb.ServerMetadataRequest(), metadata(WRONG))[0] == "OK"


# --- trace ids


def lines_of(server: Server, identity: str) -> list[dict[str, Any]]:
    text = server.log.read_text().splitlines()
    told = [json.loads(line) for line in text if line.startswith("{")]
    return [line for line in told if line.get("request_id") == identity]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [("/v1/models/tiny:predict", V1, 200), ("/v2/models/tiny/infer", V2, 200), ("/v2/models/tiny/infer", b"{", 400)],
)
def test_trace_ids_pass_through(serve: Serve, path: str, body: Any, status: int) -> None:
    server = serve("sd15")
    identity = f"trace-{status}-{path[1:3]}"
    sent = {"x-request-id": identity, "traceparent": PARENT, "tracestate": "rojo=1,congo=t61"}
    got, headers, _ = server.request("POST", path, body, sent)
    assert got == status
    assert (headers["traceparent"], headers["tracestate"]) == (PARENT, "rojo=1,congo=t61")
    lines = lines_of(server, identity)
    assert lines and {line.get("trace_id") for line in lines} == {TRACE}


def test_a_malformed_trace_is_ignored(serve: Serve) -> None:
    server = serve("sd15")
    sent = {"x-request-id": "no-trace", "traceparent": PARENT[:-1], "tracestate": "rojo=1"}
    status, headers, _ = server.request("POST", "/v1/models/tiny:predict", V1, sent)
    assert status == 200 and not {"traceparent", "tracestate"} & set(headers)
    assert lines_of(server, "no-trace") and not any("trace_id" in line for line in lines_of(server, "no-trace"))


@pytest.mark.parametrize("key", [ONE, None])
def test_trace_ids_pass_through_grpc_and_refusals(serve: Serve, key: str | None) -> None:
    server = serve("sd15", **KEYS)
    identity = f"trace-grpc-{key}"
    sent = (("x-request-id", identity), ("traceparent", PARENT), ("tracestate", "rojo=1"), *metadata(key))
    code, _, initial = call(server, "ModelInfer", infer_message(), sent)
    assert code == ("OK" if key else "UNAUTHENTICATED")
    assert (initial["traceparent"], initial["tracestate"]) == (PARENT, "rojo=1")
    lines = lines_of(server, identity)
    assert lines and {line.get("trace_id") for line in lines} == {TRACE}
    if key is None:
        _, headers, _ = server.request("GET", "/v2", None, dict(sent))
        assert headers["traceparent"] == PARENT
    bad = call(server, "ServerLive", pb.ServerLiveRequest(), (("traceparent", "x"), ("tracestate", "rojo=1")))
    assert bad[0] == "OK" and not {"traceparent", "tracestate"} & set(bad[2])

"""The protocols' decoders on what they cannot expect: InvalidRequest in few words, or fields; nothing else."""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from runtime.errors import InvalidRequest
from runtime.families.base import Schema
from runtime.protocol import grpc, v1, v2
from runtime.protocol.wire import parse
from tests.fuzz.inputs import (
    changes,
    checked,
    integers,
    more,
    mostly,
    mutated,
    requests,
    texts,
    to_json,
    values,
)
from tests.server.test_requests import checker

MAX_PROMPTS = 4
SCHEMAS: dict[str, Schema] = {model: checker(model).schema for model in ("glm", "ti2v", "sd15", "flux")}
schemas = st.sampled_from(sorted(SCHEMAS)).map(SCHEMAS.__getitem__)


def assert_rows(rows: Any) -> None:
    """What a decoder promises the checker."""
    assert isinstance(rows, list) and 1 <= len(rows) <= MAX_PROMPTS
    assert all(isinstance(row, dict) and all(isinstance(name, str) for name in row) for row in rows)
    assert len({id(row) for row in rows}) == len(rows), "two prompts share their fields"


# --- JSON


@more(4)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | values.map(to_json))
def test_parse(body: bytes) -> None:
    try:
        value = parse(body)
    except InvalidRequest as error:
        checked(str(error))
    else:
        assert parse(memoryview(body)) == parse(bytearray(body)) == value
        if not re.search(rb"\d", body):  # of large numbers the two keep different digits
            assert json.loads(body) == value


# --- v1

documents = st.fixed_dictionaries(
    {"instances": st.lists(requests() | values, max_size=MAX_PROMPTS + 1)},
    optional={"parameters": requests() | values},
)


@more(4)
@given(documents | values)
def test_v1(payload: Any) -> None:
    try:
        rows = v1.decode(payload, MAX_PROMPTS)
    except InvalidRequest as error:
        checked(str(error))
    else:
        assert_rows(rows)
        assert len(rows) == len(payload["instances"])


@more(2)
@given(documents, changes)
def test_v1_bytes(payload: Any, changes: list[tuple[int, int, bytes]]) -> None:
    try:
        rows = v1.decode(parse(mutated(to_json(payload), changes)), MAX_PROMPTS)
    except InvalidRequest as error:
        checked(str(error))
    else:
        assert_rows(rows)


# --- v2 REST

KNOWN = ["prompt", "seed", "n", "image", "images", "guidance_scale", "size", "output_format"]
odd_shapes = st.lists(st.integers(0, 3), max_size=3) | st.lists(integers, max_size=10)
odd_binaries = st.binary(max_size=40) | st.sampled_from([struct.pack("<I", 2**32 - 1), b"\xff" * 12])
utf8 = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
elements: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    **{f"INT{bits}": st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": st.floats(width=bits) for bits in (16, 32, 64)},  # type: ignore[arg-type]
    "BYTES": st.sampled_from([b"a dog", b"7", b"64x64", b"png", b""]) | utf8.map(str.encode),
}


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, str, list[int], list[Any]]:
    """Name, datatype, shape and elements of a tensor that is whole."""
    datatype = draw(st.sampled_from(["BYTES", "BYTES", *elements]))
    data = draw(st.lists(elements[datatype], min_size=1, max_size=4))
    shape = draw(st.sampled_from([[len(data)], [len(data), 1], [1, len(data)]] + ([[2, 2]] if len(data) == 4 else [])))
    return draw(st.sampled_from(KNOWN)), datatype, shape, data


def packed(datatype: str, data: list[Any]) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(item)) + item for item in data)
    return np.array(data, dtype=v2.NUMPY_TYPES[datatype]).tobytes()


@st.composite
def rest_bodies(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """A body with the binary extension, mostly whole, and its Inference-Header-Content-Length."""
    inputs, tail = [], b""
    for name, datatype, shape, data in draw(st.lists(tensors(), max_size=3, unique_by=lambda tensor: tensor[0])):
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if draw(st.booleans()):
            tensor["data"] = [item.decode() if isinstance(item, bytes) else item for item in data]
        else:
            raw = packed(datatype, data) if mostly(draw) else draw(odd_binaries)
            tail += raw
            tensor["parameters"] = {"binary_data_size": len(raw) if mostly(draw) else draw(values)}
        if not mostly(draw):
            tensor[draw(st.sampled_from(sorted(tensor)))] = draw(values)
        if not mostly(draw):
            tensor["shape"] = draw(odd_shapes)
        inputs.append(tensor)
    document: dict[str, Any] = {"inputs": inputs}
    if draw(st.booleans()):
        document["parameters"] = draw(requests())
    if not mostly(draw):
        document[draw(st.sampled_from(["id", "inputs", "parameters", "outputs", "model_name"]) | texts)] = draw(values)
    if draw(st.booleans()):
        name = st.sampled_from(["image", "metadata"]) | texts
        document["outputs"] = draw(st.lists(st.fixed_dictionaries({"name": name}), max_size=2))
    head = to_json(document)
    length = str(len(head)) if mostly(draw) else draw(integers.map(str) | st.text(max_size=20))
    return head + tail, length if tail else draw(st.sampled_from([None, length]))


def assert_v2_rest(body: bytes, length: str | None, schema: Schema) -> None:
    try:
        request = v2.rest_request(body, length, "tiny")
        for kind in ("image", "video"):
            v2.requested(request, kind)
        rows = v2.decode(request, schema, MAX_PROMPTS)
    except InvalidRequest as error:
        checked(str(error))
    else:
        assert_rows(rows)


@more(6)
@given(rest_bodies(), schemas)
def test_v2_rest(sent: tuple[bytes, str | None], schema: Schema) -> None:
    assert_v2_rest(*sent, schema)


@more(3)
@given(rest_bodies(), changes, schemas)
def test_v2_rest_bytes(sent: tuple[bytes, str | None], changes: list[tuple[int, int, bytes]], schema: Schema) -> None:
    assert_v2_rest(mutated(sent[0], changes), sent[1], schema)


@given(st.binary(max_size=60), st.none() | st.text(max_size=20), schemas)
def test_v2_rest_of_anything(body: bytes, length: str | None, schema: Schema) -> None:
    assert_v2_rest(body, length, schema)


# --- v2 gRPC

RANGES = {
    "int_contents": elements["INT32"],
    "int64_contents": elements["INT64"],
    "uint_contents": elements["UINT32"],
    "uint64_contents": elements["UINT64"],
    "fp32_contents": elements["FP32"],
    "fp64_contents": elements["FP64"],
    "bool_contents": elements["BOOL"],
    "bytes_contents": st.binary(max_size=12),
}


@st.composite
def messages(draw: st.DrawFn) -> pb.ModelInferRequest:
    """Any message that protobuf allows, tensors whole more often than not."""
    message = pb.ModelInferRequest(model_name=draw(utf8), model_version=draw(utf8), id=draw(utf8))
    raw = draw(st.booleans())
    for name, datatype, shape, data in draw(st.lists(tensors(), max_size=3, unique_by=lambda tensor: tensor[0])):
        if not mostly(draw):
            shape = draw(st.lists(st.integers(0, 3), max_size=3) | st.lists(elements["INT64"], max_size=10))
        if not mostly(draw):
            name, datatype = draw(st.tuples(utf8, utf8 | st.just("bytes")))
        tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
        if raw if mostly(draw) else not raw:
            message.raw_input_contents.append(packed(datatype, data) if datatype in elements else b"")
        elif datatype in grpc.CONTENTS:
            getattr(tensor.contents, grpc.CONTENTS[datatype]).extend(data)
        if not mostly(draw):
            other = draw(st.sampled_from(sorted(RANGES)))
            getattr(tensor.contents, other).extend(draw(st.lists(RANGES[other], max_size=4)))
    if not mostly(draw):
        message.raw_input_contents.append(draw(odd_binaries))
    for name in draw(st.lists(st.sampled_from(KNOWN) if mostly(draw) else utf8, max_size=2)):
        parameter = message.parameters[name]
        kind = draw(st.sampled_from(["bool_param", "int64_param", "string_param", "none", "double", "uint64"]))
        if kind == "bool_param":
            parameter.bool_param = draw(st.booleans())
        elif kind == "int64_param":
            parameter.int64_param = draw(elements["INT64"])
        elif kind == "string_param":
            parameter.string_param = draw(utf8)
        elif kind == "double":  # these two are not in KServe's proto
            parameter.MergeFromString(bytes([4 << 3 | 1]) + draw(st.binary(min_size=8, max_size=8)))
        elif kind == "uint64":
            parameter.MergeFromString(bytes([5 << 3]) + draw(st.sampled_from([b"\0", b"\x07", b"\xff" * 9 + b"\x01"])))
    if draw(st.booleans()):
        message.outputs.add(name=draw(st.sampled_from(["image", "metadata"]) | utf8))
    return message


def assert_grpc(message: pb.ModelInferRequest, schema: Schema) -> None:
    try:
        request = grpc.infer_request(message)
        assert request.use_binary_outputs == bool(message.raw_input_contents)
        v2.requested(request, "image")
        rows = v2.decode(request, schema, MAX_PROMPTS)
    except InvalidRequest as error:
        checked(str(error))
    else:
        assert_rows(rows)


@more(4)
@given(messages(), schemas)
def test_grpc(message: pb.ModelInferRequest, schema: Schema) -> None:
    assert_grpc(message, schema)


@more(4)
@given(messages(), changes, schemas)
def test_grpc_bytes(message: pb.ModelInferRequest, changes: list[tuple[int, int, bytes]], schema: Schema) -> None:
    """What still parses: wrong wire types, unknown fields and groups among it."""
    data = mutated(message.SerializeToString(), changes)
    try:
        broken = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        assert data != message.SerializeToString()
    else:
        assert_grpc(broken, schema)


WIRE_TYPES = {0: b"\x07", 1: b"\7" * 8, 2: b"\x02ab", 5: b"\7" * 4}


@pytest.mark.parametrize("number", [4, 5, 9])
@pytest.mark.parametrize("wire", [*WIRE_TYPES, 3])
def test_grpc_parameters_of_other_wire_types(number: int, wire: int) -> None:
    """double_param and uint64_param, which KServe's proto lacks, as anything; 3 is a group."""
    data = WIRE_TYPES.get(wire, bytes([number << 3 | 4]))
    message = pb.ModelInferRequest(model_name="tiny")
    message.parameters["seed"].MergeFromString(bytes([number << 3 | wire]) + data)
    try:
        value = grpc.infer_request(message).parameters["seed"]
    except InvalidRequest as error:
        checked(str(error))
    else:
        assert value is None or isinstance(value, int | float), f"{type(value).__name__}: a message would quote it"

"""Wire formats: v1 and v2 in and out, JSON with base64 in pieces, REST's binary extension, gRPC messages."""

from __future__ import annotations

import base64
import json
import math
import random
import struct
from typing import Any

import numpy as np
import pytest
from kserve import InferInput, InferRequest, InferResponse
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.infer_type import RequestedOutput

from runtime.errors import InvalidRequest
from runtime.families.base import Limits, Schema
from runtime.families.requests import RequestChecker
from runtime.protocol import grpc, v1, v2
from runtime.protocol.wire import CHUNK, Base64, parse, pieces
from runtime.routes.responses import Chunked, chunks
from runtime.types import Capabilities, GeneratedMedia, GenerationRequest, GenerationResult, SourceImage


def plain(value: Any) -> Any:
    """What the streamed JSON must say: `value` with its Base64 objects as strings."""
    if isinstance(value, Base64):
        return value.text()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def schema_of(family: str, facts: dict[str, Any]) -> Schema:
    told = Capabilities(family, "P", "image", facts, {}, "s", 1, "r", "cpu", {}, {}, "v")
    return RequestChecker(told, Limits()).schema


GLM = schema_of(
    "glm_image",
    {"edits": True, "special_tokens": ["<|image|>"], "source_shortest_edge": 512, "source_longest_edge": 2048},
)
FLAGGED = schema_of(
    "generic",
    {
        "pipeline": "P",
        "multiple": 8,
        "video": False,
        "takes": {"num_inference_steps": 5, "guidance_scale": 5.0, "negative_prompt": None},
        "refused": {},
        "extra": {"tidy": {"kind": "boolean", "default": False, "bounds": (None, None)}},
        "image_required": False,
        "default_width": 64,
        "default_height": 64,
        "negative_prompt_gate": "guidance_scale",
    },
)


def result(
    *data: bytes | bytearray, format: str = "png", prompt: str = "a dog", seed: int = 5, **fields: Any
) -> GenerationResult:
    video = {"num_frames": 17, "fps": 16} if format == "mp4" else {}
    request = GenerationRequest(
        prompt=prompt,
        width=64,
        height=32,
        num_inference_steps=4,
        seed=seed,
        n=len(data),
        output_format=format,
        **{"guidance_scale": 1.5, **video, **fields},
    )
    media = tuple(GeneratedMedia(bytes(d), format, 64, 32, seed + i, **video) for i, d in enumerate(data))
    return GenerationResult(request, media, {"wait": 0.5, "total": 1.25}, "variant", "revision")


def text(parts: Any) -> bytes:
    """The bytes that leave the socket."""
    return b"".join(b"".join(part.chunks()) if isinstance(part, Base64) else bytes(part) for part in parts)


# --- wire: JSON in pieces


def nested(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(10 if depth else 7)
    if kind == 0:
        return Base64(rng.randbytes(rng.choice((0, 1, 2, 3, 4, 100, 1000))))
    if kind == 1:
        return "".join(rng.choice('aZ"\\/\n\t\0\x1f\x7fé犬🐕\u2028 ') for _ in range(rng.randrange(12)))
    if kind == 2:
        return rng.choice((0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 7))
    if kind == 3:
        return rng.choice((0.0, -0.0, 1.5, 1e-300, 1e300, 0.1))
    if kind in (4, 5):
        return rng.choice((None, True, False))
    if kind == 6:
        return rng.choice(([], {}, (), ""))
    if kind == 7:
        return {f'k{i}"\n犬': nested(rng, depth - 1) for i in range(rng.randrange(5))}
    items = [nested(rng, depth - 1) for _ in range(rng.randrange(5))]
    return tuple(items) if kind == 8 else items


@pytest.mark.parametrize("seed", range(8))
def test_pieces_are_the_json_of_the_plain_value(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        value = nested(rng, 5)
        parts = list(pieces(value))
        body = text(parts)
        assert json.loads(body) == json.loads(json.dumps(plain(value)))
        assert len(body) == sum(map(len, parts))


@pytest.mark.parametrize("size", [0, 1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 2])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_base64_in_chunks(size: int, kind: type) -> None:
    data = kind(random.Random(size).randbytes(size))
    value = Base64(data)
    chunks = list(value.chunks())
    assert b"".join(chunks) == base64.b64encode(data)
    assert len(value) == len(base64.b64encode(data))
    assert value.text() == base64.b64encode(data).decode()
    assert len(chunks) == math.ceil(size / CHUNK)
    assert all(len(chunk) == CHUNK // 3 * 4 for chunk in chunks[:-1])


def test_chunks_join_without_padding() -> None:
    assert CHUNK % 3 == 0


def test_base64_is_not_in_its_repr() -> None:
    assert "x" * 10 not in repr(Base64(b"x" * 10))
    assert "x" * 10 not in repr(result(b"x" * 10))


def test_a_large_body_is_never_whole() -> None:
    """A media's text exists a chunk at a time; the body declares its true length."""
    data = random.Random(0).randbytes(5 * CHUNK + 1)
    parts = list(pieces({"a": Base64(data), "b": [1]}))
    response, sent = Chunked(parts, "application/json"), [bytes(chunk) for chunk in chunks(parts)]
    body = b"".join(sent)
    assert json.loads(body) == {"a": base64.b64encode(data).decode(), "b": [1]}
    assert max(map(len, sent)) <= CHUNK // 3 * 4
    assert response.headers["content-length"] == str(len(body))
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("sizes", [(), (0,), (1, CHUNK, 1), (CHUNK + 1, 0, 2 * CHUNK), (5, 6, 7)])
def test_binary_parts_are_sent_in_chunks(sizes: tuple[int, ...]) -> None:
    parts = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    whole = [*parts, bytearray(b"end")]
    response = Chunked(whole, "application/octet-stream", {"x": "y"})
    sent = [bytes(chunk) for chunk in chunks(whole)]
    assert b"".join(sent) == b"".join(parts) + b"end"
    assert max(map(len, sent)) <= 2 * CHUNK
    assert response.headers["content-length"] == str(sum(sizes) + 3)
    assert response.headers["x"] == "y"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nope",
        b'{"a": NaN}',
        b"Infinity",
        b"\xff",
        b'"\\ud800"',
        b"[1,]",
        b"{'a': 1}",
        b"1e999",
        b"[" * 5000,
    ],
)
def test_bodies_that_are_no_json(body: bytes) -> None:
    for form in (body, bytearray(body), memoryview(body)):
        with pytest.raises(InvalidRequest, match=r"^body: not valid JSON"):
            parse(form)


def test_parse() -> None:
    for value in ({"a": [1, 2.5, None, True, "犬"]}, [], 5):
        assert parse(memoryview(json.dumps(value).encode())) == value


# --- v1


@pytest.mark.parametrize(
    ("payload", "rows"),
    [
        ({"instances": [{"prompt": "a"}]}, [{"prompt": "a"}]),
        ({"instances": [{}]}, [{}]),
        ({"instances": [{"prompt": "a"}], "parameters": {}}, [{"prompt": "a"}]),
        ({"instances": [{"prompt": "a"}], "parameters": None}, [{"prompt": "a"}]),
        (
            {"instances": [{"prompt": "a"}, {"prompt": "b", "n": 2}], "parameters": {"n": 1, "seed": 5}},
            [{"prompt": "a", "n": 1, "seed": 5}, {"prompt": "b", "n": 2, "seed": 5}],
        ),
        ({"instances": [{"prompt": "a"}] * 4}, [{"prompt": "a"}] * 4),
    ],
)
def test_v1_decodes(payload: Any, rows: list[dict[str, Any]]) -> None:
    before = json.dumps(payload)
    assert v1.decode(payload, 4) == rows
    assert json.dumps(payload) == before


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (None, "body: must be an object"),
        ([], "body: must be an object"),
        ("text", "body: must be an object"),
        ({}, "instances: None is not a list of at least one object"),
        ({"instances": []}, "instances: [] is not a list"),
        ({"instances": {"prompt": "a"}}, "is not a list"),
        ({"instances": "a dog"}, "instances: 'a dog' is not a list"),
        ({"instances": ["a dog"]}, "instances[0]: 'a dog' is not an object"),
        ({"instances": [{"prompt": "a"}, None]}, "instances[1]: None is not an object"),
        ({"instances": [{}] * 5}, "instances: 5 prompts; at most 4 fit in one call"),
        ({"instances": [{}], "parameters": [1]}, "parameters: [1] is not an object"),
        ({"instances": [{}], "parameters": False}, "parameters: False is not an object"),
        ({"instances": [{}], "inputs": []}, "'inputs' is not a field of a v1 request; it has instances and parameters"),
        ({"prompt": "a dog"}, "'prompt' is not a field of a v1 request"),
    ],
)
def test_v1_refuses(payload: Any, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        v1.decode(payload, 4)
    assert str(caught.value).startswith(says) or says in str(caught.value)


def test_v1_one_picture() -> None:
    body = plain(v1.encode([result(b"PNG1")], "tiny"))
    assert body == {
        "predictions": [
            {
                "model_name": "tiny",
                "prompt": "a dog",
                "image": {"format": "PNG", "b64": base64.b64encode(b"PNG1").decode()},
                "seed": 5,
                "seeds": [5],
                "width": 64,
                "height": 32,
                "num_inference_steps": 4,
                "guidance_scale": 1.5,
                "timings": {"wait": 0.5, "total": 1.25},
                "batched": 1,
                "engine_variant": "variant",
                "model_revision": "revision",
            }
        ]
    }


def test_v1_several_pictures_of_several_prompts() -> None:
    made = [result(b"a", b"bb", format="jpeg"), result(b"ccc", prompt="a cat", extra={"eta": 0.5})]
    first, second = plain(v1.encode(made, "tiny"))["predictions"]
    assert [base64.b64decode(image["b64"]) for image in first["images"]] == [b"a", b"bb"]
    assert first["image"] == first["images"][0]
    assert first["image"]["format"] == "JPEG"
    assert first["seeds"] == [5, 6]
    assert "images" not in second
    assert (second["prompt"], second["eta"]) == ("a cat", 0.5)


def test_v1_video() -> None:
    fields = {"guidance_scale_2": 3.0, "flow_shift": 5.0, "max_sequence_length": 512}
    (told,) = plain(v1.encode([result(b"mp4", format="mp4", **fields)], "tiny"))["predictions"]
    assert told["video"] == {"format": "MP4", "b64": base64.b64encode(b"mp4").decode(), "fps": 16, "num_frames": 17}
    assert "image" not in told
    assert {name: told[name] for name in (*fields, "num_frames", "fps")} == {**fields, "num_frames": 17, "fps": 16}


def test_results_tell_how_they_were_drawn() -> None:
    values: dict[str, Any] = {"guidance_scale": 1.0, "guidance_scale_2": 2.0, "flow_shift": 3.0, "num_frames": 5}
    values |= {"fps": 6, "max_sequence_length": 7, "extra": {"eta": 0.5}}
    told = v1.describe(result(b"x", **values))
    extra = values.pop("extra")
    wanted = {**values, **extra, "seed": 5, "width": 64, "height": 32, "num_inference_steps": 4}
    assert {name: told.get(name) for name in wanted} == wanted


# --- v2: decode


def tensor(name: str, data: Any, datatype: str = "BYTES", shape: Any = None) -> InferInput:
    return InferInput(name, [len(data)] if shape is None else shape, datatype, data)


def request(*inputs: InferInput, outputs: list[RequestedOutput] | None = None, **parameters: Any) -> InferRequest:
    return InferRequest("tiny", list(inputs), parameters=parameters or None, request_outputs=outputs)


PROMPT = tensor("prompt", ["a dog"])


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        (request(PROMPT), [{"prompt": "a dog"}]),
        (request(tensor("prompt", [b"a dog"])), [{"prompt": "a dog"}]),
        (request(tensor("prompt", ["犬".encode()])), [{"prompt": "犬"}]),
        (request(tensor("prompt", ["a", "b"])), [{"prompt": "a"}, {"prompt": "b"}]),
        (request(tensor("prompt", ["a", "b"], shape=[2, 1])), [{"prompt": "a"}, {"prompt": "b"}]),
        (request(tensor("prompt", [["a"], ["b"]], shape=[2, 1])), [{"prompt": "a"}, {"prompt": "b"}]),
        (request(tensor("prompt", ["a"], shape=[])), [{"prompt": "a"}]),
        (request(tensor("prompt", np.array([b"a", b"b"], dtype=object))), [{"prompt": "a"}, {"prompt": "b"}]),
        (request(PROMPT, n=2, seed=5), [{"prompt": "a dog", "n": 2, "seed": 5}]),
        (request(prompt="a dog"), [{"prompt": "a dog"}]),
        (request(PROMPT, binary_data_output=True, binary_data=True, headers={}), [{"prompt": "a dog"}]),
        (
            request(tensor("prompt", ["a", "b"]), tensor("seed", [1, 2], "INT64"), tensor("n", [3], "INT64")),
            [{"prompt": "a", "seed": 1, "n": 3}, {"prompt": "b", "seed": 2, "n": 3}],
        ),
        (request(PROMPT, tensor("seed", [], "INT64")), [{"prompt": "a dog"}]),
        (request(PROMPT, tensor("guidance_scale", [1.5], "FP32")), [{"prompt": "a dog", "guidance_scale": 1.5}]),
        (request(PROMPT, tensor("image", [b"1", b"2"])), [{"prompt": "a dog", "image": [b"1", b"2"]}]),
        (request(PROMPT, tensor("images", ["MQ=="])), [{"prompt": "a dog", "images": ["MQ=="]}]),
        (
            request(tensor("prompt", ["a", "b"]), tensor("image", [b"1"])),
            [{"prompt": "a", "image": [b"1"]}, {"prompt": "b", "image": [b"1"]}],
        ),
        (
            request(tensor("prompt", ["a", "b"]), tensor("image", [b"1", b"2"])),
            [{"prompt": "a", "image": [b"1"]}, {"prompt": "b", "image": [b"2"]}],
        ),
        (
            request(tensor("prompt", ["a", "b"]), tensor("image", [b"1", b"2", b"3", b"4"], shape=[2, 2])),
            [{"prompt": "a", "image": [b"1", b"2"]}, {"prompt": "b", "image": [b"3", b"4"]}],
        ),
    ],
)
def test_v2_decodes(given: InferRequest, rows: list[dict[str, Any]]) -> None:
    assert v2.decode(given, GLM, 4) == rows


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("seed", b"7", 7),
        ("seed", " 7\n", 7),
        ("seed", "7.0", 7.0),
        ("seed", "1e3", 1000.0),
        ("guidance_scale", "2.5", 2.5),
        ("guidance_scale", "2", 2),
        ("guidance_scale", "high", "high"),  # left for the check, which names the field
        ("guidance_scale", "9" * 100, "9" * 100),
        ("num_images_per_prompt", "2", 2),
        ("tidy", "True", True),
        ("tidy", b"false", False),
        ("tidy", "1", "1"),
        ("prompt", "5", "5"),
        ("prompt", b"true", "true"),
        ("no_such_field", b"7", "7"),
        ("seed", 7, 7),
        ("seed", None, None),
    ],
)
def test_v2_reads_numbers_from_text(name: str, value: Any, typed: Any) -> None:
    for given in (request(tensor(name, [value])), request(**{name: value})):
        (row,) = v2.decode(given, FLAGGED, 4)
        assert row == {name: typed}
        assert type(row[name]) is type(typed)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (request(PROMPT, PROMPT), "prompt: given as two inputs"),
        (request(PROMPT, prompt="a cat"), "prompt: given as an input and as a parameter"),
        (request(tensor("prompt", ["a"] * 5)), "prompt: 5 prompts; at most 4 fit in one call"),
        (request(tensor("prompt", [])), "prompt: the tensor is empty"),
        (request(tensor("prompt", ["a", "b", "c"]), tensor("seed", [1, 2], "INT64")), "seed: 2 elements for 3 prompts"),
        (
            request(tensor("prompt", ["a", "b"]), tensor("image", [b"1", b"2", b"3"], shape=[3])),
            "image: shape [3] for 2 prompts; the first dimension must be 2",
        ),
        (request(tensor("prompt", ["a"], shape=[2])), "prompt: shape [2] means 2 elements; 1 were sent"),
        (request(tensor("prompt", ["a", "b"], shape=[1])), "prompt: shape [1] means 1 elements; 2 were sent"),
        (request(InferInput("prompt", [1], "BYTES", None)), "prompt: shape [1] means 1 elements; 0 were sent"),
        (request(tensor("prompt", ["a"], shape="1")), "prompt: shape '1' is not a list"),
        (request(InferInput("prompt", None, "BYTES", ["a"])), "prompt: shape None is not a list"),
        (request(tensor("prompt", ["a"], shape=[-1])), "has a size that is not an integer from 0"),
        (request(tensor("prompt", ["a"], shape=[1.0])), "has a size that is not an integer from 0"),
        (request(tensor("prompt", ["a"], shape=[True])), "has a size that is not an integer from 0"),
        (request(tensor("prompt", ["a"], shape=[2**31])), "has a size that is not an integer from 0"),
        (request(tensor("prompt", ["a"], shape=[1] * 9)), "is not a list of at most 8 sizes"),
        (request(tensor("prompt", ["a"], shape=[2**31 - 1] * 8)), "1 were sent"),
        (request(tensor("prompt", [[[[[[[[[["a"]]]]]]]]]])), "prompt: data is nested deeper than 8 levels"),
        (request(tensor("prompt", [b"\xff\xfe"])), "prompt: b'\\xff\\xfe' is not UTF-8 text"),
        (request(prompt=b"\xff"), "is not UTF-8 text"),
    ],
)
def test_v2_refuses(given: InferRequest, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        v2.decode(given, GLM, 4)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400


def test_v2_rows_do_not_share_their_pictures() -> None:
    rows = v2.decode(request(tensor("prompt", ["a", "b"]), tensor("image", [b"1", b"2"])), GLM, 4)
    rows[0]["seed"] = 1
    assert "seed" not in rows[1]


# --- v2: the binary form of tensors


@pytest.mark.parametrize("datatype", v2.NUMPY_TYPES)
def test_raw_numbers(datatype: str) -> None:
    dtype = np.dtype(v2.NUMPY_TYPES[datatype])
    values = np.array([0, 1, 1, 0]) if datatype == "BOOL" else np.array([0, 1, 100, 3])
    array = values.astype(dtype)
    made = v2.from_raw("x", datatype, array.tobytes())
    assert made == array.tolist()
    assert {type(item) for item in made} == {type(array.tolist()[0])}
    assert v2.from_raw("x", datatype, memoryview(array.tobytes())) == made
    assert v2.from_raw("x", datatype, b"") == []
    if dtype.itemsize > 1:
        with pytest.raises(
            InvalidRequest, match=f"^x: {4 * dtype.itemsize - 1} bytes are no whole number of {datatype}"
        ):
            v2.from_raw("x", datatype, array.tobytes()[:-1])


@pytest.mark.parametrize("seed", range(5))
def test_raw_bytes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        items = [rng.randbytes(rng.choice((0, 1, 5, 300))) for _ in range(rng.randrange(6))]
        raw = b"".join(struct.pack("<I", len(item)) + item for item in items)
        assert v2.from_raw("x", "BYTES", raw) == items
        assert v2.from_raw("x", "BYTES", memoryview(raw)) == items
        for cut in {rng.randrange(1, len(raw) + 1) for _ in range(3)} if raw else ():
            part = raw[:-cut]
            try:
                made = v2.from_raw("x", "BYTES", part)
            except InvalidRequest as error:
                assert str(error).startswith("x: ")
            else:  # cut between two elements
                assert made == items[: len(made)]


def test_raw_of_an_unknown_datatype() -> None:
    with pytest.raises(InvalidRequest, match=r"^x: datatype 'BF16' is none of BYTES, BOOL"):
        v2.from_raw("x", "BF16", b"1234")
    with pytest.raises(InvalidRequest, match="runs past the end"):
        v2.from_raw("x", "BYTES", struct.pack("<I", 2**32 - 1) + b"abc")


# --- v2 over REST


def rest(document: Any, binary: bytes = b"", length: str | int | None = None) -> InferRequest:
    body = json.dumps(document).encode()
    if length is None and binary:
        length = len(body)
    return v2.rest_request(body + binary, None if length is None else str(length), "tiny")


def input_of(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", **fields}]}


def test_rest_request() -> None:
    made = rest(
        {
            "id": "42",
            "parameters": {"n": 2},
            "inputs": [
                {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a dog"], "parameters": {"x": 1}},
                {"name": "seed", "shape": [1, 1], "datatype": "INT64", "data": [[7]]},
            ],
            "outputs": [{"name": "image", "parameters": {"binary_data": True}}, {"name": "metadata"}],
        }
    )
    assert (made.id, made.model_name, made.parameters, made.from_grpc) == ("42", "tiny", {"n": 2}, False)
    assert [(o.name, o.parameters) for o in made.request_outputs] == [
        ("image", {"binary_data": True}),
        ("metadata", {}),
    ]
    assert v2.decode(made, GLM, 4) == [{"prompt": "a dog", "seed": 7, "n": 2}]


def test_rest_request_with_little() -> None:
    made = rest({"parameters": {"prompt": "a dog"}, "inputs": None, "outputs": None, "id": None})
    assert (made.id, made.inputs, made.request_outputs) == (None, [], None)
    assert v2.decode(made, GLM, 4) == [{"prompt": "a dog"}]
    assert rest({"id": "", "inputs": [], "outputs": []}).id is None


def test_rest_request_with_binary_tensors() -> None:
    prompts = struct.pack("<I", 1) + b"a" + struct.pack("<I", 2) + b"bb"
    seeds = struct.pack("<qq", 1, 2)
    document = {
        "inputs": [
            {"name": "prompt", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(prompts)}},
            {"name": "n", "shape": [1], "datatype": "INT64", "data": [1]},
            {"name": "seed", "shape": [2], "datatype": "INT64", "parameters": {"binary_data_size": len(seeds)}},
            {"name": "image", "shape": [0], "datatype": "BYTES", "parameters": {"binary_data_size": 0}},
        ]
    }
    made = rest(document, prompts + seeds)
    assert v2.decode(made, GLM, 4) == [{"prompt": "a", "n": 1, "seed": 1}, {"prompt": "bb", "n": 1, "seed": 2}]


@pytest.mark.parametrize(
    ("document", "binary", "length", "says"),
    [
        ([], b"", None, "body: must be an object"),
        ({"instances": []}, b"", None, "'instances' is not a field of a v2 request"),
        ({"id": 5}, b"", None, "id: 5 is not a string"),
        ({"inputs": {}}, b"", None, "inputs: {} is not a list of objects"),
        ({"inputs": ["a dog"]}, b"", None, "inputs: ['a dog'] is not a list of objects"),
        ({"outputs": "image"}, b"", None, "outputs: 'image' is not a list of objects"),
        ({"outputs": [{}]}, b"", None, "outputs[0].name: None is not a name"),
        ({"outputs": [{"name": "image", "parameters": 1}]}, b"", None, "outputs[0].parameters: 1 is not an object"),
        ({"parameters": []}, b"", None, "parameters: [] is not an object"),
        (input_of(name=""), b"", None, "inputs[0].name: '' is not a name"),
        (input_of(name=5), b"", None, "inputs[0].name: 5 is not a name"),
        (input_of(datatype="STRING", data=["a"]), b"", None, "prompt: datatype 'STRING' is none of BYTES"),
        (input_of(datatype=None, data=["a"]), b"", None, "prompt: datatype None is none of BYTES"),
        (input_of(datatype=["BYTES"], data=["a"]), b"", None, "is none of BYTES"),
        (input_of(), b"", None, "prompt: data None is not a list, and there is no binary_data_size"),
        (input_of(data="a dog"), b"", None, "prompt: data 'a dog' is not a list"),
        (input_of(parameters=5), b"", None, "inputs[0].parameters: 5 is not an object"),
        (input_of(parameters={"binary_data_size": 9}), b"12345", None, "binary_data_size 9 is not within the 5 bytes"),
        (input_of(parameters={"binary_data_size": -1}), b"12345", None, "binary_data_size -1 is not within"),
        (input_of(parameters={"binary_data_size": True}), b"12345", None, "binary_data_size True is not within"),
        (input_of(parameters={"binary_data_size": "5"}), b"12345", None, "binary_data_size '5' is not within"),
        (input_of(parameters={"binary_data_size": 5}), b"12345", None, "BYTES element of 875770417 bytes runs past"),
        (input_of(data=["a"]), b"123", None, "body: 3 bytes follow the last binary input"),
        ({}, b"", "x", "Inference-Header-Content-Length: 'x' is not a length"),
        ({}, b"", "-1", "Inference-Header-Content-Length: '-1' is not a length"),
        ({}, b"", "3", "Inference-Header-Content-Length: '3' is not a length within the 2 bytes"),
        ({}, b"", "²", "is not a length"),
        ({}, b"", "1", "body: not valid JSON"),
        ({}, b"", "0", "body: not valid JSON"),
    ],
)
def test_rest_refuses(document: Any, binary: bytes, length: str | None, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        rest(document, binary, length)
    assert says in str(caught.value)


def test_an_input_has_data_or_binary_data_not_both() -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        rest(input_of(data=["a dog"], parameters={"binary_data_size": 5}), struct.pack("<I", 1) + b"x")


def respond(
    given: InferRequest, *made: GenerationResult, identity: str = "id-1"
) -> tuple[bytes, int | None, InferResponse]:
    response = v2.encode(list(made), given, "tiny", identity)
    parts, json_length = v2.rest_response(response, given)
    assert sum(map(len, parts)) == len(text(parts))
    return text(parts), json_length, response


def test_rest_response_as_json() -> None:
    body, json_length, _ = respond(request(PROMPT), result(b"\x89PNG", b"\x00", prompt="犬"))
    assert json_length is None
    document = json.loads(body)
    metadata = [json.loads(item) for item in document["outputs"][1].pop("data")]
    assert document == {
        "model_name": "tiny",
        "id": "id-1",
        "outputs": [
            {
                "name": "image",
                "shape": [2],
                "datatype": "BYTES",
                "parameters": {"content_type": "base64"},
                "data": [base64.b64encode(b"\x89PNG").decode(), "AA=="],
            },
            {"name": "metadata", "shape": [2], "datatype": "BYTES"},
        ],
    }
    assert [item["seed"] for item in metadata] == [5, 6]
    assert metadata[0] | {"seed": 6} == metadata[1]
    assert metadata[0] == {
        **v1.describe(result(b"x", b"y")),
        "prompt": "犬",
        "format": "png",
    }


def test_rest_response_of_a_video() -> None:
    body, _, _ = respond(request(PROMPT), result(b"mp4", format="mp4"))
    outputs = json.loads(body)["outputs"]
    assert [output["name"] for output in outputs] == ["video", "metadata"]
    told = json.loads(outputs[1]["data"][0])
    assert (told["num_frames"], told["fps"], told["format"]) == (17, 16, "mp4")


def binary_outputs(body: bytes, json_length: int | None) -> dict[str, list[bytes]]:
    assert json_length is not None
    document, rest_of_body, made = json.loads(body[:json_length]), body[json_length:], {}
    for output in document["outputs"]:
        size = (output.get("parameters") or {}).get("binary_data_size")
        if size is not None:
            assert "data" not in output
            made[output["name"]] = v2.from_raw(output["name"], "BYTES", rest_of_body[:size])
            rest_of_body = rest_of_body[size:]
    assert rest_of_body == b""
    return made


BIN = {"binary_data": True}


@pytest.mark.parametrize(
    ("given", "names", "binary"),
    [
        (request(PROMPT, binary_data_output=True), ["image", "metadata"], {"image", "metadata"}),
        (request(PROMPT, binary_data_output=False), ["image", "metadata"], set()),
        (request(PROMPT, outputs=[RequestedOutput("image", BIN)]), ["image"], {"image"}),
        (request(PROMPT, outputs=[RequestedOutput("metadata")]), ["metadata"], set()),
        (
            request(PROMPT, outputs=[RequestedOutput("metadata"), RequestedOutput("image", BIN)]),
            ["metadata", "image"],
            {"image"},
        ),
        (
            request(PROMPT, outputs=[RequestedOutput("image", {"binary_data": False})], binary_data_output=True),
            ["image"],
            set(),
        ),
        (request(PROMPT, outputs=[RequestedOutput("image", {})], binary_data_output=True), ["image"], {"image"}),
    ],
)
def test_rest_response_with_binary_outputs(given: InferRequest, names: list[str], binary: set[str]) -> None:
    images = (b"\x89PNG\0", b"")
    body, json_length, _ = respond(given, result(*images))
    document = json.loads(body[:json_length])
    assert [output["name"] for output in document["outputs"]] == names
    if not binary:
        assert json_length is None
        return
    made = binary_outputs(body, json_length)
    assert set(made) == binary
    if "image" in binary:
        assert made["image"] == list(images)
    if "metadata" in binary:
        assert [json.loads(item)["seed"] for item in made["metadata"]] == [5, 6]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_requested_outputs(kind: str) -> None:
    assert v2.requested(request(PROMPT), kind) == []
    wanted = [RequestedOutput("metadata"), RequestedOutput(kind)]
    assert v2.requested(request(PROMPT, outputs=wanted), kind) == ["metadata", kind]
    other = "video" if kind == "image" else "image"
    with pytest.raises(InvalidRequest, match=f"^outputs: '{other}' is not an output of this model; it has {kind}"):
        v2.requested(request(PROMPT, outputs=[RequestedOutput(other)]), kind)


def test_media_of_a_megabyte_are_pieces_not_text() -> None:
    given = request(PROMPT)
    parts, _ = v2.rest_response(v2.encode([result(b"x" * 2**20)], given, "tiny", "i"), given)
    assert sum(isinstance(part, Base64) for part in parts) == 1
    assert max(len(part) for part in parts if not isinstance(part, Base64)) < 2000


# --- clients that are not ours


@pytest.mark.parametrize("binary", [False, True])
def test_kserves_own_client(binary: bool) -> None:
    """KServe's InferenceRESTClient sends `InferRequest.to_rest()` and reads with `InferResponse.from_bytes`."""
    prompt = InferInput("prompt", [2], "BYTES")
    prompt.set_data_from_numpy(np.array(["a dog", "犬"], dtype=object), binary_data=binary)
    seed = InferInput("seed", [1], "INT64")
    seed.set_data_from_numpy(np.array([7]), binary_data=binary)
    sent = InferRequest("tiny", [prompt, seed], request_id="42", parameters={"n": 1})
    # It cannot read binary outputs that are no text, so it does not ask for any.
    body, json_length = sent.to_rest()
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = v2.rest_request(raw, None if json_length is None else str(json_length), "tiny")
    assert given.id == "42"
    assert v2.decode(given, GLM, 4) == [{"prompt": p, "seed": 7, "n": 1} for p in ("a dog", "犬")]
    answer, answer_length, _ = respond(given, result(b"\x89PNG"))
    read = InferResponse.from_bytes(answer, len(answer) if answer_length is None else answer_length)
    assert base64.b64decode(read.outputs[0].data[0]) == b"\x89PNG"


def test_tritons_http_client() -> None:
    from tritonclient import http

    prompt = http.InferInput("prompt", [2], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a dog", "犬".encode()], dtype=object))
    seed = http.InferInput("seed", [1], "INT64")
    seed.set_data_from_numpy(np.array([7]), binary_data=False)
    body, json_length = http.InferenceServerClient.generate_request_body(
        [prompt, seed], request_id="42", parameters={"guidance_scale": 2.5}
    )
    given = v2.rest_request(bytes(body), str(json_length), "tiny")
    assert given.id == "42"
    assert v2.decode(given, GLM, 4) == [{"prompt": p, "seed": 7, "guidance_scale": 2.5} for p in ("a dog", "犬")]
    answer, answer_length, _ = respond(given, result(b"\x89PNG\0"), result(b""))
    read = http.InferenceServerClient.parse_response_body(answer, header_length=answer_length)
    assert read.get_response()["id"] == "id-1"
    assert read.as_numpy("image").tolist() == [b"\x89PNG\0", b""]
    assert [json.loads(item)["seed"] for item in read.as_numpy("metadata")] == [5, 5]


# --- v2 over gRPC


def test_grpc_request_with_contents() -> None:
    message = pb.ModelInferRequest(model_name="tiny", id="42")
    contents: dict[str, Any] = {
        "prompt": ("BYTES", "bytes_contents", [b"a dog"]),
        "num_inference_steps": ("INT32", "int_contents", [3]),
        "seed": ("INT64", "int64_contents", [2**62]),
        "width": ("UINT16", "uint_contents", [64]),
        "height": ("UINT64", "uint64_contents", [32]),
        "guidance_scale": ("FP64", "fp64_contents", [2.1]),
        "max_sequence_length": ("INT8", "int_contents", [5]),
        "tidy": ("BOOL", "bool_contents", [True]),
        "n": ("FP32", "fp32_contents", [2.0]),
    }
    for name, (datatype, field, values) in contents.items():
        tensor = message.inputs.add(name=name, datatype=datatype, shape=[1])
        getattr(tensor.contents, field).extend(values)
    message.outputs.add(name="image")
    made = grpc.infer_request(pb.ModelInferRequest.FromString(message.SerializeToString()))
    assert (made.id, made.model_name, made.from_grpc, made.use_binary_outputs) == ("42", "tiny", True, False)
    assert [output.name for output in made.request_outputs] == ["image"]
    wanted = {name: values[0] for name, (_, _, values) in contents.items()}
    assert v2.decode(made, FLAGGED, 4) == [{**wanted, "prompt": "a dog"}]


def test_grpc_request_with_raw_contents() -> None:
    message = pb.ModelInferRequest(model_name="tiny")
    message.inputs.add(name="prompt", datatype="bytes", shape=[2])
    message.inputs.add(name="seed", datatype="INT64", shape=[2])
    message.inputs.add(name="guidance_scale", datatype="FP16", shape=[1])
    message.raw_input_contents.extend(
        [struct.pack("<I1sI2s", 1, b"a", 2, b"bb"), struct.pack("<qq", 1, 2), np.float16(2.5).tobytes()]
    )
    made = grpc.infer_request(message)
    assert made.id is None and made.request_outputs is None
    assert made.use_binary_outputs is True
    assert v2.decode(made, GLM, 4) == [
        {"prompt": "a", "seed": 1, "guidance_scale": 2.5},
        {"prompt": "bb", "seed": 2, "guidance_scale": 2.5},
    ]


def field(number: int, kind: int, payload: bytes) -> bytes:
    return bytes([number << 3 | kind]) + payload


def delimited(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return field(number, 2, bytes([len(data)]) + data)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        (field(1, 0, b"\x01"), True),
        (field(1, 0, b"\x00"), False),
        (field(2, 0, b"\xac\x02"), 300),
        (delimited(3, "犬".encode()), "犬"),
        (field(4, 1, struct.pack("<d", 2.1)), 2.1),
        (field(4, 1, struct.pack("<d", -0.0)), -0.0),
        (field(4, 1, struct.pack("<d", 0.0)), 0.0),
        (field(5, 0, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), 2**64 - 1),
        (field(5, 0, b"\x07"), 7),
        (b"", None),
    ],
)
def test_grpc_parameters(parameter: bytes, value: Any) -> None:
    """Also those that KServe's proto lacks and the protocol has: double_param (4) and uint64_param (5)."""
    entry = delimited(1, b"seed") + delimited(2, parameter)
    wire = delimited(1, b"tiny") + delimited(4, entry)
    message = pb.ModelInferRequest.FromString(wire)
    assert message.model_name == "tiny" and list(message.parameters) == ["seed"]
    made = grpc.infer_request(message)
    assert made.parameters == {"seed": value}
    assert type(made.parameters["seed"]) is type(value)
    assert v2.decode(made, GLM, 4) == [{"seed": value}]


def test_a_grpc_parameter_of_no_known_kind_is_refused() -> None:
    entry = delimited(1, b"seed") + delimited(2, field(9, 0, b"\x07"))
    message = pb.ModelInferRequest.FromString(delimited(1, b"tiny") + delimited(4, entry))
    with pytest.raises(InvalidRequest, match="'seed': field 9 is no kind of parameter"):
        grpc.infer_request(message)


@pytest.mark.parametrize(
    ("inputs", "raw", "says"),
    [
        ([("prompt", "BYTES")], [b"", b""], "raw_input_contents: 2 entries for 1 inputs"),
        ([("prompt", "BYTES"), ("seed", "INT64")], [b""], "raw_input_contents: 1 entries for 2 inputs"),
        ([("prompt", "TEXT")], [], "prompt: datatype 'TEXT' is none of BYTES"),
        ([("prompt", "")], [b""], "prompt: datatype '' is none of BYTES"),
        ([("guidance_scale", "FP16")], [], "guidance_scale: FP16 data must be sent in raw_input_contents"),
        ([("prompt", "BYTES")], [b"\x05\0\0\0a"], "prompt: a BYTES element of 5 bytes runs past the end"),
        ([("prompt", "BYTES")], [b"\0\0"], "prompt: 2 bytes too many after the last BYTES element"),
        ([("seed", "INT64")], [b"1234567"], "seed: 7 bytes are no whole number of INT64 elements"),
    ],
)
def test_grpc_refuses(inputs: list[tuple[str, str]], raw: list[bytes], says: str) -> None:
    message = pb.ModelInferRequest(raw_input_contents=raw)
    for name, datatype in inputs:
        message.inputs.add(name=name, datatype=datatype, shape=[1])
    with pytest.raises(InvalidRequest) as caught:
        grpc.infer_request(message)
    assert says in str(caught.value)


def test_grpc_data_come_one_way() -> None:
    message = pb.ModelInferRequest(raw_input_contents=[struct.pack("<I", 0)])
    message.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a dog")
    with pytest.raises(InvalidRequest, match="prompt: has contents and raw_input_contents"):
        grpc.infer_request(message)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("size", [0, 4, 119, 120, 16_000, 16_400, 3_000_000])  # lengths of one to four bytes
def test_grpc_response(raw: bool, kind: type, size: int) -> None:
    images = [random.Random(size).randbytes(size), b""]
    made = result(*images)
    media = tuple(GeneratedMedia(kind(m.data), m.format, m.width, m.height, m.seed) for m in made.media)
    made = GenerationResult(made.request, media, made.timings, "v", "r")
    wire = grpc.infer_response(v2.encode([made], request(PROMPT), "tiny", "id-1"), raw)
    message = pb.ModelInferResponse.FromString(wire)
    assert (message.id, message.model_name) == ("id-1", "tiny")
    assert [(o.name, o.datatype, list(o.shape)) for o in message.outputs] == [
        ("image", "BYTES", [2]),
        ("metadata", "BYTES", [2]),
    ]
    if raw:
        data = [v2.from_raw("x", "BYTES", content) for content in message.raw_output_contents]
        assert not any(output.HasField("contents") for output in message.outputs)
    else:
        data = [list(output.contents.bytes_contents) for output in message.outputs]
        assert not message.raw_output_contents
    assert data[0] == images
    assert [json.loads(item)["seed"] for item in data[1]] == [5, 6]
    # and as KServe's own client reads it
    read = InferResponse.from_grpc(message)
    assert read.outputs[0].as_numpy().reshape(-1).tolist() == images


def test_grpc_request_of_kserves_own_client() -> None:
    prompt = InferInput("prompt", [1], "BYTES", ["a dog"])
    seed = InferInput("seed", [1], "INT64", [7])
    sent = InferRequest("tiny", [prompt, seed], request_id="42", parameters={"n": 2, "output_format": "webp"})
    made = grpc.infer_request(sent.to_grpc())
    assert v2.decode(made, GLM, 4) == [{"prompt": "a dog", "seed": 7, "n": 2, "output_format": "webp"}]


# --- metadata


@pytest.mark.parametrize("schema", [GLM, FLAGGED], ids=["glm", "generic"])
def test_metadata_of_a_schema(schema: Schema) -> None:
    inputs = v2.inputs(schema)
    assert [entry["name"] for entry in inputs] == list(schema.parameters)
    types = {entry["name"]: entry["datatype"] for entry in inputs}
    assert types["prompt"] == "BYTES"
    assert types["num_inference_steps"] == "INT64"
    assert types["guidance_scale"] == "FP64"
    assert all(entry["shape"] == [-1] for entry in inputs)
    told = v2.parameters(schema)
    assert list(told) == list(schema.parameters)
    assert json.loads(json.dumps(told)).keys() == told.keys()
    assert told["prompt"]["required"] is True
    assert told["prompt"]["max_length"] == 8000
    assert told["num_inference_steps"]["default"] == schema.parameters["num_inference_steps"].default
    assert all(entry["fits"] and entry["type"] and entry["description"] for entry in told.values())


def test_metadata_tells_multiples_choices_and_pictures() -> None:
    told = v2.parameters(GLM)
    assert (told["width"]["multiple_of"], told["width"]["offset"]) == (32, 0)
    assert (told["width"]["minimum"], told["width"]["maximum"]) == (32, 4096)
    assert told["image"]["max_items"] == 4
    assert v2.outputs("video") == [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("video", "metadata")]
    assert {entry["datatype"] for entry in v2.inputs(FLAGGED) if entry["name"] == "tidy"} == {"BOOL"}


def test_source_pictures_are_not_told_back() -> None:
    image = SourceImage(1, 1, b"\1\2\3")
    told = v1.describe(result(b"x", images=(image,)))
    assert "images" not in told and "image" not in told
    assert json.dumps(told)

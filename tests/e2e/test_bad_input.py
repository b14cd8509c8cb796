"""Bad input of every kind over v1, v2 REST and gRPC: refused with a reason, and the next good request works."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import math
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from PIL import Image

from runtime.errors import InvalidRequest
from runtime.families.base import Limits
from runtime.families.requests import RequestChecker
from runtime.types import Capabilities
from tests.e2e.test_load import known, paused

if TYPE_CHECKING:
    from tests.conftest import Gate, Serve, Server

GOOD: dict[str, dict[str, Any]] = {
    "sd15": {"prompt": "a fox", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 7},
    "glm-image": {"prompt": "a fox", "width": 32, "height": 32, "num_inference_steps": 2, "seed": 7},
    "wan-ti2v-5b": {"prompt": "a fox", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 7, "num_frames": 5},
}
LONGEST_MESSAGE = 600
ABSENT = object()


# --- one way to look at all answers


@dataclass
class Answer:
    """What a client heard. `code` is a gRPC status's name; HTTP's are translated."""

    code: str
    message: str


HTTP_TO_GRPC = {
    200: "OK",
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
}


def http(server: Server, path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST") -> Answer:
    status, _, content = server.request(method, path, body, headers)
    if status == 200:
        return Answer("OK", "")
    document = json.loads(content)
    assert list(document) == ["error"] and isinstance(document["error"], str), content[:1000]
    return Answer(HTTP_TO_GRPC.get(status, f"HTTP {status}"), document["error"])


def call(server: Server, message: Any, method: str = "ModelInfer") -> Answer:
    """A gRPC call; `message` may be bytes, which go out as they are."""
    with grpc.insecure_channel(server.grpc) as channel:
        if isinstance(message, bytes):
            ask = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        else:
            ask = getattr(GRPCInferenceServiceStub(channel), method)
        try:
            ask(message, timeout=60)
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details())
    return Answer("OK", "")


def assert_refused(answer: Answer, *parts: str, code: str = "INVALID_ARGUMENT") -> None:
    """Refused as `code`, in a short message that says `parts` and nothing about the server's inside."""
    assert answer.code == code, answer
    for part in parts:
        assert part.lower() in answer.message.lower(), answer
    assert 0 < len(answer.message) < LONGEST_MESSAGE, f"{len(answer.message)} characters: {answer.message[:300]}"
    assert answer.message.isprintable(), answer
    for secret in ("Traceback", "site-packages", '.py"', ".py:", "object at 0x", "tiny-models"):
        assert secret not in answer.message, answer


@contextlib.contextmanager
def unharmed(server: Server, family: str = "sd15") -> Iterator[None]:
    """What happens inside leaves no error in the server's log, and the next good request gives the same bytes."""
    if family not in PICTURES:
        picture(server, family)
    start = server.log.stat().st_size
    yield
    picture(server, family)
    with server.log.open() as log:
        log.seek(start)
        news = [json.loads(line) for line in log if line.startswith("{")]
    bad = [line for line in news if "traceback" in line or line["level"] in ("error", "critical")]
    assert not bad, "\n".join(json.dumps(line)[:2000] for line in bad)


PICTURES: dict[str, str] = {}


def picture(server: Server, family: str) -> str:
    """A good request's result in base64, which is the same every time."""
    source = {"image": b64(png())} if family == "glm-image" else {}  # much faster than from text alone
    prediction = server.predict({**GOOD[family], **source})[0]
    media = (prediction.get("image") or prediction["video"])["b64"]
    assert media == PICTURES.setdefault(family, media), "the good request's result has changed"
    return media


def model_path(server: Server, protocol: str) -> str:
    return f"/v1/models/{server.name}:predict" if protocol == "v1" else f"/v2/models/{server.name}/infer"


# --- the transports: each sends the same fields


def elements(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def kind_of(values: list[Any]) -> str:
    value = values[0] if values else ""
    if isinstance(value, bool):
        return "BOOL"
    if isinstance(value, int):
        return "INT64" if -(2**63) <= value < 2**63 else "UINT64"
    return "FP64" if isinstance(value, float) else "BYTES"


def as_v1(server: Server, fields: dict[str, Any]) -> Answer:
    return http(server, model_path(server, "v1"), {"instances": [fields]})


def as_v1_parameters(server: Server, fields: dict[str, Any]) -> Answer:
    return http(server, model_path(server, "v1"), {"instances": [{}], "parameters": fields})


def as_json_tensors(server: Server, fields: dict[str, Any]) -> Answer:
    tensors = [
        {"name": name, "shape": [len(elements(value))], "datatype": kind_of(elements(value)), "data": elements(value)}
        for name, value in fields.items()
    ]
    return http(server, model_path(server, "v2"), {"inputs": tensors})


def as_json_parameters(server: Server, fields: dict[str, Any]) -> Answer:
    return http(server, model_path(server, "v2"), {"parameters": fields})


def binary(values: list[Any]) -> bytes:
    kind = kind_of(values)
    if kind == "BYTES":
        items = [v.encode() if isinstance(v, str) else v for v in values]
        return b"".join(struct.pack("<I", len(item)) + item for item in items)
    return np.array(values, dtype={"BOOL": "?", "INT64": "<i8", "UINT64": "<u8", "FP64": "<f8"}[kind]).tobytes()


def as_binary_tensors(server: Server, fields: dict[str, Any]) -> Answer:
    tensors, data = [], b""
    for name, value in fields.items():
        raw = binary(elements(value))
        told = {"name": name, "shape": [len(elements(value))], "datatype": kind_of(elements(value))}
        tensors.append({**told, "parameters": {"binary_data_size": len(raw)}})
        data += raw
    head = json.dumps({"inputs": tensors}).encode()
    return http(server, model_path(server, "v2"), head + data, {"inference-header-content-length": str(len(head))})


CONTENTS = {"BOOL": "bool_contents", "INT64": "int64_contents", "UINT64": "uint64_contents", "FP64": "fp64_contents"}


def grpc_message(server: Server, fields: dict[str, Any], raw: bool) -> Any:
    message = pb.ModelInferRequest(model_name=server.name)
    for name, value in fields.items():
        values = elements(value)
        tensor = message.inputs.add(name=name, shape=[len(values)], datatype=kind_of(values))
        if raw:
            message.raw_input_contents.append(binary(values))
        else:
            contents = getattr(tensor.contents, CONTENTS.get(tensor.datatype, "bytes_contents"))
            contents.extend(v.encode() if isinstance(v, str) else v for v in values)
    return message


def as_grpc_raw(server: Server, fields: dict[str, Any]) -> Answer:
    return call(server, grpc_message(server, fields, True))


def as_grpc_contents(server: Server, fields: dict[str, Any]) -> Answer:
    return call(server, grpc_message(server, fields, False))


V1 = (as_v1, as_v1_parameters)
V2_JSON = (as_json_tensors, as_json_parameters)
TENSORS = (as_json_tensors, as_binary_tensors, as_grpc_raw, as_grpc_contents)
TYPED = (as_binary_tensors, as_grpc_raw, as_grpc_contents)
EVERYWHERE = (*V1, *V2_JSON, *TYPED)
Transport = Callable[[Any, dict[str, Any]], Answer]


# --- pictures that are none


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int) -> bytes:
    """A whole black picture: 400 million pixels in some 48 KB."""
    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes((1 + side // 8) * 1000)) for _ in range(side // 1000)]
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", b"".join(rows) + packer.flush()), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in parts)


def png(width: int = 40, height: int = 32) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- the table


@dataclass
class Case:
    """`changes` to a family's good request, and what the refusal must say: `alike`, in the same words everywhere."""

    label: str
    changes: dict[str, Any]
    says: tuple[str, ...]
    family: str = "sd15"
    transports: tuple[Transport, ...] = field(default=EVERYWHERE)
    alike: bool = True

    @property
    def fields(self) -> dict[str, Any]:
        return {k: v for k, v in {**GOOD[self.family], **self.changes}.items() if v is not ABSENT}


SD15 = [
    Case("prompt missing", {"prompt": ABSENT}, ("prompt", "missing")),
    Case("prompt null", {"prompt": None}, ("prompt", "missing"), transports=V1 + V2_JSON),
    Case("prompt empty", {"prompt": ""}, ("prompt", "missing")),
    Case("prompt a number", {"prompt": 5}, ("prompt: 5", "a string")),
    Case("prompt true", {"prompt": True}, ("prompt: True", "a string")),
    Case("prompt an object", {"prompt": {"text": "a"}}, ("prompt", "a string"), transports=V1 + V2_JSON),
    Case("prompt a list", {"prompt": ["a", "b"]}, ("prompt", "a string"), transports=(*V1, as_json_parameters)),
    Case("prompt too long", {"prompt": "x" * 8001}, ("prompt", "8001", "at most 8000")),
    Case("prompt of 2 MB", {"prompt": "x" * 2_000_000}, ("prompt", "2000000", "at most 8000")),
    Case("width a word", {"width": "wide"}, ("width: 'wide'", "an integer")),
    Case("width as text", {"width": "64"}, ("width: '64'", "an integer"), transports=V1),
    Case("width true", {"width": True}, ("width: True", "an integer")),
    Case("width a list", {"width": [64]}, ("width: [64]", "an integer"), transports=(*V1, as_json_parameters)),
    Case("width with a fraction", {"width": 64.5}, ("width: 64.5", "an integer")),
    Case("width not divisible", {"width": 65}, ("width: 65", "multiple of 8", "64 and 72")),
    Case("width below", {"width": 32}, ("width: 32", "from 64 to 4096")),
    Case("width zero", {"width": 0}, ("width: 0", "from 64 to 4096")),
    Case("width negative", {"width": -64}, ("width: -64", "from 64 to 4096")),
    Case("height beyond", {"height": 4104}, ("height: 4104", "from 64 to 4096")),
    Case("too many pixels", {"width": 4096, "height": 4096}, ("width x height", "16777216", "at most 4194304")),
    Case("size malformed", {"size": "64"}, ("size: '64'", "1024x1024")),
    Case("size a number", {"size": 64}, ("size: 64", "1024x1024")),
    Case("size negative", {"size": "-64x64"}, ("size: '-64x64'", "1024x1024")),
    Case("size contradicts width", {"size": "128x64"}, ("size", "128", "contradicts width: 64")),
    Case("no steps", {"num_inference_steps": 0}, ("num_inference_steps: 0", "from 1 to 200")),
    Case("too many steps", {"num_inference_steps": 201}, ("num_inference_steps: 201", "from 1 to 200")),
    Case("steps 1e308", {"num_inference_steps": 1e308}, ("num_inference_steps", "from 1 to 200")),
    Case("guidance beyond", {"guidance_scale": 30.5}, ("guidance_scale: 30.5", "from 0 to 30")),
    Case("guidance negative", {"guidance_scale": -0.5}, ("guidance_scale: -0.5", "from 0 to 30")),
    Case("guidance a word", {"guidance_scale": "high"}, ("guidance_scale: 'high'", "a finite number")),
    Case("guidance NaN", {"guidance_scale": math.nan}, ("guidance_scale: nan", "finite"), transports=TYPED),
    Case("guidance infinite", {"guidance_scale": math.inf}, ("guidance_scale: inf", "finite"), transports=TYPED),
    Case("seed NaN", {"seed": math.nan}, ("seed: nan", "an integer"), transports=TYPED),
    Case("NaN in JSON", {"guidance_scale": math.nan}, ("body", "NaN"), transports=V1 + V2_JSON, alike=False),
    Case("infinity in JSON", {"seed": -math.inf}, ("body", "Infinity"), transports=V1 + V2_JSON, alike=False),
    Case("NaN as text", {"guidance_scale": "nan"}, ("guidance_scale: nan", "finite"), transports=TENSORS),
    Case("seed negative", {"seed": -1}, ("seed: -1", "from 0 to 9223372036854775807")),
    Case("seed 2^63", {"seed": 2**63}, ("seed: 9223372036854775808", "to 9223372036854775807")),
    Case("seed 2^64 - 1", {"seed": 2**64 - 1}, ("seed: 18446744073709551615", "to 9223372036854775807")),
    Case("seed 2^64", {"seed": 2**64}, ("seed: 18446744073709551616",), transports=V1 + V2_JSON),
    Case("seed of 4000 digits", {"seed": 10**4000}, ("body",), transports=V1 + V2_JSON, alike=False),
    Case("seed with a fraction", {"seed": 1.5}, ("seed: 1.5", "an integer")),
    Case("last seed beyond", {"seed": 2**63 - 1, "n": 2}, ("seed", "n - 1", "2^63 - 1")),
    Case("n zero", {"n": 0}, ("n: 0", "from 1 to 10")),
    Case("n 11", {"n": 11}, ("n: 11", "from 1 to 10")),
    Case("n contradicts its alias", {"n": 1, "num_images_per_prompt": 2}, ("num_images_per_prompt: 2", "n: 1")),
    Case("unknown format", {"output_format": "bmp"}, ("output_format: 'bmp'", "png, jpeg, webp")),
    Case("format a number", {"output_format": 5}, ("output_format: 5", "png, jpeg, webp")),
    Case("quality of a png", {"output_quality": 90}, ("output_quality: 90", "png is lossless")),
    Case("quality zero", {"output_quality": 0, "output_format": "jpeg"}, ("output_quality: 0", "from 1 to 100")),
    Case("quality 101", {"output_quality": 101, "output_format": "webp"}, ("output_quality: 101", "from 1 to 100")),
    Case("misspelt field", {"promt": "a"}, ("'promt'", "did you mean prompt?")),
    Case("unknown field", {"zzzz": 1}, ("'zzzz'", "known fields", "guidance_scale")),
    Case("field of odd characters", {"\x00\n\u2028": 1}, ("'\\x00\\n\\u2028'",), alike=False),
    Case("field of 1 MB", {"x" * 10**6: 1}, ("'xxxx",), alike=False),
    Case("negative prompt a number", {"negative_prompt": 1}, ("negative_prompt: 1", "a string")),
    Case(
        "negative prompt without guidance",
        {"negative_prompt": "b", "guidance_scale": 1},
        ("negative_prompt", "guidance_scale is 1"),
    ),
    Case("no frames here", {"num_frames": 5}, ("num_frames: 5", "StableDiffusionPipeline takes no such argument")),
    Case("no source here", {"image": b64(png())}, ("image", "takes no such argument"), alike=False),
    Case("no flow shift here", {"flow_shift": 3.0}, ("flow_shift: 3.0", "no fixed shift")),
    Case("one denoiser here", {"guidance_scale_2": 3}, ("guidance_scale_2: 3", "takes no such argument")),
    Case("no fps here", {"fps": 16}, ("fps: 16", "takes no such argument")),
    Case("no seconds here", {"seconds": 2}, ("seconds: 2", "takes no such argument")),
    Case("clip_skip beyond the encoder", {"clip_skip": 100}, ("clip_skip",)),
    Case("clip_skip negative", {"clip_skip": -100}, ("clip_skip",)),
]
GLM = [
    Case("negative prompt", {"negative_prompt": "ugly"}, ("negative_prompt: 'ugly'", "has none")),
    Case("flow shift", {"flow_shift": 3.0}, ("flow_shift: 3.0", "by the picture's size")),
    Case("frames", {"num_frames": 5}, ("num_frames: 5", "pictures, not videos")),
    Case("width not divisible", {"width": 48}, ("width: 48", "multiple of 32", "32 and 64")),
    Case("prompt tokens beyond", {"max_sequence_length": 2049}, ("max_sequence_length: 2049", "from 1 to 2048")),
    Case("broken base64", {"image": "%%%not base64%%%"}, ("image", "base64")),
    Case("base64 of text", {"image": b64(b"just some text")}, ("image", "picture")),
    Case("base64 of an SVG", {"image": b64(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}, ("image", "SVG")),
    Case("a URL", {"image": "http://169.254.169.254/latest/meta-data"}, ("image", "is not fetched")),
    Case("a file URL", {"image": "file:///etc/passwd"}, ("image", "is not fetched")),
    Case("a path", {"image": "/etc/passwd"}, ("image", "picture")),
    Case("an empty data URI", {"image": "data:image/png;base64,"}, ("image", "empty")),
    Case("a data URI of text", {"image": "data:text/plain;base64,aGFsbG8="}, ("image", "data:image/")),
    Case("cut off", {"image": b64(png()[:200])}, ("image", "damaged or cut off")),
    Case("20,000 x 20,000 pixels", {"image": b64(huge_png(20_000))}, ("image", "400000000 pixels", "at most 40000000")),
    Case("five pictures", {"image": [b64(png())] * 5}, ("image: 5 pictures", "at most 4")),
    Case("aspect", {"image": b64(png(90, 20))}, ("image: 90 x 20", "4.50", "at most 4")),
    Case("aspect of the second", {"image": [b64(png()), b64(png(20, 90))]}, ("image[1]: 20 x 90", "4.50")),
    Case("second broken", {"image": [b64(png()), "?"]}, ("image[1]", "base64")),
    Case("a number", {"image": 5}, ("image[0]: 5", "base64")),
    Case("null among them", {"image": [b64(png()), None]}, ("image[1]: None", "base64"), transports=V1),
    Case("an object", {"image": {"b64": "x"}}, ("image[0]", "base64"), transports=V1 + V2_JSON),
    Case(
        "image contradicts its alias",
        {"image": b64(png()), "images": b64(png(41))},
        ("images", "contradicts image"),
        alike=False,
    ),
]
WAN = [
    Case("ten frames", {"num_frames": 10}, ("num_frames: 10", "multiple of 4 plus 1", "9 and 13")),
    Case("no frames", {"num_frames": 0}, ("num_frames: 0", "from 1 to 257")),
    Case("too many frames", {"num_frames": 261}, ("num_frames: 261", "from 1 to 257")),
    Case("seconds and frames", {"seconds": 0.5}, ("seconds: 0.5", "num_frames: 5", "give one")),
    Case(
        "seconds that do not fit",
        {"seconds": 0.7, "fps": 10, "num_frames": ABSENT},
        ("seconds: 0.7 at 10 fps is 8 frames", "0.4 and 0.8 seconds"),
    ),
    Case("seconds too many", {"seconds": 99, "fps": 24, "num_frames": ABSENT}, ("seconds: 99", "at most 257")),
    Case("seconds negative", {"seconds": -1, "num_frames": ABSENT}, ("seconds: -1", "from 0")),
    Case("fps 61", {"fps": 61}, ("fps: 61", "from 1 to 60")),
    Case("no second expert", {"guidance_scale_2": 3}, ("guidance_scale_2: 3", "one expert")),
    Case("flow shift zero", {"flow_shift": 0}, ("flow_shift: 0", "from 0.01 to 100")),
    Case("five videos", {"n": 5}, ("n: 5", "from 1 to 4")),
    Case("a picture's format", {"output_format": "png"}, ("output_format: 'png'", "one of mp4")),
    Case("two first frames", {"image": [b64(png())] * 2}, ("image: 2 pictures", "at most 1")),
    Case("negative prompt", {"negative_prompt": "b", "guidance_scale": 1}, ("negative_prompt", "guidance_scale is 1")),
]
for case in GLM:
    case.family = "glm-image"
for case in WAN:
    case.family = "wan-ti2v-5b"
CASES = [*SD15, *GLM, *WAN]


def meaning(message: str) -> str:
    """The message without what may differ: where the fields stood, and text that came as bytes."""
    return re.sub(r"(?<=[\s:])b'", "'", message.removeprefix("instances[0]: "))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.label}")
def test_bad_fields_are_refused_alike_everywhere(case: Case, serve: Serve) -> None:
    server = serve(case.family)
    with unharmed(server, case.family):
        messages = set()
        for transport in case.transports:
            answer = transport(server, case.fields)
            assert_refused(answer, *case.says)
            messages.add(meaning(answer.message))
        assert len(messages) == 1 or not case.alike, messages


@pytest.mark.parametrize("empty", [None, "", [], {}], ids=repr)
def test_null_and_empty_count_as_absent(empty: Any, serve: Serve) -> None:
    server = serve("sd15")
    known = server.json("GET", f"/v2/models/{server.name}")[1]["properties"]["parameters"]
    fields = {**dict.fromkeys([*known, "size", "image", "num_images_per_prompt", "flow_shift"], empty), **GOOD["sd15"]}
    assert len(fields) > len(GOOD["sd15"]) + 8
    with unharmed(server):
        for protocol, body in (("v1", {"instances": [fields]}), ("v2", {"parameters": fields})):
            assert http(server, model_path(server, protocol), body).code == "OK"
        if empty is None or empty == "":  # a tensor of one such element
            assert as_json_tensors(server, fields).code == "OK"
        if empty == "":
            assert as_binary_tensors(server, fields).code == "OK"
            assert as_grpc_contents(server, fields).code == "OK"


@pytest.mark.parametrize("text", ["<|image|>", "<|begin_of_image|>", "<|endoftext|>", "<sop>", "<|user|>"])
def test_a_models_own_tokens_in_a_prompt_are_no_fault_of_ours(text: str, serve: Serve) -> None:
    server = serve("glm-image")
    with unharmed(server, "glm-image"):
        for fields in (GOOD["glm-image"], {**GOOD["glm-image"], "image": b64(png())}):
            answer = as_v1(server, {**fields, "prompt": f"a {text} fox"})
            if answer.code != "OK":
                assert_refused(answer, "prompt", text)


# --- bodies that are wrong before any field is


def nested(depth: int, text: str = "[") -> bytes:
    return text.encode() * depth + b"1" + {"[": b"]", '{"a":': b"}"}[text] * depth


def instances(value: bytes) -> bytes:
    return b'{"instances":' + value + b"}"


V1_BODIES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "nothing": (b"", ("body", "JSON")),
    "spaces": (b"  \n ", ("body", "JSON")),
    "null": (b"null", ("body", "instances")),
    "a list": (b"[]", ("body", "instances")),
    "a string": (b'"instances"', ("body", "instances")),
    "an empty object": (b"{}", ("instances", "at least one")),
    "cut off": (b'{"instances":[{"prompt":"a"}', ("body", "JSON")),
    "more after it": (instances(b'[{"prompt":"a"}]') + b"x", ("body", "JSON")),
    "a form": (b"instances=1&prompt=a", ("body", "JSON")),
    "instances null": (instances(b"null"), ("instances", "at least one")),
    "instances empty": (instances(b"[]"), ("instances", "at least one")),
    "instances an object": (instances(b'{"prompt":"a"}'), ("instances", "a list")),
    "instances a string": (instances(b'"a"'), ("instances", "a list")),
    "an instance a string": (instances(b'["a"]'), ("instances[0]: 'a'", "an object")),
    "an instance null": (instances(b"[null]"), ("instances[0]: None", "an object")),
    "an instance empty": (instances(b"[{}]"), ("instances[0]: prompt: missing",)),
    "the second wrong": (instances(b'[{"prompt":"a"},{"prompt":"b","n":0}]'), ("instances[1]: n: 0",)),
    "10,000 instances": (instances(b"[" + b'{"prompt":"a"},' * 9_999 + b"{}]"), ("instances: 10000", "at most 32")),
    "parameters a list": (b'{"instances":[{"prompt":"a"}],"parameters":[1]}', ("parameters: [1]", "an object")),
    "an unknown key": (b'{"instances":[{"prompt":"a"}],"inputs":[]}', ("'inputs'", "instances and parameters")),
    "a key of 1 MB": (b'{"' + b"k" * 10**6 + b'":1}', ("'kkk", "instances and parameters")),
    "a number too large": (instances(b'[{"prompt":"a","guidance_scale":1e400}]'), ("body", "JSON")),
    "a lone surrogate": (instances(b'[{"prompt":"\\ud800"}]'), ("body", "JSON")),
    "a lone surrogate as key": (instances(b'[{"\\udfff":"a"}]'), ("body", "JSON")),
    "Latin-1": (instances('[{"prompt":"größe"}]'.encode("latin-1")), ("body", "JSON")),
    "UTF-16": (instances(b'[{"prompt":"a"}]').decode().encode("utf-16"), ("body", "JSON")),
    "a raw NUL": (instances(b'[{"prompt":"\0"}]'), ("body", "JSON")),
    "binary": (bytes(range(256)), ("body", "JSON")),
    **{
        f"{depth} {'lists' if text == '[' else 'objects'} deep in {place}": (
            form % nested(depth, text),
            ("body", "depth") if depth > 1020 else (place,),
        )
        for depth in (900, 985, 1010, 100_000)
        for text in ("[", '{"a":')
        for place, form in {
            "instances": b'{"instances":%s}',
            "instances[0]": b'{"instances":[%s]}',
            "prompt": b'{"instances":[{"prompt":%s}]}',
            "seed": b'{"instances":[{"prompt":"a","seed":%s}]}',
            "parameters": b'{"instances":[{"prompt":"a"}],"parameters":%s}',
        }.items()
        if not (text == '{"a":' and place in ("instances[0]", "parameters"))  # these are fields, and 'a' unknown
    },
}


@pytest.mark.parametrize("label", V1_BODIES)
def test_bad_v1_bodies(label: str, serve: Serve) -> None:
    server = serve("sd15")
    body, says = V1_BODIES[label]
    with unharmed(server):
        assert_refused(http(server, model_path(server, "v1"), body), *says)


PROMPT = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a fox"]}


def tensor(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**PROMPT, **changes}.items() if v is not ABSENT}


V2_BODIES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "nothing": (b"", ("body", "JSON")),
    "a list": ([], ("body", "inputs")),
    "an unknown key": ({"inputs": [PROMPT], "instances": []}, ("'instances'", "inputs")),
    "a key of 1 MB": ({"k" * 10**6: 1}, ("'kkk", "inputs")),
    "nothing asked": ({}, ("prompt", "missing")),
    "inputs an object": ({"inputs": PROMPT}, ("inputs", "a list")),
    "inputs a list of strings": ({"inputs": ["prompt"]}, ("inputs", "objects")),
    "inputs a string": ({"inputs": "prompt"}, ("inputs", "a list")),
    "parameters a list": ({"inputs": [PROMPT], "parameters": [1]}, ("parameters: [1]", "an object")),
    "a nested parameter": ({"inputs": [PROMPT], "parameters": {"seed": {"a": 1}}}, ("seed: {'a': 1}", "an integer")),
    "id a number": ({"inputs": [PROMPT], "id": 5}, ("id: 5", "a string")),
    "a name missing": ({"inputs": [tensor(name=ABSENT)]}, ("inputs[0].name", "None")),
    "a name empty": ({"inputs": [tensor(name="")]}, ("inputs[0].name", "''")),
    "a name a number": ({"inputs": [tensor(name=5)]}, ("inputs[0].name", "5")),
    "a name of 1 MB": ({"inputs": [tensor(name="x" * 10**6)]}, ("xxx",)),
    "a name of 1 MB, and no datatype": ({"inputs": [tensor(name="x" * 10**6, datatype=5)]}, ("xxx",)),
    "a name of 1 MB, twice": ({"inputs": [tensor(name="x" * 10**6)] * 2}, ("xxx",)),
    "a name of 1 MB, and a bad shape": ({"inputs": [tensor(name="x" * 10**6, shape=[3])]}, ("xxx",)),
    "a name of control characters": ({"inputs": [tensor(name="\x1b[31m\n", datatype="X")]}, ("\\x1b[31m",)),
    "twice the same input": ({"inputs": [PROMPT, PROMPT]}, ("prompt", "two inputs")),
    "an input and a parameter": ({"inputs": [PROMPT], "parameters": {"prompt": "b"}}, ("prompt", "as a parameter")),
    "datatype missing": ({"inputs": [tensor(datatype=ABSENT)]}, ("prompt", "datatype None", "BYTES")),
    "datatype unknown": ({"inputs": [tensor(datatype="STRING")]}, ("prompt", "datatype 'STRING'", "BYTES")),
    "datatype a list": ({"inputs": [tensor(datatype=["BYTES"])]}, ("prompt", "datatype ['BYTES']", "BYTES")),
    "datatype an object": ({"inputs": [tensor(datatype={})]}, ("prompt", "datatype {}", "BYTES")),
    "datatype of 1 MB": ({"inputs": [tensor(datatype="X" * 10**6)]}, ("prompt", "datatype 'XXX", "BYTES")),
    "data missing": ({"inputs": [tensor(data=ABSENT)]}, ("prompt", "data None", "a list")),
    "data a string": ({"inputs": [tensor(data="a fox")]}, ("prompt", "data 'a fox'", "a list")),
    "data null": ({"inputs": [tensor(data=[None])]}, ("prompt", "missing")),
    "data empty": ({"inputs": [tensor(data=[], shape=[0])]}, ("prompt", "empty")),
    "data deep": ({"inputs": [tensor(data=json.loads(nested(20)))]}, ("prompt", "nested deeper than 8")),
    "data 1000 deep": (
        b'{"inputs":[{"name":"prompt","shape":[1],"datatype":"BYTES","data":%s}]}' % nested(1000),
        ("prompt", "nested deeper than 8"),
    ),
    "shape 1000 deep": (
        b'{"inputs":[{"name":"prompt","shape":%s,"datatype":"BYTES","data":["a"]}]}' % nested(1000),
        ("prompt", "shape"),
    ),
    "datatype 1000 deep": (
        b'{"inputs":[{"name":"prompt","shape":[1],"datatype":%s,"data":["a"]}]}' % nested(1000),
        ("prompt", "datatype"),
    ),
    "id 1000 deep": (b'{"id":%s}' % nested(1000), ("id",)),
    "inputs 1000 deep": (b'{"inputs":%s}' % nested(1000), ("inputs",)),
    "outputs 1000 deep": (b'{"outputs":%s}' % nested(1000), ("outputs",)),
    "parameter 1000 deep": (b'{"parameters":{"prompt":%s}}' % nested(1000), ("prompt",)),
    "shape missing": ({"inputs": [tensor(shape=ABSENT)]}, ("prompt", "shape None")),
    "shape a number": ({"inputs": [tensor(shape=1)]}, ("prompt", "shape 1 ")),
    "shape of strings": ({"inputs": [tensor(shape=["1"])]}, ("prompt", "shape ['1']")),
    "shape true": ({"inputs": [tensor(shape=[True])]}, ("prompt", "shape [True]")),
    "shape negative": ({"inputs": [tensor(shape=[-1])]}, ("prompt", "shape [-1]")),
    "shape twice negative": ({"inputs": [tensor(shape=[-1, -1])]}, ("prompt", "shape [-1, -1]")),
    "shape with a fraction": ({"inputs": [tensor(shape=[1.0])]}, ("prompt", "shape [1.0]")),
    "shape huge": ({"inputs": [tensor(shape=[2**31 - 1] * 8)]}, ("prompt", "shape", "2147483647")),
    "shape huger": ({"inputs": [tensor(shape=[2**63])]}, ("prompt", "shape [9223372036854775808]")),
    "shape of 10,000 ones": ({"inputs": [tensor(shape=[1] * 10_000)]}, ("prompt", "shape", "at most 8")),
    "shape and data differ": ({"inputs": [tensor(shape=[2])]}, ("prompt", "shape [2]", "2 elements; 1 were sent")),
    "33 prompts": ({"inputs": [tensor(shape=[33], data=["a"] * 33)]}, ("prompt: 33 prompts", "at most 32")),
    "10,000 prompts": ({"inputs": [tensor(shape=[10_000], data=["a"] * 10_000)]}, ("prompt", "10000", "at most")),
    "the second wrong": (
        {"inputs": [tensor(shape=[2], data=["a", "b"]), tensor(name="n", datatype="INT64", shape=[2], data=[1, 0])]},
        ("prompt[1]: n: 0",),
    ),
    "seeds for no prompt": (
        {
            "inputs": [
                tensor(shape=[3], data=["a", "b", "c"]),
                tensor(name="seed", datatype="INT64", shape=[2], data=[1, 2]),
            ]
        },
        ("seed: 2 elements for 3 prompts",),
    ),
    "outputs an object": ({"inputs": [PROMPT], "outputs": {"name": "image"}}, ("outputs", "a list")),
    "outputs unknown": (
        {"inputs": [PROMPT], "outputs": [{"name": "video"}]},
        ("outputs: 'video'", "image and metadata"),
    ),
    "an output without a name": ({"inputs": [PROMPT], "outputs": [{}]}, ("outputs[0].name", "None")),
    "an output of 1 MB": ({"inputs": [PROMPT], "outputs": [{"name": "x" * 10**6}]}, ("outputs", "'xxx")),
    "an output's parameters a list": (
        {"inputs": [PROMPT], "outputs": [{"name": "image", "parameters": [1]}]},
        ("outputs[0].parameters: [1]", "an object"),
    ),
    "an input's parameters a list": ({"inputs": [tensor(parameters=[1])]}, ("inputs[0].parameters: [1]", "an object")),
    "binary size, and no binary data": (
        {"inputs": [tensor(data=ABSENT, parameters={"binary_data_size": 9})]},
        ("prompt", "binary_data_size 9", "0 bytes"),
    ),
    "a lone surrogate": (
        b'{"inputs":[{"name":"prompt","shape":[1],"datatype":"BYTES","data":["\\ud800"]}]}',
        ("body", "JSON"),
    ),
}


@pytest.mark.parametrize("label", V2_BODIES)
def test_bad_v2_bodies(label: str, serve: Serve) -> None:
    server = serve("sd15")
    body, says = V2_BODIES[label]
    with unharmed(server):
        assert_refused(http(server, model_path(server, "v2"), body), *says)


RAW_FOX = struct.pack("<I", 5) + b"a fox"


def split_body(size: Any, data: bytes, length: str | None = None, **changes: Any) -> tuple[bytes, str]:
    """A body of the binary extension, and its header Inference-Header-Content-Length."""
    head = json.dumps({"inputs": [tensor(data=ABSENT, parameters={"binary_data_size": size}, **changes)]}).encode()
    return head + data, str(len(head)) if length is None else length


BINARY: dict[str, tuple[tuple[bytes, str], tuple[str, ...]]] = {
    "size too large": (split_body(100, RAW_FOX), ("prompt", "binary_data_size 100", "9 bytes")),
    "size too small": (split_body(4, RAW_FOX), ("prompt", "5 bytes", "past the end")),
    "size negative": (split_body(-1, RAW_FOX), ("prompt", "binary_data_size -1")),
    "size a string": (split_body("9", RAW_FOX), ("prompt", "binary_data_size '9'")),
    "size true": (split_body(True, RAW_FOX), ("prompt", "binary_data_size True")),
    "size 2^64": (split_body(2**64, RAW_FOX), ("prompt", "binary_data_size")),
    "more than the inputs": (split_body(9, RAW_FOX + b"rest"), ("body", "4 bytes follow")),
    "an element too long": (split_body(9, b"\xff\xff\xff\xff12345"), ("prompt", "4294967295", "past the end")),
    "half a length": (split_body(11, RAW_FOX + b"\0\0"), ("prompt", "2 bytes too many")),
    "two elements for one": (split_body(18, RAW_FOX * 2), ("prompt", "shape [1]", "1 elements")),
    "not UTF-8": (split_body(6, b"\2\0\0\0\xff\xfe"), ("prompt", "not UTF-8")),
    "surrogates in UTF-8": (split_body(7, b"\3\0\0\0\xed\xa0\x80"), ("prompt", "not UTF-8")),
    "half a number": (split_body(9, RAW_FOX, name="seed", datatype="INT64"), ("seed", "9 bytes", "INT64")),
    "datatype unknown": (split_body(9, RAW_FOX, datatype="BF16"), ("prompt", "'BF16'")),
    "header a word": (split_body(9, RAW_FOX, "long"), ("Inference-Header-Content-Length: 'long'",)),
    "header negative": (split_body(9, RAW_FOX, "-1"), ("Inference-Header-Content-Length: '-1'",)),
    "header zero": (split_body(9, RAW_FOX, "0"), ("body", "JSON")),
    "header too small": (split_body(9, RAW_FOX, "10"), ("body", "JSON")),
    "header too large": (split_body(9, RAW_FOX, "99999"), ("Inference-Header-Content-Length: '99999'",)),
    "header of 5000 digits": (split_body(9, RAW_FOX, "9" * 5000), ("Inference-Header-Content-Length: '999",)),
    "header of odd digits": (split_body(9, RAW_FOX, "²"), ("Inference-Header-Content-Length",)),
}


@pytest.mark.parametrize("label", BINARY)
def test_bad_binary_bodies(label: str, serve: Serve) -> None:
    server = serve("sd15")
    (body, length), says = BINARY[label]
    with unharmed(server):
        answer = http(server, model_path(server, "v2"), body, {"inference-header-content-length": length})
        assert_refused(answer, *says)


def bad_message(change: Callable[[Any], None]) -> Callable[[Server], Any]:
    def make(server: Server) -> Any:
        message = grpc_message(server, GOOD["sd15"], False)
        change(message)
        return message

    return make


def change_prompt(**changes: Any) -> Callable[[Server], Any]:
    def change(message: Any) -> None:
        message.inputs[0].MergeFrom(pb.ModelInferRequest.InferInputTensor(**changes))
        if "shape" in changes:
            message.inputs[0].shape[:] = changes["shape"]

    return bad_message(change)


MESSAGES: dict[str, tuple[Callable[[Server], Any], tuple[str, ...]]] = {
    "datatype unknown": (change_prompt(datatype="STRING"), ("prompt", "'STRING'")),
    "datatype of 100 KB": (change_prompt(datatype="X" * 10**5), ("prompt", "XXX")),
    "a name of 100 KB": (change_prompt(name="x" * 10**5), ("xxx",)),
    "a name of 100 KB, and no datatype": (change_prompt(name="x" * 10**5, datatype="X"), ("xxx",)),
    "a name of 100 KB, and a bad shape": (change_prompt(name="x" * 10**5, shape=[3]), ("xxx",)),
    "a name of control characters": (change_prompt(name="\x1b[31m\n", shape=[3]), ("\\x1b[31m",)),
    "shape negative": (change_prompt(shape=[-1]), ("prompt", "shape [-1]")),
    "shape huge": (change_prompt(shape=[2**62, 2**62]), ("prompt", "shape [4611686018427387904")),
    "shape of 10,000 ones": (change_prompt(shape=[1] * 10_000), ("prompt", "shape", "at most 8")),
    "shape and data differ": (change_prompt(shape=[2]), ("prompt", "shape [2]", "1 were sent")),
    "data of another type": (
        bad_message(lambda m: m.inputs.add(name="n", datatype="INT64", shape=[1]).contents.fp32_contents.append(1)),
        ("n", "shape [1]", "0 were sent"),
    ),
    "FP16 in contents": (
        bad_message(lambda m: m.inputs.add(name="n", datatype="FP16", shape=[1]).contents.fp32_contents.append(1)),
        ("n", "FP16", "raw_input_contents"),
    ),
    "contents and raw": (
        bad_message(lambda m: m.raw_input_contents.extend([b""] * len(m.inputs))),
        ("prompt", "contents and raw_input_contents"),
    ),
    "raw for another number of inputs": (
        bad_message(lambda m: m.raw_input_contents.append(RAW_FOX)),
        ("raw_input_contents", "1 entries for 5 inputs"),
    ),
    "twice the same input": (bad_message(lambda m: m.inputs.append(m.inputs[0])), ("prompt", "two inputs")),
    "an input and a parameter": (
        bad_message(lambda m: setattr(m.parameters["seed"], "int64_param", 1)),
        ("seed", "as a parameter"),
    ),
    "outputs unknown": (bad_message(lambda m: m.outputs.add(name="video")), ("outputs: 'video'", "metadata")),
    "an output of 100 KB": (bad_message(lambda m: m.outputs.add(name="x" * 10**5)), ("outputs", "'xxx")),
    "not UTF-8": (
        bad_message(lambda m: m.inputs[0].contents.bytes_contents.__setitem__(0, b"\xff")),
        ("prompt", "not UTF-8"),
    ),
    "10,000 prompts": (
        bad_message(
            lambda m: (
                m.inputs[0].contents.bytes_contents.extend([b"a"] * 9_999),
                m.inputs[0].shape.__setitem__(0, 10_000),
            )
        ),
        ("prompt", "10000", "at most"),
    ),
    "NaN as a parameter": (
        # double_param, which KServe's messages lack
        lambda server: (
            pb.ModelInferRequest(
                model_name=server.name, inputs=grpc_message(server, GOOD["sd15"], False).inputs
            ).SerializeToString()
            + b"\x22\x1b\x0a\x0eguidance_scale\x12\x09\x21"
            + struct.pack("<d", math.nan)
        ),
        ("guidance_scale: nan", "finite"),
    ),
    "no protobuf": (lambda _: b"\xff\xff\xff", ("request",)),
    "a string that is not UTF-8": (lambda _: b"\x0a\x02\xff\xfe", ("request",)),
}


@pytest.mark.parametrize("label", MESSAGES)
def test_bad_grpc_messages(label: str, serve: Serve) -> None:
    server = serve("sd15")
    make, says = MESSAGES[label]
    with unharmed(server):
        assert_refused(call(server, make(server)), *says)


# --- the wrong place


@pytest.mark.parametrize(
    ("method", "path", "code", "says"),
    [
        ("POST", "/v1/models/nobody:predict", "NOT_FOUND", "'nobody'"),
        ("GET", "/v1/models/nobody", "NOT_FOUND", "'nobody'"),
        ("POST", "/v2/models/nobody/infer", "NOT_FOUND", "'nobody'"),
        ("GET", "/v2/models/nobody", "NOT_FOUND", "'nobody'"),
        ("GET", "/v2/models/nobody/ready", "NOT_FOUND", "'nobody'"),
        ("GET", "/v2/models/%ff%00%1b", "NOT_FOUND", "not served here"),
        ("GET", "/v2/models/" + "x" * 5000, "NOT_FOUND", "'xxx"),
        ("POST", "/v2/repository/models/nobody/load", "NOT_FOUND", "'nobody'"),
        ("POST", "/v2/models/tiny/versions/1/infer", "UNIMPLEMENTED", "version"),
        ("GET", "/v2/models/tiny/versions/1", "UNIMPLEMENTED", "version"),
        ("GET", "/v2/models/tiny/versions/1/ready", "UNIMPLEMENTED", "version"),
        ("POST", "/v2/repository/models/tiny/load", "UNIMPLEMENTED", "ENABLE_REPOSITORY_API"),
        ("POST", "/v2/repository/models/tiny/unload", "UNIMPLEMENTED", "ENABLE_REPOSITORY_API"),
        ("POST", "/v1/models/tiny:explain", "UNIMPLEMENTED", ""),
        ("GET", "/nowhere", "NOT_FOUND", "not found"),
        ("GET", "/v2/models/tiny/stats", "NOT_FOUND", "not found"),
        ("GET", "/v1/models/tiny:predict", "NOT_FOUND", ""),
        ("PUT", "/v1/models/tiny:predict", "HTTP 405", "method not allowed"),
        ("GET", "/v2/models/tiny/infer", "HTTP 405", "method not allowed"),
        ("DELETE", "/v2/models/tiny/infer", "HTTP 405", "method not allowed"),
        ("POST", "/v2/health/live", "HTTP 405", "method not allowed"),
    ],
)
def test_wrong_places(method: str, path: str, code: str, says: str, serve: Serve) -> None:
    server = serve("sd15")
    with unharmed(server):
        body = {"instances": [GOOD["sd15"]]} if method in ("POST", "PUT") else None
        assert_refused(http(server, path, body, method=method), says, code=code)


@pytest.mark.parametrize(
    ("method", "message", "code", "says"),
    [
        ("ModelInfer", pb.ModelInferRequest(model_name="nobody"), "NOT_FOUND", "'nobody'"),
        ("ModelInfer", pb.ModelInferRequest(model_name="x" * 10**5), "NOT_FOUND", "'xxx"),
        ("ModelInfer", pb.ModelInferRequest(), "NOT_FOUND", "''"),
        ("ModelInfer", pb.ModelInferRequest(model_name="tiny", model_version="1"), "UNIMPLEMENTED", "version"),
        ("ModelReady", pb.ModelReadyRequest(name="nobody"), "NOT_FOUND", "'nobody'"),
        ("ModelReady", pb.ModelReadyRequest(name="tiny", version="1"), "UNIMPLEMENTED", "version"),
        ("ModelMetadata", pb.ModelMetadataRequest(name="nobody"), "NOT_FOUND", "'nobody'"),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="nobody"), "NOT_FOUND", "'nobody'"),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="tiny"), "UNIMPLEMENTED", "REPOSITORY_API"),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="tiny"), "UNIMPLEMENTED", "REPOSITORY"),
        ("ModelStatistics", b"", "UNIMPLEMENTED", ""),
    ],
)
def test_wrong_places_over_grpc(method: str, message: Any, code: str, says: str, serve: Serve) -> None:
    server = serve("sd15")
    with unharmed(server):
        assert_refused(call(server, message, method), says, code=code)


# --- HTTP itself


def good_request(server: Server, *headers: str, length: int | None = None, **changes: Any) -> bytes:
    body = json.dumps({"instances": [{**GOOD["sd15"], **changes}]}).encode()
    lines = [f"POST {model_path(server, 'v1')} HTTP/1.1", "Host: test", *headers]
    if "Transfer-Encoding: chunked" not in headers:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def connect(server: Server) -> socket.socket:
    host, _, port = server.http.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def talk(server: Server, data: bytes) -> bytes:
    """All that the server answers to `data` until it closes the connection."""
    with connect(server) as sock:
        sock.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                answer += part
        return answer


@pytest.mark.parametrize(
    ("label", "data"),
    [
        ("no HTTP", b"\x16\x03\x01\x02\x00\x01\xfc\x03\x03\r\n\r\n"),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("a path that is not ASCII", b"GET /v2/models/\xff\xfe HTTP/1.1\r\nHost: test\r\n\r\n"),
        ("a length that is negative", b"Content-Length: -1"),
        ("a length too long for a number", b"Content-Length: " + b"9" * 40),
        ("two lengths", b"Content-Length: 1\r\nContent-Length: 2"),
        ("a length and chunks", b"Content-Length: 5\r\nTransfer-Encoding: chunked"),
        ("a chunk that is none", b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_garbage_is_no_fault_of_ours(label: str, data: bytes, serve: Serve) -> None:
    server = serve("sd15")
    if data.startswith((b"Content", b"Transfer")):
        data = f"POST {model_path(server, 'v1')} HTTP/1.1\r\nHost: test\r\n".encode() + data + b"\r\n\r\n{}"
    with unharmed(server):
        assert talk(server, data).startswith(b"HTTP/1.1 400 ")


def test_a_length_too_short_is_taken_at_its_word(serve: Serve) -> None:
    server = serve("sd15")
    with unharmed(server):
        answer = talk(server, good_request(server, length=10))
        statuses = re.findall(rb"HTTP/1.1 (\d+) ", answer)
        assert statuses and set(statuses) == {b"400"}


@pytest.mark.parametrize("label", ["a chunked body", "a body of known length"])
def test_a_client_that_leaves_within_its_body(label: str, serve: Serve) -> None:
    server = serve("sd15")
    with unharmed(server):
        for _ in range(5):
            with connect(server) as sock:
                if label == "a chunked body":
                    sock.sendall(good_request(server, "Transfer-Encoding: chunked").partition(b"{")[0])
                    sock.sendall(b"10\r\n" + b'{"instances"')
                else:
                    sock.sendall(good_request(server, length=10_000))


def test_a_compressed_body_is_refused_with_a_reason(serve: Serve) -> None:
    server = serve("sd15")
    body = gzip.compress(json.dumps({"instances": [GOOD["sd15"]]}).encode())
    with unharmed(server):
        for protocol in ("v1", "v2"):
            answer = http(server, model_path(server, protocol), body, {"content-encoding": "gzip"})
            assert_refused(answer, "body", "JSON")


def log_lines(server: Server, request_id: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("request_id") == request_id]


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return found


LONG = {"num_inference_steps": 200, "width": 512, "height": 512, "n": 10}  # minutes of work


def test_a_client_that_leaves_while_it_waits(serve: Serve) -> None:
    server = serve("sd15")
    with unharmed(server):
        identity = "left-while-waiting"
        with connect(server) as sock:
            sock.sendall(good_request(server, f"X-Request-Id: {identity}", **LONG))
            sock.settimeout(0.3)
            with pytest.raises(TimeoutError):  # it runs
                sock.recv(1)
        lines = wait_until(lambda: [line for line in log_lines(server, identity) if line["message"] == "cancelled"])
        assert lines[0]["status"] == 499
        begun = time.monotonic()
        picture(server, "sd15")
        assert time.monotonic() - begun < 30


# --- limits


LIMITED = {
    "MAX_BODY_BYTES": "100000",
    "GRPC_MAX_RECEIVE_MESSAGE_LENGTH": "100000",
    "MAX_QUEUE_SIZE": "1",
    "ENABLE_REPOSITORY_API": "true",
}


@pytest.fixture
def limited(serve: Serve) -> Server:
    """A server of small limits, with the repository API on."""
    return serve("sd15", **LIMITED)


@pytest.mark.parametrize("chunked", [False, True], ids=["known length", "chunked"])
@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_a_body_over_the_limit(protocol: str, chunked: bool, limited: Server) -> None:
    import httpx

    body = b" " * 100_001
    with unharmed(limited), httpx.Client(base_url=limited.http) as client:
        content = iter([body[:60_000], body[60_000:]]) if chunked else body
        answer = client.post(model_path(limited, protocol), content=content)
        assert answer.status_code == 413
        assert_refused(
            Answer("RESOURCE_EXHAUSTED", answer.json()["error"]), "body", "100000", code="RESOURCE_EXHAUSTED"
        )
        assert "MAX_BODY_BYTES" in answer.json()["error"]
        fits = json.dumps({"instances": [GOOD["sd15"]]}).encode().ljust(100_000)
        assert client.post(model_path(limited, "v1"), content=fits).status_code == 200


def test_a_message_over_the_limit(limited: Server) -> None:
    with unharmed(limited):
        message = grpc_message(limited, {**GOOD["sd15"], "negative_prompt": "x" * 100_001}, True)
        assert_refused(call(limited, message), "larger than max", code="RESOURCE_EXHAUSTED")


def test_a_full_queue(limited: Server) -> None:
    """Of six at once one may run, one may wait, and the others hear that they may come again."""
    slow = {**GOOD["sd15"], "num_inference_steps": 100}
    together = threading.Barrier(6)

    def over_http() -> tuple[str, Any, str]:
        together.wait()
        status, headers, body = limited.request("POST", model_path(limited, "v1"), {"instances": [slow]})
        return HTTP_TO_GRPC[status], headers.get("retry-after"), "" if status == 200 else json.loads(body)["error"]

    def over_grpc() -> tuple[str, Any, str]:
        with grpc.insecure_channel(limited.grpc) as channel:
            ask = GRPCInferenceServiceStub(channel).ModelInfer
            together.wait()
            try:
                ask(grpc_message(limited, slow, True), timeout=60)
            except grpc.RpcError as error:
                return error.code().name, dict(error.trailing_metadata()).get("retry-after"), error.details()
            return "OK", None, ""

    for way in (over_http, over_grpc):
        with unharmed(limited), ThreadPoolExecutor(6) as pool:
            with paused(limited):  # nobody makes room before four have come in vain
                asked = [pool.submit(way) for _ in range(6)]
                wait_until(lambda asked=asked: sum(future.done() for future in asked) >= 4)
            answers = [future.result() for future in asked]
            refused = [answer for answer in answers if answer[0] != "OK"]
            assert 1 <= len(answers) - len(refused) <= 2
            for code, retry_after, message in refused:
                assert_refused(Answer(code, message), "at most 1", code="RESOURCE_EXHAUSTED")
                assert int(retry_after) > 0


def test_more_prompts_than_ever_fit_are_not_asked_to_come_again(limited: Server) -> None:
    status, headers, body = limited.request("POST", model_path(limited, "v1"), {"instances": [GOOD["sd15"]] * 3})
    assert status == 400 and "retry-after" not in headers, body
    assert_refused(Answer(HTTP_TO_GRPC[status], json.loads(body)["error"]), "instances", "3", "1")


def engines(server: Server) -> list[psutil.Process]:
    return [p for p in psutil.Process(server.process.pid).children() if "runtime.engine.worker" in p.cmdline()]


def test_unload_ends_the_engine_and_load_brings_the_same_pictures(limited: Server) -> None:
    name = limited.name
    with unharmed(limited):
        for over_grpc in (False, True):
            (engine,) = engines(limited)
            if over_grpc:
                message = pb.RepositoryModelUnloadRequest(model_name=name)
                assert call(limited, message, "RepositoryModelUnload").code == "OK"
            else:
                answer = limited.json("POST", f"/v2/repository/models/{name}/unload")
                assert answer == (200, {"name": name, "unload": True})
            assert not engine.is_running()
            assert not engines(limited)
            for path in ("/v2/health/ready", f"/v2/models/{name}/ready", f"/v1/models/{name}"):
                status, told = limited.json("GET", path)
                assert status == 503 and "unloaded" in told["error"], path
            assert limited.json("GET", "/v2/health/live") == (200, {"live": True})
            (entry,) = limited.json("POST", "/v2/repository/index")[1]
            assert entry == {"name": name, "state": "UNAVAILABLE", "reason": "unloaded"}
            assert limited.json("POST", "/v2/repository/index", {"ready": True}) == (200, [])
            for transport in EVERYWHERE:
                assert_refused(transport(limited, GOOD["sd15"]), "unloaded", code="UNAVAILABLE")
            if over_grpc:
                assert call(limited, pb.RepositoryModelLoadRequest(model_name=name), "RepositoryModelLoad").code == "OK"
            else:
                assert limited.json("POST", f"/v2/repository/models/{name}/load")[0] == 200
            assert limited.json("GET", f"/v2/models/{name}/ready")[0] == 200
            assert picture(limited, "sd15")


def test_a_load_amid_an_unload_leaves_one_engine(limited: Server) -> None:
    path = f"/v2/repository/models/{limited.name}"
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(limited.json, "POST", f"{path}/unload")
        while limited.json("GET", f"/v2/models/{limited.name}/ready")[0] == 200:
            pass
        limited.json("POST", f"{path}/load")  # 503 where it came before the old engine's end
        assert unloading.result()[0] == 200
    limited.json("POST", f"{path}/load")
    limited.wait_ready()
    assert picture(limited, "sd15") and len(engines(limited)) == 1


def test_unload_does_not_leave_a_client_waiting(limited: Server) -> None:
    """One that runs and one that waits both hear that the model is gone."""
    body = {"instances": [{**GOOD["sd15"], **LONG}]}
    calls = []
    with unharmed(limited), ThreadPoolExecutor(2) as pool:
        with paused(limited):
            for state in ("running", "queued"):
                told = {"X-Request-ID": f"unloaded-{state}"}
                calls.append(pool.submit(limited.request, "POST", model_path(limited, "v1"), body, told))
                wait_until(lambda state=state: known(limited, f"unloaded-{state}", state))
        try:
            assert limited.json("POST", f"/v2/repository/models/{limited.name}/unload")[0] == 200
            assert [call.result()[0] for call in calls] == [503, 503]
        finally:
            assert limited.json("POST", f"/v2/repository/models/{limited.name}/load")[0] == 200


def test_requests_while_the_model_loads(start: Callable[..., Server], gate: Gate) -> None:
    gate.shut("loading")
    server = start("sd15", **gate.environment)

    def listening() -> bool:
        with contextlib.suppress(OSError):
            return server.request("GET", "/v2/health/live")[0] == 200
        return False

    wait_until(listening, 60)
    for path, body in (
        (model_path(server, "v1"), {"instances": [GOOD["sd15"]]}),
        (model_path(server, "v1"), b"not even JSON"),
        (model_path(server, "v2"), {"inputs": [PROMPT]}),
    ):
        status, headers, content = server.request("POST", path, body)
        assert status == 503 and int(headers["retry-after"]) > 0
        assert_refused(Answer("UNAVAILABLE", json.loads(content)["error"]), "not ready", "loading", code="UNAVAILABLE")
    wait_until(lambda: call(server, pb.ServerLiveRequest(), "ServerLive").code == "OK")
    assert_refused(as_grpc_raw(server, GOOD["sd15"]), "not ready", "loading", code="UNAVAILABLE")
    assert server.json("GET", "/v2/health/ready")[0] == 503
    assert server.json("GET", f"/v2/models/{server.name}")[1]["inputs"] == []


# --- bodies that would keep the server from answering probes


def many_tensors(kind: str) -> tuple[bytes, dict[str, str]]:
    if kind == "text":
        return json.dumps({"inputs": [tensor(shape=[10**6], data=["a"] * 10**6)]}).encode(), {}
    if kind == "numbers":
        values = tensor(name="seed", datatype="INT64", shape=[3 * 10**6], data=[0] * (3 * 10**6))
        return json.dumps({"inputs": [PROMPT, values]}).encode(), {}
    if kind == "empty binary text":
        body, length = split_body(8 * 10**6, bytes(8 * 10**6), shape=[2 * 10**6])
    else:
        body, length = split_body(8 * 10**6, bytes(8 * 10**6), shape=[8 * 10**6], name="seed", datatype="UINT8")
    return body, {"inference-header-content-length": length}


@pytest.mark.parametrize("kind", ["text", "numbers", "empty binary text", "binary numbers"])
def test_more_elements_than_any_call_takes_are_refused(kind: str, serve: Serve) -> None:
    """Each of them would cost the event loop seconds; bench/probes.py watches what probes wait."""
    server = serve("sd15")
    body, headers = many_tensors(kind)
    status, _, content = server.request("POST", model_path(server, "v2"), body, headers)
    assert status == 400
    assert any(words in content.decode() for words in ("JSON values", "elements"))


# --- families whose requests need no server to be checked


WAN_FACTS: dict[str, Any] = {
    "video": True,
    "multiple": 16,
    "temporal": 4,
    "experts": 2,
    "text_to_video": True,
    "image_to_video": False,
    "flow_shift": 3.0,
    "defaults": {
        "width": 1280,
        "height": 720,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 40,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
    },
}


def checker(defaults: dict[str, Any] | None = None, **facts: Any) -> RequestChecker:
    capabilities = Capabilities(
        family="wan",
        pipeline_class="WanPipeline",
        media="video",
        facts={**WAN_FACTS, **facts},
        defaults=defaults or {},
        source="",
        model_bytes=0,
        model_revision="",
        device="CPU",
        dtypes={},
        optimizations={},
        engine_variant="",
    )
    return RequestChecker(capabilities, Limits())


def complete(checker: RequestChecker, **fields: Any) -> Any:
    return checker.complete(checker.check({"prompt": "a fox", **fields}))


I2V = {"text_to_video": False, "image_to_video": True}


@pytest.mark.parametrize(
    ("facts", "fields", "says"),
    [
        (I2V, {}, ("image: missing", "PNG, JPEG, WebP or GIF")),
        (I2V, {"image": ""}, ("image: missing",)),
        (I2V, {"image": [b64(png())] * 2}, ("image: 2 pictures", "at most 1")),
        ({}, {"image": b64(png())}, ("image", "from text alone")),
        ({}, {"guidance_scale": 1, "guidance_scale_2": 3}, ("guidance_scale_2: 3", "guidance_scale is 1")),
        ({"experts": 1}, {"guidance_scale_2": 3}, ("guidance_scale_2: 3", "one expert")),
        ({"flow_shift": None}, {"flow_shift": 3}, ("flow_shift: 3", "no fixed shift")),
        ({}, {"num_frames": 10}, ("num_frames: 10", "9 and 13")),
        ({}, {"num_frames": 258}, ("num_frames: 258", "from 1 to 257")),
        ({}, {"seconds": 5, "num_frames": 81}, ("seconds: 5", "num_frames: 81", "give one")),
        ({}, {"seconds": 17}, ("seconds: 17 at 16 fps is 273 frames", "at most 257", "16 seconds")),
        ({}, {"seconds": 0.1}, ("seconds: 0.1", "0 and 0.25 seconds")),
        ({}, {"size": "1920x1104"}, ("width x height", "at most 2088960")),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_refused_by_wan(facts: dict[str, Any], fields: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        complete(checker(**facts), **fields)
    assert_refused(Answer("INVALID_ARGUMENT", str(refused.value)), *says)


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"),
    [
        (0, 16, 1),
        (5, 16, 81),
        (0.25, 16, 5),
        (1.12, 25, 29),  # 1.12 * 25 is 28.000000000000004
        (0.56, 50, 29),
        (8.96, 25, 225),
        (float(np.float32(0.32)), 25, 9),  # as an FP32 tensor brings it
        (float(np.float32(4.8)), 25, 121),
    ],
)
def test_seconds_that_fit_are_not_refused_for_their_last_digit(seconds: float, fps: int, frames: int) -> None:
    assert complete(checker(), seconds=seconds, fps=fps).num_frames == frames


def test_a_default_length_does_not_contradict_seconds() -> None:
    with_default = checker(defaults={"num_frames": 17})
    assert complete(with_default).num_frames == 17
    assert complete(with_default, seconds=0.5).num_frames == 9


def test_a_default_size_does_not_contradict_a_size() -> None:
    request = complete(checker(defaults={"size": "64x96"}), size="96x64")
    assert (request.width, request.height) == (96, 64)


@pytest.mark.parametrize(
    ("field", "value"), [("clip_skip", 100), ("clip_skip", -1), ("denoising_end", 5), ("guidance_rescale", 1e308)]
)
def test_arguments_of_the_pipelines_own_have_bounds(serve: Serve, field: str, value: float) -> None:
    server = serve("sdxl")
    status, answer = server.json("POST", "/v1/models/tiny:predict", {"instances": [{"prompt": "a fox", field: value}]})
    assert status == 400 and field in answer["error"]


def test_many_json_values_are_refused_before_they_are_parsed(serve: Serve) -> None:
    server = serve("sd15")
    for body in (b'{"instances": [' + b"[]," * 5_000_000 + b"[]]}", b'{"instances": [' + b"1," * 5_000_000 + b"1]}"):
        status, _, content = server.request("POST", "/v1/models/tiny:predict", body)
        assert status == 400 and b"JSON values" in content

"""KServe's v2 protocol (Open Inference Protocol): tensors and parameters, REST with the binary extension.

`decode` and `encode` work on KServe's InferRequest and InferResponse, whose tensors here always hold
flat Python lists: REST and gRPC differ only in how those lists come and go (this file, grpc.py).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import orjson
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.protocol.infer_type import RequestedOutput

from runtime import __version__
from runtime.errors import InvalidRequest, shown
from runtime.families.base import ALIASES, Schema
from runtime.protocol.v1 import describe, estimated
from runtime.protocol.wire import Base64, parse, pieces
from runtime.types import Estimate, GenerationResult

NUMPY_TYPES = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
DATATYPES = {"string": "BYTES", "image": "BYTES", "integer": "INT64", "number": "FP64", "boolean": "BOOL"}
# Parameters that speak to the protocol, not to the model.
PROTOCOL_PARAMETERS = {"binary_data_output", "binary_data", "headers"}
MAX_RANK = 8
MAX_ELEMENTS = 4096  # of one tensor: more than any call takes
SERVER = {"name": "diffusion-runtime", "version": __version__, "extensions": ["binary_tensor_data", "model_repository"]}


# --- wire → fields


def decode(request: InferRequest, schema: Schema, max_prompts: int) -> list[dict[str, Any]]:
    """The fields of each prompt: n elements in the tensor `prompt` are n prompts. Raises InvalidRequest."""
    parameters = {k: v for k, v in (request.parameters or {}).items() if k not in PROTOCOL_PARAMETERS}
    shared = {name: _typed(name, value, schema) for name, value in parameters.items()}
    tensors: dict[str, list[Any]] = {}
    shapes: dict[str, list[int]] = {}
    for tensor in request.inputs:
        if tensor.name in tensors:
            raise InvalidRequest(f"{tensor.name}: given as two inputs")
        if tensor.name in shared:
            raise InvalidRequest(f"{tensor.name}: given as an input and as a parameter")
        tensors[tensor.name] = [_typed(tensor.name, value, schema) for value in tensor_values(tensor)]
        shapes[tensor.name] = tensor.shape
    count = len(tensors["prompt"]) if "prompt" in tensors else 1
    if count > max_prompts:
        raise InvalidRequest(f"prompt: {count} prompts; at most {max_prompts} fit in one call")
    if count == 0:
        raise InvalidRequest("prompt: the tensor is empty; it must hold at least one prompt")
    rows: list[dict[str, Any]] = [dict(shared) for _ in range(count)]
    for name, values in tensors.items():
        if not values:
            continue  # an empty tensor counts as absent
        if ALIASES.get(name, name) == "image":
            # A tensor is rectangular: a prompt with fewer pictures than another has empty elements.
            each = _pictures_by_prompt(name, values, shapes[name], count)
            columns = [[value for value in own if value not in (None, "", b"")] for own in each]
        elif len(values) in (1, count):
            columns = values * count if len(values) == 1 else values
        else:
            raise InvalidRequest(
                f"{name}: {len(values)} elements for {count} prompts; give one for all, or one for each prompt"
            )
        for row, value in zip(rows, columns, strict=True):
            row[name] = value
    return rows


def _pictures_by_prompt(name: str, values: list[Any], shape: list[int], count: int) -> list[list[Any]]:
    """One prompt takes all pictures; for several, the first dimension counts prompts."""
    if count == 1:
        return [values]
    if len(values) == 1:
        return [values] * count
    if shape[0] != count:
        raise InvalidRequest(
            f"{name}: shape {shape} for {count} prompts; the first dimension must be {count}, "
            "the second counts the pictures of each"
        )
    each = len(values) // count
    return [values[i * each : (i + 1) * each] for i in range(count)]


def _typed(name: str, value: Any, schema: Schema) -> Any:
    """BYTES as the field wants it: text, or a number written as text. Pictures stay bytes."""
    known = schema.parameters.get(ALIASES.get(name, name))
    if known is not None and known.kind == "image":
        return value
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(f"{name}: {shown(value)} is not UTF-8 text") from None
    if known is None or not isinstance(value, str):
        return value
    text = value.strip()
    if known.kind == "boolean" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if known.kind in ("integer", "number") and len(text) < 40 and text.isascii() and "_" not in text:
        for read in (int, float):
            try:
                return read(text)
            except ValueError:
                pass
    return value


def tensor_values(tensor: InferInput) -> list[Any]:
    """A tensor's elements, flat, in row-major order. Raises InvalidRequest where shape and data disagree."""
    data = tensor.data
    if tensor._raw_data is not None:  # a request that KServe's own code decoded
        data = from_raw(tensor.name, tensor.datatype, tensor._raw_data)
    elif isinstance(data, np.ndarray):
        data = data.reshape(-1).tolist()
    expected = _elements(tensor.name, tensor.shape)
    flat = list(islice(_flatten(tensor.name, data if data is not None else []), MAX_ELEMENTS + 1))
    if len(flat) > MAX_ELEMENTS:
        raise InvalidRequest(
            f"{tensor.name}: shape {shown(tensor.shape)} means {expected} elements; at most {MAX_ELEMENTS} fit"
        )
    if len(flat) != expected:
        raise InvalidRequest(f"{tensor.name}: shape {tensor.shape} means {expected} elements; {len(flat)} were sent")
    return flat


def _elements(name: str, shape: Any) -> int:
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise InvalidRequest(f"{name}: shape {shown(shape)} is not a list of at most {MAX_RANK} sizes")
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**31:
            raise InvalidRequest(f"{name}: shape {shown(shape)} has a size that is not an integer from 0")
    return math.prod(shape)


def _flatten(name: str, data: Any, depth: int = 0) -> Iterator[Any]:
    if not isinstance(data, list):
        yield data
    elif depth > MAX_RANK:
        raise InvalidRequest(f"{name}: data is nested deeper than {MAX_RANK} levels")
    else:
        for item in data:
            yield from _flatten(name, item, depth + 1)


def from_raw(name: str, datatype: str, raw: bytes | memoryview) -> list[Any]:
    """The elements of a tensor in its binary form: little-endian numbers, or length-prefixed BYTES."""
    if datatype == "BYTES":
        values: list[Any] = []
        position, view = 0, memoryview(raw)
        while position < len(view) and len(values) <= MAX_ELEMENTS:
            if position + 4 > len(view):
                raise InvalidRequest(f"{name}: {len(view) - position} bytes too many after the last BYTES element")
            (length,) = struct.unpack_from("<I", view, position)
            position += 4 + length
            if position > len(view):
                raise InvalidRequest(f"{name}: a BYTES element of {length} bytes runs past the end of the data")
            values.append(bytes(view[position - length : position]))
        return values
    try:
        array = np.frombuffer(raw, dtype=np.dtype(NUMPY_TYPES[datatype]))[: MAX_ELEMENTS + 1]
    except KeyError:
        raise InvalidRequest(f"{name}: datatype {shown(datatype)} is none of BYTES, {', '.join(NUMPY_TYPES)}") from None
    except ValueError:
        raise InvalidRequest(f"{name}: {len(raw)} bytes are no whole number of {datatype} elements") from None
    return decimals(array) if datatype == "FP32" else array.tolist()


def decimals(values: Any) -> list[float]:
    """Single-precision numbers as their shortest decimals: 7.3 must not draw another picture than v1's 7.3."""
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]


_PARAMETERS = {"type": "object", "additionalProperties": {"type": ["boolean", "string", "number"]}}
# The request's JSON schema, for the OpenAPI document.
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "inputs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "datatype": {"enum": ["BYTES", *NUMPY_TYPES]},
                    "parameters": _PARAMETERS,
                    "data": {"type": "array"},
                },
                "required": ["name", "shape", "datatype"],
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "parameters": _PARAMETERS},
                "required": ["name"],
            },
        },
    },
    "required": ["inputs"],
}


def rest_request(body: bytes, json_length: str | None, model_name: str) -> InferRequest:
    """A REST body as an InferRequest; `json_length` is the header Inference-Header-Content-Length.

    Raises InvalidRequest.
    """
    length = len(body)
    if json_length is not None:
        digits = json_length.isascii() and json_length.isdigit() and len(json_length) < 16
        if not digits or int(json_length) > len(body):
            raise InvalidRequest(
                f"Inference-Header-Content-Length: {shown(json_length)} is not a length within "
                f"the {len(body)} bytes of the body"
            )
        length = int(json_length)
    view = memoryview(body)
    document = parse(view[:length])
    if not isinstance(document, dict):
        raise InvalidRequest('body: must be an object like {"inputs": [{"name": "prompt", …}]}')
    unknown = set(document) - {"id", "parameters", "inputs", "outputs", "model_name"}  # the last: KServe's client
    if unknown:
        raise InvalidRequest(
            f"{shown(min(unknown))} is not a field of a v2 request; it has id, parameters, inputs, outputs"
        )
    identity, parameters = document.get("id"), document.get("parameters")
    if identity is not None and not isinstance(identity, str):
        raise InvalidRequest(f"id: {shown(identity)} is not a string")
    binary = view[length:]
    inputs = []
    for i, item in enumerate(_objects(document, "inputs")):
        tensor, binary = _rest_input(item, f"inputs[{i}]", binary)
        inputs.append(tensor)
    if len(binary):
        raise InvalidRequest(f"body: {len(binary)} bytes follow the last binary input")
    outputs = [
        RequestedOutput(_name(item, f"outputs[{i}]"), _parameters(item.get("parameters"), f"outputs[{i}].parameters"))
        for i, item in enumerate(_objects(document, "outputs"))
    ]
    return InferRequest(
        model_name=model_name,
        infer_inputs=inputs,
        request_id=identity or None,
        parameters=_parameters(parameters, "parameters"),
        request_outputs=outputs or None,
    )


def _rest_input(item: dict[str, Any], where: str, binary: memoryview) -> tuple[InferInput, memoryview]:
    """One input of a REST body, and the binary data that is left after it."""
    name = _name(item, where)
    datatype = item.get("datatype")
    if not isinstance(datatype, str) or (datatype != "BYTES" and datatype not in NUMPY_TYPES):
        raise InvalidRequest(f"{name}: datatype {shown(datatype)} is none of BYTES, {', '.join(NUMPY_TYPES)}")
    size = _parameters(item.get("parameters"), f"{where}.parameters").get("binary_data_size")
    if size is not None:
        if item.get("data") is not None:
            raise InvalidRequest(f"{name}: has data and binary_data_size; give one of them")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
            raise InvalidRequest(
                f"{name}: binary_data_size {shown(size)} is not within the {len(binary)} bytes that follow"
            )
        data, binary = from_raw(name, datatype, binary[:size]), binary[size:]
    elif isinstance(item.get("data"), list):
        data = item["data"]
    else:
        raise InvalidRequest(f"{name}: data {shown(item.get('data'))} is not a list, and there is no binary_data_size")
    return InferInput(name, item.get("shape"), datatype, data), binary


def _objects(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    items = document.get(name)
    items = [] if items is None else items
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidRequest(f"{name}: {shown(items)} is not a list of objects")
    return items


def _name(item: dict[str, Any], where: str) -> str:
    name = item.get("name")
    return tensor_name(name, f"{where}.name")


def tensor_name(name: Any, where: str) -> str:
    """`name`, which messages may then quote as it is. Raises InvalidRequest."""
    if not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
        raise InvalidRequest(f"{where}: {shown(name)} is not a name")
    return name


def _parameters(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where}: {shown(value)} is not an object")
    return value


# --- results → wire


def encode(
    results: list[GenerationResult] | list[Estimate], request: InferRequest, model_name: str, identity: str
) -> InferResponse:
    """Outputs `image` or `video` (raw bytes) and `metadata` (JSON text), one element for each picture or video."""
    if isinstance(results[0], Estimate):  # a dry run has metadata alone
        dry = [orjson.dumps({"prompt": r.request.prompt, **estimated(r)}) for r in results if isinstance(r, Estimate)]
        output = InferOutput("metadata", [len(dry)], "BYTES", dry)
        return InferResponse(response_id=identity, model_name=model_name, infer_outputs=[output])
    kind = "video" if results[0].media[0].format == "mp4" else "image"
    media, metadata = [], []
    for result in results:
        assert isinstance(result, GenerationResult)
        told = describe(result)
        for item in result.media:
            media.append(item.data)
            video = {"num_frames": item.num_frames, "fps": item.fps} if item.num_frames else {}
            own = {"prompt": result.request.prompt, **told, "seed": item.seed, "format": item.format, **video}
            metadata.append(orjson.dumps(own))
    data = {kind: media, "metadata": metadata}
    wanted = requested(request, kind) or list(data)
    return InferResponse(
        response_id=identity,
        model_name=model_name,
        infer_outputs=[InferOutput(name, [len(data[name])], "BYTES", data[name]) for name in wanted],
        requested_outputs=request.request_outputs,
    )


def envelope(request: InferRequest) -> dict[str, Any]:
    """What of a request decides the form of its answer, as JSON values."""
    outputs = [{"name": o.name, "parameters": o.parameters or {}} for o in request.request_outputs or []]
    binary = (request.parameters or {}).get("binary_data_output") is True
    return {"id": request.id, "binary": binary, "outputs": outputs}


def from_envelope(kept: Mapping[str, Any], model_name: str) -> InferRequest:
    """A request whose answer has the form of the one that `envelope` was made of; it has no inputs."""
    return InferRequest(
        model_name=model_name,
        infer_inputs=[],
        request_id=kept["id"],
        parameters={"binary_data_output": kept["binary"]},
        request_outputs=[RequestedOutput(o["name"], o["parameters"]) for o in kept["outputs"]] or None,
    )


def requested(request: InferRequest, kind: str) -> list[str]:
    """Names of the outputs the request asks for; none means all. Raises InvalidRequest for an unknown one."""
    names = [output.name for output in request.request_outputs or []]
    for name in names:
        if name not in (kind, "metadata"):
            raise InvalidRequest(f"outputs: {shown(name)} is not an output of this model; it has {kind} and metadata")
    return names


def rest_response(
    response: InferResponse, request: InferRequest
) -> tuple[list[bytes | bytearray | Base64], int | None]:
    """The response body's parts, and the length of its JSON where binary data follow."""
    by_name = {output.name: output for output in request.request_outputs or []}
    default = (request.parameters or {}).get("binary_data_output") is True
    outputs, binary = [], []
    for output in response.outputs:
        told: dict[str, Any] = {"name": output.name, "shape": output.shape, "datatype": output.datatype}
        own = by_name[output.name].parameters if output.name in by_name else None
        if (own or {}).get("binary_data", default) is True:
            parts = [part for item in output.data for part in (struct.pack("<I", len(item)), item)]
            told["parameters"] = {"binary_data_size": sum(map(len, parts))}
            binary += parts
        elif output.name == "metadata":
            told["data"] = [item.decode("utf-8") for item in output.data]
        else:
            told["parameters"] = {"content_type": "base64"}
            told["data"] = [Base64(item) for item in output.data]
        outputs.append(told)
    body: list[bytes | bytearray | Base64] = list(
        pieces({"model_name": response.model_name, "id": response.id, "outputs": outputs})
    )
    return (body + binary, sum(map(len, body))) if binary else (body, None)


# --- metadata


def inputs(schema: Schema) -> list[dict[str, Any]]:
    """The model's inputs, for metadata: prompt has one element a prompt, the others one or as many."""
    return [{"name": p.name, "datatype": DATATYPES[p.kind], "shape": [-1]} for p in schema.parameters.values()]


def outputs(media: str) -> list[dict[str, Any]]:
    return [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in (media, "metadata")]


def parameters(schema: Schema) -> Mapping[str, Any]:
    """Each field's type, default and bounds, as the model's metadata tells them."""
    told: dict[str, Any] = {}
    for p in schema.parameters.values():
        entry: dict[str, Any] = {"type": p.kind, "description": p.description, "fits": p.fits()}
        for name in ("default", "minimum", "maximum", "max_length", "choices"):
            if (value := getattr(p, name)) is not None:
                entry[name] = value
        if p.multiple_of > 1:
            entry |= {"multiple_of": p.multiple_of, "offset": p.offset}
        if p.required:
            entry["required"] = True
        if p.kind == "image":
            entry["max_items"] = p.max_items
        told[p.name] = entry
    return told

"""The v2 protocol's documents, as the Open Inference Protocol and its binary extension have them."""

from __future__ import annotations

import base64
import io
import json
import struct
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from PIL import Image

if TYPE_CHECKING:
    from tests.conftest import Serve, Server

SMALL: dict[str, Any] = {"prompt": "a fox", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 7}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": SMALL,
    "glm-image": {**SMALL, "width": 32, "height": 32},
    "wan-ti2v-5b": {**SMALL, "num_frames": 5},
}
OUTPUT = {"sd15": "image", "glm-image": "image", "wan-ti2v-5b": "video"}
KINDS = {"string": "BYTES", "image": "BYTES", "integer": "INT64", "number": "FP64", "boolean": "BOOL"}


def nulls(value: Any, where: str = "") -> list[str]:
    """Where a document holds null."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in nulls(item, f"{where}.{key}")]
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in nulls(item, f"{where}[{i}]")]
    return [where] if value is None else []


def ask(server: Server, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and document; every answer is JSON without nulls, and its errors have one shape."""
    status, headers, content = server.request(method, path, body)
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(content)
    document = json.loads(content)
    assert not nulls(document)
    if status >= 400:
        assert isinstance(document["error"], str) and document["error"]
    return status, document


def infer(server: Server, **body: Any) -> tuple[int, Any]:
    return ask(server, "POST", f"/v2/models/{server.name}/infer", body)


def tensor(name: str, kind: str, *values: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(values)], "datatype": KINDS[kind], "data": list(values)}


def png() -> str:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# --- the server


@pytest.mark.parametrize(
    ("method", "path", "body", "document"),
    [
        ("GET", "/v2/health/live", None, {"live": True}),
        ("GET", "/v2/health/ready", None, {"ready": True}),
        ("GET", "/v2/models/tiny/ready", None, {"name": "tiny", "ready": True}),
        ("GET", "/v2/models", None, {"models": ["tiny"]}),
        ("GET", "/v2/repository/index", None, [{"name": "tiny", "state": "READY", "reason": ""}]),
        ("POST", "/v2/repository/index", None, [{"name": "tiny", "state": "READY", "reason": ""}]),
        ("POST", "/v2/repository/index", {}, [{"name": "tiny", "state": "READY", "reason": ""}]),
        ("POST", "/v2/repository/index", {"ready": True}, [{"name": "tiny", "state": "READY", "reason": ""}]),
    ],
)
def test_documents(method: str, path: str, body: Any, document: Any, serve: Serve) -> None:
    assert ask(serve("sd15"), method, path, body) == (200, document)


def test_server_metadata(serve: Serve) -> None:
    import runtime

    status, document = ask(serve("sd15"), "GET", "/v2")
    assert status == 200
    assert (document["name"], document["version"]) == ("diffusion-runtime", runtime.__version__)
    assert {"binary_tensor_data", "model_repository"} <= set(document["extensions"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/nobody/ready", 404),
        ("POST", "/v2/models/nobody/infer", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/tiny/infer", 405),
        ("POST", "/v2/models/tiny/infer", 400),
        ("GET", "/v2/models/tiny/versions/1", 501),
        ("POST", "/v2/models/tiny/versions/1/infer", 501),
        ("POST", "/v2/repository/models/tiny/unload", 501),
    ],
)
def test_errors_are_objects_of_one_string(method: str, path: str, status: int, serve: Serve) -> None:
    answer, document = ask(serve("sd15"), method, path)
    assert (answer, list(document)) == (status, ["error"])


def test_a_version_in_the_query_means_nothing(serve: Serve) -> None:
    assert ask(serve("sd15"), "GET", "/v2/models/tiny?model_version=7")[0] == 200


def test_the_openapi_document_tells_what_bodies_hold(serve: Serve) -> None:
    server = serve("sd15")
    paths = ask(server, "GET", "/openapi.json")[1]["paths"]
    v1 = paths["/v1/models/{model_name}:predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "num_inference_steps" in v1["properties"]["instances"]["items"]["properties"]
    v2 = paths["/v2/models/{model_name}/infer"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert v2["properties"]["inputs"]["items"]["required"] == ["name", "shape", "datatype"]
    assert "Duplicate Operation ID" not in server.log.read_text()


# --- infer


def test_an_inference_response(serve: Serve) -> None:
    body = {"id": "my-id", "inputs": [tensor("prompt", "string", "a fox", "a dog")], "parameters": {**SMALL, "n": 2}}
    del body["parameters"]["prompt"]
    status, document = infer(serve("sd15"), **body)
    assert status == 200
    image, metadata = document.pop("outputs")
    assert document == {"model_name": "tiny", "id": "my-id"}  # no model_version: versions are not served
    pictures, told = image.pop("data"), metadata.pop("data")
    assert image == {"name": "image", "shape": [4], "datatype": "BYTES", "parameters": {"content_type": "base64"}}
    assert metadata == {"name": "metadata", "shape": [4], "datatype": "BYTES"}
    assert len(set(pictures)) == len(pictures) == 4
    assert all(Image.open(io.BytesIO(base64.b64decode(p, validate=True))).size == (64, 64) for p in pictures)
    first = json.loads(told[0])
    assert not nulls(first)
    assert set(first) == {
        *("prompt", "seed", "seeds", "width", "height", "num_inference_steps", "guidance_scale", "format"),
        *("timings", "batched", "engine_variant", "model_revision"),
    }
    assert [(json.loads(t)["prompt"], json.loads(t)["seed"]) for t in told] == [
        ("a fox", 7),
        ("a fox", 8),
        ("a dog", 7),
        ("a dog", 8),
    ]
    assert {"wait", "prepare", "denoise", "decode", "encode", "total"} <= set(first["timings"])


def test_a_video_response(serve: Serve) -> None:
    status, document = infer(serve("wan-ti2v-5b"), parameters={**FAMILIES["wan-ti2v-5b"], "fps": 8})
    assert status == 200
    video, metadata = document["outputs"]
    assert (video["name"], video["shape"], metadata["shape"]) == ("video", [1], [1])
    assert base64.b64decode(video["data"][0], validate=True)[4:8] == b"ftyp"
    told = json.loads(metadata["data"][0])
    assert {name: told[name] for name in ("format", "num_frames", "fps")} == {
        "format": "mp4",
        "num_frames": 5,
        "fps": 8,
    }


@pytest.mark.parametrize(
    ("parameters", "outputs", "binary"),
    [
        ({}, None, []),
        ({"binary_data_output": False}, None, []),
        ({"binary_data_output": True}, None, ["image", "metadata"]),
        ({}, [{"name": "image", "parameters": {"binary_data": True}}, {"name": "metadata"}], ["image"]),
        ({}, [{"name": "metadata"}, {"name": "image", "parameters": {"binary_data": True}}], ["image"]),
        ({"binary_data_output": True}, [{"name": "image"}], ["image"]),
        (
            {"binary_data_output": True},
            [{"name": "image"}, {"name": "metadata", "parameters": {"binary_data": False}}],
            ["image"],
        ),
    ],
)
def test_binary_outputs(parameters: dict[str, Any], outputs: Any, binary: list[str], serve: Serve) -> None:
    server = serve("sd15")
    body = {"parameters": {**SMALL, **parameters}} | ({"outputs": outputs} if outputs else {})
    status, headers, content = server.request("POST", f"/v2/models/{server.name}/infer", body)
    assert status == 200 and int(headers["content-length"]) == len(content)
    length = int(headers.get("inference-header-content-length", len(content)))
    assert headers["content-type"] == ("application/octet-stream" if binary else "application/json")
    assert ("inference-header-content-length" in headers) == bool(binary)
    document, rest = json.loads(content[:length]), content[length:]
    assert not nulls(document)
    assert [o["name"] for o in document["outputs"]] == [
        o["name"] for o in outputs or [*map(named, ("image", "metadata"))]
    ]
    data = {}
    for output in document["outputs"]:
        if output["name"] in binary:
            assert set(output) == {"name", "shape", "datatype", "parameters"}
            size = output["parameters"]["binary_data_size"]
            part, rest = rest[:size], rest[size:]
            assert struct.unpack_from("<I", part)[0] == size - 4
            data[output["name"]] = part[4:]
        else:
            text = output["data"][0]
            data[output["name"]] = base64.b64decode(text) if output["name"] == "image" else text.encode()
    assert not rest
    assert data["image"] == base64.b64decode(server.predict(SMALL)[0]["image"]["b64"])
    assert "metadata" not in data or json.loads(data["metadata"])["seed"] == 7


def named(name: str) -> dict[str, Any]:
    return {"name": name}


# --- the model's metadata is true


def metadata(server: Server) -> dict[str, Any]:
    status, document = server.json("GET", f"/v2/models/{server.name}")
    assert status == 200
    return document


@pytest.mark.parametrize("family", FAMILIES)
def test_model_metadata(family: str, serve: Serve) -> None:
    server = serve(family)
    document = metadata(server)
    assert not nulls(document)
    assert set(document) == {"name", "platform", "inputs", "outputs", "properties"}
    assert (document["name"], document["platform"]) == ("tiny", "diffusers")
    assert all(set(entry) == {"name", "datatype", "shape"} for entry in document["inputs"] + document["outputs"])
    assert all(entry["shape"] == [-1] for entry in document["inputs"] + document["outputs"])
    told = document["properties"]["parameters"]
    assert {i["name"]: i["datatype"] for i in document["inputs"]} == {n: KINDS[p["type"]] for n, p in told.items()}
    assert not set(told) & set(document["properties"]["refused"])
    _, answer = infer(server, parameters=FAMILIES[family])
    outputs = [(o["name"], o["datatype"]) for o in answer["outputs"]]
    assert (
        outputs
        == [(o["name"], o["datatype"]) for o in document["outputs"]]
        == [
            (OUTPUT[family], "BYTES"),
            ("metadata", "BYTES"),
        ]
    )


def test_metadata_is_the_same_over_grpc(serve: Serve) -> None:
    server = serve("sd15")
    document = metadata(server)
    with grpc.insecure_channel(server.grpc) as channel:
        told = GRPCInferenceServiceStub(channel).ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
        message = pb.ModelInferRequest(model_name="tiny")
        for name, value in SMALL.items():
            setattr(message.parameters[name], "string_param" if name == "prompt" else "int64_param", value)
        answer = GRPCInferenceServiceStub(channel).ModelInfer(message)
    assert (told.name, told.platform, list(told.versions)) == ("tiny", "diffusers", [])
    for kind in ("inputs", "outputs"):
        entries = [{"name": e.name, "datatype": e.datatype, "shape": list(e.shape)} for e in getattr(told, kind)]
        assert entries == document[kind]
    assert (answer.model_name, answer.model_version) == ("tiny", "")
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [
        ("image", "BYTES", [1]),
        ("metadata", "BYTES", [1]),
    ]


def legal(name: str, told: dict[str, Any]) -> Any:
    """A value that the metadata says is legal."""
    if told["type"] == "image":
        return png()
    for key in ("default", "minimum"):
        if told.get(key) is not None:
            return told[key]
    if told["type"] == "string":
        return told["choices"][0] if "choices" in told else "a fox"
    return {"integer": 1, "number": 0.5, "boolean": True}[told["type"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_listed_input_is_accepted(family: str, serve: Serve) -> None:
    server = serve(family)
    document = metadata(server)
    parameters = document["properties"]["parameters"]
    for entry in document["inputs"]:
        name = entry["name"]
        fields = {key: value for key, value in FAMILIES[family].items() if key != name}
        if family == "glm-image" and name != "image":
            fields["image"] = png()  # much faster than from text alone
        if name == "seconds":
            del fields["num_frames"]
        if name == "output_quality" and OUTPUT[family] == "image":
            fields["output_format"] = "jpeg"
        if name == "timeout":
            value = 60
        elif name in ("width", "height", "num_inference_steps"):
            value = parameters[name]["minimum"]
        else:
            value = legal(name, parameters[name])
        status, answer = infer(server, inputs=[tensor(name, parameters[name]["type"], value)], parameters=fields)
        assert status == 200, (name, value, answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_refused_field_is_refused_for_the_reason_told(family: str, serve: Serve) -> None:
    server = serve(family)
    refused = metadata(server)["properties"]["refused"]
    assert refused
    for name, reason in refused.items():
        status, answer = infer(server, parameters={**FAMILIES[family], name: 1})
        assert status == 400
        assert answer["error"].startswith(f"{name}: ") and reason in answer["error"]


def outside(told: dict[str, Any]) -> list[Any]:
    """Values that the metadata says are not legal."""
    values: list[Any] = [{"an": "object"}] if told["type"] != "image" else []
    if "minimum" in told:
        values.append(told["minimum"] - (told.get("multiple_of", 1) if told["type"] == "integer" else 0.001))
    if "maximum" in told:
        values.append(told["maximum"] + told.get("multiple_of", 1))
    if "multiple_of" in told:
        first = told["minimum"] + (told["offset"] - told["minimum"]) % told["multiple_of"]
        values += [first + 1, first + told["multiple_of"] - 1]
    if "max_length" in told:
        values.append("x" * (told["max_length"] + 1))
    if "choices" in told:
        values.append("no-" + told["choices"][0])
    if told["type"] == "image":
        values += [[png()] * (told["max_items"] + 1), "%"]
    if told["type"] in ("integer", "number"):
        values += [True, "many"]
    if told["type"] == "integer":
        values.append(told.get("minimum", 0) + 0.5)
    return values


def inside(told: dict[str, Any]) -> list[Any]:
    """The outermost values that the metadata says are legal."""
    step, offset = told.get("multiple_of", 1), told.get("offset", 0)
    values = []
    if "minimum" in told:
        values.append(told["minimum"] + (offset - told["minimum"]) % step if step > 1 else told["minimum"])
    if "maximum" in told:
        values.append(told["maximum"] - (told["maximum"] - offset) % step if step > 1 else told["maximum"])
    if "max_length" in told and "choices" not in told:
        values.append("x" * told["max_length"])
    return values + list(told.get("choices", ()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bounds_told_are_the_bounds_kept(family: str, serve: Serve) -> None:
    """Outside, a value is refused in the words of `fits`. Inside, the next mistake is what the server complains of."""
    server = serve(family)
    parameters = metadata(server)["properties"]["parameters"]
    checks = 0
    for name, told in parameters.items():
        for value in outside(told):
            status, answer = infer(server, parameters={**FAMILIES[family], name: value})
            assert status == 400 and answer["error"].startswith((f"{name}:", f"{name}[")), (name, value, answer)
            if told["type"] not in ("image", "string"):
                assert told["fits"] in answer["error"]
            checks += 1
        for value in inside(told):
            fields = {**FAMILIES[family], name: value}
            if name == "output_quality":  # checked last of all
                continue
            status, answer = infer(server, parameters={**fields, "output_quality": 0})
            assert status == 400 and answer["error"].startswith("output_quality: 0"), (name, value, answer)
            checks += 1
        if told.get("required"):
            fields = {key: value for key, value in FAMILIES[family].items() if key != name}
            assert infer(server, parameters=fields) == (400, {"error": f"{name}: missing; it must be {told['fits']}"})
            checks += 1
    assert list(parameters)[-1] == "output_quality"
    assert checks > 50


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_told_are_the_defaults_taken(family: str, serve: Serve) -> None:
    server = serve(family)
    parameters = metadata(server)["properties"]["parameters"]
    sizes = {
        key: value for key, value in FAMILIES[family].items() if key in ("prompt", "width", "height", "num_frames")
    }
    source = {"image": png()} if family == "glm-image" else {}
    status, answer = infer(server, parameters={**sizes, **source, "n": 1, "seed": 7})
    assert status == 200
    taken = json.loads(next(o for o in answer["outputs"] if o["name"] == "metadata")["data"][0])
    told = {
        name: parameters[name]["default"]
        for name in ("num_inference_steps", "guidance_scale", "fps", "max_sequence_length", "flow_shift")
        if name in parameters
    }
    assert len(told) >= 2
    assert {name: taken[name] for name in told} == told


def test_a_single_precision_number_draws_what_v1_draws(serve: Serve) -> None:
    """7.3 is not a float32: its nearest one would be 7.300000190734863."""
    server = serve("sd15")
    fields = {"seed": 3, "num_inference_steps": 2}
    tensors = [
        {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 9}},
        {"name": "guidance_scale", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}},
    ]
    head = json.dumps({"inputs": tensors, "parameters": fields}).encode()
    body = head + struct.pack("<I", 5) + b"a fox" + struct.pack("<f", 7.3)
    headers = {"Inference-Header-Content-Length": str(len(head))}
    status, _, content = server.request("POST", "/v2/models/tiny/infer", body, headers)
    assert status == 200, content
    image, metadata = (output["data"][0] for output in json.loads(content)["outputs"])
    assert json.loads(metadata)["guidance_scale"] == 7.3
    assert server.predict({"prompt": "a fox", "guidance_scale": 7.3, **fields})[0]["image"]["b64"] == image

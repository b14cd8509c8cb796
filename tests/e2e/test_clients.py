"""The clients people use, against a running server: tritonclient, KServe's own clients and plain curl.

tritonclient's and KServe's gRPC messages can't live in one process (both define `inference.*`): what needs
tritonclient.grpc runs in a process of its own, given by the fixture `apart`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import multiprocessing
import re
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.e2e.test_load import known, wait_for

if TYPE_CHECKING:
    from tests.conftest import Serve, Server

PROMPTS = ["a red fox", "ein blauer Fuchs, 青い狐"]
# The guidance is neither the default (7.5) nor an integer: a client whose float is lost draws another picture.
FIELDS: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 7, "guidance_scale": 4.5}
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 7}
VIDEO = {**SMALL, "num_frames": 5}
SOURCE_SERVERS = {"glm-image": SMALL, "wan-ti2v-5b": VIDEO}


def datatype(value: Any) -> str:
    return {bool: "BOOL", int: "INT64", float: "FP32"}.get(type(value), "BYTES")


def array(values: list[Any]) -> np.ndarray[Any, Any]:
    """What a client of numpy gives for these values."""
    kind = {"BOOL": np.bool_, "INT64": np.int64, "FP32": np.float32}.get(datatype(values[0]), np.object_)
    return np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=kind)


def media(document: dict[str, Any]) -> list[bytes]:
    """The pictures or videos in a v2 JSON response."""
    output = next(o for o in document["outputs"] if o["name"] in ("image", "video"))
    assert output["parameters"] == {"content_type": "base64"}
    assert output["shape"] == [len(output["data"])]
    return [base64.b64decode(item, validate=True) for item in output["data"]]


def v1_media(prediction: dict[str, Any]) -> bytes:
    return base64.b64decode((prediction.get("image") or prediction["video"])["b64"], validate=True)


def infer(server: Server, body: Any, **headers: str) -> dict[str, Any]:
    status, answer = server.json("POST", f"/v2/models/{server.name}/infer", body, headers)
    assert status == 200, answer
    return answer


def json_tensor(name: str, values: list[Any]) -> dict[str, Any]:
    return {"name": name, "shape": [len(values)], "datatype": datatype(values[0]), "data": values}


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A PNG file with something in it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# --- the ways to ask for pictures: each takes the server, prompts and fields, and gives the pictures in order


def v1(server: Server, prompts: list[str], fields: dict[str, Any]) -> list[bytes]:
    return [v1_media(p) for p in server.predict(*({"prompt": prompt} for prompt in prompts), **fields)]


def v2_tensors(server: Server, prompts: list[str], fields: dict[str, Any]) -> list[bytes]:
    tensors = [json_tensor("prompt", prompts)] + [json_tensor(name, [value]) for name, value in fields.items()]
    return media(infer(server, {"inputs": tensors}))


def v2_parameters(server: Server, prompts: list[str], fields: dict[str, Any]) -> list[bytes]:
    return media(infer(server, {"inputs": [json_tensor("prompt", prompts)], "parameters": fields}))


def v2_parameters_as_text(server: Server, prompts: list[str], fields: dict[str, Any]) -> list[bytes]:
    return v2_parameters(server, prompts, {name: str(value) for name, value in fields.items()})


def triton_http_inputs(prompts: list[str], fields: dict[str, Any], binary: bool) -> list[Any]:
    import tritonclient.http as triton

    inputs = []
    for name, values in {"prompt": prompts, **{k: [v] for k, v in fields.items()}}.items():
        tensor = triton.InferInput(name, [len(values)], datatype(values[0]))
        inputs.append(tensor.set_data_from_numpy(array(values), binary_data=binary))
    return inputs


def triton_http_pictures(result: Any, binary: bool, name: str = "image") -> list[bytes]:
    data = list(result.as_numpy(name))
    return data if binary else [base64.b64decode(item, validate=True) for item in data]


def triton_http(
    server: Server,
    prompts: list[str],
    fields: dict[str, Any],
    *,
    binary_in: bool = True,
    binary_out: bool = True,
    as_parameters: bool = False,
) -> list[bytes]:
    import tritonclient.http as triton

    tensors, parameters = ({}, fields) if as_parameters else (fields, None)
    with triton.InferenceServerClient(server.http.removeprefix("http://")) as client:
        result = client.infer(
            server.name,
            triton_http_inputs(prompts, tensors, binary_in),
            outputs=[triton.InferRequestedOutput("image", binary_data=binary_out)],
            parameters=parameters,
        )
    return triton_http_pictures(result, binary_out)


def triton_http_aio(server: Server, prompts: list[str], fields: dict[str, Any]) -> list[bytes]:
    import tritonclient.http.aio as triton

    async def ask() -> list[bytes]:
        async with triton.InferenceServerClient(server.http.removeprefix("http://")) as client:
            result = await client.infer(server.name, triton_http_inputs(prompts, fields, True))
        return triton_http_pictures(result, True)

    return asyncio.run(ask())


def grpc_parameters(message: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        parameter = message.parameters[name]
        kind = {bool: "bool_param", int: "int64_param", float: "double_param"}.get(type(value), "string_param")
        setattr(parameter, kind, value)


def grpc_contents(server: Server, prompts: list[str], fields: dict[str, Any]) -> list[bytes]:
    """KServe's stub, with data in `contents` on both ways."""
    import grpc
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

    message = pb.ModelInferRequest(model_name=server.name)
    contents = {"BOOL": "bool_contents", "INT64": "int64_contents", "FP32": "fp32_contents", "BYTES": "bytes_contents"}
    for name, values in {"prompt": prompts, **{k: [v] for k, v in fields.items()}}.items():
        kind = datatype(values[0])
        tensor = message.inputs.add(name=name, shape=[len(values)], datatype=kind)
        getattr(tensor.contents, contents[kind]).extend(v.encode() if isinstance(v, str) else v for v in values)
    with grpc.insecure_channel(server.grpc) as channel:
        answer = GRPCInferenceServiceStub(channel).ModelInfer(message)
    assert not answer.raw_output_contents
    return list(next(o for o in answer.outputs if o.name == "image").contents.bytes_contents)


def kserve_rest_v1(server: Server, prompts: list[str], fields: dict[str, Any]) -> list[bytes]:
    from kserve import InferenceRESTClient, RESTConfig

    async def ask() -> Any:
        async with InferenceRESTClient(RESTConfig(protocol="v1", timeout=120, retries=0)) as client:
            body = {"instances": [{"prompt": prompt} for prompt in prompts], "parameters": fields}
            return await client.infer(server.http, body, model_name=server.name)

    return [v1_media(prediction) for prediction in asyncio.run(ask())["predictions"]]


def kserve_request(server: Server, prompts: list[str], fields: dict[str, Any], numpy: bool) -> Any:
    from kserve import InferInput, InferRequest

    inputs = []
    for name, values in {"prompt": prompts, **{k: [v] for k, v in fields.items()}}.items():
        tensor = InferInput(name, [len(values)], datatype(values[0]), None if numpy else values)
        if numpy:
            tensor.set_data_from_numpy(array(values), binary_data=True)
        inputs.append(tensor)
    return InferRequest(model_name=server.name, infer_inputs=inputs)


def kserve_rest_v2(server: Server, prompts: list[str], fields: dict[str, Any], *, numpy: bool) -> list[bytes]:
    """Pictures come as base64: this client can't read binary outputs that are not UTF-8."""
    from kserve import InferenceRESTClient, RESTConfig

    async def ask() -> Any:
        async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=120, retries=0)) as client:
            return await client.infer(server.http, kserve_request(server, prompts, fields, numpy), server.name)

    output = asyncio.run(ask()).get_output_by_name("image")
    return [base64.b64decode(item, validate=True) for item in output.data]


def kserve_grpc(server: Server, prompts: list[str], fields: dict[str, Any], *, numpy: bool) -> list[bytes]:
    from kserve import InferenceGRPCClient

    async def ask() -> Any:
        async with InferenceGRPCClient(server.grpc, timeout=120, retries=0) as client:
            return await client.infer(kserve_request(server, prompts, fields, numpy))

    output = asyncio.run(ask()).get_output_by_name("image")
    return split_bytes(output._raw_data) if numpy else list(output.data)


def split_bytes(raw: bytes) -> list[bytes]:
    """The elements of a length-prefixed BYTES tensor."""
    items = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        items.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    return items


def curl(server: Server, path: str, *arguments: str) -> tuple[int, str, bytes]:
    """Status, all of `-v`, and the body."""
    done = subprocess.run(
        ["curl", "-sv", "--max-time", "60", "-w", "%{stderr}\nstatus=%{http_code}", server.http + path, *arguments],
        capture_output=True,
        check=True,
    )
    told = done.stderr.decode()
    return int(told.rpartition("status=")[2]), told, done.stdout


def v1_body(prompts: list[str], fields: dict[str, Any]) -> str:
    return json.dumps({"instances": [{"prompt": prompt} for prompt in prompts], "parameters": fields})


def curl_v1(server: Server, prompts: list[str], fields: dict[str, Any]) -> list[bytes]:
    status, _, body = curl(server, f"/v1/models/{server.name}:predict", "-d", v1_body(prompts, fields))
    assert status == 200, body
    return [v1_media(prediction) for prediction in json.loads(body)["predictions"]]


WAYS: dict[str, Callable[[Server, list[str], dict[str, Any]], list[bytes]]] = {
    "v2 JSON tensors": v2_tensors,
    "v2 JSON parameters": v2_parameters,
    "v2 JSON parameters, as text": v2_parameters_as_text,
    "tritonclient.http": triton_http,
    "tritonclient.http, JSON in": partial(triton_http, binary_in=False),
    "tritonclient.http, JSON out": partial(triton_http, binary_out=False),
    "tritonclient.http, JSON both ways": partial(triton_http, binary_in=False, binary_out=False),
    "tritonclient.http, parameters": partial(triton_http, as_parameters=True),
    "tritonclient.http.aio": triton_http_aio,
    "gRPC contents": grpc_contents,
    "kserve REST v1": kserve_rest_v1,
    "kserve REST v2, lists": partial(kserve_rest_v2, numpy=False),
    "kserve REST v2, numpy": partial(kserve_rest_v2, numpy=True),
    "kserve gRPC, lists": partial(kserve_grpc, numpy=False),
    "kserve gRPC, numpy": partial(kserve_grpc, numpy=True),
    "curl": curl_v1,
}


# --- tritonclient.grpc, in a process of its own: these functions run there


def triton_grpc_inputs(tensors: dict[str, np.ndarray[Any, Any]], kinds: dict[str, str]) -> list[Any]:
    import tritonclient.grpc as triton

    inputs = []
    for name, values in tensors.items():
        tensor = triton.InferInput(name, list(values.shape), kinds.get(name, "BYTES"))
        inputs.append(tensor.set_data_from_numpy(values))
    return inputs


def triton_grpc(
    address: str,
    model: str,
    tensors: dict[str, np.ndarray[Any, Any]],
    kinds: dict[str, str],
    parameters: dict[str, Any],
    outputs: list[str],
    request_id: str = "",
    aio: bool = False,
) -> tuple[str, dict[str, tuple[list[int], list[bytes]]]]:
    """The response's id and its outputs; an error is raised as its text."""
    import tritonclient.grpc as triton
    import tritonclient.grpc.aio as triton_aio

    inputs = triton_grpc_inputs(tensors, kinds)
    options = {
        "outputs": [triton.InferRequestedOutput(name) for name in outputs] or None,
        "parameters": parameters,
        "request_id": request_id,
    }

    async def ask() -> Any:
        async with triton_aio.InferenceServerClient(address) as client:
            return await client.infer(model, inputs, **options)

    try:
        if aio:
            result = asyncio.run(ask())
        else:
            with triton.InferenceServerClient(address) as client:
                result = client.infer(model, inputs, **options)
    except triton.InferenceServerException as error:
        raise RuntimeError(f"{error.status()} {error.message()}") from None
    response = result.get_response()
    found = {o.name: (list(o.shape), result.as_numpy(o.name).reshape(-1).tolist()) for o in response.outputs}
    return response.id, found


def triton_grpc_uint64(address: str, model: str, prompt: str, fields: dict[str, Any]) -> list[bytes]:
    """The seed as uint64_param, which KServe's messages lack too."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    message = service_pb2.ModelInferRequest(model_name=model)
    grpc_parameters(message, {**fields, "prompt": prompt})
    message.parameters["seed"].uint64_param = fields["seed"]
    message.outputs.add(name="image")
    with grpc.insecure_channel(address) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message)
    return list(answer.outputs[0].contents.bytes_contents)


def triton_grpc_administration(address: str, model: str) -> dict[str, Any]:
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(address) as client:
        server, metadata = client.get_server_metadata(), client.get_model_metadata(model)
        told: dict[str, Any] = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model ready": client.is_model_ready(model),
            "name": server.name,
            "extensions": list(server.extensions),
            "inputs": {i.name: i.datatype for i in metadata.inputs},
            "outputs": {o.name: o.datatype for o in metadata.outputs},
        }
        try:
            client.get_model_metadata("nobody")
        except triton.InferenceServerException as error:
            told["unknown"] = f"{error.status()} {error.message()}"
    return told


def triton_grpc_cancel(address: str, place: str, prompt: str, fields: dict[str, Any], request_id: str) -> str:
    """Cancel a call that runs, as is told below `place`, the model's address; gives what its callback heard."""
    import threading
    import urllib.error
    import urllib.request

    import tritonclient.grpc as triton

    heard: list[Any] = []
    over = threading.Event()

    def callback(result: Any, error: Any) -> None:
        heard.append(error)
        over.set()

    def runs() -> bool:
        try:
            with urllib.request.urlopen(f"{place}/requests/{request_id}", timeout=60) as answer:
                return bool(json.load(answer)["state"] == "running")
        except urllib.error.HTTPError as error:  # it has not come yet
            error.close()
            return False

    model = place.rpartition("/")[2]
    inputs = triton_grpc_inputs({"prompt": np.array([prompt.encode()], dtype=np.object_)}, {})
    with triton.InferenceServerClient(address) as client:
        call = client.async_infer(model, inputs, callback, parameters=fields, headers={"x-request-id": request_id})
        while not runs():
            assert not over.wait(0.02)
        call.cancel()
        assert over.wait(60)
    return str(heard[0])


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., Any]]:
    """`apart(function, …)` in a process that imports neither this one's gRPC messages nor KServe's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(120)


# --- the same request


@pytest.fixture(scope="module")
def reference(serve: Serve) -> list[bytes]:
    """What v1 draws for PROMPTS: two different pictures, which depend on the guidance."""
    pictures = v1(serve("sd15"), PROMPTS, FIELDS)
    assert [p[:8] for p in pictures] == [b"\x89PNG\r\n\x1a\n"] * 2
    plain = v1(serve("sd15"), PROMPTS, {k: v for k, v in FIELDS.items() if k != "guidance_scale"})
    assert len({*pictures, *plain}) == 4
    return pictures


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_pictures(way: str, serve: Serve, reference: list[bytes]) -> None:
    ask = WAYS[way]
    assert ask(serve("sd15"), PROMPTS[:1], FIELDS) == reference[:1]
    assert ask(serve("sd15"), PROMPTS[::-1], FIELDS) == reference[::-1]


@pytest.mark.parametrize("aio", [False, True], ids=["sync", "aio"])
@pytest.mark.parametrize("as_parameters", [False, True], ids=["tensors", "parameters"])
def test_triton_grpc_gives_the_same_pictures(
    aio: bool, as_parameters: bool, serve: Serve, reference: list[bytes], apart: Callable[..., Any]
) -> None:
    server = serve("sd15")
    tensors = {"prompt": array(PROMPTS)}
    if not as_parameters:
        tensors |= {name: array([value]) for name, value in FIELDS.items()}
    kinds = {name: datatype(value) for name, value in FIELDS.items()}
    parameters = FIELDS if as_parameters else {}
    identity, found = apart(
        triton_grpc, server.grpc, server.name, tensors, kinds, parameters, ["image"], "my-id", aio=aio
    )
    assert identity == "my-id"
    assert found == {"image": ([2], reference)}


def test_unsigned_grpc_parameters_survive(serve: Serve, reference: list[bytes], apart: Callable[..., Any]) -> None:
    server = serve("sd15")
    assert apart(triton_grpc_uint64, server.grpc, server.name, PROMPTS[0], FIELDS) == reference[:1]


TYPED = {
    "seed": ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP32", "FP64"],
    "guidance_scale": ["FP16", "FP32", "FP64"],
}
NUMPY = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BOOL": np.bool_}


def typed(value: Any, kind: str) -> np.ndarray[Any, Any]:
    return np.array([value], dtype=NUMPY.get(kind, kind.lower()))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in TYPED.items() for kind in kinds])
def test_tensors_of_every_type(
    name: str, kind: str, serve: Serve, reference: list[bytes], apart: Callable[..., Any]
) -> None:
    import tritonclient.http as triton

    server = serve("sd15")
    rest = {k: v for k, v in FIELDS.items() if k != name}
    values = typed(FIELDS[name], kind)
    with triton.InferenceServerClient(server.http.removeprefix("http://")) as client:
        tensor = triton.InferInput(name, [1], kind).set_data_from_numpy(values)
        inputs = [*triton_http_inputs(PROMPTS[:1], {}, True), tensor]
        result = client.infer(server.name, inputs, parameters=rest)
    assert triton_http_pictures(result, True) == reference[:1]
    tensors = {"prompt": array(PROMPTS[:1]), name: values}
    _, found = apart(triton_grpc, server.grpc, server.name, tensors, {name: kind}, rest, ["image"])
    assert found["image"] == ([1], reference[:1])


def test_a_wrong_type_is_refused_by_name(serve: Serve, apart: Callable[..., Any]) -> None:
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    server = serve("sd15")
    wanted = "n: True is not an integer from 1 to 10"
    with triton.InferenceServerClient(server.http.removeprefix("http://")) as client:
        tensor = triton.InferInput("n", [1], "BOOL").set_data_from_numpy(typed(True, "BOOL"))
        with pytest.raises(InferenceServerException, match=wanted) as refused:
            client.infer(server.name, [*triton_http_inputs(PROMPTS[:1], FIELDS, True), tensor])
        assert refused.value.status() == "400"
    for tensors, parameters in (({"n": typed(True, "BOOL")}, FIELDS), ({}, {**FIELDS, "n": True})):
        tensors = {"prompt": array(PROMPTS[:1]), **tensors}
        with pytest.raises(RuntimeError, match=f"StatusCode.INVALID_ARGUMENT {wanted}"):
            apart(triton_grpc, server.grpc, server.name, tensors, {"n": "BOOL"}, parameters, [])


# --- outputs


@pytest.mark.parametrize("outputs", [["image"], ["metadata"], ["metadata", "image"], ["image", "metadata"]])
def test_requested_outputs_alone_come_back_in_their_order(
    outputs: list[str], serve: Serve, reference: list[bytes], apart: Callable[..., Any]
) -> None:
    import tritonclient.http as triton

    server = serve("sd15")
    with triton.InferenceServerClient(server.http.removeprefix("http://")) as client:
        for binary in (True, False):
            result = client.infer(
                server.name,
                triton_http_inputs(PROMPTS, FIELDS, True),
                outputs=[triton.InferRequestedOutput(name, binary_data=binary) for name in outputs],
            )
            assert [o["name"] for o in result.get_response()["outputs"]] == outputs
            if "image" in outputs:
                assert triton_http_pictures(result, binary) == reference
            if "metadata" in outputs:
                assert [json.loads(m)["prompt"] for m in result.as_numpy("metadata")] == PROMPTS
    _, found = apart(triton_grpc, server.grpc, server.name, {"prompt": array(PROMPTS)}, {}, FIELDS, outputs)
    assert list(found) == outputs


def test_one_output_binary_and_the_other_json(serve: Serve, reference: list[bytes]) -> None:
    import tritonclient.http as triton

    server = serve("sd15")
    with triton.InferenceServerClient(server.http.removeprefix("http://")) as client:
        result = client.infer(
            server.name,
            triton_http_inputs(PROMPTS, FIELDS, True),
            outputs=[
                triton.InferRequestedOutput("metadata", binary_data=False),
                triton.InferRequestedOutput("image", binary_data=True),
            ],
        )
    told = {o["name"]: o for o in result.get_response()["outputs"]}
    assert isinstance(told["metadata"]["data"][0], str)
    assert "data" not in told["image"]
    assert triton_http_pictures(result, True) == reference


def test_several_of_several_prompts_come_in_order_with_their_metadata(serve: Serve, apart: Callable[..., Any]) -> None:
    server = serve("sd15")
    fields = {**FIELDS, "output_format": "jpeg", "output_quality": 80, "n": 2}
    tensors = {"prompt": array(PROMPTS), "seed": np.array([7, 2**53 + 1], dtype=np.uint64)}
    del fields["seed"]
    _, found = apart(triton_grpc, server.grpc, server.name, tensors, {"seed": "UINT64"}, fields, [])
    shape, pictures = found["image"]
    assert shape == [4] and found["metadata"][0] == [4]
    alone = [
        v1_media(server.predict({**fields, "n": 1, "prompt": prompt, "seed": seed})[0])
        for prompt, first in zip(PROMPTS, (7, 2**53 + 1), strict=True)
        for seed in (first, first + 1)
    ]
    assert pictures == alone
    assert all(picture[:3] == b"\xff\xd8\xff" for picture in pictures)
    told = [json.loads(item) for item in found["metadata"][1]]
    assert [(t["prompt"], t["seed"]) for t in told] == [
        (PROMPTS[0], 7),
        (PROMPTS[0], 8),
        (PROMPTS[1], 2**53 + 1),
        (PROMPTS[1], 2**53 + 2),
    ]
    for one in told:
        assert {name: one[name] for name in ("width", "height", "num_inference_steps", "guidance_scale", "format")} == {
            "width": 64,
            "height": 64,
            "num_inference_steps": 2,
            "guidance_scale": 4.5,
            "format": "jpeg",
        }
        assert one["timings"]["denoise"] > 0 and one["engine_variant"] and one["model_revision"]


# --- pictures as input


def ask_with_sources(
    server: Server, apart: Callable[..., Any], fields: dict[str, Any], sources: list[bytes], name: str
) -> dict[str, list[bytes]]:
    """The result of one prompt with these sources, each way that a picture can be sent."""
    import tritonclient.http as triton

    encoded = [base64.b64encode(source).decode() for source in sources]
    files = np.array(sources, dtype=np.object_)
    with triton.InferenceServerClient(server.http.removeprefix("http://")) as client:
        tensor = triton.InferInput("image", [len(sources)], "BYTES").set_data_from_numpy(files)
        raw = client.infer(server.name, [*triton_http_inputs(PROMPTS[:1], {}, True), tensor], parameters=fields)
    prompt = json_tensor("prompt", PROMPTS[:1])
    tensors = {"prompt": array(PROMPTS[:1]), "image": files}
    return {
        "v1": [v1_media(server.predict({"prompt": PROMPTS[0], "image": encoded, **fields})[0])],
        "v2 JSON": media(infer(server, {"inputs": [prompt, json_tensor("image", encoded)], "parameters": fields})),
        "v2 binary": triton_http_pictures(raw, True, name),
        "gRPC": apart(triton_grpc, server.grpc, server.name, tensors, {}, fields, [name])[1][name][1],
    }


@pytest.mark.parametrize(("family", "sources"), [("glm-image", 1), ("glm-image", 2), ("wan-ti2v-5b", 1)])
def test_source_pictures_as_raw_bytes_and_as_base64(
    family: str, sources: int, serve: Serve, apart: Callable[..., Any]
) -> None:
    server, fields = serve(family), SOURCE_SERVERS[family]
    name = "video" if family.startswith("wan") else "image"
    results = ask_with_sources(server, apart, fields, [picture(i) for i in range(sources)], name)
    others = ask_with_sources(server, apart, fields, [picture(9), *map(picture, range(1, sources))], name)
    assert all(result == results["v1"] for result in results.values()), {k: [*map(len, v)] for k, v in results.items()}
    assert results["v1"] != others["v1"], "the source makes no difference"
    assert results["v1"][0][4:8] == b"ftyp" if name == "video" else results["v1"][0].startswith(b"\x89PNG")


def test_each_prompt_has_its_own_sources(serve: Serve) -> None:
    server = serve("glm-image")
    sources = [base64.b64encode(picture(i)).decode() for i in range(4)]
    tensor = {"name": "image", "shape": [2, 2], "datatype": "BYTES", "data": [sources[:2], sources[2:]]}
    together = media(infer(server, {"inputs": [json_tensor("prompt", PROMPTS), tensor], "parameters": SMALL}))
    alone = server.predict(
        {"prompt": PROMPTS[0], "image": sources[:2]}, {"prompt": PROMPTS[1], "image": sources[2:]}, **SMALL
    )
    assert together == [v1_media(prediction) for prediction in alone]


# --- administration


def test_triton_clients_see_the_server_and_its_model(serve: Serve, apart: Callable[..., Any]) -> None:
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    server = serve("sd15")
    with triton.InferenceServerClient(server.http.removeprefix("http://")) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(server.name)
        assert not client.is_model_ready("nobody")
        metadata = client.get_model_metadata(server.name)
        over_http = client.get_server_metadata()
        assert client.get_model_repository_index() == [{"name": server.name, "state": "READY", "reason": ""}]
        with pytest.raises(InferenceServerException, match="'nobody' is not served here") as refused:
            client.get_model_metadata("nobody")
        assert refused.value.status() == "404"
    told = apart(triton_grpc_administration, server.grpc, server.name)
    assert told["live"] and told["ready"] and told["model ready"]
    assert told["inputs"] == {i["name"]: i["datatype"] for i in metadata["inputs"]}
    assert told["outputs"] == {o["name"]: o["datatype"] for o in metadata["outputs"]}
    assert {"prompt": "BYTES", "seed": "INT64"}.items() <= told["inputs"].items()
    assert told["unknown"].startswith("StatusCode.NOT_FOUND") and "nobody" in told["unknown"]
    assert (told["name"], told["extensions"]) == (over_http["name"], over_http["extensions"])


def test_kserve_clients_see_the_server_and_its_model(serve: Serve) -> None:
    from kserve import InferenceGRPCClient, InferenceRESTClient, RESTConfig

    server = serve("sd15")

    async def ask() -> list[Any]:
        async with (
            InferenceRESTClient(RESTConfig(protocol="v1")) as v1_client,
            InferenceRESTClient(RESTConfig(protocol="v2")) as v2_client,
            InferenceGRPCClient(server.grpc) as grpc_client,
        ):
            return [
                await v1_client.is_server_live(server.http),
                await v1_client.is_model_ready(server.http, server.name),
                await v2_client.is_server_live(server.http),
                await v2_client.is_server_ready(server.http),
                await v2_client.is_model_ready(server.http, server.name),
                await grpc_client.is_server_live(),
                await grpc_client.is_server_ready(),
                await grpc_client.is_model_ready(server.name),
                not await v2_client.is_model_ready(server.http, "nobody"),
            ]

    assert asyncio.run(ask()) == [True] * 9


def test_kserve_clients_hear_why(serve: Serve) -> None:
    import grpc
    import httpx
    from kserve import InferenceGRPCClient, InferenceRESTClient, RESTConfig

    server = serve("sd15")
    bad = {**FIELDS, "width": 65}

    async def ask() -> None:
        wanted = "width: 65 is not .* the nearest that fit are 64 and 72"
        async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
            with pytest.raises(httpx.HTTPStatusError, match=wanted):
                await client.infer(server.http, json.loads(v1_body(PROMPTS, bad)), model_name=server.name)
        async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
            request = kserve_request(server, PROMPTS, bad, False)
            with pytest.raises(httpx.HTTPStatusError, match=wanted):
                await client.infer(server.http, request, model_name=server.name)
        async with InferenceGRPCClient(server.grpc) as client:
            with pytest.raises(grpc.RpcError) as refused:
                await client.infer(kserve_request(server, PROMPTS, bad, False))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert re.search(wanted, refused.value.details())

    asyncio.run(ask())


def test_a_client_that_cancels_frees_the_device(
    serve: Serve, reference: list[bytes], apart: Callable[..., Any]
) -> None:
    server = serve("sd15")
    long = {**FIELDS, "num_inference_steps": 200, "width": 512, "height": 512, "n": 10}
    place = f"{server.http}/v2/models/{server.name}"
    heard = apart(triton_grpc_cancel, server.grpc, place, PROMPTS[0], long, "cancelled-by-its-client")
    assert "cancel" in heard.lower()
    wait_for(lambda: known(server, "cancelled-by-its-client", "cancelled"), "the server hears of it")
    begun = time.monotonic()
    assert v1(server, PROMPTS, FIELDS) == reference
    assert time.monotonic() - begun < 30  # the cancelled one would have run for minutes
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    cancelled = [line for line in lines if line.get("request_id") == "cancelled-by-its-client"]
    assert [line["outcome"] for line in cancelled if line["message"] == "request"] == ["cancelled"]
    assert not any("traceback" in line for line in cancelled)


# --- curl


@pytest.mark.parametrize(
    "arguments",
    [
        (),  # curl's own content type is a form's
        ("-H", "Content-Type: application/json"),
        ("-H", "Content-Type: application/json; charset=utf-8"),
        ("-H", "Content-Type:"),
        ("-H", "Content-Type: text/plain"),
        ("--http1.0",),
        ("-H", "Transfer-Encoding: chunked"),
        ("-H", "Connection: close"),
    ],
    ids=lambda arguments: " ".join(arguments) or "plain",
)
def test_curl(arguments: tuple[str, ...], serve: Serve, reference: list[bytes], tmp_path: Path) -> None:
    server = serve("sd15")
    file = tmp_path / "request.json"
    file.write_text(v1_body(PROMPTS, FIELDS))
    for body in (("-d", f"@{file}"), ("--data-binary", f"@{file}")):
        status, told, answer = curl(server, f"/v1/models/{server.name}:predict", *body, *arguments)
        assert status == 200, told
        assert [v1_media(prediction) for prediction in json.loads(answer)["predictions"]] == reference


def test_curl_waits_for_100_continue_before_a_large_body(serve: Serve, tmp_path: Path) -> None:
    server = serve("glm-image")
    source = picture(1, (900, 600))  # 1.6 MB, and more in base64
    file = tmp_path / "request.json"
    body = {"instances": [{"prompt": PROMPTS[0], "image": base64.b64encode(source).decode(), **SMALL}]}
    file.write_text(json.dumps(body))
    assert file.stat().st_size > 2 * 2**20
    status, told, answer = curl(
        server,
        f"/v1/models/{server.name}:predict",
        *("--data-binary", f"@{file}", "-H", "Expect: 100-continue", "--expect100-timeout", "30"),
    )
    assert status == 200, answer[:500]
    assert "HTTP/1.1 100 Continue" in told
    assert v1_media(json.loads(answer)["predictions"][0]) == v1_media(server.predict(body["instances"][0])[0])


def test_curl_sends_v2_binary(serve: Serve, reference: list[bytes], tmp_path: Path) -> None:
    server = serve("sd15")
    prompt = PROMPTS[0].encode()
    raw = struct.pack("<I", len(prompt)) + prompt
    head = json.dumps(
        {
            "inputs": [
                {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
            ],
            "outputs": [{"name": "image", "parameters": {"binary_data": True}}],
            "parameters": FIELDS,
        }
    ).encode()
    file = tmp_path / "request.bin"
    file.write_bytes(head + raw)
    status, told, answer = curl(
        server,
        f"/v2/models/{server.name}/infer",
        *("--data-binary", f"@{file}", "-H", f"Inference-Header-Content-Length: {len(head)}"),
    )
    assert status == 200, answer
    headers = dict(re.findall(r"^< ([^:\r]+): ([^\r]*)\r?$", told, re.MULTILINE))
    assert headers["content-type"] == "application/octet-stream"
    length = int(headers["inference-header-content-length"])
    (output,) = json.loads(answer[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": len(answer) - length}
    assert split_bytes(answer[length:]) == reference[:1]


# --- ids


@pytest.mark.parametrize("given", ["my-request.1", "a b", "x" * 128])
def test_a_request_id_is_echoed(given: str, serve: Serve) -> None:
    server = serve("sd15")
    body = {"inputs": [json_tensor("prompt", PROMPTS[:1])], "parameters": FIELDS}
    status, headers, answer = server.request("POST", f"/v2/models/{server.name}/infer", body, {"x-request-id": given})
    assert status == 200
    assert headers["x-request-id"] == given
    assert json.loads(answer)["id"] == given  # where the body names none
    assert infer(server, {**body, "id": "of-the-body"}, **{"x-request-id": given})["id"] == "of-the-body"
    status, headers, answer = server.request("GET", "/nowhere", headers={"x-request-id": given})
    assert (status, headers["x-request-id"]) == (404, given)


@pytest.mark.parametrize("given", [None, "", "x" * 129, "tab\there", "größe"])
def test_an_absent_or_odd_request_id_is_replaced(given: str | None, serve: Serve) -> None:
    server = serve("sd15")
    headers = {} if given is None else {"x-request-id": given}
    body = {"inputs": [json_tensor("prompt", PROMPTS[:1])], "parameters": FIELDS}
    answers = [server.request("POST", f"/v2/models/{server.name}/infer", body, headers) for _ in range(2)]
    ids = {told["x-request-id"] for _, told, _ in answers}
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{32}", identity) for identity in ids)
    assert {json.loads(answer)["id"] for _, _, answer in answers} == ids


def test_grpc_echoes_ids(serve: Serve) -> None:
    import grpc
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

    server = serve("sd15")
    message = pb.ModelInferRequest(model_name=server.name)
    grpc_parameters(message, {"prompt": PROMPTS[0], **{k: v for k, v in FIELDS.items() if not isinstance(v, float)}})
    with grpc.insecure_channel(server.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        answer, call = stub.ModelInfer.with_call(message, metadata=[("x-request-id", "from-metadata")])
        assert answer.id == dict(call.initial_metadata())["x-request-id"] == "from-metadata"
        message.id = "of-the-message"
        assert stub.ModelInfer(message).id == "of-the-message"
        message.id = ""
        answer, call = stub.ModelInfer.with_call(message)
        assert re.fullmatch("[0-9a-f]{32}", answer.id)
        assert dict(call.initial_metadata())["x-request-id"] == answer.id

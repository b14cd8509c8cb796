"""v2 over gRPC: KServe's server and servicer with our decoding, errors, limits and message sizes."""

from __future__ import annotations

import asyncio
import logging
import struct
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc import aio
from kserve import InferInput, InferRequest, InferResponse
from kserve.model_repository import ModelRepository
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.infer_type import RequestedOutput

from runtime.access import OPEN_METHODS, Keys
from runtime.errors import DiffusionError, InvalidRequest, Unauthorized, shown
from runtime.logs import credential, log, request_scope, trace_context, unexpected, with_request_id
from runtime.model import DiffusionModel, find_model
from runtime.protocol import v2

CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

VARINT, FIXED64 = 0, 1  # protobuf wire types
RAW_OUTPUT_TAG = bytes([pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | 2])


def parameter_value(name: str, parameter: Any) -> Any:
    """A parameter's value; None where it has none. KServe's proto lacks the protocol's double_param (4) and
    uint64_param (5): they arrive as unknown fields. Raises InvalidRequest for any other."""
    choice = parameter.WhichOneof("parameter_choice")
    if choice is not None:
        return getattr(parameter, choice)
    for unknown in UnknownFieldSet(parameter):
        if (unknown.field_number, unknown.wire_type) == (4, FIXED64):
            return struct.unpack("<d", struct.pack("<Q", unknown.data))[0]
        if (unknown.field_number, unknown.wire_type) == (5, VARINT):
            return unknown.data
        raise InvalidRequest(f"{shown(name)}: field {unknown.field_number} is no kind of parameter of the v2 protocol")
    return None


def infer_request(message: pb.ModelInferRequest) -> InferRequest:
    """A gRPC message as an InferRequest with plain lists and values. Raises InvalidRequest."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(f"raw_input_contents: {len(raw)} entries for {len(message.inputs)} inputs")
    inputs = []
    for i, tensor in enumerate(message.inputs):
        v2.tensor_name(tensor.name, f"inputs[{i}].name")
        datatype = tensor.datatype.upper()
        if datatype != "BYTES" and datatype not in v2.NUMPY_TYPES:
            raise InvalidRequest(
                f"{tensor.name}: datatype {shown(tensor.datatype)} is none of BYTES, {', '.join(v2.NUMPY_TYPES)}"
            )
        if raw:
            if tensor.HasField("contents"):
                raise InvalidRequest(f"{tensor.name}: has contents and raw_input_contents; give one of them")
            data = v2.from_raw(tensor.name, datatype, raw[i])
        elif datatype in CONTENTS:
            data = list(getattr(tensor.contents, CONTENTS[datatype])[: v2.MAX_ELEMENTS + 1])
            data = v2.decimals(data) if datatype == "FP32" else data
        else:
            raise InvalidRequest(f"{tensor.name}: {datatype} data must be sent in raw_input_contents")
        inputs.append(InferInput(tensor.name, list(tensor.shape), datatype, data))
    request = InferRequest(
        model_name=message.model_name,
        infer_inputs=inputs,
        request_id=message.id or None,
        from_grpc=True,
        parameters={name: parameter_value(name, p) for name, p in message.parameters.items()},
        request_outputs=[RequestedOutput(output.name) for output in message.outputs] or None,
    )
    request._use_raw_outputs = bool(raw)
    return request


def infer_response(response: InferResponse, raw: bool) -> bytes:
    """The serialized ModelInferResponse. `raw`: length-prefixed BYTES in raw_output_contents, as Triton's client
    reads; else in `contents`. Slow for large media: run it in a thread.

    The raw form is put together by hand: protobuf would copy a video three times, holding the interpreter lock.
    """
    message = pb.ModelInferResponse(id=response.id, model_name=response.model_name)
    parts: list[bytes | bytearray] = []
    for output in response.outputs:
        tensor = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        if raw:
            elements = [part for item in output.data for part in (struct.pack("<I", len(item)), item)]
            parts += [RAW_OUTPUT_TAG, _varint(sum(map(len, elements))), *elements]
        else:
            tensor.contents.bytes_contents.extend(bytes(item) for item in output.data)
    return b"".join([message.SerializeToString(), *parts])


def _varint(value: int) -> bytes:
    """`value` as protobuf writes lengths: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


class Servicer(InferenceServicer):  # type: ignore[misc]
    """KServe's servicer; what differs from it is here."""

    def __init__(self, data_plane: Any, extension: Any, repository: ModelRepository) -> None:
        super().__init__(data_plane, extension)
        self._repository = repository

    def _model(self, name: str, version: str = "") -> DiffusionModel:
        return find_model(self._repository, name, version)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(**v2.SERVER)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=all([await m.healthy() for m in self._repository.get_models().values()]))

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=await self._model(request.name, request.version).healthy())

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        metadata = self._model(request.name, request.version).metadata()
        return pb.ModelMetadataResponse(
            name=metadata["name"],
            platform=metadata["platform"],
            inputs=metadata["inputs"],
            outputs=metadata["outputs"],
        )

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        model = self._model(request.model_name, request.model_version)
        decoded = infer_request(request)
        headers = {key.lower(): value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        response = await model.answer(decoded, headers, request.SerializeToString(deterministic=True))
        return await asyncio.to_thread(infer_response, response, decoded.use_binary_outputs)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        await self._model(request.model_name).load_from_api()
        return pb.RepositoryModelLoadResponse(model_name=request.model_name, isLoaded=True)

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await self._model(request.model_name).unload_from_api()
        return pb.RepositoryModelUnloadResponse(model_name=request.model_name, isUnloaded=True)


class Errors(aio.ServerInterceptor):  # type: ignore[misc]
    """Asks for a key, and turns our errors into status codes, anything else into INTERNAL with a request id."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys or Keys()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        pairs = [(key, value) for key, value in details.invocation_metadata or () if isinstance(value, str)]
        metadata = dict(pairs)
        trace, echoed = trace_context(pairs)
        try:
            key_name = "" if details.method in OPEN_METHODS else self._keys.require(metadata)
        except Unauthorized as error:
            refusal = str(error)

            async def refuse(_: Any, context: Any) -> None:
                with request_scope(metadata.get("x-request-id"), trace) as identity:
                    log(logging.INFO, "refused", status=401, method=details.method[:200], error=refusal)
                    await context.send_initial_metadata((("x-request-id", identity), *echoed))
                    await context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal)

            # A handler of streams is called before the first message is read.
            return grpc.stream_stream_rpc_method_handler(refuse)
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        inner, deserialize = handler.unary_unary, handler.request_deserializer

        async def guarded(request: Any, context: Any) -> Any:
            with request_scope(metadata.get("x-request-id"), trace) as identity:
                credential.set(key_name)
                await context.send_initial_metadata((("x-request-id", identity), *echoed))
                try:
                    try:
                        message = deserialize(request) if deserialize else request
                    except DecodeError:
                        raise InvalidRequest("request: not a message of this method") from None
                    return await inner(message, context)
                except DiffusionError as error:
                    if error.retry_after is not None:
                        context.set_trailing_metadata((("retry-after", str(error.retry_after)),))
                    code = getattr(grpc.StatusCode, error.grpc_code)
                    text = str(error) if error.http_status < 500 else with_request_id(str(error), identity)
                except Exception as error:
                    code, text = grpc.StatusCode.INTERNAL, unexpected(error, identity)
                await context.abort(code, text)

        return grpc.unary_unary_rpc_method_handler(
            guarded,
            # infer_response has serialized already
            response_serializer=lambda answer: answer if isinstance(answer, bytes) else answer.SerializeToString(),
        )


class Server(GRPCServer):  # type: ignore[misc]
    """KServe's gRPC server with our servicer, interceptor and message limits."""

    def __init__(
        self,
        port: int,
        data_plane: Any,
        extension: Any,
        repository: ModelRepository,
        sizes: tuple[int, int],
        grace: int,
        keys: Keys | None = None,
    ) -> None:
        super().__init__(port, data_plane, extension, kwargs={}, grace_period=grace)
        self._servicer = Servicer(data_plane, extension, repository)
        self._sizes = sizes
        self._keys = keys

    async def start(self, max_workers: int = 1) -> None:
        send, receive = self._sizes
        self._server = aio.server(
            interceptors=(Errors(self._keys),),
            options=[("grpc.max_send_message_length", send), ("grpc.max_receive_message_length", receive)],
        )
        add_GRPCInferenceServiceServicer_to_server(self._servicer, self._server)
        if self._server.add_insecure_port(f"[::]:{self._port}") == 0:
            raise OSError(f"GRPC_PORT={self._port}: the port is taken")
        await self._server.start()
        await self._server.wait_for_termination()

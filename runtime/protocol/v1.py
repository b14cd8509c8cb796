"""KServe's v1 protocol: {"instances": […], "parameters": {…}} to {"predictions": […]}."""

from __future__ import annotations

from typing import Any

from runtime.errors import InvalidRequest, shown
from runtime.families.base import COMMON, normalise
from runtime.protocol.wire import Base64
from runtime.types import Estimate, GeneratedMedia, GenerationRequest, GenerationResult

FIELDS = ("instances", "parameters")

_FIELD = {
    "type": "object",
    # A picture is a string or a list of strings; a model may have further fields of its own.
    "properties": {
        p.name: {"description": p.description} | ({} if p.kind == "image" else {"type": p.kind})
        for p in COMMON.values()
    },
}
# The request's JSON schema, for the OpenAPI document.
SCHEMA = {
    "type": "object",
    "properties": {"instances": {"type": "array", "items": _FIELD, "minItems": 1}, "parameters": _FIELD},
    "required": ["instances"],
    "additionalProperties": False,
}


def decode(payload: Any, max_instances: int) -> list[dict[str, Any]]:
    """The fields of each instance, with `parameters` as defaults for all. Raises InvalidRequest."""
    if not isinstance(payload, dict):
        raise InvalidRequest('body: must be an object like {"instances": [{"prompt": "a dog"}]}')
    for name in payload:
        if name not in FIELDS:
            raise InvalidRequest(f"{shown(name)} is not a field of a v1 request; it has instances and parameters")
    instances, parameters = payload.get("instances"), payload.get("parameters")
    if not isinstance(instances, list) or not instances:
        raise InvalidRequest(f"instances: {shown(instances)} is not a list of at least one object")
    if len(instances) > max_instances:
        raise InvalidRequest(f"instances: {len(instances)} prompts; at most {max_instances} fit in one call")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidRequest(f"parameters: {shown(parameters)} is not an object")
    for i, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise InvalidRequest(f'instances[{i}]: {shown(instance)} is not an object like {{"prompt": "a dog"}}')
    shared = normalise(parameters or {})
    return [{**shared, **normalise(instance)} for instance in instances]


def encode(results: list[GenerationResult] | list[Estimate], model_name: str) -> dict[str, Any]:
    """The response body; pictures and videos in it are `Base64`."""
    return {"predictions": [_prediction(result, model_name) for result in results]}


def estimated(estimate: Estimate) -> dict[str, Any]:
    """What every protocol tells about a dry run."""
    return {
        "dry_run": True,
        "predicted_seconds": round(estimate.seconds, 3),
        "predicted_wait_seconds": round(estimate.wait_seconds, 3),
        "width": estimate.request.width,
        "height": estimate.request.height,
        **asked(estimate.request),
    }


def _prediction(result: GenerationResult | Estimate, model_name: str) -> dict[str, Any]:
    if isinstance(result, Estimate):
        return {"model_name": model_name, "prompt": result.request.prompt, **estimated(result)}
    kind = "video" if result.media[0].format == "mp4" else "image"
    media = [_media(item) for item in result.media]
    prediction: dict[str, Any] = {"model_name": model_name, "prompt": result.request.prompt, kind: media[0]}
    if len(media) > 1:
        prediction[f"{kind}s"] = media
    return {**prediction, **describe(result)}


def _media(item: GeneratedMedia) -> dict[str, Any]:
    video = {"fps": item.fps, "num_frames": item.num_frames} if item.num_frames else {}
    return {"format": item.format.upper(), "b64": Base64(item.data), **video}


def describe(result: GenerationResult) -> dict[str, Any]:
    """What every protocol tells about a result beside its media: what was drawn, and how."""
    return {
        "width": result.media[0].width,
        "height": result.media[0].height,
        **asked(result.request),
        "timings": dict(result.timings),
        "batched": result.batched,
        "engine_variant": result.engine_variant,
        "model_revision": result.model_revision,
    }


def asked(request: GenerationRequest) -> dict[str, Any]:
    """The request as it is run, defaults filled in."""
    told: dict[str, Any] = {
        "seed": request.seed,
        "seeds": list(request.seeds),
        "num_inference_steps": request.num_inference_steps,
    }
    for name in ("guidance_scale", "guidance_scale_2", "flow_shift", "num_frames", "fps", "max_sequence_length"):
        if (value := getattr(request, name)) is not None:
            told[name] = value
    return {**told, **request.extra}

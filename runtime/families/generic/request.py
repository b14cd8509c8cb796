"""What a request may say to any other diffusers pipeline: what its own `__call__` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runtime.errors import InvalidRequest
from runtime.families.base import (
    COMMON,
    OURS,
    Limits,
    Parameter,
    Schema,
    cap,
    check_pixels,
    fit_pixels,
    number,
    parameter,
    table,
)
from runtime.types import GenerationRequest

MAX_SIDE = 4096
MIN_SIDE = 64
MAX_PIXELS = 2048 * 2048


def schema(facts: Mapping[str, Any], limits: Limits) -> Schema:
    """`facts`: multiple, default_width, default_height, video, takes (name -> default of the signature's known
    arguments), refused (name -> reason) and extra (name -> {kind, default, bounds}: further scalar arguments)."""
    takes: Mapping[str, Any] = facts["takes"]
    prompt_length = cap(limits.max_prompt_length, 8000)
    side = {"multiple_of": facts["multiple"], "minimum": max(MIN_SIDE, facts["multiple"]), "maximum": MAX_SIDE}
    parameters = table(
        parameter("prompt", max_length=prompt_length),
        parameter("num_inference_steps", default=takes["num_inference_steps"], maximum=cap(limits.max_steps, 200)),
        parameter("n", maximum=cap(limits.max_n, 10)),
    )
    if "width" in takes and "height" in takes:
        parameters |= table(parameter("width", **side), parameter("height", **side))
    for name in ("guidance_scale", "max_sequence_length", "flow_shift"):
        if name in takes:
            parameters |= table(parameter(name, default=takes[name]))
    if "max_sequence_length" in takes:  # beyond 512 the pipelines of this kind raise
        parameters |= table(parameter("max_sequence_length", default=takes["max_sequence_length"], maximum=512))
    if "negative_prompt" in takes:
        parameters |= table(parameter("negative_prompt", max_length=prompt_length))
    if "image" in takes:
        parameters |= table(parameter("image", required=facts["image_required"]))
    if facts["video"]:
        parameters |= table(
            parameter("num_frames", default=takes["num_frames"], maximum=cap(limits.max_frames, 257)),
            parameter("fps", default=16),
        )
    for name, extra in facts["extra"].items():
        parameters[name] = Parameter(
            name,
            extra["kind"],
            "An argument of the pipeline's own.",
            default=extra["default"],
            max_length=prompt_length if extra["kind"] == "string" else None,
            minimum=extra["bounds"][0],
            maximum=extra["bounds"][1],
        )
    refused = {name: reason for name, reason in facts["refused"].items() if name not in parameters} | {
        name: facts["refused"].get(name, f"{facts['pipeline']} takes no such argument")
        for name in COMMON
        if name not in parameters and name not in OURS
    }
    return Schema(parameters, refused)


def batch_key(request: GenerationRequest, facts: Mapping[str, Any]) -> GenerationRequest | None:
    """Text to image runs with what is alike in all but prompts, seed, n and file format: it keeps a GPU busier."""
    if not facts["batches"] or request.images or any("prompt" in name for name in request.extra):
        return None
    negative = "any" if request.negative_prompt else None
    return replace(
        request, prompt="any", negative_prompt=negative, seed=0, n=1, output_format="any", output_quality=None
    )


def complete(values: dict[str, Any], facts: Mapping[str, Any], limits: Limits) -> GenerationRequest:
    asked = values.pop("given")
    extra = {name: values.pop(name) for name in facts["extra"]}
    extra = {name: value for name, value in extra.items() if value != facts["extra"][name]["default"]}
    gate = facts[
        "negative_prompt_gate"
    ]  # the argument that turns guidance on: guidance_scale, or Flux's true_cfg_scale
    given = [n for n in ("negative_prompt", "negative_prompt_2", "negative_prompt_3") if values.get(n) or extra.get(n)]
    if given and gate is not None:
        value = extra.get(gate, facts["extra"].get(gate, {}).get("default")) if gate in facts["extra"] else values[gate]
        if value is None or value <= 1:
            if given[0] not in asked:  # a default of the model folder's
                values["negative_prompt"] = None
                extra = {name: value for name, value in extra.items() if name not in given}
            else:
                raise InvalidRequest(
                    f"{given[0]}: it has no effect while {gate} is {number(value or 0)}; use one above 1"
                )
    limit, multiple = cap(limits.max_pixels, MAX_PIXELS), facts["multiple"]
    size = (facts["default_width"], facts["default_height"])
    default_width, default_height = fit_pixels(*size, limit, multiple, max(MIN_SIDE, multiple))
    width, height = values.pop("width", None) or default_width, values.pop("height", None) or default_height
    check_pixels(width, height, limit)
    return GenerationRequest(width=width, height=height, extra=extra, **values)

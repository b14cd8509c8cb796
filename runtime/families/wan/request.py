"""What a request may say to Wan 2.2 (T2V-A14B, I2V-A14B, TI2V-5B) and to Wan 2.1 of the same classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runtime.errors import InvalidRequest
from runtime.families.base import Limits, Schema, cap, check_pixels, fit_pixels, number, parameter, table
from runtime.types import GenerationRequest

MIN_SIDE = 32
MAX_SIDE = 4096
MAX_PIXELS = 1920 * 1088
FRAME_TOLERANCE = 0.01  # of a frame: 4.8 and 5.0667 seconds at 15 fps mean 72 and 76 frames


def schema(facts: Mapping[str, Any], limits: Limits) -> Schema:
    """`facts`: multiple, temporal, text_to_video, image_to_video, experts, flow_shift and the checkpoint's defaults."""
    own = facts["defaults"]
    side = {"multiple_of": facts["multiple"], "minimum": MIN_SIDE, "maximum": MAX_SIDE}
    prompt_length = cap(limits.max_prompt_length, 8000)
    parameters = table(
        parameter("prompt", max_length=prompt_length),
        parameter("negative_prompt", max_length=prompt_length),
        parameter("width", **side),
        parameter("height", **side),
        parameter("num_inference_steps", default=own["num_inference_steps"], maximum=cap(limits.max_steps, 200)),
        parameter("guidance_scale", default=own["guidance_scale"]),
        parameter(
            "num_frames",
            default=own["num_frames"],
            minimum=1,
            maximum=cap(limits.max_frames, 257),
            multiple_of=facts["temporal"],
            offset=1,
        ),
        parameter("fps", default=own["fps"]),
        parameter("seconds"),
        parameter("n", maximum=cap(limits.max_n, 4)),
        parameter("max_sequence_length", default=512, maximum=512),
    )
    refused = {}
    if facts["experts"] == 2:
        parameters |= table(parameter("guidance_scale_2"))
    else:
        refused["guidance_scale_2"] = "this checkpoint has one expert; guidance_scale is its guidance"
    if facts["flow_shift"] is not None:
        parameters |= table(parameter("flow_shift", default=facts["flow_shift"]))
    else:
        refused["flow_shift"] = "this checkpoint's scheduler has no fixed shift"
    if facts["image_to_video"]:
        required = not facts["text_to_video"]
        parameters |= table(parameter("image", required=required, description="The first frame of the video."))
    else:
        refused["image"] = "this checkpoint makes videos from text alone"
    return Schema(parameters, refused)


def batch_key(request: GenerationRequest, facts: Mapping[str, Any]) -> GenerationRequest | None:
    """Alone: one video fills the device."""
    return None


def complete(values: dict[str, Any], facts: Mapping[str, Any], limits: Limits) -> GenerationRequest:
    images, given = values.setdefault("images", ()), values.pop("given")
    own = facts["defaults"]
    guidance, guidance_2 = values["guidance_scale"], values.get("guidance_scale_2")
    if guidance <= 1:  # the pipeline then makes no unconditional forward
        if guidance_2 is not None and guidance_2 > 1 and "guidance_scale_2" in given:
            raise InvalidRequest(
                f"guidance_scale_2: {number(guidance_2)} has no effect while guidance_scale is {number(guidance)}; "
                "guidance_scale above 1 turns guidance on"
            )
        if "negative_prompt" in given:
            raise InvalidRequest(
                f"negative_prompt: it has no effect while guidance_scale is {number(guidance)}; use one above 1"
            )
        values["negative_prompt"] = None
    if facts["experts"] == 2 and guidance_2 is None:
        # The checkpoint's pair belongs together: with another guidance the pipeline's own rule, one value for both.
        same_guidance = guidance == own["guidance_scale"]
        values["guidance_scale_2"] = own["guidance_scale_2"] if same_guidance else guidance
    seconds, num_frames = values.pop("seconds"), values["num_frames"]
    if seconds is not None and num_frames is not None:
        raise InvalidRequest(f"seconds: {number(seconds)} and num_frames: {num_frames} both set the length; give one")
    if seconds is not None:
        values["num_frames"] = frames_of(seconds, values["fps"], facts["temporal"], cap(limits.max_frames, 257))
    width, height = values.pop("width"), values.pop("height")
    limit, multiple = cap(limits.max_pixels, MAX_PIXELS), facts["multiple"]
    size = default_size(own["width"], own["height"], images, multiple)
    default_width, default_height = fit_pixels(*size, limit, multiple, MIN_SIDE)
    width, height = width or default_width, height or default_height
    check_pixels(width, height, limit)
    return GenerationRequest(width=width, height=height, **values)


def frames_of(seconds: float, fps: int, temporal: int, most: int) -> int:
    """Frames of a video of `seconds`: fps x seconds plus the first frame, which must be 4k + 1."""
    exact = seconds * fps + 1
    frames = round(exact)
    if abs(exact - frames) > FRAME_TOLERANCE or (frames - 1) % temporal or not 1 <= frames <= most:
        below = max(0, min(math.floor(exact - 1), most - 1) // temporal * temporal)
        fit = [f / fps for f in (below, below + temporal) if f + 1 <= most]
        raise InvalidRequest(
            f"seconds: {number(seconds)} at {fps} fps is {number(exact)} frames; frames must be a multiple of "
            f"{temporal} plus 1 and at most {most}; the nearest that fit are "
            f"{' and '.join(f'{s:.6g}' for s in fit)} seconds"
        )
    return frames


def default_size(width: int, height: int, images: tuple[Any, ...], multiple: int) -> tuple[int, int]:
    """The checkpoint's size, or for a source picture its aspect at the same area, as in the model card's example."""
    if not images:
        return width, height
    aspect = images[0].height / images[0].width
    area = width * height
    tall = round(math.sqrt(area * aspect)) // multiple * multiple
    wide = round(math.sqrt(area / aspect)) // multiple * multiple
    return min(MAX_SIDE, max(MIN_SIDE, wide)), min(MAX_SIDE, max(MIN_SIDE, tall))

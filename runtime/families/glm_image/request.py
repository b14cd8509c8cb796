"""What a request may say to GLM-Image: text to image, and editing of one or several source pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.errors import InvalidRequest
from runtime.families.base import Limits, Schema, cap, check_pixels, fit_pixels, parameter, table
from runtime.types import GenerationRequest, SourceImage

MULTIPLE = 32  # one token of the autoregressive stage covers 32 x 32 pixels
DEFAULT_SIDE = 1024
MAX_SIDE = 4096
MAX_PIXELS = 2048 * 2048
MAX_ASPECT = 4  # the image processor refuses source pictures beyond it


def schema(facts: Mapping[str, Any], limits: Limits) -> Schema:
    side = {"multiple_of": MULTIPLE, "minimum": MULTIPLE, "maximum": MAX_SIDE}
    image = parameter("image", max_items=cap(limits.max_source_images, 4), description="Source pictures to edit.")
    return Schema(
        table(
            parameter("prompt", max_length=cap(limits.max_prompt_length, 8000)),
            *([image] if facts["edits"] else []),
            parameter("width", **side),
            parameter("height", **side),
            parameter("num_inference_steps", default=50, maximum=cap(limits.max_steps, 200)),
            parameter("guidance_scale", default=1.5),
            parameter("n", maximum=cap(limits.max_n, 10)),
            parameter("max_sequence_length", default=2048, maximum=2048),
        ),
        {
            **({} if facts["edits"] else {"image": "editing does not work with ENABLE_SEQUENTIAL_CPU_OFFLOAD"}),
            "negative_prompt": "GLM-Image has none; its unconditional branch is an empty prompt",
            "guidance_scale_2": "GLM-Image has one denoiser",
            "flow_shift": "GLM-Image's scheduler shifts by the picture's size",
            "num_frames": "GLM-Image makes pictures, not videos",
            "fps": "GLM-Image makes pictures, not videos",
            "seconds": "GLM-Image makes pictures, not videos",
        },
    )


def batch_key(request: GenerationRequest, facts: Mapping[str, Any]) -> GenerationRequest | None:
    """What wants as many tokens: those of all are made in one pass, and the DiT's pictures one after another."""
    if not facts["batches"]:
        return None
    mode = "edit" if request.images else "text to image"
    return GenerationRequest(mode, request.width, request.height, 1, 0, 1, "any")


def complete(values: dict[str, Any], facts: Mapping[str, Any], limits: Limits) -> GenerationRequest:
    for token in facts["special_tokens"]:
        if token in values["prompt"]:
            raise InvalidRequest(f"prompt: {token} is one of the model's own tokens and can't be drawn")
    images: tuple[SourceImage, ...] = values.setdefault("images", ())
    values.pop("given")
    for i, image in enumerate(images):
        aspect = max(image.width, image.height) / min(image.width, image.height)
        if aspect > MAX_ASPECT:
            field = "image" if len(images) == 1 else f"image[{i}]"
            raise InvalidRequest(
                f"{field}: {image.width} x {image.height} has an aspect of {aspect:.2f}; at most {MAX_ASPECT} fits"
            )
    width, height = values.pop("width"), values.pop("height")
    limit = cap(limits.max_pixels, MAX_PIXELS)
    size = source_size(images[0].width, images[0].height, facts) if images else (DEFAULT_SIDE, DEFAULT_SIDE)
    default_width, default_height = fit_pixels(*size, limit, MULTIPLE, MULTIPLE)
    width, height = width or default_width, height or default_height
    check_pixels(width, height, limit)
    return GenerationRequest(width=width, height=height, **values)


def source_size(width: int, height: int, facts: Mapping[str, Any]) -> tuple[int, int]:
    """The size a source picture is resized to, once, before both paths that read it.

    The token path shrinks to multiples of 32 within the processor's edges, the VAE path floors to
    16: only a size that both leave alone keeps their grids equal. The rule is `smart_resize` of
    transformers' GLM-Image image processor, which works on half the size in multiples of 16.
    """
    shortest, longest = int(facts["source_shortest_edge"]), int(facts["source_longest_edge"])
    scale = max(1.0, shortest / min(width, height))
    scale = min(scale, longest / max(width, height))
    most = longest // MULTIPLE * MULTIPLE
    least = min(-(-shortest // MULTIPLE) * MULTIPLE, most)

    def rounded(side: int) -> int:
        return min(most, max(least, round(side // 2 * scale / (MULTIPLE // 2)) * MULTIPLE))

    return rounded(width), rounded(height)

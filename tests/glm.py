"""A small request to the tiny GLM-Image, and source pictures for it."""

from __future__ import annotations

import numpy as np

from runtime.types import GenerationRequest, SourceImage

TEXT = GenerationRequest(
    prompt='a red fox, "OPEN"',
    width=64,
    height=64,
    num_inference_steps=3,
    seed=0,
    n=1,
    output_format="png",
    guidance_scale=1.5,
    max_sequence_length=64,
)


def source(index: int, width: int = 64, height: int = 64) -> SourceImage:
    """A picture of noise, another one for each `index`."""
    rgb = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return SourceImage(width, height, rgb.tobytes())

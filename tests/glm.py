"""A small request to the tiny GLM-Image, source pictures for it, and a call as the engine makes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from runtime.engine.context import Context
from runtime.engine.running import clean, isolated_random_state
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


def drawn(pipeline: Any, runner: Any, request: GenerationRequest, seed: int, device: torch.device) -> Any:
    """The picture's pixels."""
    try:
        with isolated_random_state(seed, device):
            return np.asarray(runner.run(request, seed, Context(device, lambda: False, lambda _: None)))
    finally:
        clean(pipeline)

"""How Wan 2.2 runs, and Wan 2.1 of the same classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from PIL import Image

from runtime.engine.context import Context
from runtime.engine.running import (
    FreshScheduler,
    Hooks,
    cpu_generator,
    flow_shift_key,
    scheduler_changes,
    stock_variant,
)
from runtime.types import PLAIN, Acceleration, GenerationRequest, SourceImage

# The authors' defaults (Wan-Video/Wan2.2, wan/configs; Wan 2.1: diffusers' own).
T2V_A14B = {"width": 1280, "height": 720, "num_frames": 81, "fps": 16, "num_inference_steps": 40} | {
    "guidance_scale": 4.0,
    "guidance_scale_2": 3.0,
}
I2V_A14B = {**T2V_A14B, "guidance_scale": 3.5, "guidance_scale_2": 3.5}
TI2V_5B = {"width": 1280, "height": 704, "num_frames": 121, "fps": 24, "num_inference_steps": 50} | {
    "guidance_scale": 5.0
}
WAN_2_1 = {"width": 832, "height": 480, "num_frames": 81, "fps": 16, "num_inference_steps": 50} | {
    "guidance_scale": 5.0
}


def facts(pipeline: Any, folder: Path) -> dict[str, Any]:
    config = pipeline.config
    experts = 2 if config.boundary_ratio is not None else 1
    from_image = type(pipeline).__name__ == "WanImageToVideoPipeline"
    if config.expand_timesteps:
        defaults = TI2V_5B
    elif experts == 2:
        defaults = I2V_A14B if from_image else T2V_A14B
    else:
        defaults = WAN_2_1
    key = flow_shift_key(pipeline.scheduler)
    return {
        "video": True,
        "multiple": pipeline.vae_scale_factor_spatial * _denoiser(pipeline).config.patch_size[1],
        "temporal": pipeline.vae_scale_factor_temporal,
        "experts": experts,
        "text_to_video": not from_image,
        # TI2V-5B is one checkpoint for both.
        "image_to_video": from_image or bool(config.expand_timesteps),
        "flow_shift": None if key is None else pipeline.scheduler.config[key],
        "defaults": defaults,
    }


def warmup(facts: dict[str, Any]) -> GenerationRequest:
    side = max(32, facts["multiple"])
    only_from_image = not facts["text_to_video"]
    return GenerationRequest(
        prompt="warm-up",
        width=side,
        height=side,
        num_inference_steps=1,
        seed=0,
        n=1,
        output_format="mp4",
        images=(SourceImage(side, side, bytes(3 * side * side)),) if only_from_image else (),
        guidance_scale=5.0,
        num_frames=facts["temporal"] + 1,
        fps=16,
        max_sequence_length=512,
    )


class Runner:
    """One Wan checkpoint; TI2V-5B gets a second pipeline over the same components."""

    def __init__(self, pipeline: Any, acceleration: Acceleration = PLAIN) -> None:
        self.variant = stock_variant(pipeline, acceleration)
        self._text = self._image = pipeline
        if type(pipeline).__name__ == "WanPipeline" and pipeline.config.expand_timesteps:
            self._image = diffusers.WanImageToVideoPipeline(
                **pipeline.components, boundary_ratio=pipeline.config.boundary_ratio, expand_timesteps=True
            )
            self._image.set_progress_bar_config(disable=True)
        self._hooks = Hooks(pipeline)
        self._scheduler = FreshScheduler(pipeline)
        self._flow_shift_key = flow_shift_key(pipeline.scheduler)

    def run(self, request: GenerationRequest, seed: int, context: Context) -> np.ndarray[Any, Any]:
        """Frames as floats from 0 to 1, of shape (frames, height, width, 3)."""
        pipeline = self._image if request.images else self._text
        pipeline.scheduler = self._scheduler(**scheduler_changes(request.flow_shift, self._flow_shift_key))
        arguments: dict[str, Any] = {}
        if request.images:
            image = request.images[0]
            arguments["image"] = Image.frombytes("RGB", (image.width, image.height), image.rgb)
        if request.guidance_scale_2 is not None:
            arguments["guidance_scale_2"] = request.guidance_scale_2
        output = self._hooks.call(
            pipeline,
            request,
            context,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            max_sequence_length=request.max_sequence_length,
            generator=cpu_generator(seed),
            output_type="np",
            **arguments,
        )
        frames: np.ndarray[Any, Any] = output.frames[0]
        return frames


def _denoiser(pipeline: Any) -> Any:
    return pipeline.transformer if pipeline.transformer is not None else pipeline.transformer_2

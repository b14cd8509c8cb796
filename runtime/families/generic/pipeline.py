"""How any other diffusers pipeline runs: its own `__call__` says what it takes."""

from __future__ import annotations

import inspect
import types
import typing
from pathlib import Path
from typing import Any

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

MIN_SIDE = 64
KINDS = {str: "string", int: "integer", float: "number", bool: "boolean"}
# Arguments that are ours to give, or that no request may reach.
OWN = {
    "self", "prompt", "negative_prompt", "image", "height", "width", "num_frames", "num_inference_steps",
    "guidance_scale", "max_sequence_length", "num_images_per_prompt", "num_videos_per_prompt", "generator",
    "output_type", "return_dict", "callback_steps", "frame_rate", "decode_chunk_size",
}  # fmt: skip

# What makes sense of arguments that pipelines take unchecked; beyond it they fail or draw black.
BOUNDS = {
    "denoising_end": (0, 1),
    "denoising_start": (0, 1),
    "eta": (0, 1),
    "guidance_rescale": (0, 1),
    "strength": (0, 1),
    "true_cfg_scale": (0, 30),
}


def facts(pipeline: Any, folder: Path) -> dict[str, Any]:
    signature = inspect.signature(type(pipeline).__call__).parameters
    hints = _hints(type(pipeline).__call__)
    takes: dict[str, Any] = {}
    for name in ("width", "height", "num_inference_steps", "guidance_scale", "num_frames", "max_sequence_length"):
        if name in signature:
            takes[name] = signature[name].default
    for name in ("negative_prompt", "image"):
        if name in signature:
            takes[name] = None
    refused = {}
    key = flow_shift_key(pipeline.scheduler)
    if key is not None:
        takes["flow_shift"] = pipeline.scheduler.config[key]
    else:
        refused["flow_shift"] = "this model's scheduler has no fixed shift"
    bounds = {**BOUNDS, "clip_skip": (0, _hidden_layers(pipeline) - 1)}
    extra: dict[str, Any] = {
        name: {"kind": kind, "default": parameter.default, "bounds": bounds.get(name, (None, None))}
        for name, parameter in signature.items()
        if name not in OWN and (kind := _scalar_kind(hints.get(name))) and _is_plain(parameter.default)
    }
    for name, reason in _without_effect(pipeline).items():
        if extra.pop(name, None) is not None:
            refused[name] = reason
    transformer = getattr(pipeline, "transformer", None)
    if transformer is not None and transformer.config.get("guidance_embeds") is False and "true_cfg_scale" in extra:
        takes.pop("guidance_scale", None)
        refused["guidance_scale"] = "this checkpoint has no guidance embedding; true_cfg_scale turns guidance on"
    gate = next((name for name in ("true_cfg_scale", "guidance_scale") if name in extra or name in takes), None)
    multiple = _multiple(pipeline)
    width, height = _default_size(pipeline, takes, multiple)
    return {
        "pipeline": type(pipeline).__name__,
        "multiple": multiple,
        "default_width": width,
        "default_height": height,
        "video": "num_frames" in signature,
        "takes": takes,
        "refused": refused,
        "extra": extra,
        "image_required": "image" in signature and signature["image"].default is inspect.Parameter.empty,
        "negative_prompt_gate": gate,
        "batches": "num_frames" not in signature
        and all(_takes_list(hints.get(name)) for name in ("prompt", "generator")),
    }


def warmup(facts: dict[str, Any]) -> GenerationRequest:
    side = max(MIN_SIDE, facts["multiple"])
    video = facts["video"]
    return GenerationRequest(
        prompt="warm-up",
        width=side,
        height=side,
        num_inference_steps=1,
        seed=0,
        n=1,
        output_format="mp4" if video else "png",
        images=(SourceImage(side, side, bytes(3 * side * side)),) if facts["image_required"] else (),
        guidance_scale=facts["takes"].get("guidance_scale"),
        num_frames=facts["takes"].get("num_frames") if video else None,
        fps=16 if video else None,
        max_sequence_length=facts["takes"].get("max_sequence_length"),
    )


class Runner:
    """Any pipeline that gives `.images` or `.frames`."""

    def __init__(self, pipeline: Any, acceleration: Acceleration = PLAIN) -> None:
        self.variant = stock_variant(pipeline, acceleration)
        self._pipeline = pipeline
        self._hooks = Hooks(pipeline)
        self._scheduler = FreshScheduler(pipeline)
        self._flow_shift_key = flow_shift_key(pipeline.scheduler)
        self._takes = set(inspect.signature(type(pipeline).__call__).parameters)

    def run(self, request: GenerationRequest, seed: int, context: Context) -> Any:
        """A picture, or a video's frames."""
        return self._call(request, context, request.prompt, request.negative_prompt, cpu_generator(seed))[0]

    def run_batch(self, rows: list[tuple[GenerationRequest, int]], context: Context) -> list[Any]:
        """A picture for each request and seed, in one pass; the requests agree in all that `batch_key` compares.

        Each row's noise is the one it has alone; kernels may round it otherwise by the batch's size.
        """
        requests = [request for request, _ in rows]
        prompts = [request.prompt for request in requests]
        negative = [request.negative_prompt or "" for request in requests] if requests[0].negative_prompt else None
        generators = [cpu_generator(seed) for _, seed in rows]
        drawn: list[Any] = self._call(requests[0], context, prompts, negative, generators)
        return drawn

    def _call(self, request: GenerationRequest, context: Context, prompt: Any, negative: Any, generator: Any) -> Any:
        pipeline = self._pipeline
        pipeline.scheduler = self._scheduler(**scheduler_changes(request.flow_shift, self._flow_shift_key))
        given: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative,
            "height": request.height,
            "width": request.width,
            "num_frames": request.num_frames,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "max_sequence_length": request.max_sequence_length,
            **request.extra,
        }
        # What is absent is left to the pipeline's own default.
        arguments = {name: value for name, value in given.items() if value is not None and name in self._takes}
        if request.images:
            pictures = [Image.frombytes("RGB", (i.width, i.height), i.rgb) for i in request.images]
            arguments["image"] = pictures[0] if len(pictures) == 1 else pictures
        output = self._hooks.call(
            pipeline,
            request,
            context,
            generator=generator,
            reports_steps="callback_on_step_end" in self._takes,
            **arguments,
        )
        return output.frames if hasattr(output, "frames") else output.images


def _hidden_layers(pipeline: Any) -> int:
    """Layers of the smallest text encoder: as many as clip_skip may leave out, less one."""
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    layers = [getattr(encoder.config, "num_hidden_layers", 1) for encoder in encoders if encoder is not None]
    return min(layers, default=1)


def _without_effect(pipeline: Any) -> dict[str, str]:
    """Arguments that the pipeline's signature has and this checkpoint ignores or fails on, with the reason."""
    scheduler = pipeline.scheduler
    found = {}
    if "eta" not in inspect.signature(scheduler.step).parameters:
        found["eta"] = "this model's scheduler takes none"
    if not scheduler.config.get("use_dynamic_shifting"):
        found["mu"] = "this model's scheduler does not shift dynamically"
    for name in ("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"):
        found[name] = "it needs a list of layers, which requests cannot give"
    encode_prompt = getattr(type(pipeline), "encode_prompt", None)
    if (
        encode_prompt is not None
        and "text_encoder.text_model" in inspect.getsource(encode_prompt)
        and not hasattr(pipeline.text_encoder, "text_model")  # gone from transformers 5's CLIPTextModel
    ):
        found["clip_skip"] = "this pipeline reads it with a text encoder of older transformers"
    return found


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except (NameError, TypeError):  # an annotation that names what is not imported: fall back on none
        return {}


def _scalar_kind(hint: Any) -> str | None:
    """The request kind of an annotation that is a scalar, perhaps with None or a list of it as alternatives."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [KINDS[option] for option in options if option in KINDS]
    others = [o for o in options if o not in KINDS and o is not type(None) and typing.get_origin(o) is not list]
    return kinds[0] if kinds and not others else None


def _takes_list(hint: Any) -> bool:
    return any(typing.get_origin(option) is list for option in (hint, *typing.get_args(hint)))


def _is_plain(default: Any) -> bool:
    return default is None or isinstance(default, str | int | float | bool)


def _multiple(pipeline: Any) -> int:
    """Pixels that width and height must be multiples of: the VAE's scale times the denoiser's patch."""
    scale = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_spatial_compression_ratio", None) or 8
    transformer = getattr(pipeline, "transformer", None)
    patch = getattr(transformer.config, "patch_size", 1) if transformer is not None else 1
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    if hasattr(pipeline, "_pack_latents"):  # Flux and its kin pack 2 x 2 latents into a token
        patch = max(2, patch or 1)
    return int(scale) * int(patch or 1)


def _default_size(pipeline: Any, takes: dict[str, Any], multiple: int) -> tuple[int, int]:
    """The signature's size, else the pipeline's sample size in latents, else 1024."""
    width, height = takes.get("width"), takes.get("height")
    if width and height:
        return width, height
    sample = getattr(pipeline, "default_sample_size", None)
    if sample is None:
        denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        sample = getattr(getattr(denoiser, "config", None), "sample_size", None)
    scale = getattr(pipeline, "vae_scale_factor", 8)
    sides = sample if isinstance(sample, list | tuple) else (sample, sample)
    tall, wide = (int(side) * scale // multiple * multiple if side else 1024 for side in sides)
    return max(wide, MIN_SIDE), max(tall, MIN_SIDE)

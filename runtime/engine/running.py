"""What all families share around a pipeline's call: hooks, a fresh scheduler, random state, timings, clean-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch

from runtime.engine.context import Context
from runtime.errors import StartupError
from runtime.types import Acceleration, GenerationRequest

DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
# AutoencoderKLWan runs its decoder once a latent frame: a check before each lets a cancel bite there too.
CHECKED = (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3", "vae.decoder", "vae.encoder")

# ATTENTION_BACKEND -> diffusers' name for it
ATTENTION = {"cudnn": "_native_cudnn", "flash": "_native_flash", "flash-attn": "flash", "native": "native"}


class Hooks:
    """Forward pre-hooks on a pipeline's models: the generation at work can be stopped before any forward."""

    def __init__(self, pipeline: Any) -> None:
        self.context: Context | None = None
        self.first_forward: float | None = None
        for path in CHECKED:
            module = pipeline
            for name in path.split("."):
                module = getattr(module, name, None)
            if isinstance(module, torch.nn.Module):
                denoiser = path in DENOISERS
                module.register_forward_pre_hook(lambda *_, denoiser=denoiser: self._before_forward(denoiser))

    def _before_forward(self, denoiser: bool) -> None:
        if self.context is None:
            return
        self.context.before_forward()
        if denoiser and self.first_forward is None:
            self.context.synchronize()
            self.first_forward = time.perf_counter()

    def call(self, pipeline: Any, request: GenerationRequest, context: Context, **arguments: Any) -> Any:
        """The pipeline's output. Times it as prepare, denoise and decode, and reports each step."""
        begun = time.perf_counter()
        self.context, self.first_forward = context, None
        last_step = begun

        def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal last_step
            # Some schedulers take more timesteps than were asked for: PNDM one more, Heun almost twice as many.
            total = getattr(pipeline, "num_timesteps", None) or request.num_inference_steps
            context.advance("denoise", step + 1, total)
            if step + 1 == total:
                context.synchronize()
            last_step = time.perf_counter()
            return tensors

        if arguments.pop("reports_steps", True):
            arguments["callback_on_step_end"] = on_step_end
        try:
            output = pipeline(**arguments)
        finally:
            self.context = None
        context.synchronize()
        done = time.perf_counter()
        first = self.first_forward or begun
        last_step = max(last_step, first)
        for stage, seconds in (
            ("prepare", first - begun),
            ("denoise", last_step - first),
            ("decode", done - last_step),
        ):
            context.timings[stage] = context.timings.get(stage, 0.0) + seconds
        return output


def stock_variant(pipeline: Any, acceleration: Acceleration) -> str:
    """Gives a stock pipeline's denoisers the attention that is asked for; what came of it, in words.

    Raises StartupError where the device or the pipeline has no such thing, and for 8-bit weights.
    """
    name = type(pipeline).__name__
    if (acceleration.token_weights, acceleration.denoiser_weights) != ("plain", "plain"):
        raise StartupError(f"TOKEN_WEIGHTS and DENOISER_WEIGHTS are GLM-Image's; {name} has plain ones only")
    if acceleration.attention == "auto":
        return "stock"
    asked = f"ATTENTION_BACKEND={acceleration.attention}"
    models = [m for n in DENOISERS if isinstance(m := getattr(pipeline, n, None), torch.nn.Module)]
    if acceleration.attention != "native" and pipeline._execution_device.type != "cuda":
        raise StartupError(f"{asked}: needs a CUDA device; native runs anywhere")
    modules = [module for model in models for module in model.modules()]
    processors = [getattr(module, "processor", None) for module in modules]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise StartupError(f"{asked}: the attention of {name} cannot be chosen; leave it at auto")
    for model in models:
        try:
            cast("Any", model).set_attention_backend(ATTENTION[acceleration.attention])
        except (RuntimeError, ValueError) as error:
            raise StartupError(f"{asked}: {str(error).splitlines()[0]}") from error
    return f"stock, {acceleration.attention} attention"


class FreshScheduler:
    """A new scheduler for each generation, from the checkpoint's config: nothing a request sets outlives it."""

    def __init__(self, pipeline: Any) -> None:
        self._class = type(pipeline.scheduler)
        self._config = dict(pipeline.scheduler.config)

    def __call__(self, **changes: Any) -> Any:
        return self._class.from_config(self._config, **changes)


def flow_shift_key(scheduler: Any) -> str | None:
    """The name under which a scheduler's config holds a fixed flow shift; None where it has none in use.

    UniPC and its kin read `flow_shift` with flow sigmas; FlowMatchEuler reads `shift` unless it shifts by size.
    """
    config = scheduler.config
    if config.get("use_flow_sigmas") and config.get("flow_shift") is not None:
        return "flow_shift"
    if type(scheduler).__name__.startswith("FlowMatch") and not config.get("use_dynamic_shifting"):
        return "shift" if config.get("shift") is not None else None
    return None


def scheduler_changes(flow_shift: float | None, key: str | None) -> Mapping[str, float]:
    return {} if flow_shift is None or key is None else {key: flow_shift}


def cpu_generator(seed: int) -> torch.Generator:
    """Noise from the CPU: a seed means the same on every device."""
    return torch.Generator("cpu").manual_seed(seed)


@contextmanager
def isolated_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Global random state seeded inside, and afterwards as it was: some pipelines draw from it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def clean(pipeline: Any) -> None:
    """After every way out of a generation, the failed ones too: offload hooks moved back, step caches empty."""
    pipeline.maybe_free_model_hooks()
    for name in DENOISERS:
        module = getattr(pipeline, name, None)
        reset: Callable[[], None] | None = getattr(module, "_reset_stateful_cache", None)
        if reset is not None and getattr(module, "is_cache_enabled", False):
            reset()

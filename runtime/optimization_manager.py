"""What trades speed for memory: decided before the model is loaded, applied after, reported in the metadata.

Adding one: its entry in OPTIMIZATIONS, with its functions, and its setting ENABLE_<NAME>.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from runtime.device_manager import Device
from runtime.errors import StartupError, shown
from runtime.types import Acceleration

logger = logging.getLogger("diffusion_runtime.optimization")

GIB = 2**30
WORKING_SET_BYTES = 4 * GIB  # activations and the CUDA context, beside the weights
WEIGHTS_MARGIN = 1.1  # the allocator's rounding and what a model builds at run time


@dataclass(frozen=True)
class Decision:
    """Whether to apply an optimization, and the reason in words."""

    on: bool
    why: str


@dataclass(frozen=True)
class Placement:
    """What a family's own planner chose: whether its models take turns on the device, the numbers that their weights
    are, and whether weights may go to the device as they come."""

    offload: Decision
    acceleration: Acceleration
    directly: bool


@dataclass(frozen=True)
class Situation:
    """What `auto` measures. Sizes are in bytes; `free_bytes` is None on a device without memory of its own."""

    settings: Mapping[str, str]
    device: Device
    model_bytes: int
    largest_bytes: int
    free_bytes: int | None
    host_limit: int


@dataclass(frozen=True)
class Optimization:
    """`decide` is what auto does. `obstacle` says why it doesn't apply to a pipeline on a device, or None."""

    decide: Callable[[Situation], Decision]
    obstacle: Callable[[Any, Device], str | None]
    apply: Callable[[Any, Device], None]


def plan(
    settings: Mapping[str, str],
    device: Device,
    model_bytes: int,
    free_bytes: int | None,
    host_limit: int,
    largest_bytes: int | None = None,
    placement: Placement | None = None,
) -> dict[str, Decision]:
    """Decides every optimization before anything is loaded; a setting left out is auto.

    `model_bytes` and `largest_bytes` are the sizes of the whole model and of its largest component in the dtypes they
    will be loaded in, `free_bytes` is what the device has free, `host_limit` what this process may use of the host. A
    `placement` decides about offload in the place of what holds for all pipelines.

    Raises StartupError for unknown names and values, for two kinds of offload at once, and when neither the device
    nor the host can hold the model.
    """
    for name, setting in settings.items():
        if name not in OPTIMIZATIONS:
            raise StartupError(f"no optimization is named {shown(name)}; there are {', '.join(OPTIMIZATIONS)}")
        if setting not in ("auto", "true", "false"):
            raise StartupError(f"ENABLE_{name.upper()} is {shown(setting)}; it takes auto, true, false")
    if settings.get("cpu_offload") == settings.get("sequential_cpu_offload") == "true":
        raise StartupError("ENABLE_CPU_OFFLOAD and ENABLE_SEQUENTIAL_CPU_OFFLOAD are both true; set one of them")
    situation = Situation(settings, device, model_bytes, largest_bytes or model_bytes, free_bytes, host_limit)
    decisions = {}
    for name, optimization in OPTIMIZATIONS.items():
        setting = settings.get(name, "auto")
        if setting == "auto":
            if placement is not None and name in OFFLOADS:
                chosen = _placed(placement, name)
            else:
                chosen = optimization.decide(situation)
            decisions[name] = Decision(chosen.on, f"auto, {chosen.why}")
        else:
            decisions[name] = Decision(setting == "true", f"set to {setting}")
    return decisions


def moves_whole(device: Device, decisions: Mapping[str, Decision]) -> bool:
    """True when no offload was decided, so that a loader may put each component on the device as it comes."""
    return device.type != "cuda" or not any(decisions[name].on for name in OFFLOADS)


def _placed(placement: Placement, name: str) -> Decision:
    if name == "cpu_offload" or not placement.offload.on:
        return placement.offload
    return Decision(False, "this family's models take turns instead")


def apply(
    pipeline: Any,
    device: Device,
    decisions: Mapping[str, Decision],
    place: Callable[[Any, torch.device], None] | None = None,
) -> dict[str, str]:
    """Applies `decisions` and puts the pipeline on its device: whole, unless an offload moves it in parts. A family's
    own `place` does either.

    Returns, for the model's metadata, each name with "on: why", "off: why" or "not_applicable: why", and logs them.
    Raises StartupError when one that applies fails, or when the device cannot hold the model.
    """
    report = {}
    whole = True
    for name, decision in decisions.items():
        obstacle = OPTIMIZATIONS[name].obstacle(pipeline, device) if decision.on else None
        if not decision.on:
            report[name] = f"off: {decision.why}"
        elif obstacle:
            report[name] = f"not_applicable: {obstacle}"
        else:
            if place is None or name not in OFFLOADS:
                _attempt(f"ENABLE_{name.upper()}", OPTIMIZATIONS[name].apply, pipeline, device)
            report[name] = f"on: {decision.why}"
            whole = whole and name not in OFFLOADS
        logger.log(logging.WARNING if obstacle else logging.INFO, "%s %s", name, report[name])
    moved = f"moving the model to {device.name}"
    if place is not None:
        _attempt(moved, lambda p, d: place(p, d.torch), pipeline, device)
    elif whole:
        _attempt(moved, lambda p, d: p.to(d.torch), pipeline, device)
    return report


def _attempt(what: str, step: Callable[[Any, Device], None], pipeline: Any, device: Device) -> None:
    try:
        step(pipeline, device)
    except Exception as exc:
        lines = str(exc).splitlines() or [type(exc).__name__]
        raise StartupError(f"{what} failed: {lines[0]}") from exc


def _always(on: bool, why: str) -> Callable[[Situation], Decision]:
    return lambda situation: Decision(on, why)


# --- parts of a pipeline that can do something ---


def _able(pipeline: Any, method: str) -> list[Any]:
    return [component for component in pipeline.components.values() if hasattr(component, method)]


def _no_component_has(method: str) -> Callable[[Any, Device], str | None]:
    def obstacle(pipeline: Any, device: Device) -> str | None:
        # diffusers itself passes over such a pipeline in silence.
        return None if _able(pipeline, method) else f"no component of {type(pipeline).__name__} has {method}"

    return obstacle


def _vae_lacks(attribute: str, method: str) -> Callable[[Any, Device], str | None]:
    def obstacle(pipeline: Any, device: Device) -> str | None:
        # Autoencoders inherit the method; without the attribute it raises NotImplementedError.
        if any(hasattr(component, attribute) for component in _able(pipeline, method)):
            return None
        return f"no component of {type(pipeline).__name__} has {attribute}"

    return obstacle


def _on_vae(attribute: str, method: str) -> Callable[[Any, Device], None]:
    def enable(pipeline: Any, device: Device) -> None:
        for component in _able(pipeline, method):
            if hasattr(component, attribute):
                getattr(component, method)()

    return enable


# --- offload ---


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _needs_offload(s: Situation) -> Decision:
    """Whether the model must be offloaded in some way. Raises StartupError when that cannot help either."""
    if s.device.type != "cuda" or s.free_bytes is None:
        return Decision(False, f"{s.device.type} has no memory apart from the host's")
    need = f"{gib(s.model_bytes)} of weights and a working set of {gib(WORKING_SET_BYTES)}"
    if s.model_bytes * WEIGHTS_MARGIN + WORKING_SET_BYTES <= s.free_bytes:
        return Decision(False, f"{need} fit in {gib(s.free_bytes)} free")
    if s.model_bytes <= s.host_limit:
        return Decision(True, f"{need} do not fit in {gib(s.free_bytes)} free")
    host = f"the host's limit of {gib(s.host_limit)} cannot hold the weights"
    if s.model_bytes > s.free_bytes:
        raise StartupError(f"{need} do not fit in {gib(s.free_bytes)} free on {s.device.name}, and {host}")
    return Decision(False, f"{need} are tight in {gib(s.free_bytes)} free, but {host}")


def _too_large_alone(s: Situation) -> bool:
    return s.free_bytes is not None and s.largest_bytes * WEIGHTS_MARGIN + WORKING_SET_BYTES > s.free_bytes


def _decide_cpu_offload(s: Situation) -> Decision:
    sequential = s.settings.get("sequential_cpu_offload", "auto")
    if sequential == "true":
        return Decision(False, "sequential_cpu_offload is on")
    needed = _needs_offload(s)
    if needed.on and _too_large_alone(s) and sequential == "auto":
        return Decision(False, f"the largest component of {gib(s.largest_bytes)} does not fit on its own either")
    return needed


def _decide_sequential(s: Situation) -> Decision:
    if s.settings.get("cpu_offload", "auto") == "true":
        return Decision(False, "cpu_offload is on")
    needed = _needs_offload(s)
    if not needed.on:
        return needed
    if _too_large_alone(s):
        return Decision(True, f"{needed.why}, nor does the largest component of {gib(s.largest_bytes)}")
    return Decision(False, "each component fits on its own, so cpu_offload is enough")


def _offload_obstacle(pipeline: Any, device: Device) -> str | None:
    return None if device.type == "cuda" else f"{device.type} has no memory apart from the host's"


def _model_offload_obstacle(pipeline: Any, device: Device) -> str | None:
    if pipeline.model_cpu_offload_seq is None:
        return f"{type(pipeline).__name__} does not say in which order its components run"
    return _offload_obstacle(pipeline, device)


def _current_gpu() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


OPTIMIZATIONS: dict[str, Optimization] = {
    # Decided for from_pretrained; there is nothing left to do when the model is loaded.
    "low_cpu_mem": Optimization(
        _always(True, "weights are mapped or streamed, never held twice"),
        lambda pipeline, device: None,
        lambda pipeline, device: None,
    ),
    "attention_slicing": Optimization(
        _always(False, "it makes PyTorch's own attention slower, which saves the memory already"),
        _no_component_has("set_attention_slice"),
        lambda pipeline, device: pipeline.enable_attention_slicing(),
    ),
    "vae_slicing": Optimization(
        _always(False, "it changes nothing for one picture"),
        _vae_lacks("use_slicing", "enable_slicing"),
        _on_vae("use_slicing", "enable_slicing"),
    ),
    "vae_tiling": Optimization(
        _always(False, "it changes the picture"),
        _vae_lacks("use_tiling", "enable_tiling"),
        _on_vae("use_tiling", "enable_tiling"),
    ),
    "cpu_offload": Optimization(
        _decide_cpu_offload,
        _model_offload_obstacle,
        lambda pipeline, device: pipeline.enable_model_cpu_offload(gpu_id=_current_gpu(), device=device.type),
    ),
    "sequential_cpu_offload": Optimization(
        _decide_sequential,
        _offload_obstacle,
        lambda pipeline, device: pipeline.enable_sequential_cpu_offload(gpu_id=_current_gpu(), device=device.type),
    ),
}
OFFLOADS = ("cpu_offload", "sequential_cpu_offload")

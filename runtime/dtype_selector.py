"""In which precision each component of a pipeline is loaded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runtime.checkpoint import Tensor, read_tensors
from runtime.device_manager import Device
from runtime.errors import StartupError, shown

logger = logging.getLogger("diffusion_runtime.dtype")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What safetensors calls them.
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Decoded in float32 by the stock examples, whatever the rest runs in.
FLOAT32_CLASSES = frozenset({"AutoencoderKLWan"})


@dataclass(frozen=True)
class DtypePlan:
    """`default` for every component but those named in `components`. `reason` is for people."""

    default: torch.dtype
    components: Mapping[str, torch.dtype] = field(default_factory=dict)
    reason: str = ""

    def of(self, component: str) -> torch.dtype:
        return self.components.get(component, self.default)

    def as_torch_dtype(self) -> torch.dtype | dict[str, torch.dtype]:
        """What `from_pretrained(dtype=...)` of a diffusers pipeline takes."""
        return {"default": self.default, **self.components} if self.components else self.default


def select_dtypes(setting: str, device: Device, folder: Path, components: Mapping[str, str]) -> DtypePlan:
    """Chooses dtypes for `components` (name to class name) on `device`, and logs why.

    `auto` is bfloat16 on CUDA that has it, float16 on older CUDA, float32 elsewhere. `native` is what the checkpoint
    in `folder` stores most of, component by component; what is stored otherwise (fp8) or not supported by the device
    falls back, with a warning. A class in FLOAT32_CLASSES stays in float32 unless the setting is `native`.

    Raises StartupError for an unknown setting, for bfloat16 on a device without it and for unreadable weights.
    """
    if setting == "native":
        plan = _native(device, folder, components)
    elif setting == "auto":
        plan = uniform(*_auto(device), components)
    elif setting not in DTYPES:
        raise StartupError(f"DTYPE is {shown(setting)}; it takes auto, native, {', '.join(DTYPES)}")
    elif DTYPES[setting] not in _supported(device):
        raise StartupError(f"DTYPE={setting}, but {device.name} does not support it; use auto, float16 or float32")
    else:
        plan = uniform(DTYPES[setting], "asked for", components)
    logger.info("dtype %s", plan.reason)
    return plan


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _auto(device: Device) -> tuple[torch.dtype, str]:
    if device.type != "cuda":
        return torch.float32, f"the choice on {device.type}"
    if device.supports_bfloat16:
        return torch.bfloat16, f"{device.name} supports it"
    return torch.float16, f"{device.name} has no bfloat16"


def _supported(device: Device) -> set[torch.dtype]:
    # float16 runs on CPUs too, slowly: SD 1.5, SD3, Flux and Wan did with torch 2.13.
    return set(DTYPES.values()) - (set() if device.supports_bfloat16 else {torch.bfloat16})


def uniform(dtype: torch.dtype, why: str, components: Mapping[str, str]) -> DtypePlan:
    """`dtype` for all of `components` (name to class name) but those of FLOAT32_CLASSES. `why` is for people."""
    kept = {
        name: torch.float32
        for name, class_name in components.items()
        if class_name in FLOAT32_CLASSES and dtype != torch.float32
    }
    reason = f"{dtype_name(dtype)}: {why}"
    if kept:
        reason += f"; float32 for {', '.join(kept)}, as in the stock examples"
    return DtypePlan(dtype, kept, reason)


def _native(device: Device, folder: Path, components: Mapping[str, str]) -> DtypePlan:
    stored = read_tensors(folder, components)
    default = _native_dtype("the checkpoint", (t for tensors in stored.values() for t in tensors), device)
    chosen = {name: _native_dtype(name, tensors, device) for name, tensors in stored.items()}
    different = {name: dtype for name, dtype in chosen.items() if dtype != default}
    reason = f"{dtype_name(default)}: most of the checkpoint's bytes"
    if different:
        reason += "; " + ", ".join(f"{name} {dtype_name(dtype)}" for name, dtype in different.items())
    return DtypePlan(default, different, reason)


def _native_dtype(name: str, tensors: Iterable[Tensor], device: Device) -> torch.dtype:
    stored: Counter[str] = Counter()
    for tensor in tensors:
        if "F" in tensor.dtype:  # integers and booleans are not cast
            stored[tensor.dtype] += tensor.bytes
    if not stored:
        return _auto(device)[0]
    dominant = stored.most_common(1)[0][0]
    dtype = STORED.get(dominant)
    if dtype is not None and dtype in _supported(device):
        return dtype
    fallback = _auto(device)[0] if dtype is None else torch.float16
    why = "is no dtype to load into" if dtype is None else f"is not supported by {device.name}"
    logger.warning("%s is stored in %s, which %s: loading it in %s", name, dominant, why, dtype_name(fallback))
    return fallback

"""Which device the model runs on, and what that device can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from runtime.cgroup import cpu_count, host_memory_limit
from runtime.errors import StartupError, shown

__all__ = ["Device", "cpu_count", "detect_device", "free_memory", "host_memory_limit"]


@dataclass(frozen=True)
class Device:
    """A device as the rest of the engine sees it. `total_memory` is in bytes, None where nobody can tell."""

    type: Literal["cuda", "mps", "cpu"]
    name: str
    total_memory: int | None
    supports_bfloat16: bool

    @property
    def torch(self) -> torch.device:
        """Without an index: of several GPUs the current one, which a rank sets once for all its work."""
        return torch.device(self.type)


def detect_device(setting: str = "auto") -> Device:
    """The device that `setting` names; `auto` takes the first there is of cuda, mps and cpu.

    Raises StartupError for an unknown name and for a device that is not there.
    """
    detectors = {"cuda": _cuda, "mps": _mps, "cpu": _cpu}
    if setting == "auto":
        return _cuda() or _mps() or _cpu()
    if setting not in detectors:
        raise StartupError(f"DEVICE is {shown(setting)}; it takes auto, {', '.join(detectors)}")
    device = detectors[setting]()
    if device is None:
        raise StartupError(f"DEVICE={setting}, but torch {torch.__version__} finds no {setting} device here")
    return device


def free_memory(device: Device | torch.device) -> int | None:
    """Bytes free on a CUDA device, other processes' use taken off, within what this process's allocator may take; None
    for devices that share the host's memory."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    limit = int(total * torch.cuda.get_per_process_memory_fraction())
    return max(0, min(free, limit - torch.cuda.memory_reserved()))


def _cuda() -> Device | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties()
    capability = (properties.major, properties.minor)
    # torch counts emulation as support; below sm80 it is slower than float16 and misses operators.
    bfloat16 = capability >= (8, 0) and torch.cuda.is_bf16_supported()
    return Device("cuda", properties.name, properties.total_memory, bfloat16)


def _mps() -> Device | None:
    if not torch.backends.mps.is_available():
        return None
    bfloat16 = torch.backends.mps.is_macos_or_newer(14, 0)
    return Device("mps", "Apple GPU", torch.mps.recommended_max_memory(), bfloat16)


def _cpu() -> Device:
    return Device("cpu", "CPU", host_memory_limit(), True)

"""Which module does the arithmetic of GLM-Image's models: `kernels`, `reference`, or none: then the stock modules."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from runtime.families.glm_image import reference
from runtime.logs import log


def hook(module: Any) -> Any:
    return getattr(module, "_hf_hook", None)


def ops_of(model: Any, fast: bool | None) -> Any:
    """The module that does a model's arithmetic the fast way; None where the stock model does it."""
    modules = list(model.modules())
    # Offload moves weights between forwards; adapters and quantization put other layers in the place of linear ones.
    plain = not any(map(hook, modules)) and len({weight.dtype for weight in model.parameters()}) == 1
    plain &= all(type(module) is torch.nn.Linear for module in modules if isinstance(module, torch.nn.Linear))
    if fast is False or not plain:
        return None
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        return reference if fast else None
    return compiled()


def batching_ops(encoder: Any) -> Any:
    """What takes several requests' tokens at once: on a CPU `reference`."""
    return ops_of(encoder, True if encoder.device.type == "cpu" else None)


@cache
def compiled() -> Any:
    """None where they cannot be compiled."""
    try:
        import triton

        from runtime.families.glm_image import kernels

        _ = triton.runtime.driver.active.utils  # compiles a stub in C, as each kernel's launcher will
    except Exception as error:  # no Triton, no compiler, no headers: slower, and no reason not to serve
        log(
            logging.WARNING, "GLM-Image runs by stock: its kernels cannot be compiled", reason=str(error).split("\n")[0]
        )
        return None
    return kernels


def name_of(ops: Any) -> str:
    return ops.__name__.rpartition(".")[2] if ops else "stock"

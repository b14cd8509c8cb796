"""Models of diffusers and transformers, put together from tensors that are on the device already."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import accelerate
import diffusers as diffusers_library
import torch
import transformers as transformers_library

from runtime.errors import StartupError

# Both libraries show a type checker untyped placeholders.
diffusers: Any = diffusers_library
transformers: Any = transformers_library


class CannotStreamError(Exception):
    """This pipeline has to be loaded from files; the message says why."""


def model_class(library: str, class_name: str) -> Any:
    """The class of a component that has weights. Raises CannotStreamError where it is none of the two libraries'."""
    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if home is None:
        home = import_module(f"diffusers.pipelines.{library}")
    cls = getattr(home, class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin | transformers.PreTrainedModel):
        raise CannotStreamError(f"{class_name} is no model class of diffusers or transformers")
    return cls


def keeps_own_format(cls: Any) -> Callable[[str], bool]:
    """Whether from_pretrained may keep a tensor of this name in float32: such a one is cast by it alone."""
    names = [
        *(getattr(cls, "_keep_in_fp32_modules", None) or ()),
        *(getattr(cls, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    return lambda name: pattern.search(name) is not None


def plan(cls: Any, home: Path, dtype: torch.dtype, name: str) -> Any:
    """A diffusers model on the meta device; None for transformers, which builds its own. Raises CannotStreamError."""
    config_file = home / "config.json"
    if not config_file.is_file():
        raise CannotStreamError(f"{name} has no config.json")
    if not issubclass(cls, diffusers.ModelMixin):
        if getattr(cls.config_class.from_pretrained(home), "quantization_config", None) is not None:
            raise CannotStreamError(f"{name} is quantized")
        return None
    config = cls.load_config(home)
    if config.get("quantization_config") is not None:
        raise CannotStreamError(f"{name} is quantized")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does: buffers are made in it
    try:
        with accelerate.init_empty_weights():
            return cls.from_config(config)
    finally:
        torch.set_default_dtype(before)


def check_names(component: str, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CannotStreamError where the checkpoint's names or shapes are not the model's; transformers checks its
    own."""
    if model is None:
        return
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(shapes)):
        raise CannotStreamError(f"{component}: the checkpoint lacks {missing[0]} under this name")
    for name, value in wanted.items():
        if tuple(value.shape) != shapes[name]:
            raise CannotStreamError(f"{component}: {name} has shape {shapes[name]}, not {tuple(value.shape)}")


def assemble(
    cls: Any,
    model: Any,
    state: dict[str, torch.Tensor],
    home: Path,
    dtype: torch.dtype,
    device: torch.device,
    component: str,
) -> torch.nn.Module:
    """The model with `state` as its weights, on `device`; `model` is what `plan` gave. Raises StartupError."""
    if model is None:
        return _assemble_transformers(cls, state, home, dtype, device, component)
    kept = cls._keep_in_fp32_modules or []
    for name in set(state) - set(model.state_dict()):
        del state[name]
    for name, value in state.items():
        if value.is_floating_point():
            keep = any(part in name.split(".") for part in kept)
            state[name] = value.to(torch.float32 if keep else dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.register_to_config(_name_or_path=str(home))
    made: torch.nn.Module = model.to(device).eval()
    return made


def _assemble_transformers(
    cls: Any, state: dict[str, torch.Tensor], home: Path, dtype: torch.dtype, device: torch.device, component: str
) -> torch.nn.Module:
    arguments: dict[str, Any] = {}
    config = cls.config_class.from_pretrained(home)
    if cls.can_generate() and (home / "generation_config.json").is_file():
        arguments["generation_config"] = transformers.GenerationConfig.from_pretrained(home)
    return load_whole(
        cls, component, None, config=config, state_dict=state, dtype=dtype, device_map={"": device}, **arguments
    )


def load_whole(cls: Any, component: str, *arguments: Any, **named: Any) -> torch.nn.Module:
    """transformers' from_pretrained, which would fill what the checkpoint lacks with random numbers.

    Raises StartupError that names the tensor.
    """
    try:
        model, told = cls.from_pretrained(*arguments, **named, output_loading_info=True, ignore_mismatched_sizes=True)
    except (RuntimeError, OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StartupError(f"{component}: {cls.__name__} cannot be loaded: {reason}") from error
    for kind, words in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape of")):
        if told[kind]:
            name = min(str(key[0] if isinstance(key, tuple) else key) for key in told[kind])
            raise StartupError(f"{component}: the checkpoint {words} {name}; {cls.__name__} needs it")
    made: torch.nn.Module = model
    return made

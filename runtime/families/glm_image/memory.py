"""Where GLM-Image's weights lie and which numbers they are: chosen from what a card has free, before they are loaded.

Of what fits the least lossy is taken: all on the device; the token model and the DiT in turns; with TOKEN_WEIGHTS or
DENOISER_WEIGHTS=auto the same again with 8-bit weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint import read_header, read_json, weight_files
from runtime.device_manager import Device
from runtime.families.glm_image.ops import compiled
from runtime.families.glm_image.stages import Stages, attach
from runtime.families.glm_image.weights import DENOISER_LINEARS, TOKEN_LINEARS, eight_bits
from runtime.logs import log
from runtime.optimization_manager import GIB, Decision, Placement, gib
from runtime.types import Acceleration

LEAST = {"int8": (8, 0), "float8": (8, 9)}  # compute capability
TOKEN_MODEL, DENOISER = "vision_language_encoder", "transformer"
ROW_BYTES = 2 * 4096 * 40 * 2 * 2 * 128 * 2  # a batch's row: keys and values of 4096 positions, and the prompt's own
PROMPT_BYTES = 1 * GIB  # beside the token model, while it reads a prompt
FORWARD_BYTES = 7 * GIB // 2  # beside the DiT at 1024 x 1024: a forward's, and a source's keys and values
VAE_BYTES = 5000  # a pixel: the VAE's largest layers, at the size of the picture
PICTURE_BYTES = VAE_BYTES * 1024 * 1024
CONVERSION_BYTES = 2 * GIB  # the largest layer, on its way to 8 bits


@dataclass(frozen=True)
class Sizes:
    """Bytes of the models in the dtype that they are loaded in, and of their layers that can be in 8 bits."""

    tokens: int
    token_linears: int
    denoiser: int
    denoiser_linears: int
    rest: int

    @property
    def all(self) -> int:
        return self.tokens + self.denoiser + self.rest

    def kept(self, token_weights: str, denoiser_weights: str) -> Sizes:
        """As they are kept in these numbers."""
        tokens = self.tokens - (self.token_linears // 2 if token_weights != "plain" else 0)
        denoiser = self.denoiser - (self.denoiser_linears // 2 if denoiser_weights != "plain" else 0)
        return replace(self, tokens=tokens, denoiser=denoiser)


def choose(
    sizes: Sizes,
    asked: Acceleration,
    offload: str,
    free: int,
    host_limit: int,
    capability: tuple[int, int],
) -> Placement | None:
    """The first that fits; None where nothing does. `offload` is ENABLE_CPU_OFFLOAD. `capability` is (0, 0) where no
    number may become an 8-bit one."""
    rows = asked.rows * ROW_BYTES
    for token_weights, denoiser_weights in _numbers(asked, capability):
        kept = sizes.kept(token_weights, denoiser_weights)
        lossy = f" ({gib(kept.all)} with 8-bit ones)" if kept != sizes else ""
        need = f"{gib(sizes.all)} of weights{lossy} and a working set of {gib(rows + PICTURE_BYTES)}"
        whole = kept.all + rows + PICTURE_BYTES
        stages = (kept.tokens + PROMPT_BYTES, kept.denoiser + FORWARD_BYTES, PICTURE_BYTES)
        chosen = replace(asked, token_weights=token_weights, denoiser_weights=denoiser_weights)
        if offload != "true" and whole <= free:
            directly = sizes.all + (CONVERSION_BYTES if lossy else 0) <= free
            return Placement(Decision(False, f"{need} fit in {gib(free)} free"), chosen, directly)
        held = kept.tokens + kept.denoiser <= host_limit or offload == "true"
        if offload != "false" and held and kept.rest + rows + max(stages) <= free:
            why = f"{need} do not fit in {gib(free)} free; the token model and the DiT take turns on the device"
            return Placement(Decision(True, why), chosen, False)
    return None


def _numbers(asked: Acceleration, capability: tuple[int, int]) -> list[tuple[str, str]]:
    """Of both models, what is lossless first."""

    def of(setting: str, lossy: str) -> tuple[str, ...]:
        if setting != "auto":
            return (setting,)
        return ("plain", lossy) if capability >= LEAST[lossy] else ("plain",)

    return [(t, d) for d in of(asked.denoiser_weights, "float8") for t in of(asked.token_weights, "int8")]


def plan_memory(
    folder: Path,
    sizes: Mapping[str, int],
    dtypes: Any,
    device: Device,
    asked: Acceleration,
    optimizations: Mapping[str, str],
    free: int | None,
    host_limit: int,
) -> Placement | None:
    """What `choose` says of a model folder, told in the log where it is lossy and nobody asked for it; None where it
    has no say."""
    if device.type != "cuda" or free is None or optimizations.get("sequential_cpu_offload") == "true":
        return None
    if any("quantization_config" in read_json(folder / name / "config.json") for name in (TOKEN_MODEL, DENOISER)):
        return None
    halves = all(dtypes.of(name) == torch.bfloat16 for name in (TOKEN_MODEL, DENOISER)) and compiled() is not None
    found = choose(
        sizes_of(folder, sizes, dtypes),
        asked,
        optimizations.get("cpu_offload", "auto"),
        free,
        host_limit,
        torch.cuda.get_device_capability() if halves else (0, 0),
    )
    for name in ("token_weights", "denoiser_weights"):
        if found is not None and getattr(asked, name) == "auto" and getattr(found.acceleration, name) != "plain":
            kind = getattr(found.acceleration, name)
            log(logging.WARNING, f"{name.upper()}={kind}: 8 bits change the picture", reason=found.offload.why)
    return found


def sizes_of(folder: Path, sizes: Mapping[str, int], dtypes: Any) -> Sizes:
    """From the headers of a model folder; `sizes` are its components' as they are loaded."""

    def linears(component: str, names: Any) -> int:
        tensors = [item for file in weight_files(folder, component) for item in read_header(file).items()]
        elements = sum(t.elements for name, t in tensors if names.search(name.removesuffix(".weight")))
        return int(elements * dtypes.of(component).itemsize)

    tokens, denoiser = sizes.get(TOKEN_MODEL, 0), sizes.get(DENOISER, 0)
    return Sizes(
        tokens,
        linears(TOKEN_MODEL, TOKEN_LINEARS),
        denoiser,
        linears(DENOISER, DENOISER_LINEARS),
        sum(sizes.values()) - tokens - denoiser,
    )


def place_weights(pipeline: Any, device: torch.device, chosen: Placement) -> None:
    """Puts a loaded pipeline's weights where they were chosen to be."""
    encoder, transformer = pipeline.vision_language_encoder, pipeline.transformer
    in_turns = chosen.offload.on
    kept = torch.device("cpu") if in_turns else device
    for model, names, kind in (
        (encoder, TOKEN_LINEARS, chosen.acceleration.token_weights),
        (transformer, DENOISER_LINEARS, chosen.acceleration.denoiser_weights),
    ):
        if kind != "plain":
            eight_bits(model, names, kind, device, kept)
    if in_turns:
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module) and part not in (encoder, transformer):
                part.to(device)
        attach(pipeline, Stages({"tokens": encoder, "denoise": transformer}, device), VAE_BYTES)
    else:
        pipeline.to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the originals' memory

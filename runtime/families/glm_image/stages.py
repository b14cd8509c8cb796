"""Models that take turns on the device: each one's weights lie in one storage there, which is given back while another
runs. Views of it stay as they are, at addresses of their own each time it is back."""

from __future__ import annotations

import bisect
import queue
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from runtime.device_manager import free_memory
from runtime.engine.context import Context
from runtime.families.glm_image.weights import attentions

ALIGNMENT = 256
CHUNK = 64 * 2**20  # bytes of one staging buffer
BUFFERS = 4  # and threads: what fills them reads mapped files


@dataclass(frozen=True)
class Place:
    """A tensor's bytes on the host, and where they go in the device's storage."""

    host: torch.Tensor
    begin: int

    @property
    def end(self) -> int:
        return self.begin + len(self.host)


@dataclass(frozen=True)
class Laid:
    """A model's storage on the device, in order of place."""

    storage: torch.Tensor
    size: int
    places: tuple[Place, ...]


class Stages:
    """The models' host tensors stay what they are, mapped from files at best. At most one model is on the device;
    `seconds` counts what bringing them there took."""

    def __init__(self, models: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        self._device, self._on, self.seconds = device, "", 0.0
        self._laid = {}
        for name, model in models.items():
            self._laid[name] = _lay(model, device)
            _give_back(self._laid[name])
        self._staging = _Staging(device) if device.type == "cuda" else None

    def take(self, name: str) -> None:
        """Have this model on the device, and no other."""
        if self._on == name:
            return
        begun = time.perf_counter()
        self.release()
        laid = self._laid[name]
        laid.storage.untyped_storage().resize_(laid.size)
        if self._staging is None:
            for place in laid.places:
                laid.storage[place.begin : place.end].copy_(place.host)
        else:
            self._staging.copy(laid)
        self._on = name
        self.seconds += time.perf_counter() - begun

    def release(self) -> None:
        self._on = ""
        for laid in self._laid.values():
            _give_back(laid)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # else what comes next would settle in a piece of it, and keep it apart

    def make_room(self, needed: int) -> None:
        """Give back what is on the device unless `needed` bytes are there without that."""
        free = free_memory(self._device)
        if self._on and free is not None:
            cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            if free + cached < needed:
                self.release()


def stages_of(pipeline: Any) -> Stages | None:
    return getattr(pipeline, "_stages", None)


def take(pipeline: Any, name: str) -> None:
    """Has a model of this pipeline on the device, where models take turns."""
    if (stages := stages_of(pipeline)) is not None:
        stages.take(name)


def attach(pipeline: Any, stages: Stages, vae_bytes: int) -> None:
    """The DiT comes when it runs; the VAE gets the room it needs, `vae_bytes` a pixel. The token model is asked for
    with `take`: it has more ways in than `forward`."""
    pipeline._stages = stages
    pipeline.transformer.register_forward_pre_hook(lambda *_: stages.take("denoise"))
    for part, scale in ((pipeline.vae.encoder, 1), (pipeline.vae.decoder, pipeline.vae_scale_factor)):

        def make_room(_: Any, given: Any, scale: int = scale) -> None:
            height, width = given[0].shape[-2:]
            stages.make_room(height * width * scale**2 * vae_bytes)

        part.register_forward_pre_hook(make_room)


def _lay(model: torch.nn.Module, device: torch.device) -> Laid:
    """Points the model's tensors into one storage, those that `fused` joins one behind the other."""
    joined = {}
    for layers in attentions(model):
        for parts in zip(*([*layer.parameters(), *layer.buffers()] for layer in layers), strict=True):
            joined.update({id(part): parts for part in parts})
    tensors, places, end = [], [], 0
    seen: set[int] = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        end = -(-end // ALIGNMENT) * ALIGNMENT
        for part in joined.get(id(tensor), (tensor,)):
            if id(part) not in seen:
                seen.add(id(part))
                tensors.append(part)
                places.append(Place(part.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8), end))
                end = places[-1].end
    storage = torch.empty(end, dtype=torch.uint8, device=device)
    for tensor, place in zip(tensors, places, strict=True):
        tensor.data = storage[place.begin : place.end].view(tensor.dtype).view(tensor.shape)
    return Laid(storage, end, tuple(places))


def _give_back(laid: Laid) -> None:
    laid.storage.untyped_storage().resize_(0)


class _Staging:
    """A ring of pinned buffers: the driver's own copies from pageable memory reach a third of what the bus does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(BUFFERS, "weights")
        self._ring: queue.SimpleQueue[tuple[torch.Tensor, Any]] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ring.put((torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True), event))

    def copy(self, laid: Laid) -> None:
        for _ in self._threads.map(lambda begin: self._chunk(laid, begin), range(0, laid.size, CHUNK)):
            pass
        torch.cuda.current_stream(self._device).synchronize()

    def _chunk(self, laid: Laid, begin: int) -> None:
        Context.activity += 1  # files that are no longer in the page cache take their time
        end = min(begin + CHUNK, laid.size)
        staging, copied = self._ring.get()
        try:
            copied.synchronize()
            for place in laid.places[bisect.bisect_right(laid.places, begin, key=lambda place: place.end) :]:
                if place.begin >= end:
                    break
                low, high = max(begin, place.begin), min(end, place.end)
                staging[low - begin : high - begin].copy_(place.host[low - place.begin : high - place.begin])
            with torch.cuda.device(laid.storage.device):  # on the default stream, as all that the engine does
                laid.storage[begin:end].copy_(staging[: end - begin], non_blocking=True)
                copied.record()
        finally:
            self._ring.put((staging, copied))

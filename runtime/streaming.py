"""Weights straight from a source into device memory: no file of them on a disk, no whole model in host memory.

Bytes go through a ring of a few buffers, pinned where the device is CUDA, and from there to the tensor that they are
of, on the device, in the checkpoint's format; a complete tensor is cast there if it has to be. Models are put together
of those tensors. Where a cache is asked for, the same buffers are written to it in the same pass.

Host memory is DOWNLOAD_THREADS x 16 MiB, whatever the model's size, where the device has memory of its own. Device
memory is the model, and the tensors that arrive in another format than they are kept in. Every range is read with the
version that was listed; a published model's chunks are checked against their sha256.
"""

from __future__ import annotations

import bisect
import json
import logging
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from runtime.assembly import CannotStreamError, assemble, check_names, keeps_own_format, model_class, plan
from runtime.checkpoint import weight_files
from runtime.logs import log
from runtime.storage.cache_writer import CacheWriter, Resumed
from runtime.storage.fetch import Meter, OnProgress, Span, fetch, spans_of
from runtime.storage.folder import Folder
from runtime.storage.skeleton import is_weights
from runtime.storage.source import CHUNK, Source

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(eq=False)
class _Tensor:
    """A tensor of the checkpoint: where its bytes lie in the file, and what has become of them."""

    name: str
    begin: int
    end: int
    stored: torch.dtype
    shape: tuple[int, ...]
    wanted: torch.dtype
    device: torch.device
    missing: int = 0
    raw: torch.Tensor | None = None
    value: torch.Tensor | None = None

    def put(self, start: int, data: torch.Tensor, lock: threading.Lock) -> None:
        """Bytes of the file from `start` on, of which some are this tensor's; `data` is uint8 on the host."""
        low, high = max(start, self.begin), min(start + len(data), self.end)
        with lock:
            if self.raw is None:
                self.raw = torch.empty(self.end - self.begin, dtype=torch.uint8, device=self.device)
            raw = self.raw
        raw[low - self.begin : high - self.begin].copy_(data[low - start : high - start], non_blocking=True)
        with lock:
            self.missing -= high - low
            if not self.missing:
                self.finish()

    def finish(self) -> None:
        raw = torch.empty(0, dtype=torch.uint8, device=self.device) if self.raw is None else self.raw
        self.value = raw.view(self.stored).view(self.shape).to(self.wanted)
        self.raw = None


class Stream:
    """The components of one remote model, as they come. `folder` is its skeleton. `writer`, where there is one, fills
    the cache with the same bytes."""

    def __init__(
        self, source: Source, folder: Path, threads: int, on_progress: OnProgress, writer: CacheWriter | None
    ) -> None:
        self._source, self._folder, self._on_progress, self._writer = source, folder, on_progress, writer
        self._files = {file.path: file for file in source.files()}
        self._threads = threads
        self._buffers: list[torch.Tensor] = []

    @property
    def uri(self) -> str:
        return self._source.uri

    @property
    def local(self) -> bool:
        """Whether the weights could be mapped from files instead."""
        return isinstance(self._source, Folder)

    def components(
        self, classes: Mapping[str, list[Any]], device: torch.device, dtype_of: Callable[[str], torch.dtype]
    ) -> dict[str, torch.nn.Module]:
        """The pipeline's models on `device`, in the dtypes that from_pretrained would give their weights.

        `classes` maps a component to library and class. Raises CannotStreamError, before anything big was read
        where that can be known, and StartupError.
        """
        plans = {}
        for name, (library, class_name) in classes.items():
            if files := weight_files(self._folder, name):
                plans[name] = (model_class(library, class_name), files)
        empty = {name: plan(cls, self._folder / name, dtype_of(name), name) for name, (cls, _) in plans.items()}
        tensors = {}
        for name, (cls, files) in plans.items():
            tensors[name] = {file: _tensors(cls, file, device, dtype_of(name)) for file in files}
            shapes = {tensor.name: tensor.shape for listed in tensors[name].values() for tensor in listed}
            check_names(name, empty[name], shapes)
        log(logging.DEBUG, "models planned")
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned) for _ in range(self._threads)]
        log(logging.DEBUG, "buffers made")
        made = {}
        with self._meter() as meter:  # its clock starts here: the device's own start is not the store's time
            # While it takes over a model's tensors, transformers allocates their size once more: with the device empty.
            sizes = {
                name: sum(tensor.end - tensor.begin for t in tensors[name].values() for tensor in t) for name in plans
            }
            for name in sorted(plans, key=lambda name: (empty[name] is not None, -sizes[name])):
                cls = plans[name][0]
                state = self._fill(tensors.pop(name), device, meter)
                log(logging.DEBUG, f"component {name} read")
                made[name] = assemble(cls, empty.pop(name), state, self._folder / name, dtype_of(name), device, name)
                log(logging.DEBUG, f"component {name} built")
            if self._writer is not None:  # what is no weight
                rest = [span for span in self._writer.missing() if not is_weights(span.file)]
                fetch(self._source, rest, _views(self._buffers), self._writer.write, on_retry=meter.retry)
                self._writer.finish()
            self._buffers = []
            meter.end()
        for _, files in plans.values():
            for file in files:
                file.unlink()  # nobody shall take the holes for weights
        return made

    def _meter(self) -> Meter:
        total = sum(file.size for file in self._files.values())
        small = sum(file.size for file in self._files.values() if not is_weights(file))
        return Meter(self._source.uri, total, small, self._on_progress, local=self.local)

    def _fill(
        self, tensors: Mapping[Path, list[_Tensor]], device: torch.device, meter: Meter
    ) -> dict[str, torch.Tensor]:
        """Read a component's files into its tensors."""
        by_path = {file.relative_to(self._folder).as_posix(): listed for file, listed in tensors.items()}
        lock, buffers = threading.Lock(), _views(self._buffers)
        writer = self._writer

        def sink(span: Span, view: memoryview) -> None:
            data = torch.frombuffer(view, dtype=torch.uint8)
            for tensor in _touched(by_path[span.file.path], span):
                tensor.put(span.start, data, lock)
            if device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            if writer is not None and not writer.has(span):
                writer.write(span, view)
            if device.type == "cuda":
                event.synchronize()  # the buffer is filled again only then
            meter.add(span.length, span.file.component)

        spans = [span for path in by_path for span in spans_of(self._files[path])]
        source: Source = self._source if writer is None else Resumed(self._source, writer)
        fetch(source, spans, buffers, sink, on_retry=meter.retry)
        filled = {}
        for listed in tensors.values():
            for tensor in listed:
                if tensor.begin == tensor.end:
                    tensor.finish()
                assert tensor.value is not None
                filled[tensor.name] = tensor.value
        return filled


def _tensors(cls: Any, file: Path, device: torch.device, dtype: torch.dtype) -> list[_Tensor]:
    """The file's tensors, from its header. Floats are to be cast to `dtype`, where the class leaves them to us."""
    kept = keeps_own_format(cls)
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        stored = SAFETENSORS_DTYPES.get(entry["dtype"])
        if stored is None:
            raise CannotStreamError(f"{name} is stored as {entry['dtype']}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        wanted = stored if not stored.is_floating_point or kept(name) else dtype
        found.append(_Tensor(name, begin, end, stored, tuple(entry["shape"]), wanted, device, end - begin))
    return sorted(found, key=lambda tensor: (tensor.begin, tensor.end))


def _views(buffers: list[torch.Tensor]) -> list[memoryview]:
    """The tensors' memory, for those who know no torch."""
    return [memoryview(cast(Any, buffer.numpy())) for buffer in buffers]


def _touched(tensors: list[_Tensor], span: Span) -> Iterator[_Tensor]:
    """The tensors, ordered by place, that have bytes in the span."""
    first = bisect.bisect_right(tensors, span.start, key=lambda tensor: tensor.end)
    for tensor in tensors[first:]:
        if tensor.begin >= span.start + span.length:
            return
        if tensor.end > tensor.begin:
            yield tensor

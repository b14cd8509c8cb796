"""Weights straight from a source into device memory: no file of them on a disk, no whole model in host memory.

Bytes go through a ring of a few buffers, pinned where the device is CUDA, and from there to the tensor that they are
of, on the device, in the checkpoint's format; a complete tensor is cast there if it has to be. Models are built on the
meta device and given those tensors. Where a cache is asked for, the same buffers are written to it in the same pass.

Host memory is DOWNLOAD_THREADS x 16 MiB, whatever the model's size. Device memory is the model, and the tensors that
arrive in another format than they are kept in. Every range is read with the version that was listed; a published
model's chunks are checked against their sha256.
"""

from __future__ import annotations

import bisect
import fcntl
import json
import logging
import os
import re
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import accelerate
import diffusers as diffusers_library
import torch
import transformers as transformers_library

from runtime.checkpoint import weight_files
from runtime.errors import StartupError
from runtime.logs import log
from runtime.storage.cache import CacheWriter, cache_folder, cached, complete
from runtime.storage.fetch import Meter, OnProgress, Span, fetch, read_whole, retried, spans_of
from runtime.storage.folder import Folder
from runtime.storage.options import StorageOptions
from runtime.storage.source import CHUNK, RemoteFile, Source

# Both libraries show a type checker untyped placeholders.
diffusers: Any = diffusers_library
transformers: Any = transformers_library

MAX_HEADER = 100_000_000  # bytes of a safetensors header, as the library has it
SKELETON = "diffusion-skeleton-"
HEADER_READ = 2**20  # most headers are shorter
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


Loaded = TypeVar("Loaded")


class CannotStreamError(Exception):
    """This pipeline has to be loaded from files; the message says why."""


def load_remote(
    source: Source,
    options: StorageOptions,
    on_progress: OnProgress,
    load: Callable[[Path, Stream | None], Loaded],
    filled: Path | None = None,
) -> Loaded:
    """What `load(folder, stream)` gives: with a stream the folder is a skeleton, without one a copy in the cache,
    `filled` where there is one already.

    LOAD_MODE=cached, a copy that is there and another process that is filling one lead to the cache; so does a
    pipeline that cannot be streamed, with a line in the log. Raises StartupError, and what `load` raises.
    """
    there = options.cache_dir and complete(cache_folder(options), source.uri, source.revision)
    if options.load_mode != "cached" and not there:
        try:
            with ExitStack() as stack:
                writer = None
                if options.cache_dir:
                    writer = stack.enter_context(CacheWriter(cache_folder(options), source))
                if writer is None or writer.leads:
                    folder = stack.enter_context(_skeleton(source))
                    return load(folder, Stream(source, folder, options.threads, on_progress, writer))
        except CannotStreamError as why:
            log(logging.WARNING, f"{source.uri} is loaded by way of the cache", reason=str(why))
    folder = filled or cached(source, options, on_progress)
    with _named(folder, source.uri):
        return load(folder, None)


def load_folder(
    folder: Path,
    options: StorageOptions,
    device: str,
    on_progress: OnProgress,
    load: Callable[[Path, Stream | None], Loaded],
) -> Loaded:
    """As `load_remote`, from a folder of this machine: its files are read side by side into a CUDA device, and mapped
    into memory for another `device` or with LOAD_MODE=cached."""
    if options.load_mode == "stream" or (options.load_mode == "auto" and device == "cuda"):
        source = Folder(folder)
        try:
            with _skeleton(source) as made:
                return load(made, Stream(source, made, options.threads, on_progress, None))
        except CannotStreamError as why:
            log(logging.WARNING, f"{folder} is loaded from mapped files", reason=str(why))
    return load(folder, None)


@contextmanager
def _skeleton(source: Source) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=SKELETON))
            _claim(Path(name), stack)
            write_skeleton(source, Path(name))
            log(logging.DEBUG, "headers read")
        except OSError as error:  # no room for a megabyte: files that are there already may still do
            raise CannotStreamError(f"the temporary directory: {error.strerror or error}") from error
        with _named(Path(name), source.uri):
            yield Path(name)


@contextmanager
def _named(folder: Path, uri: str) -> Iterator[None]:
    """Errors name the model as the operator does, not a folder of ours."""
    try:
        yield
    except StartupError as error:
        raise type(error)(str(error).replace(str(folder), uri)) from error
    except CannotStreamError:
        raise
    except Exception as error:
        log(logging.ERROR, "the model could not be loaded", exc_info=error)
        reason = (str(error).strip().splitlines() or [""])[0].replace(str(folder), uri)
        raise StartupError(f"{uri}: cannot be loaded: {type(error).__name__}: {reason}") from error


def _claim(folder: Path, stack: ExitStack) -> None:
    """Hold the folder's lock, and remove the skeletons that killed processes have left: nobody holds theirs."""
    for other in folder.parent.glob(f"{SKELETON}*"):
        with suppress(OSError):
            descriptor = os.open(other, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if other == folder:
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                continue
            with ExitStack() as closing:
                closing.callback(os.close, descriptor)
                # A moment old, it may not be locked yet.
                if time.time() - os.fstat(descriptor).st_mtime > 60:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other, ignore_errors=True)


# --- the folder that stands for a remote model ---


def write_skeleton(source: Source, folder: Path) -> None:
    """Fill `folder` with the source's small files, and with the headers of its weights: files of their full size whose
    tensors are holes. All that judges a model folder without reading weights works on it. Raises StartupError."""
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda file: _write_small(source, file, folder / file.path), source.files()):
            pass


def _write_small(source: Source, file: RemoteFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _is_weights(file):
        path.write_bytes(read_whole(source, file))
        return
    with path.open("wb") as out:
        out.write(_header(source, file))
        out.truncate(file.size)


def _is_weights(file: RemoteFile) -> bool:
    return file.path.endswith(".safetensors")


def _header(source: Source, file: RemoteFile) -> bytes:
    """The first bytes of a safetensors file: the header's length, and the header."""
    begin = _first_bytes(source, file, min(HEADER_READ, file.size))
    length = struct.unpack("<Q", begin[:8])[0] if len(begin) >= 8 else 0
    if 8 + length > min(MAX_HEADER, file.size):
        return begin  # for the check of the folder to refuse
    return begin[: 8 + length] if 8 + length <= len(begin) else _first_bytes(source, file, 8 + length)


def _first_bytes(source: Source, file: RemoteFile, length: int) -> bytes:
    content = bytearray(length)
    retried(f"{source.uri}/{file.path}", lambda: source.read(file, 0, memoryview(content)))
    return bytes(content)


# --- tensors that fill up ---


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
        empty = {name: _plan(cls, self._folder / name, dtype_of(name), name) for name, (cls, _) in plans.items()}
        tensors = {}
        for name, (cls, files) in plans.items():
            tensors[name] = {file: self._tensors(cls, file, device, dtype_of(name)) for file in files}
            found = {tensor.name: tensor for listed in tensors[name].values() for tensor in listed}
            _check_names(name, empty[name], found)
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
                made[name] = _assemble(cls, empty.pop(name), state, self._folder / name, dtype_of(name), device, name)
                log(logging.DEBUG, f"component {name} built")
            if self._writer is not None:  # what is no weight
                rest = [span for span in self._writer.missing() if not _is_weights(span.file)]
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
        small = sum(file.size for file in self._files.values() if not _is_weights(file))
        return Meter(self._source.uri, total, small, self._on_progress, local=self.local)

    def _tensors(self, cls: Any, file: Path, device: torch.device, dtype: torch.dtype) -> list[_Tensor]:
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
                event.synchronize()  # the buffer is read again only then
            meter.add(span.length, span.file.component)

        spans = [span for path in by_path for span in spans_of(self._files[path])]
        source: Source = self._source if writer is None else _Resumed(self._source, writer)
        fetch(source, spans, buffers, sink, on_retry=meter.retry)
        filled = {}
        for listed in tensors.values():
            for tensor in listed:
                if tensor.begin == tensor.end:
                    tensor.finish()
                assert tensor.value is not None
                filled[tensor.name] = tensor.value
        return filled


@dataclass(frozen=True)
class _Resumed:
    """The source, but for the chunks that an earlier start has left in the cache."""

    source: Source
    writer: CacheWriter

    @property
    def uri(self) -> str:
        return self.source.uri

    @property
    def revision(self) -> str:
        return self.source.revision

    def files(self) -> tuple[RemoteFile, ...]:
        return self.source.files()

    def read(self, file: RemoteFile, start: int, into: memoryview) -> None:
        span = Span(file, start, len(into))
        if self.writer.has(span):
            self.writer.read(span, into)
        else:
            self.source.read(file, start, into)

    def close(self) -> None:
        self.source.close()


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


# --- models ---


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


def _plan(cls: Any, home: Path, dtype: torch.dtype, name: str) -> Any:
    """A diffusers model on the meta device; None for transformers, which builds its own."""
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


def _check_names(component: str, model: Any, tensors: dict[str, _Tensor]) -> None:
    """Raises CannotStreamError where the checkpoint's names or shapes are not the model's; transformers checks its
    own."""
    if model is None:
        return
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise CannotStreamError(f"{component}: the checkpoint lacks {missing[0]} under this name")
    for name, value in wanted.items():
        if tuple(value.shape) != tensors[name].shape:
            raise CannotStreamError(f"{component}: {name} has shape {tensors[name].shape}, not {tuple(value.shape)}")


def _assemble(
    cls: Any,
    model: Any,
    state: dict[str, torch.Tensor],
    home: Path,
    dtype: torch.dtype,
    device: torch.device,
    component: str,
) -> torch.nn.Module:
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

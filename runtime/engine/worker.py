"""The engine process: loads one pipeline and draws what the server asks for. Started by `engine/client.py`.

Threads: the main one owns the device and runs generations; one reads the control channel; one encodes
results; one sends heartbeats. When the server goes, the control channel closes and the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import platform
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from runtime.engine.messages import (
    MEDIA_HEADER,
    Advanced,
    Cancel,
    Configure,
    DeviceFree,
    Done,
    Failed,
    Fatal,
    FromEngine,
    Generate,
    Heartbeat,
    Member,
    Memory,
    Ready,
    Stage,
)
from runtime.errors import Cancelled, DiffusionError, StartupError
from runtime.logs import configure, log, request_id, unexpected
from runtime.metadata import metadata_of
from runtime.types import DEFAULTS_FILE, Capabilities, GeneratedMedia, GenerationRequest, Progress

if TYPE_CHECKING:
    from runtime.engine.context import Context
    from runtime.storage.source import Source
    from runtime.streaming import Stream

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
NICE = 5  # a third of the server's share where both want one core: probes come first
HEARTBEAT_SECONDS = 1.0
# What torch's class for it does not cover.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
DEVICE_MEMORY_SECONDS = 30.0


@dataclass
class Drawn:
    """One member's pictures as they come, the seconds by stage that it saw, and the part of them that it cost."""

    member: Member
    batched: int
    pictures: list[Any] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)


class Engine:
    """The process's state. `load` on the main thread, then `work` for ever."""

    def __init__(self, control: Connection, media: socket.socket, configuration: Configure) -> None:
        self._control, self._media, self._configuration = control, media, configuration
        self._send_lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Generate] = queue.SimpleQueue()
        self._cancelled: dict[int, float] = {}  # job → when the cancel came
        self._encoder = ThreadPoolExecutor(1, "encoder")

    def send(self, message: FromEngine) -> None:
        with self._send_lock:
            try:
                self._control.send(message)
            except OSError:  # the server is gone, or has unloaded the model
                end_process_group()

    # --- start

    def load(self) -> None:
        """Load the pipeline and draw once. Sends Ready, or Fatal with a reason and ends the process."""
        self.send(Stage("loading", 0.0))
        try:
            self._load()
        except StartupError as error:
            self.send(Fatal(str(error)))
            sys.exit(1)
        except Exception as error:
            log(logging.ERROR, "the model could not be loaded", exc_info=error)
            reason = str(error).strip().splitlines() or [""]
            self.send(Fatal(f"the model could not be loaded: {type(error).__name__}: {reason[0]}"))
            sys.exit(1)

    def _load(self) -> None:
        configuration = self._configuration
        if configuration.device in ("auto", "cuda"):
            threading.Thread(target=make_cuda_context, name="cuda-context", daemon=True).start()
        gc.disable()  # it takes a fifth of the imports' time, and finds nothing: what they make stays
        from runtime.storage.registry import open_source

        model = open_source(configuration.source, configuration.storage)
        # Before the seconds that importing torch takes, or within them:
        filling: Future[Path] | None = None
        if not isinstance(model, Path):
            model.files()
            if configuration.storage.load_mode == "cached":
                from runtime.storage.cache import cached

                filling = _in_background(partial(cached, model, configuration.storage, self._downloaded))
        elif not (model / "model_index.json").is_file():
            raise StartupError(f"{model} holds no pipeline: it has no model_index.json")
        log(logging.DEBUG, "source opened")
        import diffusers
        import torch
        import transformers

        torch.set_num_threads(configuration.cpu_threads)
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.set_verbosity_error()  # what they warn of at import is not about this model
            library.disable_default_handler()
            library.enable_propagation()  # into our one format
        from runtime.device_manager import detect_device
        from runtime.load_mode import load_folder, load_remote
        from runtime.storage.source import Changed

        gc.freeze()
        gc.enable()
        log(logging.DEBUG, "libraries imported")
        if configuration.restarted:
            _await_device_memory()
        if isinstance(model, Path):
            device = detect_device(configuration.device).type
            set_up = partial(self._set_up, str(model), None)
            load_folder(model, configuration.storage, device, self._read, set_up)
            return
        for last in (False, True):
            source = cast("Source", model)
            set_up = partial(self._set_up, source.uri, source.revision)
            try:
                filled = filling.result() if filling is not None and not last else None
                load_remote(source, configuration.storage, self._downloaded, set_up, filled)
            except Changed as changed:
                if last:
                    raise
                log(logging.WARNING, f"{changed}: starting again")
                model = open_source(configuration.source, configuration.storage)
            else:
                return

    def _set_up(self, source: str, revision: str | None, folder: Path, stream: Stream | None) -> None:
        """Load the pipeline of a folder, or of a stream, draw once, and tell the server what there is."""
        from runtime.families import registry
        from runtime.pipeline_loader import load_pipeline

        configuration = self._configuration
        loaded = load_pipeline(
            folder,
            configuration.device,
            configuration.dtype,
            configuration.optimizations,
            lambda name, fraction: self.send(Stage(name, fraction)),
            stream,
            configuration.acceleration,
        )
        self._pipeline, self._device = loaded.pipeline, loaded.device.torch
        family = registry.family_of(type(loaded.pipeline).__name__)
        half = registry.pipeline_half(family)
        facts = half.facts(loaded.pipeline, folder)
        self._runner = half.Runner(loaded.pipeline, loaded.acceleration)
        self._revision = revision or loaded.revision
        capabilities = Capabilities(
            family=family,
            pipeline_class=type(loaded.pipeline).__name__,
            media="video" if facts["video"] else "image",
            facts=facts,
            defaults=_defaults(folder),
            source=source,
            model_bytes=loaded.model_bytes,
            model_revision=self._revision,
            device=loaded.device.name,
            dtypes=loaded.dtypes,
            optimizations=loaded.optimizations,
            engine_variant=_variant(loaded, self._runner.variant, configuration.cpu_threads),
        )
        warmup = self._warm_up(half.warmup(facts), capabilities) if configuration.warmup else ()
        self.send(Ready(capabilities, warmup, _memory()))

    def _warm_up(
        self, small: GenerationRequest, capabilities: Capabilities
    ) -> tuple[tuple[GenerationRequest, dict[str, float]], ...]:
        """What is drawn before the first request, and its seconds by stage. Raises StartupError."""
        from runtime.engine.context import Context
        from runtime.families.requests import warmup_request

        configuration = self._configuration
        sizes = [warmup_request(capabilities, configuration.limits, *size) for size in configuration.warmup_sizes]
        drawn = []
        for i, request in enumerate([small, *sizes]):
            size = f"{request.width} x {request.height}"
            self.send(Stage("warming", i / (1 + len(sizes)), size if sizes else ""))
            begun = time.monotonic()
            try:
                for _ in range(2 if i else 1):  # the first of a size pays for its kernels: the second tells its cost
                    context = Context(self._device, lambda: False, lambda _: None)
                    list(self._draw([(request, 0)], context))
            except Exception as error:
                log(logging.ERROR, "the warm-up failed", exc_info=error)
                attention = configuration.acceleration.attention
                asked = "" if attention == "auto" else f" with ATTENTION_BACKEND={attention}"
                raise StartupError(f"the warm-up of {size}{asked} failed: {_first_line(error)}") from error
            drawn.append((request, context.timings))
            log(logging.INFO, "warmed up", size=size, seconds=round(time.monotonic() - begun, 2))
        return tuple(drawn)

    def _read(self, progress: Any) -> None:
        """Of a folder's files."""
        self.send(Stage("loading", progress.done_bytes / max(progress.total_bytes, 1), str(progress)))

    def _downloaded(self, progress: Any) -> None:
        fraction = progress.done_bytes / max(progress.total_bytes, 1)
        self.send(Stage("downloading", fraction, str(progress), progress.done_bytes))

    # --- work

    def listen(self) -> None:
        """Read the control channel; its end is the end of this process and of all it started."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self._control.recv()
                if isinstance(message, Generate):
                    self._jobs.put(message)
                elif isinstance(message, Cancel):
                    self._cancelled[message.job] = time.monotonic()
        end_process_group()

    def beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.send(Heartbeat(self._activity()))
                time.sleep(HEARTBEAT_SECONDS)

    @staticmethod
    def _activity() -> int:
        context = sys.modules.get("runtime.engine.context")  # not before torch is there
        return context.Context.activity if context else 0

    def work(self) -> None:
        while True:
            message = self._jobs.get()
            self._answer(message.members, message.rows)
            for member in message.members:
                self._cancelled.pop(member.job, None)

    def _answer(self, members: tuple[Member, ...], rows: int) -> None:
        """Draw for the members, `rows` pictures in one pass; each is answered once its own are there. Where a pass
        fails, those without an answer are drawn one by one: only the member to blame fails."""
        request_id.set(members[0].request_id)
        left = list(members)
        try:
            for drawn in self._generate(members, rows):
                left.remove(drawn.member)
                self._answer_one(drawn, idle=not left)
        except Exception as error:
            if _device_is_lost(error):  # nothing this process does on the device will work again
                log(logging.ERROR, "the device is lost; the engine ends", exc_info=error)
                end_process_group()
            if not left:  # nobody to tell
                log(logging.ERROR, "cleaning up after a generation failed", exc_info=error)
                return
            if isinstance(error, Cancelled):
                self._log_stop(left)
            if isinstance(error, Cancelled) or rows == 1 or sum(member.request.n for member in members) == 1:
                for member in left:
                    self.send(_failed(member, error))
                return
            log(logging.WARNING, "a batch failed; its pictures are drawn one by one", error=_first_line(error))
            if _is_out_of_memory(error):
                _release(error)
        else:
            return
        for member in left:
            self._answer((member,), 1)

    def _answer_one(self, drawn: Drawn, idle: bool) -> None:
        member = drawn.member
        request_id.set(member.request_id)
        self.send(DeviceFree(member.job))
        if member.job in self._cancelled:
            if idle:  # nobody else's picture is drawn after it
                self._log_stop([member])
            self.send(_failed(member, Cancelled("the request was cancelled")))
        else:
            self._encoder.submit(self._deliver, drawn)

    def _log_stop(self, members: list[Member]) -> None:
        """Tell how long after the last member's cancel the device is idle."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        came = [self._cancelled[member.job] for member in members if member.job in self._cancelled]
        if came:
            now = time.monotonic()
            log(logging.INFO, "stopped", seconds=round(now - max(came), 4), idle_at=round(now, 4))

    def _generate(self, members: tuple[Member, ...], most: int) -> Iterator[Drawn]:
        """What the pipeline gave for each member, in order, `most` pictures in one pass."""
        rows = [(member, i) for member in members for i in range(member.request.n)]
        batched = min(most, len(rows))
        found = {member.job: Drawn(member, batched) for member in members}
        for begin in range(0, len(rows), most):
            batch = rows[begin : begin + most]
            context = self._batch_context(members, batch, begin // most, -(-len(rows) // most))
            pictures = self._draw([(member.request, member.request.seeds[i]) for member, i in batch], context)
            before = None
            for (member, i), own, picture in zip(batch, context.rows, pictures, strict=True):
                drawn = found[member.job]
                drawn.pictures.append(picture)
                _add(drawn.timings, own.timings)
                _add(drawn.costs, own.timings)
                if member is not before:
                    _add(drawn.timings, context.timings)
                _add(drawn.costs, context.timings, 1 / len(batch))
                before = member
                if i == member.request.n - 1:
                    yield drawn

    def _batch_context(
        self, members: tuple[Member, ...], batch: list[tuple[Member, int]], number: int, passes: int
    ) -> Context:
        """Of one pass: what is drawn together is told to all, a row's own to its member alone."""
        from runtime.engine.context import Context

        def advanced(progress: Progress) -> None:
            step, total = number * progress.total + progress.step, passes * progress.total
            for member in members:
                self.send(Advanced(member.job, replace(progress, step=step, total=total)))

        def row_advanced(member: Member, i: int, progress: Progress) -> None:
            step, total = i * progress.total + progress.step, member.request.n * progress.total
            self.send(Advanced(member.job, replace(progress, step=step, total=total)))

        own = [
            Context(self._device, partial(self._cancelled.__contains__, member.job), partial(row_advanced, member, i))
            for member, i in batch
        ]
        return Context(self._device, lambda: all(m.job in self._cancelled for m in members), advanced, own)

    def _draw(self, rows: list[tuple[GenerationRequest, int]], context: Context) -> Iterator[Any]:
        """One pass: a picture or video for each request and seed, as it is there."""
        from runtime.engine.running import clean, isolated_random_state

        context.check()
        try:
            with isolated_random_state(rows[0][1], self._device):
                if len(rows) == 1:
                    yield self._runner.run(*rows[0], context)
                else:
                    yield from self._runner.run_batch(rows, context)
        finally:
            clean(self._pipeline)

    def _deliver(self, drawn: Drawn) -> None:
        """Encode and send one job's results; runs on the encoder's thread."""
        member, timings = drawn.member, drawn.timings
        request_id.set(member.request_id)
        try:
            begun = time.perf_counter()
            media = [
                _encoded(member.request, seed, picture, self._metadata(member.request, seed))
                for seed, picture in zip(member.request.seeds, drawn.pictures, strict=True)
            ]
            timings["encode"] = time.perf_counter() - begun
            told = tuple(replace(item, data=b"") for item in media)
            self.send(Done(member.job, told, timings, drawn.costs, _memory(), drawn.batched))
            for index, item in enumerate(media):
                self._media.sendall(MEDIA_HEADER.pack(member.job, index, len(item.data)))
                self._media.sendall(item.data)
        except OSError:  # the server is gone
            end_process_group()
        except Exception as error:
            self.send(_failed(member, error))

    def _metadata(self, request: GenerationRequest, seed: int) -> dict[str, str] | None:
        """What the file of one picture or video shall say of it."""
        c = self._configuration
        return metadata_of(request, seed, c.model_name, self._revision, c.log_prompts) if c.embed_metadata else None


def _add(total: dict[str, float], timings: Mapping[str, float], share: float = 1.0) -> None:
    for stage, seconds in timings.items():
        total[stage] = total.get(stage, 0.0) + seconds * share


def make_cuda_context() -> None:
    """The primary context of the first device there is, which torch takes over: it takes up to 1.5 s, which pass amid
    the imports. What is wrong with the device is for torch to tell."""
    with contextlib.suppress(OSError, AttributeError):  # no driver, or a strange one
        cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _in_background(work: Callable[[], T]) -> Future[T]:
    """On a thread that the process's end does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="filling", daemon=True).start()
    return future


def _encoded(
    request: GenerationRequest, seed: int, picture: Any, metadata: dict[str, str] | None = None
) -> GeneratedMedia:
    from runtime.media import encode_image, encode_video, frames_to_uint8

    if request.output_format != "mp4":
        data = encode_image(picture, request.output_format, request.output_quality, metadata)
        return GeneratedMedia(data, request.output_format, picture.width, picture.height, seed)
    frames, fps = frames_to_uint8(picture), request.fps or 16
    count, height, width, _ = frames.shape
    data = encode_video(frames, fps, request.output_quality, metadata)
    return GeneratedMedia(data, "mp4", width, height, seed, count, fps)


def _failed(member: Member, error: Exception) -> Failed:
    """The error as the server hears it: ours by name, the device's memory as such, anything else logged."""
    if isinstance(error, DiffusionError):
        return Failed(member.job, type(error).__name__, str(error))
    if _is_out_of_memory(error):
        log(logging.WARNING, "out of memory", error=_first_line(error))
        _release(error)
        request = member.request
        size = f"{request.width} x {request.height}" + (f" x {request.num_frames} frames" if request.num_frames else "")
        return Failed(member.job, "OutOfMemory", f"{size} does not fit in the device's memory; ask for less")
    return Failed(member.job, "GenerationFailed", unexpected(error, member.request_id))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _release(error: Exception) -> None:
    """Give the memory back that a failed generation held."""
    import torch

    error.__traceback__ = None  # its frames hold the tensors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU's allocator and CUDA's libraries have words."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def _device_is_lost(error: Exception) -> bool:
    """An illegal access or an assert on the device poisons the process's CUDA context for good."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not _is_out_of_memory(error)


def _memory() -> Memory:
    import torch

    if not torch.cuda.is_available():
        return Memory()
    return Memory(torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved())


def _await_device_memory() -> None:
    """The driver gives a dead engine's memory back by and by: wait until it stops growing."""
    import torch

    if torch.cuda.is_available():
        free, deadline = -1, time.monotonic() + DEVICE_MEMORY_SECONDS
        while time.monotonic() < deadline and (now := torch.cuda.mem_get_info()[0]) > free:
            free = now
            time.sleep(0.5)


def _defaults(folder: Path) -> dict[str, Any]:
    """The model folder's own defaults, where it has some. Raises StartupError."""
    path = folder / DEFAULTS_FILE
    if not path.exists():
        return {}
    try:
        defaults = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StartupError(f"{path}: {error}") from error
    if not isinstance(defaults, dict):
        raise StartupError(f"{path}: is not an object of fields and values")
    return defaults


def _variant(loaded: Any, path: str, cpu_threads: int) -> str:
    """What else, beside the request, may decide a result's bytes."""
    import diffusers
    import torch
    import transformers

    device = loaded.device.name if loaded.device.type != "cpu" else f"{platform.machine()} {cpu_threads} threads"
    dtypes = ",".join(sorted(set(loaded.dtypes.values())))
    lossy = [name for name in ("vae_tiling",) if loaded.optimizations.get(name, "").startswith("on")]
    parts = [
        path,
        f"torch {torch.__version__}",
        f"diffusers {diffusers.__version__}",
        f"transformers {transformers.__version__}",
        device,
        dtypes,
        *lossy,
    ]
    return "; ".join(parts)


def end_process_group() -> None:
    """End this process and all it started; it leads a process group of its own."""
    with contextlib.suppress(PermissionError):
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    if os.getpgrp() != os.getpid():
        sys.exit("runtime.engine.worker is started by the server")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server decides when the engine ends
    os.nice(NICE)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    control = Connection(int(sys.argv[1]))
    media = socket.socket(fileno=int(sys.argv[2]))
    try:
        configuration = control.recv()
    except (EOFError, OSError):
        return
    configure(configuration.log_level, configuration.log_format)
    engine = Engine(control, media, configuration)
    threading.Thread(target=engine.listen, name="listen", daemon=True).start()
    threading.Thread(target=engine.beat, name="heartbeat", daemon=True).start()
    engine.load()
    engine.work()


if __name__ == "__main__":
    main()

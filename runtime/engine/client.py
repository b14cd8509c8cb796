"""The server's side of the engine process: start it, talk to it, watch it, end it with all its children."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from runtime import errors
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
    ToEngine,
)
from runtime.errors import DiffusionError, GenerationFailed, NotReady, StartupError
from runtime.logs import log
from runtime.settings import Settings, child_environment, compile_caches
from runtime.types import Capabilities, GenerationRequest, GenerationResult, Progress

LOADING, WARMING, READY, FAILED, UNLOADED = "loading", "warming", "ready", "failed", "unloaded"
WATCH_SECONDS = 1.0
LOAD_PATIENCE = 600.0  # loading and compiling hold the interpreter lock, heartbeats with it, for a while
STOP_SECONDS = 5.0  # an engine whose channel closed ends by itself; after this it is killed


@dataclass(frozen=True)
class Order:
    """What is asked of the engine for one request."""

    request: GenerationRequest
    on_progress: Callable[[Progress], None]
    request_id: str


@dataclass(eq=False)
class Ticket:
    """One request inside the engine. `device_free` is set when its work on the device is over."""

    job: int
    request: GenerationRequest
    on_progress: Callable[[Progress], None]
    result: asyncio.Future[GenerationResult]
    device_free: asyncio.Event = field(default_factory=asyncio.Event)
    done: Done | None = None
    parts: dict[int, bytes] = field(default_factory=dict, repr=False)
    patience: float = 60.0  # seconds without a sign of life that are taken for a hang


class EngineClient:
    """One engine process at a time. All methods belong to the event loop; the channels are read by threads."""

    def __init__(self, settings: Settings, cpu_threads: int) -> None:
        self._settings = settings
        self._cpu_threads = cpu_threads
        self._compile_caches = compile_caches(settings.cache_dir)
        self._process: subprocess.Popen[bytes] | None = None
        self._channels: tuple[Connection[Any, Any], socket.socket] | None = None  # of a process nobody listens to yet
        self._outbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._jobs = itertools.count(1)
        self._tickets: dict[int, Ticket] = {}
        self._exited = asyncio.Event()
        self.state = LOADING
        self.stage = Stage(LOADING, 0.0)
        self.reason = ""
        self.capabilities: Capabilities | None = None
        self.load_seconds: dict[str, float] = {}  # by stage of the last start
        self.load_bytes = 0
        self.begun = self._stage_begun = time.monotonic()  # of this process, of its stage
        self.warmup: tuple[tuple[GenerationRequest, Mapping[str, float]], ...] = ()
        self.memory = Memory()
        self.ready = asyncio.Event()
        self._activity = 0
        self._heard = self._alive = time.monotonic()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def describe(self) -> str:
        """The state in words, for readiness bodies and 503 messages."""
        if self.state in (LOADING, WARMING):
            detail = f": {self.stage.detail}" if self.stage.detail else ""
            return f"{self.stage.name}, {self.stage.fraction:.0%}{detail}"
        return f"{self.state}: {self.reason}" if self.reason else self.state

    # --- life

    def spawn(self, restarted: bool = False) -> None:
        """Begin the process, without listening to it: `start` does. Called on the main thread, whose death ends the
        engine too (PR_SET_PDEATHSIG follows the spawning thread)."""
        control, their_control = socket.socketpair()
        media, their_media = socket.socketpair()
        threads = str(self._cpu_threads)
        self.begun = self._stage_begun = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runtime.engine.worker", str(their_control.fileno()), str(their_media.fileno())],
            pass_fds=(their_control.fileno(), their_media.fileno()),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            env=child_environment(
                OMP_NUM_THREADS=threads,
                MKL_NUM_THREADS=threads,
                TORCHINDUCTOR_COMPILE_THREADS=threads,
                **self._compile_caches,
            ),
        )
        their_control.close()
        their_media.close()
        connection = Connection(control.detach())
        self._channels, self._outbox = (connection, media), queue.SimpleQueue()
        s = self._settings
        connection.send(
            Configure(
                s.source,
                s.storage,
                s.device,
                s.dtype,
                s.optimizations,
                s.acceleration,
                self._cpu_threads,
                s.warmup,
                s.warmup_sizes,
                s.limits,
                s.log_level,
                s.log_format,
                restarted,
                s.model_name,
                s.embed_metadata,
                s.log_prompts,
            )
        )

    def start(self, restarted: bool = False) -> None:
        """Listen to the engine that `spawn` began, or begin one; `ready` is set once its model is loaded."""
        if self._channels is None:
            self.spawn(restarted)
        assert self._channels is not None and self._process is not None
        (connection, media), self._channels = self._channels, None
        self.state, self.stage, self.reason, self.capabilities = LOADING, Stage(LOADING, 0.0), "", None
        self._exited = asyncio.Event()
        self._heard = time.monotonic()
        self.load_seconds, self.load_bytes = {}, 0
        loop, process = asyncio.get_running_loop(), self._process
        for name, target, arguments in (
            ("control-reader", self._read_control, (connection, loop, process)),
            ("control-writer", _write_control, (connection, self._outbox)),
            ("media-reader", self._read_media, (media, loop)),
        ):
            threading.Thread(target=target, args=arguments, name=f"engine-{name}", daemon=True).start()

    async def stop(self) -> None:
        """End the engine and everything it started. Returns when it is gone."""
        process, exited = self._process, self._exited
        if process is None:
            return
        self.state, self.reason = UNLOADED, ""
        self.ready.clear()
        self._outbox.put(None)  # closes the channel, which ends the engine
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(exited.wait(), STOP_SECONDS)
        if not exited.is_set():
            _kill(process)
            await exited.wait()
        if self._process is process:  # else the model is being loaded again
            self._process = None

    def kill(self) -> None:
        """End the engine's whole process group at once."""
        if self._process is not None:
            _kill(self._process)

    async def wait_exited(self) -> None:
        await self._exited.wait()

    # --- requests

    def submit(self, orders: Sequence[Order], rows: int, step_seconds: float) -> list[Ticket]:
        """Send requests to be drawn, `rows` pictures in one pass, a step of which should take `step_seconds`.

        Raises NotReady.
        """
        if self.state != READY:
            raise NotReady(f"the model is not ready ({self.describe()})", retry_after=5)
        loop, patience = asyncio.get_running_loop(), max(float(self._settings.engine_timeout), 10 * step_seconds)
        tickets = [
            Ticket(next(self._jobs), order.request, order.on_progress, loop.create_future(), patience=patience)
            for order in orders
        ]
        self._tickets |= {ticket.job: ticket for ticket in tickets}
        self._alive = time.monotonic()
        members = zip(tickets, orders, strict=True)
        self._outbox.put(Generate(tuple(Member(t.job, o.request, o.request_id) for t, o in members), rows))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Ask the engine to stop the request; `device_free` is set when it has."""
        if ticket.job in self._tickets:
            self._outbox.put(Cancel(ticket.job))

    # --- a watch over it

    async def watch(self) -> None:
        """Kill an engine that hangs: silent altogether, or without a sign of life under a request. Runs for ever."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            at_work = [ticket for ticket in self._tickets.values() if not ticket.device_free.is_set()]
            silence = LOAD_PATIENCE if self.state in (LOADING, WARMING) else float(self._settings.engine_timeout)
            if self._process is None or self.state in (FAILED, UNLOADED):
                continue
            if now - self._heard > silence:
                self._hung(f"no heartbeat for {now - self._heard:.0f} s")
            elif at_work and now - self._alive > at_work[0].patience:
                self._hung(f"no sign of life under a request for {now - self._alive:.0f} s")

    def _hung(self, why: str) -> None:
        self.state, self.reason = FAILED, f"the engine hung: {why}"
        self.ready.clear()
        log(logging.ERROR, self.reason)
        self.kill()

    # --- what the engine says; on the event loop

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case Stage(name):
                if name != self.stage.name:
                    self._stage_ended(message.at)
                self.stage = message
                self.load_bytes = max(self.load_bytes, message.done_bytes)
                self.state = message.name if message.name == WARMING else self.state
            case Heartbeat(activity):
                self._heard = time.monotonic()
                if activity != self._activity:
                    self._activity, self._alive = activity, self._heard
            case Ready(capabilities, warmup, memory):
                self.capabilities, self.warmup, self.memory, self.state = capabilities, warmup, memory, READY
                self._stage_ended(message.at)
                self.ready.set()
            case Fatal(reason):
                self.state, self.reason = FAILED, reason
            case Advanced(job, progress):
                if ticket := self._tickets.get(job):
                    ticket.on_progress(progress)
            case DeviceFree(job):
                if ticket := self._tickets.get(job):
                    ticket.device_free.set()
            case Done(job):
                if ticket := self._tickets.get(job):
                    ticket.done, self.memory = message, message.memory
                    self._finish(ticket)
            case Failed(job, error, text):
                kind = getattr(errors, error, GenerationFailed)
                self._fail(job, kind(text))

    def _stage_ended(self, at: float) -> None:
        at = max(at, self._stage_begun)  # two threads of the engine may send in another order than they spoke
        spent = at - self._stage_begun
        self.load_seconds[self.stage.name] = self.load_seconds.get(self.stage.name, 0.0) + spent
        self._stage_begun = at

    def _on_media(self, job: int, index: int, data: bytes) -> None:
        if ticket := self._tickets.get(job):
            ticket.parts[index] = data
            self._finish(ticket)

    def _finish(self, ticket: Ticket) -> None:
        """Complete the ticket once both its message and all its media are here."""
        done, capabilities = ticket.done, self.capabilities
        if done is None or capabilities is None or len(ticket.parts) < len(done.media):
            return
        del self._tickets[ticket.job]
        ticket.device_free.set()
        if not ticket.result.done():
            media = tuple(replace(item, data=ticket.parts.pop(i)) for i, item in enumerate(done.media))
            ticket.result.set_result(
                GenerationResult(
                    ticket.request,
                    media,
                    done.timings,
                    capabilities.engine_variant,
                    capabilities.model_revision,
                    done.batched,
                    done.costs,
                )
            )

    def _fail(self, job: int, error: DiffusionError) -> None:
        if ticket := self._tickets.pop(job, None):
            ticket.device_free.set()
            if not ticket.result.done():
                ticket.result.set_exception(error)

    def _on_exit(self, process: subprocess.Popen[bytes], status: int) -> None:
        if process is not self._process:
            return
        self.ready.clear()
        if self.state not in (FAILED, UNLOADED):
            self.state, self.reason = FAILED, f"the engine process ended with status {status}"
            log(logging.ERROR, self.reason)
        for job in list(self._tickets):
            self._fail(job, EngineDied("the engine ended while it worked on this request", retry_after=5))
        self._exited.set()

    # --- threads

    def _read_control(
        self, connection: Connection, loop: asyncio.AbstractEventLoop, process: subprocess.Popen[bytes]
    ) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                _call(loop, self._on_message, connection.recv())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the engine started dies with it
        _call(loop, self._on_exit, process, process.wait())

    def _read_media(self, media: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        with media, contextlib.suppress(EOFError, OSError):
            while True:
                job, index, length = MEDIA_HEADER.unpack(_receive(media, MEDIA_HEADER.size))
                _call(loop, self._on_media, job, index, _receive(media, length))


class EngineDied(NotReady):
    """The engine ended under the request. It may be run again by a new engine."""


def fatal(client: EngineClient) -> StartupError:
    """Why the start can't succeed, as the line the operator reads."""
    return StartupError(client.reason or "the engine ended while it was loading")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _write_control(connection: Connection, outbox: queue.SimpleQueue[ToEngine | None]) -> None:
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            connection.send(message)
        # Wakes both sides' readers; closing alone would leave ours blocked.
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)


def _receive(sock: socket.socket, length: int) -> bytearray:
    """Exactly `length` bytes, received into one buffer with the interpreter lock released."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        got = sock.recv_into(view)
        if got == 0:
            raise EOFError
        view = view[got:]
    return buffer


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone
        loop.call_soon_threadsafe(function, *arguments)

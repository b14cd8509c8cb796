"""All that crosses the border between the server process and the engine process.

Two socket pairs. Control: pickled messages of the classes below, both ways. Media: from the engine
only, frames of a header (job, index, length) and that many raw bytes, so that a video never stands
between a cancel and the GPU.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.families.base import Limits
from runtime.storage.options import StorageOptions
from runtime.types import Acceleration, Capabilities, GeneratedMedia, GenerationRequest, Progress

MEDIA_HEADER = struct.Struct("!QIQ")  # job, index, bytes that follow


# server → engine
@dataclass(frozen=True, slots=True)
class Configure:
    """First message: what to load and how."""

    source: str
    storage: StorageOptions
    device: str
    dtype: str
    optimizations: Mapping[str, str]
    acceleration: Acceleration
    cpu_threads: int
    warmup: bool
    warmup_sizes: tuple[tuple[int, int], ...]
    limits: Limits
    log_level: str
    log_format: str
    restarted: bool
    model_name: str
    embed_metadata: bool
    log_prompts: bool


@dataclass(frozen=True, slots=True)
class Member:
    """One request of a batch."""

    job: int
    request: GenerationRequest
    request_id: str


@dataclass(frozen=True, slots=True)
class Generate:
    """Requests to draw, at most `rows` pictures in one pass; each is answered on its own."""

    members: tuple[Member, ...]
    rows: int


@dataclass(frozen=True, slots=True)
class Cancel:
    job: int


# engine → server
@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of device memory in use, and the most that were; 0 on the CPU."""

    device: int = 0
    device_peak: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """How far the start is: downloading, loading or warming, a fraction from 0 to 1, what people read of it, and the
    bytes that have come. `at` is when it was told, by the clock that all processes share: it may be heard later."""

    name: str
    fraction: float
    detail: str = ""
    done_bytes: int = 0
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Ready:
    """`warmup` holds what was drawn first and the seconds by stage: what the cost model starts from. `at` is as a
    Stage's."""

    capabilities: Capabilities
    warmup: tuple[tuple[GenerationRequest, Mapping[str, float]], ...]
    memory: Memory
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Fatal:
    """The start cannot succeed, for this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The engine's process lives. `activity` grows with each sign of life of the thread that draws."""

    activity: int


@dataclass(frozen=True, slots=True)
class Advanced:
    job: int
    progress: Progress


@dataclass(frozen=True, slots=True)
class DeviceFree:
    """The job's work on the device is over; the next may be sent while its result is encoded."""

    job: int


@dataclass(frozen=True, slots=True)
class Done:
    """The job succeeded. `media` lack their bytes: they come over the media channel, by index. `batched` pictures
    were drawn in one pass; `costs` are the job's own part of the seconds by stage in `timings`."""

    job: int
    media: tuple[GeneratedMedia, ...]
    timings: Mapping[str, float]
    costs: Mapping[str, float]
    memory: Memory
    batched: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The job failed. `error` names a class of `runtime.errors`."""

    job: int
    error: str
    message: str


ToEngine = Configure | Generate | Cancel
FromEngine = Stage | Ready | Fatal | Heartbeat | Advanced | DeviceFree | Done | Failed

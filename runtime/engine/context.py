"""What a running generation can ask and tell: should it stop, how far it is, how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from runtime.errors import Cancelled
from runtime.types import Progress

LONG_FORWARD_SECONDS = 0.05  # two shorter ones in flight still end within one forward and 100 ms


class Context:
    """One generation's side of the engine. `timings` are seconds by stage, measured when the device is done. Of a batch
    `rows` holds a context for each picture, for what is drawn one after another."""

    activity: ClassVar[int] = 0  # signs of life of all generations; the heartbeat tells them

    def __init__(
        self,
        device: torch.device,
        should_stop: Callable[[], bool],
        on_progress: Callable[[Progress], None],
        rows: Sequence[Context] = (),
    ) -> None:
        self.device = device
        self.should_stop = should_stop
        self.on_progress = on_progress
        self.rows = rows
        self._pending: Any = None  # event recorded one `advance` ago
        self._begun: Any = None  # event that the last forward began with
        self._begun_at = 0.0
        self.timings: dict[str, float] = {}

    def check(self) -> None:
        """A sign of life. Raises Cancelled once nobody waits for the result any more."""
        Context.activity += 1
        if self.should_stop():
            raise Cancelled("the request was cancelled")

    def before_forward(self) -> None:
        """Raises Cancelled as `check`. The host runs ahead of the device, by at most one forward here, and not at all
        where forwards are long: what is in flight at a cancel ends within one forward and 100 ms."""
        if self.device.type == "cuda":
            if self._begun is not None:
                self._begun.synchronize()
                length, self._begun_at = time.perf_counter() - self._begun_at, time.perf_counter()
                if length > LONG_FORWARD_SECONDS:
                    torch.cuda.current_stream().synchronize()
            self._begun = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._begun.record()
        self.check()

    def advance(self, stage: str, step: int, total: int) -> None:
        """Report a step. Work is enqueued ahead of the device: waiting for the step before this one keeps
        progress true and a cancel at most two steps away."""
        self.check()
        if self.device.type == "cuda":
            if self._pending is not None:
                self._pending.synchronize()
            self._pending = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._pending.record()
        self.on_progress(Progress(stage, step, total))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block, device included, to `timings[name]`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.synchronize()
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - begun

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

"""Many ranges of many files at once, through a few buffers of the caller, with retries and checksums.

The buffers are all the memory there is: a thread for each of them takes the next span, fills its buffer, hands it to
the sink and goes on. What the sink does with the bytes (a file, a device, both) is not known here.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from runtime.errors import StartupError
from runtime.logs import log
from runtime.storage.source import CHUNK, RemoteFile, Source, Transient

ATTEMPTS = 8
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # seconds; each wait is drawn between 0 and twice the last one's bound
GIVE_UP_SECONDS = 180.0  # for one span, its reads and waits together
REPORT_SECONDS, LOG_SECONDS = 0.5, 5.0
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Span:
    """`length` bytes of a file from `start` on."""

    file: RemoteFile
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is: bytes of all files, seconds since it began, the component that bytes last came of.

    `rate` is in bytes a second and counts what was downloaded, not what was there already.
    """

    done_bytes: int
    total_bytes: int
    seconds: float
    component: str
    rate: float
    retries: int

    @property
    def seconds_left(self) -> float | None:
        """None as long as nothing has come."""
        return (self.total_bytes - self.done_bytes) / self.rate if self.rate else None

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {self.seconds_left:.0f} s left"
        return (
            f"{self.component or 'model'}: {self.done_bytes / GIB:.2f} of {self.total_bytes / GIB:.2f} GiB, "
            f"{self.rate / MIB:.0f} MiB/s{left}"
        )


OnProgress = Callable[[Progress], None]


class Meter:
    """Counts bytes from any thread. Between `with` and its end, or `end()`, a thread tells `on_progress` at once and
    every half second and the log every five, also while nothing comes."""

    def __init__(self, uri: str, total: int, done: int, on_progress: OnProgress | None, *, local: bool = False) -> None:
        self._verbs = ("reading", "read") if local else ("downloading", "downloaded")
        self._uri, self._total, self._start, self._on_progress = uri, total, done, on_progress
        self._done, self._component, self._retries = done, "", 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._report, name="download-meter", daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def add(self, count: int, component: str = "") -> None:
        """`count` bytes more, of this component."""
        with self._lock:
            self._done, self._component = self._done + count, component

    def retry(self) -> None:
        with self._lock:
            self._retries += 1

    def end(self) -> Progress:
        """The last report and the last line of the log."""
        self.__exit__()
        progress = self._tell()
        self._log(self._verbs[1], progress)
        return progress

    def _report(self) -> None:
        logged = time.monotonic()
        while True:
            progress = self._tell()
            if time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                self._log(self._verbs[0], progress)
            if self._ended.wait(REPORT_SECONDS):
                return

    def _tell(self) -> Progress:
        with self._lock:
            seconds = time.monotonic() - self._begun
            rate = (self._done - self._start) / seconds if seconds > 0 else 0.0
            progress = Progress(self._done, self._total, seconds, self._component, rate, self._retries)
        if self._on_progress:
            self._on_progress(progress)
        return progress

    def _log(self, what: str, progress: Progress) -> None:
        left = progress.seconds_left
        log(
            logging.INFO,
            f"{what} {self._uri}",
            component=progress.component or None,
            bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            mib_per_s=round(progress.rate / MIB, 1),
            seconds=round(progress.seconds, 1),
            seconds_left=None if left is None or what == self._verbs[1] else round(left, 1),
            retries=progress.retries,
        )


def spans_of(file: RemoteFile, chunk: int = CHUNK) -> Iterator[Span]:
    """The file in pieces of `chunk` bytes, the last one shorter; none of an empty file."""
    for start in range(0, file.size, chunk):
        yield Span(file, start, min(chunk, file.size - start))


def fetch(
    source: Source,
    spans: Iterable[Span],
    buffers: Sequence[memoryview],
    sink: Callable[[Span, memoryview], None],
    *,
    on_retry: Callable[[], None] = lambda: None,
    attempts: int = ATTEMPTS,
) -> None:
    """Read every span into one of `buffers` and give it to `sink`, on as many threads as there are buffers.

    `sink(span, view)` runs on the thread that read; its buffer is used again once it returns. Spans are begun in
    their order and finish in any. A span that is a chunk of a manifest is checked against its sha256. Returns when
    all threads have ended. The first error ends the others and is raised: StartupError with the file's name for what
    reading cannot mend, or whatever `sink` or `spans` raised. Buffers are writable bytes, each as long as a span.
    """
    pending, lock, stop = iter(spans), threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def work(buffer: memoryview) -> None:
        try:
            while not stop.is_set():
                with lock:
                    span = next(pending, None)
                if span is None:
                    return
                view = buffer[: span.length]
                if len(view) != span.length:
                    raise ValueError(f"a buffer of {len(buffer)} bytes for a span of {span.length}")
                _read(source, span, view, stop, on_retry, attempts)
                if not stop.is_set():
                    sink(span, view)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(b,), name=f"fetch-{i}", daemon=True) for i, b in enumerate(buffers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C: the buffers are the caller's again only when nobody writes to them
        stop.set()
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]


def read_whole(source: Source, file: RemoteFile) -> bytes:
    """A small file, with retries. Raises StartupError."""
    content = bytearray(file.size)
    _read(source, Span(file, 0, file.size), memoryview(content), threading.Event(), lambda: None, ATTEMPTS)
    return bytes(content)


def retried(what: str, call: Callable[[], None], attempts: int = ATTEMPTS, stop: threading.Event | None = None) -> None:
    """`call`, again after each Transient that it raises, with growing random waits.

    Raises StartupError with `what` in front once `attempts` or GIVE_UP_SECONDS are used up. Ends early once `stop`
    is set.
    """
    begun, stop = time.monotonic(), stop or threading.Event()
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Transient as reason:
            seconds = time.monotonic() - begun
            if attempt == attempts or seconds > GIVE_UP_SECONDS:
                raise StartupError(f"{what}: {reason}; gave up after {attempt} attempts in {seconds:.0f} s") from reason
            log(logging.WARNING, f"{what}: {reason}; trying again", attempt=attempt)
            # Full jitter: many pods that one hiccup hit do not come back together.
            if stop.wait(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))):
                return


def _read(
    source: Source,
    span: Span,
    view: memoryview,
    stop: threading.Event,
    on_retry: Callable[[], None],
    attempts: int,
) -> None:
    tries = 0

    def once() -> None:
        nonlocal tries
        tries += 1
        if tries > 1:
            on_retry()
        source.read(span.file, span.start, view)
        _verify(span, view)

    retried(f"{source.uri}/{span.file.path}", once, attempts, stop)


def _verify(span: Span, view: memoryview) -> None:
    """Raises Transient for a chunk, or a whole small file, that is not what the source says it is.

    Reading again mends what the network broke; a store that holds the wrong bytes fails each time.
    """
    file, whole = span.file, span.length == span.file.size
    if file.chunks and span.start % CHUNK == 0 and span.length == min(CHUNK, file.size - span.start):
        if hashlib.sha256(view).hexdigest() != file.chunks[span.start // CHUNK]:
            raise Transient(f"wrong checksum of bytes {span.start} to {span.start + span.length}")
    elif whole and file.sha256:
        if hashlib.sha256(view).hexdigest() != file.sha256:
            raise Transient("wrong checksum")
    elif whole and file.md5 and hashlib.md5(view, usedforsecurity=False).hexdigest() != file.md5:
        raise Transient("wrong checksum")

"""Where results lie: a folder, or a prefix of an object store.

Keys are JOB/NAME. Beside what `runtime.jobs.store.ResultStore` promises both tell what they hold, and drop a job's
results, for the job stores' sweeps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runtime.jobs.bucket import CHUNK, Bucket
from runtime.jobs.store import Lifetimes, ResultStore, Unavailable

_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_KEY = re.compile(_JOB.pattern + r"/[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PARTIAL = ".partial-"  # no key begins with a dot
STALE_SECONDS = 3600.0  # after which a partial file is nobody's

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of this disk is used up",
    errno.EFBIG: "a file of this size is not allowed",
    errno.EACCES: "this user may not write here",
    errno.EPERM: "this user may not write here",
    errno.EROFS: "the volume is read-only",
}


@dataclass(frozen=True, slots=True)
class Held:
    """What a store holds of one job: bytes in all, and seconds since the last of it was written."""

    job: str
    size: int
    age: float


class Results(ResultStore, Protocol):
    """A ResultStore as the job stores need it."""

    def held(self) -> list[Held]: ...

    def drop(self, job_id: str) -> None:
        """Delete all results of a job."""

    def close(self) -> None: ...


def overdue(held: Sequence[Held], lifetimes: Lifetimes) -> list[str]:
    """Jobs whose results are past their lifetime, or are the oldest of more than `max_bytes`."""
    left = sum(item.size for item in held)
    dropped = []
    for item in sorted(held, key=lambda item: item.age, reverse=True):
        if item.age > lifetimes.result or left > lifetimes.max_bytes:
            dropped.append(item.job)
            left -= item.size
    return dropped


def plain(error: OSError) -> str:
    """Why the system refused, in words."""
    return REASONS.get(error.errno or 0) or error.strerror or type(error).__name__


class FolderResults:
    """Results as files. A file appears whole or not at all, and is on the disk when `put` returns."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder. Raises Unavailable."""
        self._folder = folder
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, data: bytes, content_type: str, metadata: Mapping[str, str]) -> None:
        """A folder keeps neither content type nor metadata: the record of the job has both."""
        path = self._path(key)
        with _told(self._folder), contextlib.ExitStack() as undo:
            path.parent.mkdir(exist_ok=True)
            undo.callback(_remove_if_empty, path.parent)
            descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
            undo.callback(Path(partial).unlink, missing_ok=True)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).replace(path)
            undo.pop_all()
            _sync(path.parent)
            _sync(self._folder)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        path = self._path(key)
        with _told(self._folder), _missing(key):
            length = path.stat().st_size
        return self._chunks(key, path, start, length if end is None else min(end, length))

    def _chunks(self, key: str, path: Path, start: int, end: int) -> Iterator[bytes]:
        with _told(self._folder), _missing(key), path.open("rb") as file:
            file.seek(start)
            while start < end and (part := file.read(min(CHUNK, end - start))):
                start += len(part)
                yield part

    def url(self, key: str, seconds: float, filename: str) -> str | None:
        return None

    def delete(self, keys: list[str]) -> None:
        with _told(self._folder):
            for path in map(self._path, keys):
                path.unlink(missing_ok=True)
                _remove_if_empty(path.parent)

    def held(self) -> list[Held]:
        """Partial files of a process that was killed go on the way."""
        found, now = [], time.time()
        with _told(self._folder):
            for folder in self._folder.iterdir():
                if not _JOB.fullmatch(folder.name):  # a volume's own, such as .snapshot
                    continue
                sizes, ages = 0, []
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # deleted meanwhile, not ours
                    for path in folder.iterdir():
                        told = path.stat()
                        age = now - told.st_mtime
                        if not path.name.startswith(_PARTIAL):
                            sizes += told.st_size
                            ages.append(age)
                        elif age > STALE_SECONDS:
                            path.unlink(missing_ok=True)
                    if ages:
                        found.append(Held(folder.name, sizes, min(ages)))
                    else:
                        _remove_if_empty(folder)
        return found

    def drop(self, job_id: str) -> None:
        folder = self._folder / _checked(_JOB, job_id)
        with _told(self._folder), contextlib.suppress(FileNotFoundError):
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            _remove_if_empty(folder)

    def close(self) -> None:
        pass

    def _path(self, key: str) -> Path:
        return self._folder / _checked(_KEY, key)


class S3Results:
    """Results as objects. A put is one request, so that an object is whole or not there."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def put(self, key: str, data: bytes, content_type: str, metadata: Mapping[str, str]) -> None:
        self._bucket.put(_object(key), data, content_type, {name: _header(value) for name, value in metadata.items()})

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        parts = self._bucket.stream(_object(key), start, end)
        try:
            first = next(parts, b"")  # asked for now, so that a missing object is told here
        except KeyError:
            raise KeyError(key) from None
        return _begun(first, parts)

    def url(self, key: str, seconds: float, filename: str) -> str | None:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", filename)[:100] or "result"
        return self._bucket.url(_object(key), seconds, f'inline; filename="{name}"')

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            self._bucket.delete(_object(key))

    def held(self) -> list[Held]:
        sizes: dict[str, int] = defaultdict(int)
        ages: dict[str, float] = {}
        for entry in self._bucket.list("results/"):
            job = entry.key.split("/")[1]
            if _JOB.fullmatch(job):
                sizes[job] += entry.size
                ages[job] = min(entry.age, ages.get(job, entry.age))
        return [Held(job, size, ages[job]) for job, size in sizes.items()]

    def drop(self, job_id: str) -> None:
        for entry in list(self._bucket.list(f"results/{_checked(_JOB, job_id)}/")):
            self._bucket.delete(entry.key)

    def close(self) -> None:
        self._bucket.close()


def _begun(first: bytes, rest: Iterator[bytes]) -> Generator[bytes, None, None]:
    try:
        if first:
            yield first
        yield from rest
    finally:
        if isinstance(rest, Generator):
            rest.close()


def _object(key: str) -> str:
    return f"results/{_checked(_KEY, key)}"


def _header(text: str) -> str:
    """On one line, and as it is signed: a prompt has line ends and runs of spaces."""
    return " ".join(re.sub(r"[^ -~]", " ", text).split())


def _checked(pattern: re.Pattern[str], key: str) -> str:
    """Raises ValueError for a key that might name something else than a result."""
    if not pattern.fullmatch(key):
        raise ValueError(f"{key[:100]!r} is no key of a result")
    return key


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{folder}: {plain(error)}") from error


@contextlib.contextmanager
def _missing(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise KeyError(key) from None


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _sync(folder: Path) -> None:
    """A name is on the disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A file of a copy while it is filled: written past the page cache, hashed as its chunks come."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

from runtime.storage.source import CHUNK, RemoteFile

HASH_PATIENCE = 5.0  # seconds that a chunk waits for the one before it to be hashed
BLOCK = 4096  # what O_DIRECT wants lengths to be multiples of


class StagedFile:
    """A file of full size, made where it is missing. Safe to write to from several threads. Raises OSError."""

    def __init__(self, path: Path, remote: RemoteFile, behind: bool) -> None:
        self.behind = behind  # no longer hashed as it comes: read back in the end
        self.hashed = 0  # bytes from its start that are in `digest`
        # None where `fetch` checks it chunk by chunk or as one.
        self.digest = None if remote.chunks or remote.size <= CHUNK else _hasher(remote)
        self._turn = threading.Condition()
        self._direct: int | None = None
        self._buffered = _created(path)
        try:
            if os.fstat(self._buffered).st_size != remote.size:
                os.ftruncate(self._buffered, remote.size)
        except OSError:
            self.close()
            raise
        with contextlib.suppress(OSError, AttributeError):  # tmpfs and some network volumes lack it
            self._direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_NOFOLLOW)

    def write(self, start: int, view: memoryview) -> None:
        """Put a chunk where it belongs."""
        self._put(start, view)
        self._hash(start, view)

    def flush(self) -> None:
        """To the disk, and out of the page cache."""
        _flush(self._buffered)

    def sync(self) -> None:
        """To the disk, with what the file system knows of the file."""
        os.fsync(self._buffered)

    def close(self) -> None:
        for descriptor in (self._buffered, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _put(self, start: int, view: memoryview) -> None:
        """Write past the page cache as far as that goes: whole blocks from aligned memory, the rest as usual."""
        done = 0
        if self._direct is not None and start % BLOCK == 0:
            whole = len(view) // BLOCK * BLOCK
            try:
                while done < whole:
                    done += os.pwrite(self._direct, view[done:whole], start + done)
            except OSError as exc:
                if exc.errno != errno.EINVAL:  # memory that is not aligned
                    raise
        while done < len(view):
            done += os.pwrite(self._buffered, view[done:], start + done)

    def _hash(self, start: int, view: memoryview) -> None:
        """Add a chunk to the file's hash in its turn; the chunk before it is in flight on another thread."""
        if self.digest is None:
            return
        with self._turn:
            if not self._turn.wait_for(lambda: self.behind or self.hashed >= start, HASH_PATIENCE):
                self.behind = True
            if self.behind or self.hashed != start:
                return
        self.digest.update(view)
        with self._turn:
            self.hashed = start + len(view)
            self._turn.notify_all()


def checksum(path: Path, remote: RemoteFile, file: StagedFile | None) -> str:
    """The hex digest of a whole file that has an expected one: what `file` did not hash as it came is read back."""
    digest, begin = _hasher(remote), 0
    if file is not None and file.digest is not None and not file.behind:
        digest, begin = file.digest, file.hashed
    if begin < remote.size:
        with path.open("rb", buffering=0) as stored:
            stored.seek(begin)
            buffer = memoryview(bytearray(2**20))
            while count := stored.readinto(buffer):
                digest.update(buffer[:count])
            _flush(stored.fileno())
    return str(digest.hexdigest())


def _hasher(remote: RemoteFile) -> Any:
    """For the checksum that the source has of the file; None where it has none."""
    if remote.sha256:
        return hashlib.sha256()
    return hashlib.md5(usedforsecurity=False) if remote.md5 else None


def _created(path: Path) -> int:
    """A descriptor of the file, made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:  # a faster writer has just moved the folder to its place
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o644)


def _flush(descriptor: int) -> None:
    """To the disk, and out of the page cache, where the system has calls for that."""
    getattr(os, "fdatasync", os.fsync)(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

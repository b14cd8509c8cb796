"""The filling of a copy in the cache: resumable, verified, all or nothing.

Writers need no lock to be correct: two of one revision write the same bytes to the same places, and one rename makes
the model appear. The lease only saves them the double work. A writer that was killed leaves its journal: the next one
fetches what is not in it. A chunk is journalled after fdatasync, so that this holds for a crash of the node, too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import uuid
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Self

from runtime.errors import StartupError
from runtime.storage.copies import (
    MARKER,
    as_startup_error,
    copies_of,
    entries,
    folder_name,
    is_complete,
    listed_files,
    remove,
    remove_unused,
    size_of,
)
from runtime.storage.fetch import GIB, Span, spans_of
from runtime.storage.lease import Lease
from runtime.storage.source import CHUNK, Changed, RemoteFile, Source
from runtime.storage.staged_file import StagedFile, checksum

SYNC_BYTES, SYNC_SECONDS = 128 * 2**20, 1.0  # after which what was written is flushed and journalled
MARGIN = 1.01  # of the bytes that are missing, as free space
ABREAST = 4  # files fetched side by side, so that their hashes are computed side by side


class CacheWriter:
    """Fills one model's copy; `with` holds the lease. Safe to write to from several threads.

        with CacheWriter(cache_folder(options), source) as writer:
            if writer.leads:
                fetch(source, writer.missing(), buffers, writer.write)
                folder = writer.finish()

    Not leading means that another process fills it. Raises StartupError, one line, for a disk that is full, read-only
    or not writable.
    """

    def __init__(self, root: Path, source: Source) -> None:
        name = folder_name(source.uri, source.revision)
        self._source, self._root = source, root
        self.folder, self._staging = root / "models" / name, root / "staging" / name
        self._journals = root / "staging" / f"{name}.journal"
        self.lease = Lease(root / "staging" / f"{name}.lease")
        self._files: dict[str, StagedFile] = {}
        self._done: set[tuple[str, int]] = set()  # path and start of each chunk on the disk
        self._verified: set[str] = set()
        self._pending: list[Span] = []
        self._lock, self._sync_lock = threading.Lock(), threading.Lock()
        self._journal: int | None = None
        self._inode = 0
        self._ended = threading.Event()
        self._syncing = threading.Thread(target=self._sync_regularly, name="cache-sync", daemon=True)
        self._failed: OSError | None = None  # what the thread met
        self.leads = False

    def __enter__(self) -> Self:
        with as_startup_error(self._root):
            self._staging.parent.mkdir(parents=True, exist_ok=True)
            self.folder.parent.mkdir(exist_ok=True)
            self.leads = self.lease.claim()
        if self.leads:
            try:
                self._begin()
                self._syncing.start()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._syncing.is_alive():
            self._syncing.join()
        if self.leads:
            with contextlib.suppress(StartupError, OSError):
                self._sync()  # what came before an error is not fetched again
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        self.lease.release()

    # --- what is there

    def missing(self) -> list[Span]:
        """The chunks that are still to be written, in the order in which they are best fetched."""
        wanted = [
            [span for span in spans_of(file) if (file.path, span.start) not in self._done]
            for file in self._source.files()
        ]
        wanted = [spans for spans in wanted if spans]
        groups = (wanted[i : i + ABREAST] for i in range(0, len(wanted), ABREAST))
        rows = chain.from_iterable(zip_longest(*group) for group in groups)
        return [span for row in rows for span in row if span is not None]

    def has(self, span: Span) -> bool:
        """Whether these bytes, a chunk of `spans_of`, are on the disk."""
        return (span.file.path, span.start) in self._done

    def staged_bytes(self) -> int:
        """About how much whoever fills it has written."""
        with contextlib.suppress(OSError):
            stats = [path.stat() for path in self._staging.rglob("*") if path.is_file()]
            return sum(min(stat.st_blocks * 512, stat.st_size) for stat in stats)
        return 0

    def read(self, span: Span, into: memoryview) -> None:
        """Fill `into` with a chunk that is on the disk. Raises StartupError."""
        path = self._staging / span.file.path
        with as_startup_error(path), path.open("rb", buffering=0) as file:
            file.seek(span.start)
            got = 0
            while got < len(into):
                count = file.readinto(into[got:])
                if not count:
                    raise StartupError(f"{path}: ends after {span.start + got} bytes; remove it and start again")
                got += count

    # --- filling it

    def write(self, span: Span, view: memoryview) -> None:
        """Put a chunk where it belongs. It is journalled with the next batch."""
        with as_startup_error(self._staging / span.file.path):
            self._open(span.file).write(span.start, view)
            with self._lock:
                self._pending.append(span)
                due = sum(span.length for span in self._pending) >= SYNC_BYTES
            if due or self._failed:
                self._sync()

    def finish(self) -> Path:
        """Check the whole, make it appear, give its folder. Raises Changed for a checksum that is wrong."""
        if self._staging == self.folder:
            return self.folder
        with as_startup_error(self._staging):
            self._sync()
            if left := self.missing():
                raise ValueError(f"{len(left)} chunks were not written, {left[0].file.path} first")
            try:
                for remote in self._source.files():
                    self._check(remote)
                self._appear()
            except FileNotFoundError:  # another writer was faster: its rename took the folder along
                if not is_complete(self.folder):
                    raise
        remove(self._staging)
        remove(self._journals)
        return self.folder

    def _begin(self) -> None:
        if is_complete(self.folder):  # finished between the caller's look and the lease
            self._staging = self.folder
            self._done = {(file.path, span.start) for file in self._source.files() for span in spans_of(file)}
            return
        with as_startup_error(self._staging):
            self._staging.mkdir(exist_ok=True)
            self._journals.mkdir(exist_ok=True)
            self._inode = self._staging.stat().st_ino
            self._recall()
            self._adopt()
            for remote in self._source.files():
                if not remote.size:
                    self._open(remote)
        remove_unused(self._root, self.folder.name)
        needed = int(sum(span.length for span in self.missing()) * MARGIN)
        free = shutil.disk_usage(self._root).free
        if needed > free:
            raise StartupError(
                f"CACHE_DIR {self._root}: {self._source.uri} needs {needed / GIB:.2f} GiB more and {free / GIB:.2f} GiB"
                " are free; give it a larger volume or remove what is old"
            )

    def _recall(self) -> None:
        """Take the chunks that earlier writers have journalled. A line that was cut off counts for nothing."""
        known = {span.file.path: span.file for file in self._source.files() for span in spans_of(file)}
        whole = {path for path, file in known.items() if size_of(self._staging / path) == file.size}
        for journal in entries(self._journals):
            for line in journal.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    path, start, length = json.loads(line)
                    if path in whole and start % CHUNK == 0 and length == min(CHUNK, known[path].size - start):
                        self._done.add((path, start))

    def _adopt(self) -> None:
        """Link the files that another revision's copy holds already, with the same version."""
        for folder in copies_of(self._root, self._source.uri):
            theirs = {(path, size, version) for path, size, version in listed_files(folder) or ()}
            for remote in self._source.files():
                mine = self._staging / remote.path
                if (remote.path, remote.size, remote.version) in theirs and remote.size:
                    mine.parent.mkdir(parents=True, exist_ok=True)
                    with contextlib.suppress(OSError):  # not every volume has hard links
                        if not mine.exists():
                            os.link(folder / remote.path, mine)
                        elif not mine.samefile(folder / remote.path):
                            continue
                        self._done |= {(remote.path, span.start) for span in spans_of(remote)}
                        self._verified.add(remote.path)

    def _open(self, remote: RemoteFile) -> StagedFile:
        with self._lock:
            if remote.path not in self._files:
                behind = any((remote.path, span.start) in self._done for span in spans_of(remote))
                self._files[remote.path] = StagedFile(self._staging / remote.path, remote, behind)
            return self._files[remote.path]

    def _sync(self) -> None:
        """Flush what was written, then journal it. The page cache keeps nothing of it."""
        with self._sync_lock:
            if self._failed:
                raise self._failed
            with self._lock:
                batch, self._pending = self._pending, []
                files = [self._files[path] for path in {span.file.path for span in batch}]
            for file in files:
                file.flush()
            try:
                if batch:
                    self._write_journal(batch)
            except FileNotFoundError:  # another writer was faster: there is nothing left to remember
                if not is_complete(self.folder):
                    raise
            with self._lock:
                self._done |= {(span.file.path, span.start) for span in batch}

    def _sync_regularly(self) -> None:
        """So that a chunk is not lost for want of another after it: on a slow network that takes its time."""
        while not self._ended.wait(SYNC_SECONDS):
            try:
                self._sync()
            except OSError as error:
                self._failed = error  # for the next chunk, or the end, to raise
                return

    def _write_journal(self, batch: list[Span]) -> None:
        if self._journal is None:
            path = self._journals / uuid.uuid4().hex
            self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        lines = "".join(json.dumps([span.file.path, span.start, span.length]) + "\n" for span in batch)
        os.write(self._journal, b"\n" + lines.encode())

    def _check(self, remote: RemoteFile) -> None:
        """Compare the file's checksum with the source's."""
        expected, path = remote.sha256 or remote.md5, self._staging / remote.path
        if expected is None or remote.chunks or remote.path in self._verified or not remote.size:
            return
        if checksum(path, remote, self._files.get(remote.path)) != expected:
            path.unlink(missing_ok=True)  # and with it what the journals say of it
            raise Changed(f"{self._source.uri}/{remote.path}: wrong checksum after the download; upload it again")

    def _appear(self) -> None:
        if self._staging.stat().st_ino != self._inode:  # a faster writer took it; what is there now lacks its part
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._staging))
        for file in self._files.values():
            file.sync()
        for folder in {path.parent for path in self._staging.rglob("*")}:
            _fsync(folder)
        files = [[file.path, file.size, file.version] for file in self._source.files()]
        content = {"uri": self._source.uri, "revision": self._source.revision, "files": files}
        part = self._journals / f"{MARKER}-{uuid.uuid4().hex}"
        with part.open("w") as marker:
            json.dump(content, marker)
            marker.flush()
            os.fsync(marker.fileno())
        part.rename(self._staging / MARKER)
        _fsync(self._staging)
        if self.folder.exists() and not is_complete(self.folder):  # somebody took files out of it
            remove(self.folder)
        try:
            self._staging.rename(self.folder)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_complete(self.folder):
                raise
        _fsync(self.folder.parent)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Resumed:
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

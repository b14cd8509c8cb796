"""Copies of remote models on a volume: resumable, verified, all or nothing, and shared by the pods that mount it.

    CACHE_DIR/models/<uri>-<revision>/           a whole model; COMPLETE in it was written last
    CACHE_DIR/staging/<uri>-<revision>/          one that is being filled: files of full size with holes
    CACHE_DIR/staging/<uri>-<revision>.journal/  which chunks are on the disk, one file for each writer
    CACHE_DIR/staging/<uri>-<revision>.lease     who fills it; its mtime is the heartbeat

Names are digests, so a changed source has another folder. Writers need no lock to be correct: two of one revision
write the same bytes to the same places, and one rename makes the model appear. The lease only saves them the double
work; flock is not used, as network volumes may lack it. A writer that was killed leaves its journal: the next one
fetches what is not in it. A chunk is journalled after fdatasync, so that this holds for a crash of the node, too.

A start marks the copy that it uses, then once an hour as long as its process lives. Other revisions of the same
model are removed once their mark is a day old; half-filled ones once their writer is dead, those of other models when
they are a day old. The store is asked at each start: a copy is not used when its source cannot be reached, as nobody
could say whether it is current.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.errors import StartupError
from runtime.logs import log
from runtime.storage.fetch import GIB, Meter, OnProgress, Span, fetch, spans_of
from runtime.storage.lease import STALE_SECONDS, Lease, age
from runtime.storage.options import StorageOptions
from runtime.storage.source import CHUNK, Changed, RemoteFile, Source

MARKER = "COMPLETE"
DAY = 86_400.0
MARK_SECONDS = 3600.0
WAIT_SECONDS = 0.5
SYNC_BYTES, SYNC_SECONDS = 128 * 2**20, 1.0  # after which what was written is flushed and journalled
HASH_PATIENCE = 5.0  # seconds that a chunk waits for the one before it to be hashed
MARGIN = 1.01  # of the bytes that are missing, as free space
BLOCK = 4096  # what O_DIRECT wants lengths to be multiples of
ABREAST = 4  # files fetched side by side, so that their hashes are computed side by side


def cached(source: Source, options: StorageOptions, on_progress: OnProgress | None = None) -> Path:
    """The folder of a verified copy of the model, downloaded where there is none, by this process or by another.

    `on_progress` as in `registry.resolve`. Raises Changed where an object was replaced meanwhile, StartupError else.
    """
    root, files = cache_folder(options), source.files()
    waiting: Meter | None = None
    seen = 0  # bytes of the other process's
    with ExitStack() as stack:
        while (folder := complete(root, source.uri, source.revision)) is None:
            with CacheWriter(root, source) as writer:
                if writer.leads:
                    stack.close()
                    _fill(writer, source, options.threads, on_progress)
                    folder = writer.finish()
                    break
                there = writer.staged_bytes()
                if waiting is None:
                    log(logging.INFO, f"another process downloads {source.uri}; waiting for it")
                    seen, total = there, sum(file.size for file in files)
                    waiting = stack.enter_context(Meter(source.uri, total, seen, on_progress))
                waiting.add(there - seen)
                seen = there
            time.sleep(WAIT_SECONDS)
    _mark(folder)
    threading.Thread(target=_keep_marked, args=(folder,), name="cache-mark", daemon=True).start()
    _clean(root, folder.name)
    return folder


def _fill(writer: CacheWriter, source: Source, threads: int, on_progress: OnProgress | None) -> None:
    missing = writer.missing()
    total = sum(file.size for file in source.files())
    done = total - sum(span.length for span in missing)

    def sink(span: Span, view: memoryview) -> None:
        writer.write(span, view)
        meter.add(span.length, span.file.component)

    buffers = [memoryview(mmap.mmap(-1, CHUNK)) for _ in range(min(threads, len(missing)))]  # page-aligned: O_DIRECT
    with Meter(source.uri, total, done, on_progress) as meter:
        fetch(source, missing, buffers, sink, on_retry=meter.retry)
        meter.end()


def cache_folder(options: StorageOptions) -> Path:
    """CACHE_DIR; where it is not set, a folder of this user's among the temporary files, gone with the container."""
    if options.cache_dir:
        return Path(options.cache_dir).absolute()
    folder = Path(tempfile.gettempdir(), f"diffusion-runtime-{os.getuid()}")
    with _told(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise StartupError(f"{folder}: belongs to somebody else; set CACHE_DIR")
    return folder


def complete(root: Path, uri: str, revision: str) -> Path | None:
    """The folder of this revision's copy, where there is a whole one: every file is there with its size."""
    folder = root / "models" / _name(uri, revision)
    return folder if _is_complete(folder) else None


def newest(root: Path, uri: str) -> Path | None:
    """The copy of the model that was used last, of whatever revision; for those who may not ask the source."""
    folders = [folder for folder in _entries(root / "models") if folder.name.startswith(_name(uri, ""))]
    return max(filter(_is_complete, folders), key=lambda folder: _mtime(folder / MARKER), default=None)


@dataclass(eq=False)
class _File:
    """A staged file. `direct` is None where O_DIRECT cannot be had; `hashed` bytes from its start are in `digest`."""

    remote: RemoteFile
    buffered: int
    direct: int | None
    digest: Any = None
    hashed: int = 0
    behind: bool = False  # no longer hashed as it comes: read back in the end
    turn: threading.Condition = field(default_factory=threading.Condition)


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
        name = _name(source.uri, source.revision)
        self._source, self._root = source, root
        self.folder, self._staging = root / "models" / name, root / "staging" / name
        self._journals = root / "staging" / f"{name}.journal"
        self.lease = Lease(root / "staging" / f"{name}.lease")
        self._files: dict[str, _File] = {}
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
        with _told(self._root):
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
            for descriptor in (file.buffered, file.direct):
                if descriptor is not None:
                    os.close(descriptor)
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
        with _told(path), path.open("rb", buffering=0) as file:
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
        with _told(self._staging / span.file.path):
            file = self._open(span.file)
            _put(file, span.start, view)
            _hash(file, span.start, view)
            with self._lock:
                self._pending.append(span)
                due = sum(span.length for span in self._pending) >= SYNC_BYTES
            if due or self._failed:
                self._sync()

    def finish(self) -> Path:
        """Check the whole, make it appear, give its folder. Raises Changed for a checksum that is wrong."""
        if self._staging == self.folder:
            return self.folder
        with _told(self._staging):
            self._sync()
        if left := self.missing():
            raise ValueError(f"{len(left)} chunks were not written, {left[0].file.path} first")
        try:
            for remote in self._source.files():
                self._check(remote)
            self._appear()
        except FileNotFoundError as exc:  # another writer was faster: its rename took the folder along
            if not _is_complete(self.folder):
                raise StartupError(_advice(self._staging, exc)) from exc
        except OSError as exc:
            raise StartupError(_advice(self._staging, exc)) from exc
        _remove(self._staging)
        _remove(self._journals)
        return self.folder

    def _begin(self) -> None:
        if _is_complete(self.folder):  # finished between the caller's look and the lease
            self._staging = self.folder
            self._done = {(file.path, span.start) for file in self._source.files() for span in spans_of(file)}
            return
        with _told(self._staging):
            self._staging.mkdir(exist_ok=True)
            self._journals.mkdir(exist_ok=True)
            self._inode = self._staging.stat().st_ino
            self._recall()
            self._adopt()
            for remote in self._source.files():
                if not remote.size:
                    self._open(remote)
        _clean(self._root, self.folder.name)
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
        whole = {path for path, file in known.items() if _size(self._staging / path) == file.size}
        for journal in _entries(self._journals):
            for line in journal.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    path, start, length = json.loads(line)
                    if path in whole and start % CHUNK == 0 and length == min(CHUNK, known[path].size - start):
                        self._done.add((path, start))

    def _adopt(self) -> None:
        """Link the files that another revision's copy holds already, with the same version."""
        for folder in _entries(self.folder.parent):
            if not folder.name.startswith(_name(self._source.uri, "")) or not _is_complete(folder):
                continue
            theirs = {(path, size, version) for path, size, version in _marker(folder)["files"]}
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

    def _open(self, remote: RemoteFile) -> _File:
        with self._lock:
            if remote.path not in self._files:
                path = self._staging / remote.path
                descriptor = _created(path)
                file = _File(remote, descriptor, None)
                self._files[remote.path] = file
                if os.fstat(descriptor).st_size != remote.size:
                    os.ftruncate(descriptor, remote.size)
                with contextlib.suppress(OSError, AttributeError):  # tmpfs and some network volumes lack it
                    file.direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_NOFOLLOW)
                file.digest = _digest(remote)
                file.behind = any((remote.path, span.start) in self._done for span in spans_of(remote))
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
                _flush(file.buffered)
            try:
                if batch:
                    self._write_journal(batch)
            except FileNotFoundError:  # another writer was faster: there is nothing left to remember
                if not _is_complete(self.folder):
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
        """Compare the file's checksum with the source's: what was not hashed as it came is read back."""
        expected, path = remote.sha256 or remote.md5, self._staging / remote.path
        if expected is None or remote.chunks or remote.path in self._verified or not remote.size:
            return
        file = self._files.get(remote.path)
        if file is None or file.behind or file.digest is None:
            digest, begin = _digest(remote, whole=True), 0
        else:
            digest, begin = file.digest, file.hashed
        if begin < remote.size:
            with path.open("rb", buffering=0) as stored:
                stored.seek(begin)
                buffer = memoryview(bytearray(2**20))
                while count := stored.readinto(buffer):
                    digest.update(buffer[:count])
                _flush(stored.fileno())
        if digest.hexdigest() != expected:
            path.unlink(missing_ok=True)  # and with it what the journals say of it
            raise Changed(f"{self._source.uri}/{remote.path}: wrong checksum after the download; upload it again")

    def _appear(self) -> None:
        if self._staging.stat().st_ino != self._inode:  # a faster writer took it; what is there now lacks its part
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._staging))
        for file in self._files.values():
            os.fsync(file.buffered)
        for folder in {path.parent for path in self._staging.rglob("*")}:
            _fsync(folder)
        entries = [[file.path, file.size, file.version] for file in self._source.files()]
        content = {"uri": self._source.uri, "revision": self._source.revision, "files": entries}
        part = self._journals / f"{MARKER}-{uuid.uuid4().hex}"
        with part.open("w") as marker:
            json.dump(content, marker)
            marker.flush()
            os.fsync(marker.fileno())
        part.rename(self._staging / MARKER)
        _fsync(self._staging)
        if self.folder.exists() and not _is_complete(self.folder):  # somebody took files out of it
            _remove(self.folder)
        try:
            self._staging.rename(self.folder)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _is_complete(self.folder):
                raise
        _fsync(self.folder.parent)


# --- bytes


def _put(file: _File, start: int, view: memoryview) -> None:
    """Write past the page cache as far as that goes: whole blocks from aligned memory, the rest as usual."""
    done = 0
    if file.direct is not None and start % BLOCK == 0:
        whole = len(view) // BLOCK * BLOCK
        try:
            while done < whole:
                done += os.pwrite(file.direct, view[done:whole], start + done)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # memory that is not aligned
                raise
    while done < len(view):
        done += os.pwrite(file.buffered, view[done:], start + done)


def _hash(file: _File, start: int, view: memoryview) -> None:
    """Add a chunk to the file's hash in its turn; the chunk before it is in flight on another thread."""
    if file.digest is None:
        return
    with file.turn:
        if not file.turn.wait_for(lambda: file.behind or file.hashed >= start, HASH_PATIENCE):
            file.behind = True
        if file.behind or file.hashed != start:
            return
    file.digest.update(view)
    with file.turn:
        file.hashed = start + len(view)
        file.turn.notify_all()


def _digest(remote: RemoteFile, whole: bool = False) -> Any:
    """A hash to compute over the file, None where `fetch` checks it chunk by chunk or as one."""
    if remote.chunks or (remote.size <= CHUNK and not whole):
        return None
    if remote.sha256:
        return hashlib.sha256()
    return hashlib.md5(usedforsecurity=False) if remote.md5 else None


# --- marks and what is old


def _name(uri: str, revision: str) -> str:
    """The folder of a revision; without one, what the names of all revisions begin with."""
    uri, revision = (hashlib.sha256(text.encode()).hexdigest()[:16] if text else "" for text in (uri, revision))
    return f"{uri}-{revision}"


def _marker(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((folder / MARKER).read_bytes())
        if isinstance(content, dict) and isinstance(content.get("files"), list):
            return content
    return {}


def _is_complete(folder: Path) -> bool:
    content = _marker(folder)
    return bool(content) and all(_size(folder / path) == size for path, size, _ in content["files"])


def _mark(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a read-only volume serves as well
        os.utime(folder / MARKER)


def _keep_marked(folder: Path) -> None:
    while True:
        time.sleep(MARK_SECONDS)
        _mark(folder)


def _clean(root: Path, name: str) -> None:
    """Remove what nobody uses, but nothing of revision `name`. What cannot be removed stays."""
    uri = name.partition("-")[0]
    for folder in _entries(root / "models"):
        if folder.name.startswith(uri) and folder.name != name and age(folder / MARKER, root) > DAY:
            log(logging.INFO, f"removing {folder}: another revision of the model, unused for a day")
            _remove(folder)
    for path in _entries(root / "staging"):
        stem = path.name.partition(".")[0]
        lease = root / "staging" / f"{stem}.lease"
        beat = min(age(lease, root), age(path, root))
        if stem == name or beat < STALE_SECONDS or (beat < DAY and not stem.startswith(uri)):
            continue
        log(logging.INFO, f"removing {path}: left by a download that has ended")
        _remove(path)


def _created(path: Path) -> int:
    """A descriptor of the file, made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:  # a faster writer has just moved the folder to its place
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o644)


def _remove(path: Path) -> None:
    """Remove a file or a folder. A folder first loses its name, so that no reader finds the half of it."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            gone = path.parent.parent / "staging" / f"removed-{uuid.uuid4().hex}"
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        else:
            path.unlink()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _mtime(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _flush(descriptor: int) -> None:
    """To the disk, and out of the page cache, where the system has calls for that."""
    getattr(os, "fdatasync", os.fsync)(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StartupError(_advice(path, exc)) from exc


def _advice(path: Path, error: OSError) -> str:
    """What the file system said as one line of what to do."""
    advice = {
        errno.ENOSPC: "the disk is full; give CACHE_DIR a larger volume",
        errno.EDQUOT: "the quota is used up; give CACHE_DIR a larger volume",
        errno.EFBIG: "a file of this size is not allowed here; give CACHE_DIR another volume",
        errno.EROFS: "the volume is read-only; mount it writable or set CACHE_DIR to another",
        errno.EACCES: f"user {os.getuid()} may not write here; change the owner or set CACHE_DIR to another folder",
        errno.EPERM: f"user {os.getuid()} may not write here; change the owner or set CACHE_DIR to another folder",
        errno.ENOENT: "is not there and cannot be made, or vanished; check CACHE_DIR",
    }
    return f"{error.filename or path}: {advice.get(error.errno or 0, f'{error.strerror or error}; check CACHE_DIR')}"

"""What lies in CACHE_DIR: copies of remote models, each whole or not there, shared by the pods that mount the volume.

    CACHE_DIR/models/<uri>-<revision>/           a whole model; COMPLETE in it was written last
    CACHE_DIR/staging/<uri>-<revision>/          one that is being filled: files of full size with holes
    CACHE_DIR/staging/<uri>-<revision>.journal/  which chunks are on the disk, one file for each writer
    CACHE_DIR/staging/<uri>-<revision>.lease     who fills it; its mtime is the heartbeat

Names are digests, so a changed source has another folder. A start marks the copy that it uses, then once an hour as
long as its process lives. Other revisions of the same model are removed once their mark is a day old; half-filled ones
once their writer is dead, those of other models when they are a day old.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import StartupError
from runtime.logs import log
from runtime.storage.lease import STALE_SECONDS, age
from runtime.storage.options import StorageOptions

MARKER = "COMPLETE"
DAY = 86_400.0
MARK_SECONDS = 3600.0


def cache_folder(options: StorageOptions) -> Path:
    """CACHE_DIR; where it is not set, a folder of this user's among the temporary files, gone with the container."""
    if options.cache_dir:
        return Path(options.cache_dir).absolute()
    folder = Path(tempfile.gettempdir(), f"diffusion-runtime-{os.getuid()}")
    with as_startup_error(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise StartupError(f"{folder}: belongs to somebody else; set CACHE_DIR")
    return folder


def complete(root: Path, uri: str, revision: str) -> Path | None:
    """The folder of this revision's copy, where there is a whole one: every file is there with its size."""
    folder = root / "models" / folder_name(uri, revision)
    return folder if is_complete(folder) else None


def newest(root: Path, uri: str) -> Path | None:
    """The copy of the model that was used last, of whatever revision; for those who may not ask the source."""
    return max(copies_of(root, uri), key=lambda folder: _mtime(folder / MARKER), default=None)


def copies_of(root: Path, uri: str) -> Iterator[Path]:
    """The whole copies of the model, of every revision."""
    for folder in entries(root / "models"):
        if folder.name.startswith(folder_name(uri, "")) and is_complete(folder):
            yield folder


def folder_name(uri: str, revision: str) -> str:
    """The folder of a revision; without one, what the names of all revisions begin with."""
    uri, revision = (hashlib.sha256(text.encode()).hexdigest()[:16] if text else "" for text in (uri, revision))
    return f"{uri}-{revision}"


def listed_files(folder: Path) -> list[Any] | None:
    """Path, size and version of each file of a copy, from its marker; None where that is missing or no marker."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((folder / MARKER).read_bytes())
        if isinstance(content, dict) and isinstance(content.get("files"), list):
            return list(content["files"])
    return None


def is_complete(folder: Path) -> bool:
    """Whether the copy has its marker, and every file with the size that it had."""
    files = listed_files(folder)
    return files is not None and all(size_of(folder / path) == size for path, size, _ in files)


# --- marks and what is old


def keep_marked(folder: Path) -> None:
    """Mark the copy as used, now and every MARK_SECONDS as long as this process lives."""
    _mark(folder)
    threading.Thread(target=_mark_regularly, args=(folder,), name="cache-mark", daemon=True).start()


def _mark(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a read-only volume serves as well
        os.utime(folder / MARKER)


def _mark_regularly(folder: Path) -> None:
    while True:
        time.sleep(MARK_SECONDS)
        _mark(folder)


def remove_unused(root: Path, name: str) -> None:
    """Remove what nobody uses, but nothing of revision `name`. What cannot be removed stays."""
    uri = name.partition("-")[0]
    for folder in entries(root / "models"):
        if folder.name.startswith(uri) and folder.name != name and age(folder / MARKER, root) > DAY:
            log(logging.INFO, f"removing {folder}: another revision of the model, unused for a day")
            remove(folder)
    for path in entries(root / "staging"):
        stem = path.name.partition(".")[0]
        lease = root / "staging" / f"{stem}.lease"
        beat = min(age(lease, root), age(path, root))
        if stem == name or beat < STALE_SECONDS or (beat < DAY and not stem.startswith(uri)):
            continue
        log(logging.INFO, f"removing {path}: left by a download that has ended")
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder. A folder first loses its name, so that no reader finds the half of it."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            gone = path.parent.parent / "staging" / f"removed-{uuid.uuid4().hex}"
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        else:
            path.unlink()


# --- the file system


def size_of(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _mtime(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in order; nothing where it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(folder.iterdir())
    return []


@contextlib.contextmanager
def as_startup_error(path: Path) -> Iterator[None]:
    """What the file system refuses is raised as StartupError, one line of what to do."""
    try:
        yield
    except OSError as exc:
        raise StartupError(_advice(path, exc)) from exc


def _advice(path: Path, error: OSError) -> str:
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

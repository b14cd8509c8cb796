"""The folder that stands for a remote model: its small files, and of its weights the headers. No torch."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from runtime.logs import log
from runtime.storage.fetch import read_whole, retried
from runtime.storage.source import RemoteFile, Source

SKELETON = "diffusion-skeleton-"
MAX_HEADER = 100_000_000  # bytes of a safetensors header, as the library has it
HEADER_READ = 2**20  # most headers are shorter


@contextmanager
def skeleton(source: Source) -> Iterator[Path]:
    """The source's skeleton in a temporary folder. Raises StartupError, and OSError where no folder can be made."""
    with tempfile.TemporaryDirectory(prefix=SKELETON) as name, ExitStack() as stack:
        folder = Path(name)
        _claim(folder, stack)
        write_skeleton(source, folder)
        log(logging.DEBUG, "headers read")
        yield folder


def _claim(folder: Path, stack: ExitStack) -> None:
    """Hold the folder's lock, and remove the skeletons that killed processes have left: nobody holds theirs."""
    for other in folder.parent.glob(f"{SKELETON}*"):
        with suppress(OSError):
            descriptor = os.open(other, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if other == folder:
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                continue
            with ExitStack() as closing:
                closing.callback(os.close, descriptor)
                # A moment old, it may not be locked yet.
                if time.time() - os.fstat(descriptor).st_mtime > 60:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other, ignore_errors=True)


def write_skeleton(source: Source, folder: Path) -> None:
    """Fill `folder` with the source's small files, and with the headers of its weights: files of their full size whose
    tensors are holes. All that judges a model folder without reading weights works on it.

    Raises StartupError, and OSError for what the disk refuses.
    """
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda file: _write_small(source, file, folder / file.path), source.files()):
            pass


def _write_small(source: Source, file: RemoteFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_weights(file):
        path.write_bytes(read_whole(source, file))
        return
    with path.open("wb") as out:
        out.write(_header(source, file))
        out.truncate(file.size)


def is_weights(file: RemoteFile) -> bool:
    """Whether the file is one whose tensors a skeleton leaves out."""
    return file.path.endswith(".safetensors")


def _header(source: Source, file: RemoteFile) -> bytes:
    """The first bytes of a safetensors file: the header's length, and the header."""
    begin = _first_bytes(source, file, min(HEADER_READ, file.size))
    length = struct.unpack("<Q", begin[:8])[0] if len(begin) >= 8 else 0
    if 8 + length > min(MAX_HEADER, file.size):
        return begin  # for the check of the folder to refuse
    return begin[: 8 + length] if 8 + length <= len(begin) else _first_bytes(source, file, 8 + length)


def _first_bytes(source: Source, file: RemoteFile, length: int) -> bytes:
    content = bytearray(length)
    retried(f"{source.uri}/{file.path}", lambda: source.read(file, 0, memoryview(content)))
    return bytes(content)

"""A folder of this machine, read as remote models are: in ranges, into the caller's buffers."""

from __future__ import annotations

import contextlib
import os
from functools import cached_property
from pathlib import Path

from runtime.errors import StartupError
from runtime.storage.fetch import read_whole
from runtime.storage.source import RemoteFile, Transient, digest_of, select


class Folder:
    """A `Source`. Its revision is `digest_of` its files; versions are their mtimes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def uri(self) -> str:
        return str(self._folder)

    @cached_property
    def _selected(self) -> tuple[RemoteFile, ...]:
        found = []
        seen: set[tuple[int, int]] = set()  # folders: a link may lead back to one
        for home, folders, names in os.walk(self._folder, followlinks=True):
            status = Path(home).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for name in names:
                path = Path(home, name)
                with contextlib.suppress(OSError):  # a link to nowhere; where it is needed, it is missing
                    status = path.stat()
                    found.append(
                        RemoteFile(path.relative_to(self._folder).as_posix(), status.st_size, str(status.st_mtime_ns))
                    )
        return select(self.uri, found, lambda file: read_whole(self, file))

    def files(self) -> tuple[RemoteFile, ...]:
        return self._selected

    @property
    def revision(self) -> str:
        return digest_of(self.files())

    def close(self) -> None:
        pass

    def read(self, file: RemoteFile, start: int, into: memoryview) -> None:
        try:
            with (self._folder / file.path).open("rb", buffering=0) as opened:
                while into:
                    count = os.preadv(opened.fileno(), [into], start)
                    if count == 0:
                        raise StartupError(f"{self._folder / file.path}: shorter than it was")
                    start, into = start + count, into[count:]
        except BlockingIOError as error:
            raise Transient(str(error)) from error
        except OSError as error:
            raise StartupError(f"{self._folder / file.path}: {error.strerror}") from error

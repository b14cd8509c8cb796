"""Who fills a copy in the cache: a file that is made by one alone, and whose mtime is its owner's heartbeat.

It only saves double work. No lock of the system is used: network volumes may lack them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from runtime.logs import log

STALE_SECONDS = 60.0  # without a heartbeat: its owner is dead


class Lease:
    """A lease that this process may take once."""

    def __init__(self, path: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.path, self._stale, self._owner = path, stale_seconds, _identity()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="cache-lease", daemon=True)

    def claim(self) -> bool:
        """Take it, and keep it fresh until `release`; False where a living process has it. Raises OSError."""
        for _ in range(2):
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                if not self._take_from_the_dead():
                    return False
            else:
                with os.fdopen(descriptor, "w") as file:
                    file.write(self._owner)
                self._heart.start()
                return True
        return False

    def release(self) -> None:
        """Give it back, if it is ours still."""
        self._ended.set()
        if self._heart.is_alive():
            self._heart.join()
            if _read(self.path) == self._owner:
                self.path.unlink(missing_ok=True)

    def _take_from_the_dead(self) -> bool:
        """Remove the lease of a writer that has ended. Two that do so at once may both lead: that costs work only."""
        holder = _read(self.path)
        if holder is None:
            return True
        if not _is_dead(holder) and age(self.path, self.path.parents[1]) < self._stale:
            return False
        aside = self.path.with_name(f"{self.path.name}-{uuid.uuid4().hex}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return True
        if _read(aside) != holder:  # a living one had just taken it
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
            aside.unlink(missing_ok=True)
            return False
        aside.unlink(missing_ok=True)
        log(logging.INFO, "taking over a download whose process has ended")
        return True

    def _beat(self) -> None:
        while not self._ended.wait(self._stale / 6):
            with contextlib.suppress(OSError):
                if _read(self.path) == self._owner:
                    os.utime(self.path)


def age(path: Path, root: Path) -> float:
    """Seconds since the file was touched, by the volume's own clock; infinite where there is none."""
    try:
        then = path.stat().st_mtime
    except OSError:
        return float("inf")
    probe = root / "staging" / f".now-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime - then
    except OSError:  # nothing can be written: this machine's clock has to do
        return time.time() - then
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _identity() -> str:
    """Host, boot, process and when it started: enough to know a dead owner on the same host at once."""
    return json.dumps([socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()), uuid.uuid4().hex])


def _is_dead(holder: str) -> bool:
    try:
        host, boot, pid, started, _ = json.loads(holder)
        return (host, boot) == (socket.gethostname(), _boot()) and bool(started) and _started(pid) != started
    except (ValueError, TypeError):
        return False


def _boot() -> str:
    return _read(Path("/proc/sys/kernel/random/boot_id")) or ""


def _started(pid: int) -> str:
    """The process's start in clock ticks since boot; empty where none of that number runs, or there is no /proc."""
    fields = (_read(Path(f"/proc/{pid}/stat")) or "").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None

"""Engines that wait until a test has seen what it is after, on a machine of any speed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.conftest import ROOT

if TYPE_CHECKING:
    from tests.conftest import Server

# Every interpreter runs it first. The engine, which does not yet end with its server then, does so here.
WAIT = """\
import os, sys, time

if "runtime.engine.worker" in sys.orig_argv:
    server = os.getppid()
    while os.path.exists({closed!r}):
        if os.getppid() != server:
            os._exit(1)
        time.sleep(0.01)
"""


@dataclass
class Gate:
    """A server with this environment does not begin to load its model before `open()`."""

    environment: dict[str, str]
    closed: Path

    def open(self) -> None:
        self.closed.unlink()


def start_gate(folder: Path) -> Gate:
    """`folder` is made for it."""
    folder.mkdir()
    closed = folder / "closed"
    closed.touch()
    (folder / "sitecustomize.py").write_text(WAIT.format(closed=str(closed)))
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))
    return Gate({"PYTHONPATH": path}, closed)


@contextlib.contextmanager
def frozen(server: Server) -> Iterator[None]:
    """The engine stands still: what it is given waits in it and does not end. (Not for ENGINE_TIMEOUT, a minute: it
    would be taken for one that hangs.)"""
    children = psutil.Process(server.process.pid).children()
    (engine,) = (child for child in children if "runtime.engine.worker" in child.cmdline())
    engine.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its server
            engine.resume()

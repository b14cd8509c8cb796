"""Engines that stand still until a test has seen what it is after, on a machine of any speed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.conftest import Server


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

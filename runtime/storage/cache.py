"""A remote model's way into the cache: a copy that is there, that another process is filling, or that this one fills.

The store is asked at each start: a copy is not used when its source cannot be reached, as nobody could say whether it
is current.
"""

from __future__ import annotations

import logging
import mmap
import time
from contextlib import ExitStack
from pathlib import Path

from runtime.logs import log
from runtime.storage.cache_writer import CacheWriter
from runtime.storage.copies import cache_folder, complete, keep_marked, remove_unused
from runtime.storage.fetch import Meter, OnProgress, Span, fetch
from runtime.storage.options import StorageOptions
from runtime.storage.source import CHUNK, Source

WAIT_SECONDS = 0.5


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
    keep_marked(folder)
    remove_unused(root, folder.name)
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

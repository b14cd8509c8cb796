"""LOAD_MODE: whether a model's weights are streamed, come by way of the cache, or are mapped from a folder's files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from runtime.assembly import CannotStreamError
from runtime.errors import StartupError
from runtime.logs import log
from runtime.storage.cache import cached
from runtime.storage.cache_writer import CacheWriter
from runtime.storage.copies import cache_folder, complete
from runtime.storage.fetch import OnProgress
from runtime.storage.folder import Folder
from runtime.storage.options import StorageOptions
from runtime.storage.skeleton import skeleton
from runtime.storage.source import Source
from runtime.streaming import Stream

Loaded = TypeVar("Loaded")


def load_remote(
    source: Source,
    options: StorageOptions,
    on_progress: OnProgress,
    load: Callable[[Path, Stream | None], Loaded],
    filled: Path | None = None,
) -> Loaded:
    """What `load(folder, stream)` gives: with a stream the folder is a skeleton, without one a copy in the cache,
    `filled` where there is one already.

    LOAD_MODE=cached, a copy that is there and another process that is filling one lead to the cache; so does a
    pipeline that cannot be streamed, with a line in the log. Raises StartupError, and what `load` raises.
    """
    there = options.cache_dir and complete(cache_folder(options), source.uri, source.revision)
    if options.load_mode != "cached" and not there:
        try:
            with ExitStack() as stack:
                writer = None
                if options.cache_dir:
                    writer = stack.enter_context(CacheWriter(cache_folder(options), source))
                if writer is None or writer.leads:
                    folder = stack.enter_context(_skeleton_of(source))
                    return load(folder, Stream(source, folder, options.threads, on_progress, writer))
        except CannotStreamError as why:
            log(logging.WARNING, f"{source.uri} is loaded by way of the cache", reason=str(why))
    folder = filled or cached(source, options, on_progress)
    with _named(folder, source.uri):
        return load(folder, None)


def load_folder(
    folder: Path,
    options: StorageOptions,
    device: str,
    on_progress: OnProgress,
    load: Callable[[Path, Stream | None], Loaded],
) -> Loaded:
    """As `load_remote`, from a folder of this machine: its files are read side by side into a CUDA device, and mapped
    into memory for another `device` or with LOAD_MODE=cached."""
    if options.load_mode == "stream" or (options.load_mode == "auto" and device == "cuda"):
        source = Folder(folder)
        try:
            with _skeleton_of(source) as made:
                return load(made, Stream(source, made, options.threads, on_progress, None))
        except CannotStreamError as why:
            log(logging.WARNING, f"{folder} is loaded from mapped files", reason=str(why))
    return load(folder, None)


@contextmanager
def _skeleton_of(source: Source) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(skeleton(source))
        except OSError as error:  # no room for a megabyte: files that are there already may still do
            raise CannotStreamError(f"the temporary directory: {error.strerror or error}") from error
        with _named(folder, source.uri):
            yield folder


@contextmanager
def _named(folder: Path, uri: str) -> Iterator[None]:
    """Errors name the model as the operator does, not a folder of ours."""
    try:
        yield
    except StartupError as error:
        raise type(error)(str(error).replace(str(folder), uri)) from error
    except CannotStreamError:
        raise
    except Exception as error:
        log(logging.ERROR, "the model could not be loaded", exc_info=error)
        reason = (str(error).strip().splitlines() or [""])[0].replace(str(folder), uri)
        raise StartupError(f"{uri}: cannot be loaded: {type(error).__name__}: {reason}") from error

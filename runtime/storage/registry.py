"""From MODEL_ID to a folder, or to a source that can be streamed. A new scheme: its module and one line in SCHEMES."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from runtime.errors import StartupError, shown
from runtime.logs import log
from runtime.storage.options import StorageOptions

if TYPE_CHECKING:  # what they import is not needed for a local folder
    from runtime.storage.fetch import OnProgress
    from runtime.storage.source import Source

# Scheme -> "module:function"; the function takes the whole MODEL_ID and the options and gives a folder of this
# machine or a remote Source, or raises StartupError.
SCHEMES = {
    "": "runtime.storage.local:from_path",
    "file": "runtime.storage.local:from_uri",
    "pvc": "runtime.storage.local:from_claim",
    "s3": "runtime.storage.s3:open_source",
    "hf": "runtime.storage.hub:open_source",
}
DEFAULTS = StorageOptions()
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}([@:][\w./-]{1,200})?", re.ASCII)


def open_source(source: str, options: StorageOptions) -> Source | Path:
    """The model's folder where it is on this machine, else a source of its files. Nothing is downloaded.

    Raises StartupError for a scheme that there is none of and for whatever the scheme cannot provide.
    """
    scheme, separator, _ = source.partition("://")
    scheme = scheme.lower() if separator else ""
    if not scheme and HUB_ID.fullmatch(source) and not os.path.exists(source):  # noqa: PTH110 (raises for long names)
        scheme, source = "hf", f"hf://{source}"
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES if name)
        raise StartupError(f"MODEL_ID {shown(source, 400)}: models come from a local path, a Hub id and {known}")
    module, function = SCHEMES[scheme].split(":")
    return cast("Source | Path", getattr(import_module(module), function)(source, options))


def resolve(source: str, options: StorageOptions = DEFAULTS, on_progress: OnProgress | None = None) -> Path:
    """The local folder that holds the model, absolute and readable: where it lies, or its copy in the cache.

    `on_progress` hears of a download about twice a second, from any thread. Raises StartupError.
    """
    opened = open_source(source, options)
    if isinstance(opened, Path):
        return opened
    from runtime.storage.cache import cached
    from runtime.storage.source import Changed

    try:
        with contextlib.closing(opened):
            return cached(opened, options, on_progress)
    except Changed as changed:
        log(logging.WARNING, f"{changed}: starting again")
    again = open_source(source, options)
    if isinstance(again, Path):
        return again
    with contextlib.closing(again):
        return cached(again, options, on_progress)

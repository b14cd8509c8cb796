"""Models in the file system: a path, a mounted volume, file://."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from runtime.errors import StartupError, shown


def from_path(model_id: str) -> Path:
    """The folder at a path. Raises StartupError where it is no folder or may not be read."""
    if not model_id or "\0" in model_id:
        raise StartupError(f"MODEL_ID {shown(model_id, 400)} is no path")
    folder = Path(model_id).absolute()
    if not os.path.exists(folder):  # noqa: PTH110 (Path.exists raises for a name that is too long)
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: no such folder; a hub id is not loaded from the hub")
    if not os.path.isdir(folder):  # noqa: PTH112
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: not a folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: user {os.getuid()} may not read this folder")
    return folder


def from_uri(model_id: str) -> Path:
    """The folder of a file:// URI, percent-decoded. Raises StartupError as `from_path`, and for another host."""
    try:
        uri = urlsplit(model_id)
    except ValueError as exc:
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: {exc}") from exc
    if uri.netloc not in ("", "localhost"):
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: file:// reaches this host only, not {shown(uri.netloc)}")
    if uri.query or uri.fragment:
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: write ? and # in a file:// path as %3F and %23")
    return from_path(unquote(uri.path))

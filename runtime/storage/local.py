"""Models in the file system: a path, file://, a mounted volume as pvc://. They are used where they lie."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from runtime.errors import StartupError, shown
from runtime.storage.options import StorageOptions

# Where KServe mounts the volume of pvc://claim/path: its whole, or the path in it in place of the model's folder.
CLAIM_MOUNTS = ("/mnt/pvc", "/mnt/models")


def from_path(model_id: str, options: StorageOptions | None = None) -> Path:
    """The folder at a path. Raises StartupError where it is no folder or may not be read."""
    if not model_id or "\0" in model_id:
        raise StartupError(f"MODEL_ID {shown(model_id, 400)} is no path")
    folder = Path(model_id).absolute()
    if not os.path.exists(folder):  # noqa: PTH110 (Path.exists raises for a name that is too long)
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: no such folder")
    if not os.path.isdir(folder):  # noqa: PTH112
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: not a folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: user {os.getuid()} may not read this folder")
    return folder


def from_uri(model_id: str, options: StorageOptions | None = None) -> Path:
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


def from_claim(model_id: str, options: StorageOptions | None = None) -> Path:
    """The folder of pvc://claim/path, which somebody else must have mounted: this process cannot.

    The first that exists of /mnt/pvc/path, /mnt/models/path and, as KServe mounts the path itself there, /mnt/models
    where it holds a model. The claim's name is not looked at: a pod does not see it. Raises StartupError as
    `from_path`.
    """
    claim, _, path = model_id.partition("://")[2].partition("/")
    parts = [part for part in path.split("/") if part]
    if not claim or ".." in parts or not model_id.isprintable():
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: is no pvc://claim/path")
    candidates = [Path(mount, *parts) for mount in CLAIM_MOUNTS]
    for folder in candidates:
        if folder.is_dir():
            return from_path(str(folder))
    whole = Path(CLAIM_MOUNTS[-1])
    if (whole / "model_index.json").is_file():
        return from_path(str(whole))
    tried = " and ".join(str(folder) for folder in candidates)
    raise StartupError(
        f"MODEL_ID {shown(model_id, 400)}: not mounted, there is no {tried}; mount the claim {shown(claim)} at /mnt/pvc"
    )

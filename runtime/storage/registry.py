"""From MODEL_ID to a folder. Adding a scheme: its module here and one line in SCHEMES."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from runtime.errors import StartupError, shown

# Scheme -> "module:function"; the function takes the whole MODEL_ID and gives a folder or raises StartupError.
SCHEMES = {
    "": "runtime.storage.local:from_path",
    "file": "runtime.storage.local:from_uri",
}


def resolve(model_id: str) -> Path:
    """The local folder that holds the model, absolute and readable.

    Raises StartupError for a scheme this version lacks and for whatever the scheme cannot provide.
    """
    scheme, separator, _ = model_id.partition("://")
    scheme = scheme.lower() if separator else ""
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES if name)
        raise StartupError(f"MODEL_ID {shown(model_id, 400)}: this version loads from a local path and from {known}")
    module, function = SCHEMES[scheme].split(":")
    return cast(Path, getattr(import_module(module), function)(model_id))

"""What a remote model is to the rest of storage: a list of files, and bytes of them. And which files a pipeline needs.

Sources list everything under the model's root; `select` keeps what the pipeline loads: model_index.json, the
components it names with their small texts and one format and variant of weights, MANIFEST.json of a published model.
The names it accepts are those that `runtime.checkpoint` reads from a folder. Nothing pickled is ever fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from runtime.checkpoint import PICKLES, STEMS
from runtime.errors import StartupError, shown
from runtime.types import DEFAULTS_FILE

CHUNK = 16 * 2**20  # bytes of one ranged read; a published manifest has a sha256 of each
MANIFEST = "MANIFEST.json"
MODEL_INDEX = "model_index.json"
TEXTS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm"})
MAX_FILES = 50_000  # of a listing: a model has some hundred
MAX_JSON = 64 * 2**20  # bytes of an index or a manifest
MAX_NAME = 255  # bytes of one part of a path, as Linux has it
MAX_PATH = 1024  # bytes


class Transient(Exception):
    """This read failed and the next may not: a reset, a timeout, a 503. The message says what happened, in words."""


class Changed(StartupError):
    """The object is not the one that was listed: what was read of it is worth nothing, a new listing may help."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model. `path` is relative to the model's root and was checked by `checked_path`; `size` in bytes.

    `version` (ETag, commit or mtime) changes when the content does. `sha256` and `md5` are of the whole file, in hex;
    `chunks` holds a sha256 of each CHUNK bytes. They are there where the source tells them.
    """

    path: str
    size: int
    version: str
    sha256: str | None = None
    md5: str | None = None
    chunks: tuple[str, ...] = ()

    @property
    def component(self) -> str:
        """The component that the file is of; empty for a file at the root."""
        return self.path.rpartition("/")[0].partition("/")[0]


class Source(Protocol):
    """A remote model. Its methods may be called from several threads at once."""

    @property
    def uri(self) -> str:
        """Where it is, as a log may print it: no secret, no query."""

    def files(self) -> tuple[RemoteFile, ...]:
        """Everything that the pipeline needs, sorted by path; listed once. Raises StartupError."""

    def read(self, file: RemoteFile, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start` on. Raises Transient, Changed or another StartupError."""

    @property
    def revision(self) -> str:
        """The commit, or a digest over path, size and version of each of `files()`. Raises StartupError."""

    def close(self) -> None:
        """Close its connections."""


def digest_of(files: Iterable[RemoteFile]) -> str:
    """The name of a model's content where the source has none: 16 hex digits over path, size and version."""
    text = "".join(f"{file.path}\0{file.size}\0{file.version}\0" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checked_path(path: str, uri: str) -> str:
    """`path`, if it names a file below the root on any file system. Raises StartupError for every other."""
    parts = path.split("/")
    wrong = (
        any(part in ("", ".", "..") for part in parts)
        or not path.isprintable()
        or "\\" in path
        or len(path.encode(errors="replace")) > MAX_PATH
        or any(len(part.encode(errors="replace")) > MAX_NAME for part in parts)
    )
    if wrong:
        raise StartupError(f"{uri}: {shown(path)} is no name that a model's file may have; remove or rename it")
    return path


def select(uri: str, listing: Iterable[RemoteFile], read: Callable[[RemoteFile], bytes]) -> tuple[RemoteFile, ...]:
    """What the pipeline needs of a model's files, sorted by path, with the manifest's checksums where there is one.

    `read` gives a whole file; it is asked for the indexes and the manifest alone. Names that nothing asks for may be
    of any kind. Raises StartupError, one line, for a listing that holds no model, for weights that exist only as
    pickles or as a variant, for a shard that is missing, and for a name that could leave the model's folder.
    """
    files = {file.path: file for file in listing}
    if MODEL_INDEX not in files:
        raise StartupError(_no_model(uri, files))
    chosen = {name for name in (MODEL_INDEX, MANIFEST, DEFAULTS_FILE) if name in files}
    for component in _components(uri, _json(uri, files[MODEL_INDEX], read)):
        inside = {
            path.removeprefix(f"{component}/"): f for path, f in files.items() if path.startswith(f"{component}/")
        }
        if not inside:
            raise StartupError(f"{uri}/{component}: missing, though model_index.json names {component}")
        names = [name for name in inside if _suffix(name) in TEXTS and ".index." not in name]
        names += _weights(uri, component, inside, read)
        chosen |= {checked_path(f"{component}/{name}", uri) for name in names}
    selected = {name: files[name] for name in sorted(chosen)}
    if MANIFEST in selected:
        selected = _with_checksums(uri, selected, _json(uri, files[MANIFEST], read))
    return tuple(selected.values())


def _no_model(uri: str, files: Mapping[str, RemoteFile]) -> str:
    if not files:
        return f"{uri}: nothing there; check the bucket, the path and its letters' case"
    below = sorted(path.removesuffix(f"/{MODEL_INDEX}") for path in files if path.endswith(f"/{MODEL_INDEX}"))
    hint = f"; one lies in {shown(below[0])}" if below else ""
    return f"{uri}/{MODEL_INDEX}: missing, so this is not a diffusers model{hint}"


def _components(uri: str, index: Any) -> list[str]:
    if not isinstance(index, dict):
        raise StartupError(f"{uri}/{MODEL_INDEX}: is no object of components")
    names = [
        name
        for name, value in index.items()
        if isinstance(value, list) and not name.startswith("_") and any(isinstance(part, str) for part in value)
    ]
    for name in names:
        if "/" in name:
            raise StartupError(f"{uri}/{MODEL_INDEX}: {shown(name)} is no name of a component")
        checked_path(name, f"{uri}/{MODEL_INDEX}")
    return names


def _weights(
    uri: str, component: str, inside: Mapping[str, RemoteFile], read: Callable[[RemoteFile], bytes]
) -> list[str]:
    """The names of a component's weights, the index of its shards with them; empty where it has none."""
    home = f"{uri}/{component}"
    for stem in STEMS:
        index, single = f"{stem}.safetensors.index.json", f"{stem}.safetensors"
        if index in inside:
            return [index, *_shards(f"{home}/{index}", inside, _json(uri, inside[index], read))]
        if single in inside:
            return [single]
    for name in sorted(name for name in inside if "/" not in name):
        if _suffix(name) == ".safetensors":
            raise StartupError(
                f"{home}/{name}: not loaded under this name; weights are {' or '.join(STEMS)}.safetensors"
            )
        if _suffix(name) in PICKLES:
            raise StartupError(
                f"{home}/{name}: weights exist only as pickles, which can run code; convert to safetensors"
            )
    return []


def _shards(index: str, inside: Mapping[str, RemoteFile], content: Any) -> list[str]:
    home, _, own_name = index.rpartition("/")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise StartupError(f"{index}: names no shards")
    shards = sorted({str(value) for value in weight_map.values()})
    for name in shards:
        if "/" in name or not name.endswith(".safetensors"):
            raise StartupError(f"{index}: {shown(name)} is no name of a safetensors file in this folder")
        if name not in inside:
            raise StartupError(f"{home}/{checked_path(name, home)}: missing, though {own_name} names it")
    return shards


def _with_checksums(uri: str, files: Mapping[str, RemoteFile], manifest: Any) -> dict[str, RemoteFile]:
    """The files with what the manifest tells of them. A file of another size was replaced after publishing."""
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise StartupError(f"{uri}/{MANIFEST}: has no list of files; publish the model again")
    known = {entry.get("path"): entry for entry in entries}
    found = {}
    for path, file in files.items():
        entry = known.get(path)
        if entry is None:
            found[path] = file
            continue
        sha256, chunks = entry.get("sha256"), entry.get("chunks") or []
        if entry.get("size") != file.size:
            raise StartupError(
                f"{uri}/{path}: has {file.size} bytes and {MANIFEST} says {entry.get('size')}; publish the model again"
            )
        if not _is_sha256(sha256) or not isinstance(chunks, list) or not all(map(_is_sha256, chunks)):
            raise StartupError(f"{uri}/{MANIFEST}: the checksums of {path} are malformed; publish the model again")
        whole = manifest.get("chunk_bytes") == CHUNK and len(chunks) == -(-file.size // CHUNK)
        found[path] = replace(file, sha256=sha256, chunks=tuple(chunks) if whole else ())
    return found


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _json(uri: str, file: RemoteFile, read: Callable[[RemoteFile], bytes]) -> Any:
    if file.size > MAX_JSON:
        raise StartupError(f"{uri}/{file.path}: {file.size} bytes are too many for an index")
    try:
        return json.loads(read(file))
    except (ValueError, RecursionError) as exc:
        raise StartupError(f"{uri}/{file.path}: not valid JSON: {exc}") from exc


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2]

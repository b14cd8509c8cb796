"""Prepare a model for fast loading: `python -m runtime.publish SOURCE DEST`.

Casts the weights once to the serving dtype, keeping what a model keeps in float32, cuts them into shards of 2 to 5 GB,
and writes a sha256 of each file and of each of its 16 MiB chunks. DEST is a folder or an s3:// prefix. What makes it a
model, model_index.json, comes after all weights, and the manifest last: an interrupted run leaves nothing that loads.
A shard is in memory at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.assembly import CannotStreamError, keeps_own_format, model_class
from runtime.checkpoint import STEMS, Tensor, read_header, read_json, weight_files
from runtime.dtype_selector import DTYPES, DtypePlan, uniform
from runtime.errors import StartupError
from runtime.logs import configure
from runtime.pipeline_loader import component_entries, read_model_index
from runtime.settings import load as load_settings
from runtime.storage.folder import Folder
from runtime.storage.options import StorageOptions
from runtime.storage.registry import resolve
from runtime.storage.source import CHUNK, MANIFEST, MODEL_INDEX

DEFAULT_SHARD = 4_000_000_000  # bytes; large enough for long reads, small enough to hold one
VERSION = 1  # of the manifest

Put = Callable[[Path, str], None]  # puts a local file to DEST under a relative name
Clear = Callable[[str, frozenset[str]], None]  # removes a component's weights from DEST, but for these names


@dataclass
class Manifest:
    """What was published: MANIFEST.json, which loading checks every chunk against."""

    source: str
    dtype: str
    files: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file: Path, name: str) -> None:
        whole, chunks, size = hashlib.sha256(), [], 0
        with file.open("rb") as opened:
            while block := opened.read(CHUNK):
                whole.update(block)
                chunks.append(hashlib.sha256(block).hexdigest())
                size += len(block)
        self.files.append({"path": name, "size": size, "sha256": whole.hexdigest(), "chunks": chunks})

    def dump(self) -> bytes:
        told = {"version": VERSION, "source": self.source, "dtype": self.dtype, "chunk_bytes": CHUNK}
        return json.dumps({**told, "files": sorted(self.files, key=lambda file: file["path"])}, indent=1).encode()


def publish(
    folder: Path,
    dtype: str,
    shard_bytes: int,
    put: Put,
    source: str,
    on_file: Callable[[str], None],
    clear: Clear = lambda component, kept: None,
) -> None:
    """Write the model in `folder` through `put`. `dtype` is one of DTYPES, or native to keep what is stored.

    `clear` removes what an interrupted run has left: an index of its shards would be taken for this run's.
    Raises StartupError for a folder that holds no model that can be loaded.
    """
    index = read_model_index(folder)
    entries = component_entries(index)
    classes = {name: value[1] for name, value in entries.items()}
    plan = uniform(DTYPES[dtype], "asked for", classes) if dtype != "native" else None
    manifest = Manifest(source, dtype)
    weights = {path for name in entries for path in weight_files(folder, name)}
    with tempfile.TemporaryDirectory(prefix="diffusion-publish-") as scratch:

        def send(file: Path, name: str) -> None:
            on_file(name)
            manifest.add(file, name)
            put(file, name)

        for name, (library, class_name) in entries.items():
            if files := weight_files(folder, name):
                wanted = _wanted(folder / name, library, class_name, plan)
                for file, path in _shards(files, name, wanted, shard_bytes, Path(scratch)):
                    send(file, path)
                    file.unlink()
        for name in entries:
            clear(name, frozenset(file["path"].removeprefix(f"{name}/") for file in manifest.files))
        small = [file.path for file in Folder(folder).files() if folder / file.path not in weights]
        for path in sorted(small, key=lambda path: path == MODEL_INDEX):
            if path != MANIFEST and not path.endswith(".index.json"):
                send(folder / path, path)
        last = Path(scratch, MANIFEST)
        last.write_bytes(manifest.dump())
        put(last, MANIFEST)
        on_file(MANIFEST)


def _shards(
    files: tuple[Path, ...],
    component: str,
    wanted: Callable[[str], torch.dtype | None],
    shard_bytes: int,
    scratch: Path,
) -> Iterator[tuple[Path, str]]:
    """The component's weights in new files, each with its name at the destination; the index of several comes last."""
    stem = next(stem for stem in STEMS if files[0].name.startswith(stem))
    tensors = [(file, name, tensor) for file in files for name, tensor in read_header(file).items()]
    groups = list(_grouped(((f, n, _bytes(t, wanted(n))) for f, n, t in tensors), shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for i, group in enumerate(groups, 1):
        name = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors"
        state = _read(group, wanted)
        total += sum(value.nbytes for value in state.values())
        weight_map |= dict.fromkeys(state, name)
        try:
            save_file(state, scratch / name, {"format": "pt"})
        except SafetensorError as error:
            raise StartupError(f"{scratch / name}: {error}; set TMPDIR to a folder with room for a shard") from error
        del state
        yield scratch / name, f"{component}/{name}"
    if len(groups) > 1:
        index = scratch / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
        yield index, f"{component}/{index.name}"


def _wanted(home: Path, library: str, class_name: str, plan: DtypePlan | None) -> Callable[[str], torch.dtype | None]:
    """A tensor's name to the dtype that its floats are cast to; None leaves them. Raises StartupError."""
    if plan is None:
        return lambda name: None
    dtype, config = plan.of(home.name), home / "config.json"
    content = read_json(config) if config.is_file() else {}
    if isinstance(content, dict) and content.get("quantization_config") is not None:
        raise StartupError(f"{config}: this component is quantized; casting would break it, so take --dtype native")
    try:
        keeps = keeps_own_format(model_class(library, class_name))
    except CannotStreamError as error:
        raise StartupError(f"{home.name}: {error}") from error
    return lambda name: None if keeps(name) else dtype


def _bytes(tensor: Tensor, wanted: torch.dtype | None) -> int:
    return tensor.elements * wanted.itemsize if wanted is not None and "F" in tensor.dtype else tensor.bytes


def _grouped(sizes: Iterable[tuple[Path, str, int]], most: int) -> Iterator[list[tuple[Path, str]]]:
    """Neighbours in groups of at most `most` bytes; a tensor larger than that is alone."""
    group: list[tuple[Path, str]] = []
    filled = 0
    for file, name, size in sizes:
        if group and filled + size > most:
            yield group
            group, filled = [], 0
        group.append((file, name))
        filled += size
    yield group


def _read(group: list[tuple[Path, str]], wanted: Callable[[str], torch.dtype | None]) -> dict[str, torch.Tensor]:
    state = {}
    for file in dict.fromkeys(file for file, _ in group):
        with safe_open(file, "pt") as opened:
            for name in (name for other, name in group if other == file):
                value, dtype = opened.get_tensor(name), wanted(name)
                state[name] = value.to(dtype) if dtype is not None and value.is_floating_point() else value
    return state


def _to_folder(destination: Path) -> tuple[Put, Clear]:
    if (destination / MODEL_INDEX).exists():
        raise StartupError(f"{destination}: holds a model already; name an empty folder, or remove it")

    def put(file: Path, name: str) -> None:
        target = destination / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            with part.open("wb") as out, file.open("rb") as opened:
                while block := opened.read(CHUNK):
                    out.write(block)
            part.replace(target)
        except OSError as error:
            raise StartupError(f"{target}: {error.strerror}") from error

    def clear(component: str, kept: frozenset[str]) -> None:
        for path in (destination / component).glob("*.safetensors*"):
            if path.name not in kept:
                path.unlink()

    return put, clear


def _destination(text: str, options: StorageOptions) -> tuple[Put, Clear]:
    """How to write to DEST. Raises StartupError where a model lies there already."""
    if text.startswith("s3://"):
        from runtime.storage.s3 import uploader

        return uploader(text, options)
    if "://" in text and not text.startswith("file://"):
        raise StartupError(f"DEST {text}: is neither a folder nor s3://bucket/prefix")
    if not text.removeprefix("file://"):
        raise StartupError("DEST is empty; name a folder or s3://bucket/prefix")
    return _to_folder(Path(text.removeprefix("file://")).absolute())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.publish", description="Prepare a model for fast loading.", allow_abbrev=False
    )
    parser.add_argument("source", metavar="SOURCE", help="as MODEL_ID: a folder, s3://, hf://, a Hub id")
    parser.add_argument("dest", metavar="DEST", help="a folder, or s3://bucket/prefix")
    parser.add_argument("--dtype", choices=[*DTYPES, "native"], default="bfloat16", help="default: bfloat16")
    parser.add_argument("--shard-gb", type=float, default=DEFAULT_SHARD / 1e9, help="largest file, in GB; default: 4")
    given = parser.parse_args(arguments)
    configure("info", "auto")
    try:
        options = load_settings([]).storage
        if not 0 < given.shard_gb < math.inf:
            raise StartupError(f"--shard-gb {given.shard_gb}: must be a number above 0")
        put, clear = _destination(given.dest, options)
        folder = resolve(given.source, options)
        size, tell = int(given.shard_gb * 1e9), lambda name: print(name, flush=True)
        publish(folder, given.dtype, size, put, given.source, tell, clear)
    except (StartupError, OSError) as error:  # OSError: of the scratch folder, or of a small file of the source
        print(f"diffusion-runtime: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

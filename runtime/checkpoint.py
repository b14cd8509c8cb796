"""What lies in a model folder, read from its index, its configs and the headers of its weights. No torch.

Everything here is cheap: a checkpoint of 100 GB is judged by a few hundred kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from runtime.errors import StartupError, shown

# The stems that diffusers and transformers save models under. Each prefers its own where a folder holds both.
STEMS = ("diffusion_pytorch_model", "model")
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint. `dtype` is safetensors' name, such as BF16; `bytes` is its size in the file."""

    dtype: str
    elements: int
    bytes: int


def weight_files(folder: Path, component: str) -> tuple[Path, ...]:
    """The safetensors files that loading `component` reads, shards in order; empty where it has no weights.

    Raises StartupError for weights that exist only as pickles or as a variant such as fp16, and for shards that the
    index names and that are not there.
    """
    home = folder / component
    for stem in STEMS:
        index, single = home / f"{stem}.safetensors.index.json", home / f"{stem}.safetensors"
        if index.is_file():
            return _shards(index)
        if single.is_file():
            return (single,)
    for path in sorted(_entries(home)):
        if path.suffix == ".safetensors":
            raise StartupError(f"{path}: not loaded under this name; weights are {' or '.join(STEMS)}.safetensors")
        if path.suffix in PICKLES:
            raise StartupError(f"{path}: weights exist only as pickles, which can run code; convert to safetensors")
    return ()


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, from its header alone.

    Raises StartupError where the file cannot be read, or where header and file size show it truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open  # here: the server's half has no such package

    tensors = {}
    try:
        with safe_open(path, framework="np") as file:  # reads no tensor; compares header and file size
            for name in file.keys():  # noqa: SIM118  it is no mapping
                part = file.get_slice(name)
                dtype, elements = part.get_dtype(), prod(part.get_shape())
                tensors[name] = Tensor(dtype, elements, elements * _bits(dtype) // 8)
    except OSError as exc:
        raise StartupError(f"{path}: {exc.strerror or exc}") from exc
    except SafetensorError as exc:
        raise StartupError(f"{path}: truncated, or corrupt: {exc}") from exc
    return tensors


def _bits(dtype: str) -> int:
    """Bits of one element of safetensors' dtypes: 8 of F8_E4M3, 16 of BF16, 8 of BOOL."""
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8


def read_tensors(folder: Path, components: Iterable[str]) -> dict[str, tuple[Tensor, ...]]:
    """Every tensor of each component that has weights. Raises StartupError as the functions above do."""
    found = {}
    for component in components:
        tensors = [t for file in weight_files(folder, component) for t in read_header(file).values()]
        if tensors:
            found[component] = tuple(tensors)
    return found


def revision(folder: Path, components: Iterable[str]) -> str:
    """A short name for what the folder holds, the same on every machine.

    The commit where the folder is a hub snapshot (.../snapshots/<40 hex digits>). Else 16 hex digits of a sha256 over
    the relative path and size of each weight file and the bytes of model_index.json and every component's
    *config.json: no weight is read, so an edit of weights that keeps a file's size does not show.
    """
    if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
        return folder.name
    digest = hashlib.sha256()
    components = sorted(components)
    configs = [path for name in components for path in sorted((folder / name).glob("*config.json"))]
    for path in [folder / "model_index.json", *configs]:
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    for path in (file for name in components for file in weight_files(folder, name)):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()[:16]


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises StartupError where it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as exc:
        raise StartupError(f"{path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise StartupError(f"{path}: not valid JSON: {exc}") from exc


def _shards(index: Path) -> tuple[Path, ...]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise StartupError(f"{index}: names no shards")
    shards = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise StartupError(f"{index}: {shown(name)} is no name of a safetensors file in this folder")
        if not (index.parent / name).is_file():
            raise StartupError(f"{index.parent / name}: missing, though {index.name} names it")
        shards.append(index.parent / name)
    return tuple(shards)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as exc:
        raise StartupError(f"{folder}: {exc.strerror}") from exc

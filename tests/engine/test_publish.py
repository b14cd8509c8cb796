"""Publishing: the same models as stock loads from the original, smaller, in shards, with checksums that are checked."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from runtime.errors import StartupError
from runtime.pipeline_loader import load_pipeline
from runtime.publish import main, publish
from runtime.storage.source import CHUNK, RemoteFile
from runtime.tiny import FAMILIES
from tests.engine.test_streaming import AUTO, Counted, load, same


@pytest.fixture
def published(tiny_models: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(family: str, *flags: str) -> Path:
        assert main([str(tiny_models / family), str(tmp_path / family), *flags]) == 0
        return tmp_path / family

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_published_loads_as_the_original_does(
    tiny_models: Path, published: Callable[..., Path], family: str
) -> None:
    copy = published(family)
    stock = load_pipeline(tiny_models / family, "cpu", "bfloat16", AUTO, lambda *_: None)
    same(load_pipeline(copy, "cpu", "bfloat16", AUTO, lambda *_: None).pipeline, stock.pipeline)
    streamed, was = load(Counted(copy), dtype="bfloat16")
    assert was
    same(streamed.pipeline, stock.pipeline)
    size, original = (sum(p.stat().st_size for p in d.rglob("*.safetensors")) for d in (copy, tiny_models / family))
    assert size < original


def test_shards_are_small_and_the_manifest_tells_every_byte(tiny_models: Path, published: Callable[..., Path]) -> None:
    copy = published("flux", "--shard-gb", "0.0001", "--dtype", "native")
    shards = sorted((copy / "transformer").glob("*.safetensors"))
    assert len(shards) > 2 and (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    for shard in shards:
        with safe_open(shard, "np") as opened:
            names = list(opened.keys())
        assert shard.stat().st_size < 110_000 or len(names) == 1
    original = load_file(next((tiny_models / "flux" / "transformer").glob("*.safetensors")))
    found = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert found.keys() == original.keys() and all(torch.equal(found[name], original[name]) for name in found)
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    assert (manifest["version"], manifest["chunk_bytes"], manifest["dtype"]) == (1, CHUNK, "native")
    told = {file["path"]: file for file in manifest["files"]}
    there = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} - {"MANIFEST.json"}
    assert told.keys() == there
    for path, file in told.items():
        content = (copy / path).read_bytes()
        assert (file["size"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert file["chunks"] == [
            hashlib.sha256(content[i : i + CHUNK]).hexdigest() for i in range(0, len(content), CHUNK)
        ]


def test_a_model_keeps_in_float32_what_it_keeps(published: Callable[..., Path]) -> None:
    copy = published("wan-t2v-a14b")
    expert = load_file(next((copy / "transformer").glob("*.safetensors")))
    assert expert["scale_shift_table"].dtype == torch.float32  # WanTransformer3DModel._keep_in_fp32_modules
    assert torch.bfloat16 in {value.dtype for value in expert.values()}
    vae = load_file(next((copy / "vae").glob("*.safetensors")))
    assert {value.dtype for value in vae.values()} == {torch.float32}


def test_a_flipped_bit_is_found_before_it_serves(published: Callable[..., Path]) -> None:
    copy = published("sd15")
    path = next((copy / "unet").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StartupError, match=r"unet/.*wrong checksum"):
        load(Counted(copy), dtype="bfloat16")


def test_an_interrupted_run_leaves_no_model(tiny_models: Path, tmp_path: Path) -> None:
    put: list[str] = []

    def failing(file: Path, name: str) -> None:
        if len(put) == 3:
            raise StartupError("the disk is full")
        put.append(name)

    with pytest.raises(StartupError, match="the disk is full"):
        publish(tiny_models / "sd3", "bfloat16", 10**9, failing, "x", lambda name: None)
    assert put and all(name.endswith(".safetensors") for name in put)
    everything: list[str] = []
    publish(tiny_models / "sd3", "bfloat16", 10**9, lambda _, name: everything.append(name), "x", lambda name: None)
    assert everything[-2:] == ["model_index.json", "MANIFEST.json"]


def test_a_run_after_an_interrupted_one_leaves_nothing_of_it(tiny_models: Path, published: Callable[..., Path]) -> None:
    """More shards than this run writes, and their index, which loading would prefer to this run's one file."""
    left = published("sd15", "--shard-gb", "0.00005", "--dtype", "float32")
    for name in ("model_index.json", "MANIFEST.json"):
        (left / name).unlink()
    (left / "unet" / ".diffusion_pytorch_model.safetensors.part").write_bytes(b"half")
    copy = published("sd15")
    told = {file["path"] for file in json.loads((copy / "MANIFEST.json").read_text())["files"]}
    assert {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} == {*told, "MANIFEST.json"}
    stock = load_pipeline(tiny_models / "sd15", "cpu", "bfloat16", AUTO, lambda *_: None)
    same(load_pipeline(copy, "cpu", "bfloat16", AUTO, lambda *_: None).pipeline, stock.pipeline)


def test_a_quantized_component_is_not_cast(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "m")
    config = tmp_path / "m" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "x"}}))
    assert main([str(tmp_path / "m"), str(tmp_path / "d")]) == 1
    assert "unet/config.json: this component is quantized" in capsys.readouterr().err
    assert main([str(tmp_path / "m"), str(tmp_path / "d"), "--dtype", "native"]) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["d", "--shard-gb", "nan"], "--shard-gb nan: must be a number above 0"),
        (["d", "--shard-gb", "inf"], "--shard-gb inf: must be a number above 0"),
        (["d", "--shard-gb", "0"], "--shard-gb 0.0: must be a number above 0"),
        ([""], "DEST is empty"),
    ],
)
def test_arguments_that_make_no_sense(
    tiny_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny_models / "sd15"), *flags]) == 1
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_scratch_disk_that_is_full_is_told_in_one_line(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("runtime.publish.save_file", full)
    assert main([str(tiny_models / "sd15"), str(tmp_path / "d")]) == 1
    assert "No space left on device (os error 28); set TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "dest", "says"),
    [
        ("{tiny}/nothing", "{tmp}/d", "no such folder"),
        ("{tiny}", "{tmp}/d", "model_index.json: missing"),
        ("{tiny}/sd15", "{tiny}/sd15", "holds a model already"),
        ("{tiny}/sd15", "ftp://x/y", "is neither a folder nor"),
        ("{tiny}/sd15", "/proc/nowhere", "/proc/nowhere"),
    ],
)
def test_what_cannot_be_published_is_told_in_one_line(
    tiny_models: Path, tmp_path: Path, source: str, dest: str, says: str
) -> None:
    names: dict[str, Any] = {"tiny": tiny_models, "tmp": tmp_path}
    made = subprocess.run(
        [sys.executable, "-m", "runtime.publish", source.format(**names), dest.format(**names)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in made.stderr.splitlines() if line.startswith("diffusion-runtime:")]
    assert made.returncode == 1 and len(lines) == 1 and says in lines[0], made.stderr


def test_the_manifest_is_of_files_that_storage_accepts(published: Callable[..., Path]) -> None:
    copy = published("glm-image")
    files: dict[str, RemoteFile] = {file.path: file for file in Counted(copy).files()}
    weights = [file for path, file in files.items() if path.endswith(".safetensors")]
    assert weights and all(file.sha256 and file.chunks for file in weights)

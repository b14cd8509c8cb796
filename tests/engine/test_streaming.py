"""Weights straight from a source: the models that from_pretrained gives, whatever their format; nothing half done."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runtime.errors import StartupError
from runtime.load_mode import load_folder, load_remote
from runtime.pipeline_loader import LoadedPipeline, load_pipeline
from runtime.storage.cache_writer import CacheWriter
from runtime.storage.fetch import Progress, spans_of
from runtime.storage.folder import Folder
from runtime.storage.options import StorageOptions
from runtime.storage.skeleton import SKELETON, write_skeleton
from runtime.storage.source import CHUNK, Changed, RemoteFile
from runtime.streaming import Stream, _Tensor, _touched
from runtime.tiny import FAMILIES

AUTO = dict.fromkeys(
    ("low_cpu_mem", "attention_slicing", "vae_slicing", "vae_tiling", "cpu_offload", "sequential_cpu_offload"), "auto"
)


class Counted(Folder):
    """A folder that counts what is read of each file, and can fail after so many bytes."""

    def __init__(self, folder: Path, fails_after: int | None = None) -> None:
        super().__init__(folder)
        self.read_bytes: dict[str, int] = {}
        self._left = fails_after

    def read(self, file: RemoteFile, start: int, into: memoryview) -> None:
        self.read_bytes[file.path] = self.read_bytes.get(file.path, 0) + len(into)
        if self._left is not None and file.path.endswith(".safetensors"):
            self._left -= len(into)
            if self._left < 0:
                raise StartupError(f"{file.path}: the network is gone")
        super().read(file, start, into)


def load(source: Folder, options: StorageOptions | None = None, dtype: str = "float32", **settings: str) -> Any:
    """(loaded pipeline, whether it was streamed)"""

    def at(folder: Path, stream: Stream | None) -> tuple[LoadedPipeline, bool]:
        optimizations = {**AUTO, **settings}
        return load_pipeline(folder, "cpu", dtype, optimizations, lambda *_: None, stream), stream is not None

    return load_remote(source, options or StorageOptions(), lambda progress: None, at)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def same(one: Any, other: Any) -> None:
    """Both pipelines hold the same models: every parameter and buffer, its dtype, and what the configs say."""
    assert type(one) is type(other) and one.components.keys() == other.components.keys()
    for name, part in one.components.items():
        rival = other.components[name]
        assert type(part) is type(rival), name
        if not isinstance(part, torch.nn.Module):
            continue
        mine, theirs = weights(part), weights(rival)
        assert mine.keys() == theirs.keys(), name
        for key, value in mine.items():
            assert value.dtype == theirs[key].dtype and value.device == theirs[key].device, (name, key)
            assert torch.equal(value, theirs[key]) and value.requires_grad == theirs[key].requires_grad, (name, key)
        assert part.training == rival.training
        configs = [dict(p.config) if hasattr(p.config, "items") else p.config.to_dict() for p in (part, rival)]
        for config in configs:
            config.pop("_name_or_path", None)
        assert configs[0] == configs[1], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_pipeline_is_the_stock_one(tiny_models: Path, family: str, dtype: str) -> None:
    streamed, was = load(Folder(tiny_models / family), dtype=dtype)
    assert was
    stock = load_pipeline(tiny_models / family, "cpu", dtype, AUTO, lambda *_: None)
    same(streamed.pipeline, stock.pipeline)
    assert streamed.dtypes == stock.dtypes and streamed.model_bytes == stock.model_bytes
    assert len(streamed.revision) == 16


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_stored_in_another_format_are_cast_as_stock_casts_them(
    tiny_models: Path, tmp_path: Path, stored: torch.dtype
) -> None:
    shutil.copytree(tiny_models / "sd3", tmp_path / "m")
    for path in (tmp_path / "m").rglob("*.safetensors"):
        save_file({name: value.to(stored) for name, value in load_file(path).items()}, path, {"format": "pt"})
    streamed, was = load(Folder(tmp_path / "m"), dtype="bfloat16")
    assert was
    same(streamed.pipeline, load_pipeline(tmp_path / "m", "cpu", "bfloat16", AUTO, lambda *_: None).pipeline)


def test_shards_and_several_chunks(tmp_path: Path) -> None:
    """Tensors that begin and end within chunks of 16 MiB, and one that spans several."""
    torch.manual_seed(3)
    model = diffusers.AutoencoderKL(
        block_out_channels=(64, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
    )
    scheduler = diffusers.DDIMScheduler()
    unet = diffusers.UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                                 up_block_types=("UpBlock2D",) * 2, layers_per_block=1)  # fmt: skip
    pipeline = diffusers.LDMPipeline(vqvae=model, unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(tmp_path / "m", max_shard_size="40MB")
    assert len(list((tmp_path / "m" / "vqvae").glob("*-of-*.safetensors"))) > 2
    streamed, was = load(Folder(tmp_path / "m"))
    assert was
    same(streamed.pipeline, load_pipeline(tmp_path / "m", "cpu", "float32", AUTO, lambda *_: None).pipeline)


# --- the skeleton


def test_a_skeleton_has_headers_sizes_and_no_weights(tiny_models: Path, tmp_path: Path) -> None:
    source = Folder(tiny_models / "wan-ti2v-5b")
    write_skeleton(source, tmp_path)
    for file in source.files():
        made, own = tmp_path / file.path, tiny_models / "wan-ti2v-5b" / file.path
        assert made.stat().st_size == own.stat().st_size
        if not file.path.endswith(".safetensors"):
            assert made.read_bytes() == own.read_bytes()
            continue
        with safe_open(made, "np") as one, safe_open(own, "np") as other:
            assert set(one.keys()) == set(other.keys())


def test_errors_name_the_source_and_not_the_skeleton(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "m")
    weights = next((tmp_path / "m" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StartupError, match="truncated, or corrupt") as caught:
        load(Folder(tmp_path / "m"))
    assert str(caught.value).startswith(f"{tmp_path}/m/unet/") and "\n" not in str(caught.value)


# --- what cannot be streamed comes by way of the cache


def renamed(folder: Path) -> None:
    """As an old checkpoint: a weight of the UNet under another name."""
    path = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["conv_in.old_weight"] = tensors.pop("conv_in.weight")
    save_file(tensors, path, {"format": "pt"})


def test_a_fallback_tells_why(tiny_models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Folder(tiny_models / "sd15")
    loaded, was = load(source, StorageOptions(cache_dir=str(tmp_path)), low_cpu_mem="false")
    assert not was
    assert [r for r in caplog.records if "by way of the cache" in r.getMessage()]
    same(loaded.pipeline, load_pipeline(tiny_models / "sd15", "cpu", "float32", AUTO, lambda *_: None).pipeline)


def test_names_that_do_not_fit_are_told_before_anything_is_read(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "m")
    renamed(tmp_path / "m")
    source = Counted(tmp_path / "m")
    with pytest.raises(StartupError):  # stock cannot load it either
        load(source, StorageOptions(cache_dir=str(tmp_path / "c")))
    assert (tmp_path / "c" / "models").exists()


# --- one pass into the device and the cache


def test_a_stream_fills_the_cache_in_the_same_pass(tiny_models: Path, tmp_path: Path) -> None:
    options = StorageOptions(cache_dir=str(tmp_path))
    first = Counted(tiny_models / "flux")
    _, was = load(first, options)
    assert was
    (copy,) = (tmp_path / "models").iterdir()
    for file in first.files():
        assert (copy / file.path).read_bytes() == (tiny_models / "flux" / file.path).read_bytes()
        if file.path.endswith(".safetensors"):  # the header, and once the whole
            assert first.read_bytes[file.path] <= 2 * file.size
    second = Counted(tiny_models / "flux")
    loaded, was = load(second, options)
    assert not was and not [path for path in second.read_bytes if path.endswith(".safetensors")]
    same(loaded.pipeline, load_pipeline(tiny_models / "flux", "cpu", "float32", AUTO, lambda *_: None).pipeline)


def test_what_a_broken_stream_left_in_the_cache_is_not_read_again(tmp_path: Path, tiny_models: Path) -> None:
    options = StorageOptions(cache_dir=str(tmp_path), threads=1)
    whole = sum(file.size for file in Folder(tiny_models / "flux").files() if file.path.endswith(".safetensors"))
    with pytest.raises(StartupError, match="the network is gone"):
        load(Counted(tiny_models / "flux", fails_after=int(whole * 1.7)), options)  # headers are read first
    assert not list((tmp_path / "models").iterdir())
    again = Counted(tiny_models / "flux")
    with CacheWriter(tmp_path, again) as writer:
        kept = {span.file.path for f in again.files() for span in spans_of(f) if writer.has(span)}
    kept = {path for path in kept if path.endswith(".safetensors")}
    assert kept
    loaded, was = load(again, options)
    assert was
    for path in kept:  # its header, for the skeleton, and no more
        size = (tiny_models / "flux" / path).stat().st_size
        assert again.read_bytes[path] <= size
    same(loaded.pipeline, load_pipeline(tiny_models / "flux", "cpu", "float32", AUTO, lambda *_: None).pipeline)


def test_cached_mode_reads_files_only(tiny_models: Path, tmp_path: Path) -> None:
    _, was = load(Folder(tiny_models / "sd15"), StorageOptions(cache_dir=str(tmp_path), load_mode="cached"))
    assert not was


def without(folder: Path, component: str, name: str) -> None:
    path = next((folder / component).glob("*.safetensors"))
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("mode", ["stream", "cached"])
def test_a_text_encoder_that_lacks_a_weight_is_refused(tiny_models: Path, tmp_path: Path, mode: str) -> None:
    """transformers would fill it with random numbers."""
    shutil.copytree(tiny_models / "sd15", tmp_path / "m")
    name = max(key for key in load_file(tmp_path / "m" / "text_encoder" / "model.safetensors") if "fc2.weight" in key)
    without(tmp_path / "m", "text_encoder", name)
    with pytest.raises(StartupError, match=r"text_encoder: the checkpoint lacks .*fc2\.weight"):
        load(Folder(tmp_path / "m"), StorageOptions(cache_dir=str(tmp_path / "c"), load_mode=mode))


def test_an_empty_tensor_beside_a_large_one(tmp_path: Path) -> None:
    tensors = [_Tensor(n, b, e, torch.uint8, (e - b,), torch.uint8, torch.device("cpu"), e - b)
               for n, b, e in (("large", 8, 3 * CHUNK), ("none", 8, 8))]  # fmt: skip
    file = RemoteFile("x/y.safetensors", 3 * CHUNK, "v")
    touched = [
        t.name for span in spans_of(file) for t in _touched(sorted(tensors, key=lambda t: (t.begin, t.end)), span)
    ]
    assert touched == ["large"] * 3


class Replaced(Counted):
    def read(self, file: RemoteFile, start: int, into: memoryview) -> None:
        if file.path.startswith("unet/") and self.read_bytes.get(file.path):
            raise Changed(f"{file.path}: replaced")
        super().read(file, start, into)


def test_what_was_replaced_meanwhile_is_told_as_that(tiny_models: Path) -> None:
    with pytest.raises(Changed):
        load(Replaced(tiny_models / "sd15"))


def test_a_killed_processs_skeleton_is_removed_and_a_living_ones_is_not(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, alive = tmp_path / f"{SKELETON}dead", tmp_path / f"{SKELETON}alive"
    for folder in (dead, alive):
        folder.mkdir()
        os.utime(folder, (1, 1))
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    load(Folder(tiny_models / "sd15"))
    os.close(descriptor)
    assert [path.name for path in tmp_path.iterdir()] == [alive.name]


def test_a_folder_is_streamed_where_that_is_asked_for(tiny_models: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="diffusion_runtime")

    def at(folder: Path, stream: Stream | None) -> tuple[LoadedPipeline, bool]:
        return load_pipeline(folder, "cpu", "float32", AUTO, lambda *_: None, stream), stream is not None

    folder = tiny_models / "wan-i2v-a14b"
    streamed, was = load_folder(folder, StorageOptions(load_mode="stream"), "cpu", lambda _: None, at)
    assert f"read {folder}" in caplog.messages and "download" not in caplog.text  # nothing is, from a folder
    mapped, other = load_folder(folder, StorageOptions(), "cpu", lambda _: None, at)
    assert was and not other
    same(streamed.pipeline, mapped.pipeline)
    assert streamed.revision == mapped.revision


def test_a_folder_needs_no_temporary_directory(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert not load_folder(
        tiny_models / "sd15", StorageOptions(load_mode="stream"), "cpu", lambda _: None, lambda _, stream: stream
    )
    assert any("mapped files" in record.getMessage() for record in caplog.records)


def test_progress_ends_with_every_byte(tiny_models: Path) -> None:
    told: list[Progress] = []
    source = Folder(tiny_models / "sd15")
    load_remote(
        source,
        StorageOptions(),
        told.append,
        lambda folder, stream: load_pipeline(folder, "cpu", "float32", AUTO, lambda *_: None, stream),
    )
    assert told[-1].done_bytes == told[-1].total_bytes == sum(file.size for file in source.files())

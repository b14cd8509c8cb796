"""From MODEL_ID to a pipeline: what loads, and what ends the start with one line."""

import json
import logging
import os
import shutil
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from runtime.checkpoint import read_header, revision, weight_files
from runtime.errors import StartupError
from runtime.pipeline_loader import load_pipeline, read_model_index
from runtime.storage.registry import SCHEMES, resolve

UNET = "unet/diffusion_pytorch_model.safetensors"


def load(folder: Path, dtype: str = "auto", **optimizations: str):
    return load_pipeline(folder, "cpu", dtype, optimizations, lambda stage, fraction: None)


def dtypes_of(module: torch.nn.Module) -> Counter:
    return Counter(parameter.dtype for parameter in module.parameters())


@pytest.fixture
def sd15(tiny_models, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(tiny_models / "sd15", tmp_path / "sd15"))


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_line(raised: pytest.ExceptionInfo[StartupError]) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- what loads ---


@pytest.mark.parametrize(
    "family", ["glm-image", "wan-t2v-a14b", "wan-i2v-a14b", "wan-ti2v-5b", "sd15", "sdxl", "sd3", "flux"]
)
def test_every_family_loads(tiny_models, family):
    folder = tiny_models / family
    loaded = load(folder)
    index = read_model_index(folder)
    parts = {name for name, part in loaded.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert type(loaded.pipeline).__name__ == index["_class_name"]
    assert loaded.device.type == "cpu"
    assert loaded.dtypes == dict.fromkeys(parts, "float32")
    assert all(len(weight_files(folder, name)) == 1 for name in parts)
    assert loaded.optimizations["low_cpu_mem"].startswith("on: ")


def test_sizes_and_a_picture(sd15):
    loaded = load(sd15)
    stored = sum(file.stat().st_size for file in sd15.rglob("*.safetensors"))
    assert loaded.model_bytes == pytest.approx(stored, rel=0.2)
    generator = torch.Generator().manual_seed(1)
    picture = loaded.pipeline("a cat", height=64, width=64, num_inference_steps=1, generator=generator).images[0]
    assert picture.size == (64, 64)


def test_the_same_weights_as_the_stock_way(sd15):
    stock = DiffusionPipeline.from_pretrained(sd15, dtype=torch.float32, local_files_only=True)
    ours = load(sd15).pipeline
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(stock, name).state_dict()
        assert all(torch.equal(expected[key], value) for key, value in getattr(ours, name).state_dict().items())


def test_progress_rises_with_each_component_to_one(tiny_models):
    library = logging.getLogger("diffusers.pipelines.pipeline_utils")
    before = (library.level, library.filters[:])
    seen = []
    load_pipeline(
        tiny_models / "wan-t2v-a14b", "cpu", "auto", {}, lambda stage, fraction: seen.append((stage, fraction))
    )
    fractions = [fraction for _, fraction in seen]
    assert {stage for stage, _ in seen} == {"loading"}
    assert len(fractions) == 2 + 4  # begin, end and four components with weights
    assert fractions == sorted(set(fractions)) and (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert (library.level, library.filters) == before


def test_nothing_but_our_log_lines_is_printed(tiny_models, capfd, caplog):
    with caplog.at_level(logging.INFO):
        loaded = load(tiny_models / "wan-ti2v-5b")
    frames = loaded.pipeline("a", height=32, width=32, num_frames=1, num_inference_steps=1, output_type="pt").frames
    printed = "".join(capfd.readouterr())
    assert frames.shape[1] == 1
    assert "it/s" not in printed and "Loading" not in printed
    lines = [record for record in caplog.records if record.name.startswith("diffusion_runtime.")]
    assert len(lines) >= 3 and not any("\n" in record.getMessage() for record in lines)


def test_wan_in_bfloat16_keeps_what_it_must_in_float32(tiny_models):
    loaded = load(tiny_models / "wan-t2v-a14b", "bfloat16")
    assert loaded.dtypes["transformer"] == loaded.dtypes["text_encoder"] == "bfloat16"
    assert loaded.dtypes["vae"] == "float32"
    assert set(dtypes_of(loaded.pipeline.vae)) == {torch.float32}
    for expert in (loaded.pipeline.transformer, loaded.pipeline.transformer_2):
        kept = {name for name, p in expert.named_parameters() if p.dtype == torch.float32}
        assert any("time_embedder" in name for name in kept) and any("scale_shift_table" in name for name in kept)
        assert dtypes_of(expert)[torch.bfloat16] > len(kept)


def test_native_loads_what_is_stored(sd15):
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(sd15 / UNET).items()}
    save_file(weights, sd15 / UNET, {"format": "pt"})
    loaded = load(sd15, "native")
    assert loaded.dtypes == {"unet": "bfloat16", "vae": "float32", "text_encoder": "float32"}


def test_sharded_weights_load(sd15):
    loaded = load(sd15)
    expected = {name: tensor.clone() for name, tensor in loaded.pipeline.unet.state_dict().items()}
    (sd15 / UNET).unlink()
    loaded.pipeline.unet.save_pretrained(sd15 / "unet", max_shard_size="50KB")
    assert len(weight_files(sd15, "unet")) > 1
    unet = load(sd15).pipeline.unet.state_dict()
    assert all(torch.equal(unet[name], tensor) for name, tensor in expected.items())


def test_optimizations_reach_the_pipeline(sd15):
    loaded = load(sd15, vae_tiling="true", cpu_offload="true")
    assert loaded.pipeline.vae.use_tiling
    assert loaded.optimizations["vae_tiling"] == "on: set to true"
    assert loaded.optimizations["cpu_offload"].startswith("not_applicable: ")
    assert loaded.pipeline.hf_device_map == "cpu"  # each component was loaded straight onto the device


def test_low_cpu_mem_false_is_passed_on(tiny_models, sd15):
    assert load(sd15, low_cpu_mem="false").optimizations["low_cpu_mem"] == "off: set to false"
    with pytest.raises(StartupError, match="low_cpu_mem_usage"):  # Wan keeps some modules in float32
        load(tiny_models / "wan-ti2v-5b", low_cpu_mem="false")


# --- revision ---


def test_revision_follows_the_content_and_not_the_place(sd15, tmp_path):
    names = ["unet", "vae", "scheduler"]
    first = revision(sd15, names)
    assert revision(Path(shutil.copytree(sd15, tmp_path / "elsewhere")), reversed(names)) == first
    assert load(sd15).revision == load(tmp_path / "elsewhere").revision
    (sd15 / "README.md").write_text("irrelevant")
    assert revision(sd15, names) == first
    scheduler = sd15 / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    second = revision(sd15, names)
    (sd15 / UNET).write_bytes((sd15 / UNET).read_bytes() + b"x")
    assert len({first, second, revision(sd15, names)}) == 3


def test_revision_of_a_hub_snapshot_is_its_commit(sd15, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert load(Path(shutil.copytree(sd15, tmp_path / "snapshots" / commit))).revision == commit


# --- what ends the start ---


def drop(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def indexed(**changes):
    return lambda folder: edit_index(folder, **changes)


def no_class(folder):
    (folder / "model_index.json").write_text("{}")


def pickled(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")


def variant(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")


def truncated(folder):
    os.truncate(folder / UNET, (folder / UNET).stat().st_size - 1000)


def lengthened(folder):
    os.truncate(folder / UNET, (folder / UNET).stat().st_size + 1)


def header_cut(folder):
    os.truncate(folder / UNET, 100)


def missing_shard(folder):
    (folder / f"{UNET}.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')


def shard_elsewhere(folder):
    (folder / f"{UNET}.index.json").write_text('{"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}')


def component_code(folder):
    (folder / "unet/diffusers.py").write_text("raise SystemExit")


BROKEN = {
    "no index": (drop("model_index.json"), "model_index.json: missing"),
    "bad json": (write("model_index.json", b"{"), "model_index.json: not valid JSON"),
    "not utf-8": (write("model_index.json", b"\xff\xfe\x00"), "model_index.json: not valid JSON"),
    "not an object": (write("model_index.json", b"[]"), "no _class_name"),
    "no class": (no_class, "no _class_name"),
    "unknown class": (indexed(_class_name="NoSuchPipeline"), "no pipeline class 'NoSuchPipeline'"),
    "no pipeline class": (indexed(_class_name="AutoencoderKL"), "AutoencoderKL is not a pipeline class"),
    "custom pipeline": (indexed(_class_name=["my_pipeline", "P"]), "no pipeline class"),
    "custom component": (indexed(unet=["my_module", "X"]), "unet comes from 'my_module'"),
    "component from a file": (indexed(unet=["code.py", "X"]), "unet comes from 'code.py'"),
    "component from the system": (indexed(unet=["os", "system"]), "unet comes from 'os'"),
    "component without a class": (indexed(unet=["diffusers"]), "not a library and a class"),
    "component outside": (indexed(**{"../vae": ["diffusers", "AutoencoderKL"]}), "missing"),
    "unknown component class": (indexed(unet=["diffusers", "NoSuchModel"]), "NoSuchModel"),
    "component missing": (drop("unet"), "unet: missing"),
    "weights missing": (drop(UNET), "diffusion_pytorch_model.safetensors"),
    "pickle only": (pickled, "diffusion_pytorch_model.bin: weights exist only as pickles"),
    "variant only": (variant, "diffusion_pytorch_model.fp16.safetensors"),
    "truncated": (truncated, f"{UNET}: truncated, or corrupt"),
    "cut in the header": (header_cut, f"{UNET}: truncated, or corrupt"),
    "empty": (write(UNET, b""), f"{UNET}: truncated, or corrupt"),
    "corrupt header": (write(UNET, struct.pack("<Q", 4) + b"abcd"), f"{UNET}: truncated, or corrupt"),
    "odd header": (write(UNET, struct.pack("<Q", 7) + b'{"a":1}'), f"{UNET}: truncated, or corrupt"),
    "longer than its header": (lengthened, f"{UNET}: truncated, or corrupt"),
    "missing shard": (missing_shard, "one.safetensors: missing"),
    "shard elsewhere": (shard_elsewhere, "is no name of a safetensors file"),
    "bad shard index": (write(f"{UNET}.index.json", b"{}"), "names no shards"),
    "component's code": (component_code, "unet/diffusers.py: models with code of their own"),
    "bad component config": (write("unet/config.json", b"{"), "StableDiffusionPipeline cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_ends_the_start_with_one_line(sd15, case):
    damage, message = BROKEN[case]
    damage(sd15)
    with pytest.raises(StartupError) as raised:
        load(sd15)
    assert message in one_line(raised)
    assert "sd15" in one_line(raised)


def test_a_missing_folder_ends_the_start(tmp_path):
    with pytest.raises(StartupError, match="no such model folder"):
        read_model_index(tmp_path / "none")


def test_the_librarys_error_is_chained(sd15):
    (sd15 / "unet/config.json").write_text("{")
    with pytest.raises(StartupError) as raised:
        load(sd15)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("name", ["None.py", "unet/diffusers.py"])
def test_code_in_the_folder_is_never_run(sd15, tmp_path, name):
    marker = tmp_path / "ran"
    (sd15 / name).write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(StartupError, match="code of their own"):
        load(sd15)
    assert not marker.exists()


def test_an_optional_component_left_out_is_no_fault(sd15):
    edit_index(sd15, safety_checker=[None, None], feature_extractor=[None, None])
    assert load(sd15).pipeline.safety_checker is None


def test_a_header_gives_dtype_elements_and_bytes(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3, dtype=torch.float16),
        "b": torch.zeros(()),
        "c": torch.zeros(5, dtype=torch.float8_e4m3fn),
        "d": torch.zeros(7, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert (header["a"].dtype, header["a"].elements, header["a"].bytes) == ("F16", 6, 12)
    assert (header["b"].dtype, header["b"].elements, header["b"].bytes) == ("F32", 1, 4)
    assert (header["c"].dtype, header["c"].bytes) == ("F8_E4M3", 5)
    assert (header["d"].dtype, header["d"].bytes) == ("BOOL", 7)


# --- storage ---


def test_paths_and_file_uris_name_the_same_folder(tmp_path, monkeypatch):
    folder = tmp_path / "my model%"
    folder.mkdir()
    quoted = str(folder).replace("%", "%25").replace(" ", "%20")
    monkeypatch.chdir(tmp_path)
    for model_id in (str(folder), "my model%", f"file://{quoted}", f"file://localhost{quoted}", f"FILE://{quoted}"):
        assert resolve(model_id) == folder


@pytest.mark.parametrize(
    ("model_id", "message"),
    [
        ("gs://bucket/model", "models come from"),
        ("https://example.com/model", "models come from"),
        ("no/such/folder", "no such folder"),
        ("/no/such/folder", "no such folder"),
        ("file:///no/such/folder", "no such folder"),
        ("file://server/share", "not 'server'"),
        ("file://[x/a", "MODEL_ID"),
        ("file:///tmp?x=1", "%3F"),
        ("file:///tmp%00", "no path"),
        ("", "no path"),
        (__file__, "not a folder"),
    ],
)
def test_what_cannot_be_resolved_ends_the_start(model_id, message):
    with pytest.raises(StartupError) as raised:
        resolve(model_id)
    assert message in one_line(raised)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_ends_the_start(tmp_path):
    folder = tmp_path / "private"
    folder.mkdir(mode=0)
    with pytest.raises(StartupError, match="may not read"):
        resolve(str(folder))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_refuses_what_is_not_there(scheme, tmp_path):
    model_id = f"{tmp_path}/none" if not scheme else f"{scheme}://{tmp_path}/none"
    with pytest.raises(StartupError):
        resolve(model_id)

"""Device, dtypes, optimizations and the container's limits."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel, VQModel
from safetensors.torch import save_file

from runtime.cgroup import cpu_count, host_memory_limit
from runtime.device_manager import Device, detect_device, free_memory
from runtime.dtype_selector import DtypePlan, select_dtypes
from runtime.errors import StartupError
from runtime.optimization_manager import OPTIMIZATIONS, Decision, apply, moves_whole, plan

GIB = 2**30
H200 = Device("cuda", "NVIDIA H200", 141 * GIB, True)
T4 = Device("cuda", "Tesla T4", 15 * GIB, False)
OLD_MAC = Device("mps", "Apple GPU", 16 * GIB, False)
CPU = Device("cpu", "CPU", 16 * GIB, True)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where torch has no CUDA")

# --- the container's limits ---


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A /proc and /sys of a machine with 64 GiB."""
    files = {"proc/self/cgroup": cgroup, "proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 5 kB\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, 64 * GIB),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max\n"}, 64 * GIB),
        ("0::/\n", {"sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        (
            "0::/pod/main\n",
            {"sys/fs/cgroup/pod/memory.max": f"{4 * GIB}", "sys/fs/cgroup/pod/main/memory.max": "max"},
            4 * GIB,
        ),
        ("0::/../../pod\n", {"sys/fs/cgroup/memory.max": f"{3 * GIB}"}, 3 * GIB),
        ("4:memory:/docker/1\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}"}, 2 * GIB),
        ("4:memory:/a\n0::/\n", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{GIB}"}, GIB),
        ("4:memory:/a\n", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712"}, 64 * GIB),
        ("1:cpu:/a\n", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{GIB}"}, 64 * GIB),
    ],
    ids=[
        "no-cgroup",
        "v2-max",
        "v2",
        "v2-parent",
        "v2-other-namespace",
        "v1-unmounted-path",
        "hybrid",
        "v1-max",
        "other",
    ],
)
def test_memory_limit_is_the_smallest_above_the_process(tmp_path, cgroup, files, expected):
    assert host_memory_limit(machine(tmp_path, cgroup, files)) == expected


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "190000 100000\n"}, 1),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "150000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 1),
        (
            "3:cpu,cpuacct:/x\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "50000",
            },
            1,
        ),
        ("3:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "1"}, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "99999900000 100000\n"}, None),
    ],
    ids=["v2-1", "v2-fraction", "v2-floor", "v2-parent", "v1-1", "v1-none", "v2-max", "v2-large"],
)
def test_cpu_count_follows_quota_and_affinity(tmp_path, cgroup, files, expected):
    expected = expected or len(os.sched_getaffinity(0))
    assert cpu_count(machine(tmp_path, cgroup, files)) == expected


# --- device ---


def test_auto_takes_the_best_device_there_is():
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = detect_device("auto")
    assert device.type == device.torch.type == best
    assert device.total_memory > 0


def test_cpu_can_be_asked_for_and_knows_its_memory():
    device = detect_device("cpu")
    assert (device.type, device.total_memory, device.supports_bfloat16) == ("cpu", host_memory_limit(), True)
    assert free_memory(device) is None


@pytest.mark.parametrize("setting", ["cuda" if not torch.cuda.is_available() else "mps", "tpu"])
def test_a_device_that_is_not_there_ends_the_start(setting):
    with pytest.raises(StartupError, match=setting) as raised:
        detect_device(setting)
    assert "\n" not in str(raised.value)


# --- dtypes ---

WAN = {"text_encoder": "UMT5EncoderModel", "transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}


@pytest.mark.parametrize(
    ("setting", "device", "default", "vae"),
    [
        ("auto", H200, torch.bfloat16, torch.float32),
        ("auto", T4, torch.float16, torch.float32),
        ("auto", OLD_MAC, torch.float32, torch.float32),
        ("auto", CPU, torch.float32, torch.float32),
        ("bfloat16", CPU, torch.bfloat16, torch.float32),
        ("float16", H200, torch.float16, torch.float32),
        ("float32", H200, torch.float32, torch.float32),
    ],
)
def test_dtypes_by_setting_and_device(tmp_path, setting, device, default, vae):
    chosen = select_dtypes(setting, device, tmp_path, WAN)
    assert (chosen.default, chosen.of("transformer"), chosen.of("vae")) == (default, default, vae)
    assert str(default).removeprefix("torch.") in chosen.reason


@pytest.mark.parametrize(("setting", "device"), [("bfloat16", T4), ("bfloat16", OLD_MAC), ("int8", H200)])
def test_a_dtype_that_cannot_be_had_ends_the_start(tmp_path, setting, device):
    with pytest.raises(StartupError, match=setting):
        select_dtypes(setting, device, tmp_path, WAN)


def test_dtypes_in_the_form_diffusers_takes():
    assert DtypePlan(torch.float16).as_torch_dtype() == torch.float16
    mixed = DtypePlan(torch.float16, {"vae": torch.float32}).as_torch_dtype()
    assert mixed == {"default": torch.float16, "vae": torch.float32}


@pytest.fixture
def stored(tmp_path):
    """A checkpoint whose transformer is two bfloat16 shards, its VAE float16 with little float32, one part fp8."""

    def save(path: str, **tensors: torch.Tensor) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        save_file(tensors, tmp_path / path)

    save("transformer/model-1-of-2.safetensors", a=torch.zeros(900, dtype=torch.bfloat16))
    save("transformer/model-2-of-2.safetensors", b=torch.zeros(100, dtype=torch.float32))
    (tmp_path / "transformer/model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
    )
    vae = {"a": torch.zeros(90, dtype=torch.float16), "b": torch.zeros(10), "c": torch.zeros(900, dtype=torch.int64)}
    save("vae/diffusion_pytorch_model.safetensors", **vae)
    save("vae/diffusion_pytorch_model.ema.safetensors", a=torch.zeros(9000))
    save("text_encoder/model.safetensors", a=torch.zeros(70, dtype=torch.float8_e4m3fn))
    (tmp_path / "tokenizer").mkdir()
    return tmp_path


PARTS = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "X", "tokenizer": "T"}


def test_native_is_what_most_of_each_component_is_stored_in(stored, caplog):
    chosen = select_dtypes("native", H200, stored, PARTS)
    assert chosen.of("transformer") == torch.bfloat16
    assert chosen.of("vae") == torch.float16  # not float32: native means native
    assert chosen.of("text_encoder") == torch.bfloat16  # fp8 falls back to what auto takes
    assert "text_encoder is stored in F8_E4M3" in caplog.text


def test_native_falls_back_where_the_device_cannot(stored, caplog):
    chosen = select_dtypes("native", T4, stored, PARTS)
    assert {chosen.of(name) for name in PARTS} == {torch.float16}
    assert "transformer is stored in BF16, which is not supported by Tesla T4" in caplog.text
    assert select_dtypes("native", CPU, stored, PARTS).of("vae") == torch.float16


# --- optimizations: decisions ---

OFF = dict.fromkeys(OPTIMIZATIONS, "false")


def on(settings=None, device=H200, model=30 * GIB, free=140 * GIB, host=256 * GIB, largest=None):
    return {name for name, decision in plan(settings or {}, device, model, free, host, largest).items() if decision.on}


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        ({}, {"low_cpu_mem"}),
        ({"settings": OFF}, set()),
        ({"settings": {**OFF, "vae_tiling": "true"}}, {"vae_tiling"}),
        ({"device": CPU, "free": None, "host": GIB}, {"low_cpu_mem"}),
        ({"free": 38 * GIB}, {"low_cpu_mem"}),
        ({"free": 36 * GIB, "largest": 20 * GIB}, {"low_cpu_mem", "cpu_offload"}),
        ({"free": 24 * GIB, "largest": 20 * GIB}, {"low_cpu_mem", "sequential_cpu_offload"}),
        ({"free": 24 * GIB}, {"low_cpu_mem", "sequential_cpu_offload"}),
        ({"free": 24 * GIB, "settings": {"sequential_cpu_offload": "false"}}, {"low_cpu_mem", "cpu_offload"}),
        ({"free": 24 * GIB, "settings": {"cpu_offload": "true"}}, {"low_cpu_mem", "cpu_offload"}),
        ({"free": 24 * GIB, "settings": {"cpu_offload": "false"}, "largest": 9 * GIB}, {"low_cpu_mem"}),
        ({"settings": {"sequential_cpu_offload": "true"}}, {"low_cpu_mem", "sequential_cpu_offload"}),
        ({"free": 24 * GIB, "settings": {"sequential_cpu_offload": "true"}}, {"low_cpu_mem", "sequential_cpu_offload"}),
        ({"free": 32 * GIB, "host": 16 * GIB}, {"low_cpu_mem"}),
    ],
)
def test_what_is_chosen(situation, expected):
    assert on(**situation) == expected


def test_reasons_name_what_was_measured():
    why = plan({}, H200, 30 * GIB, 36 * GIB, 256 * GIB, 20 * GIB)["cpu_offload"].why
    assert "auto" in why and "30.0 GiB" in why and "36.0 GiB" in why
    assert plan({"vae_tiling": "true"}, CPU, 1, None, 1)["vae_tiling"] == Decision(True, "set to true")


@pytest.mark.parametrize(
    ("situation", "message"),
    [
        ({"settings": {"cpu_offload": "true", "sequential_cpu_offload": "true"}}, "both true"),
        ({"settings": {"cpu_offlaod": "true"}}, "cpu_offlaod"),
        ({"settings": {"vae_tiling": "maybe"}}, "ENABLE_VAE_TILING is 'maybe'"),
        ({"free": 24 * GIB, "host": 16 * GIB}, "30.0 GiB.*24.0 GiB.*16.0 GiB"),
    ],
)
def test_plans_that_cannot_work_end_the_start(situation, message):
    with pytest.raises(StartupError, match=message):
        on(**situation)


def test_components_go_straight_to_the_device_only_without_offload():
    assert moves_whole(H200, plan({}, H200, GIB, 140 * GIB, 256 * GIB))
    assert not moves_whole(H200, plan({"cpu_offload": "true"}, H200, GIB, 140 * GIB, 256 * GIB))
    assert moves_whole(CPU, plan({"cpu_offload": "true"}, CPU, GIB, None, 256 * GIB))


# --- optimizations: effects ---


def asked(*names: str) -> dict[str, Decision]:
    return {name: Decision(name in names, "a test") for name in OPTIMIZATIONS}


def pipeline_of(folder: Path):
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def test_what_applies_is_on(tiny_models):
    pipeline = pipeline_of(tiny_models / "sd15")
    report = apply(pipeline, CPU, asked("attention_slicing", "vae_slicing", "vae_tiling"))
    assert [report[n] for n in ("attention_slicing", "vae_slicing", "vae_tiling")] == ["on: a test"] * 3
    assert report["low_cpu_mem"] == "off: a test"
    assert pipeline.vae.use_slicing and pipeline.vae.use_tiling
    assert all("Sliced" in type(processor).__name__ for processor in pipeline.unet.attn_processors.values())


def test_what_is_off_is_left_alone(tiny_models):
    pipeline = pipeline_of(tiny_models / "sd15")
    report = apply(pipeline, CPU, asked())
    assert set(report) == set(OPTIMIZATIONS) and set(report.values()) == {"off: a test"}
    assert not pipeline.vae.use_slicing and not pipeline.vae.use_tiling
    assert not any("Sliced" in type(processor).__name__ for processor in pipeline.unet.attn_processors.values())


@pytest.mark.parametrize("family", ["wan-t2v-a14b", "glm-image"])
def test_attention_slicing_is_not_applicable_where_nothing_can_slice(tiny_models, caplog, family):
    report = apply(pipeline_of(tiny_models / family), CPU, asked("attention_slicing"))
    assert report["attention_slicing"].startswith("not_applicable: no component of ")
    assert [r.levelno for r in caplog.records if "attention_slicing" in r.message] == [logging.WARNING]


def small_unet() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)


def test_vae_options_are_not_applicable_without_a_vae_or_to_one_that_cannot(tiny_models):
    no_vae = DDIMPipeline(small_unet(), DDIMScheduler())
    cannot = pipeline_of(tiny_models / "sd15")
    cannot.vae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    for pipeline in (no_vae, cannot):
        report = apply(pipeline, CPU, asked("vae_slicing", "vae_tiling"))
        assert report["vae_slicing"].startswith("not_applicable: ")
        assert report["vae_tiling"].startswith("not_applicable: ")


@pytest.mark.parametrize("name", ["cpu_offload", "sequential_cpu_offload"])
def test_offload_is_not_applicable_on_a_cpu(tiny_models, caplog, name):
    pipeline = pipeline_of(tiny_models / "sd15")
    report = apply(pipeline, CPU, asked(name))
    assert report[name].startswith("not_applicable: cpu has no memory apart")
    assert "WARNING" in caplog.text
    assert not hasattr(pipeline.unet, "_hf_hook")


def test_offload_does_not_move_the_model_to_the_gpu(tiny_models):
    pipeline = pipeline_of(tiny_models / "sd15")
    report = apply(pipeline, H200, asked("cpu_offload"))
    assert report["cpu_offload"] == "on: a test"
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert hasattr(part, "_hf_hook")  # moves it when it runs
        assert {p.device.type for p in part.parameters()} == {"cpu"}


@without_cuda
@pytest.mark.parametrize(
    ("names", "message"),
    [(["sequential_cpu_offload"], "ENABLE_SEQUENTIAL_CPU_OFFLOAD failed: "), ([], "moving the model to NVIDIA H200")],
)
def test_what_applies_and_fails_ends_the_start(tiny_models, names, message):
    with pytest.raises(StartupError, match=message) as raised:
        apply(pipeline_of(tiny_models / "sd15"), H200, asked(*names))
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize(
    "text",
    ["CUDA error: out of memory\nCUDA kernel errors might", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"],
)
def test_cuda_says_out_of_memory_in_other_words_too(text: str) -> None:
    from runtime.engine.worker import _device_is_lost, _is_out_of_memory

    error = RuntimeError(text)
    assert _is_out_of_memory(error) and not _device_is_lost(error)


def test_a_context_made_early_needs_no_driver() -> None:
    """In a process of its own: where there is a device, the context stays."""
    code = "from runtime.engine.worker import make_cuda_context; make_cuda_context()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)

"""What only a CUDA device shows: the same pictures as the CPU's, offload, and the default data types."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import Serve, Server

pytestmark = pytest.mark.gpu

PICTURE = {"prompt": "a red fox", "size": "64x64", "num_inference_steps": 4, "seed": 11}
VIDEO = {**PICTURE, "num_frames": 9, "output_quality": 100}  # H.264 makes much of the last bit of noise
SOURCE = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)).save(SOURCE, "PNG")
IMAGE = base64.b64encode(SOURCE.getvalue()).decode()

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm-image": ("glm-image", PICTURE),
    "glm-image edit": ("glm-image", {**PICTURE, "image": IMAGE}),
    "glm-image two sources": ("glm-image", {**PICTURE, "images": [IMAGE, IMAGE]}),
    "wan-t2v-a14b": ("wan-t2v-a14b", {**VIDEO, "num_inference_steps": 8}),
    "wan-i2v-a14b": ("wan-i2v-a14b", {**VIDEO, "image": IMAGE}),
    "wan-ti2v-5b": ("wan-ti2v-5b", VIDEO),
    "wan-ti2v-5b from image": ("wan-ti2v-5b", {**VIDEO, "image": IMAGE}),
    "sd15": ("sd15", PICTURE),
    "sdxl": ("sdxl", PICTURE),
    "sd3": ("sd3", PICTURE),
    "flux": ("flux", PICTURE),
}


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    assert torch.cuda.is_available(), "these tests need a CUDA device; none is visible"


def pixels(server: Server, fields: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The result as floats from 0 to 255, of shape (frames, height, width, 3)."""
    prediction = server.predict(fields)[0]
    content = base64.b64decode((prediction.get("video") or prediction["image"])["b64"])
    if "video" not in prediction:
        return np.asarray(Image.open(io.BytesIO(content)), dtype=np.float64)[None]
    with av.open(io.BytesIO(content)) as video:
        return np.stack([f.to_ndarray(format="rgb24") for f in video.decode(video=0)]).astype(np.float64)


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one - other).mean())


@pytest.mark.parametrize("case", CASES)
def test_a_seed_means_the_same_as_on_the_cpu(serve: Serve, case: str) -> None:
    family, fields = CASES[case]
    gpu = serve(family, "--device", "cuda", "--dtype", "float32")
    cpu = serve(family, "--device", "cpu", "--dtype", "float32")
    here, there = pixels(gpu, fields), pixels(cpu, fields)
    other = pixels(gpu, {**fields, "seed": 12})
    print(f"{case}: {difference(here, there):.4f} of 255 from the CPU's, another seed {difference(here, other):.1f}")
    assert difference(here, there) < 2.0
    assert difference(here, other) > 5.0
    assert np.array_equal(here, pixels(gpu, fields))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("offload", ["ENABLE_CPU_OFFLOAD", "ENABLE_SEQUENTIAL_CPU_OFFLOAD"])
def test_offload_changes_nothing_but_memory(serve: Serve, case: str, offload: str) -> None:
    family, fields = CASES[case]
    whole = serve(family, "--device", "cuda", "--dtype", "float32")
    offloaded = serve(family, "--device", "cuda", "--dtype", "float32", **{offload: "true"})
    name = offload.removeprefix("ENABLE_").lower()
    told = offloaded.json("GET", f"/v2/models/{offloaded.name}")[1]["properties"]["optimizations"]
    assert told[name].startswith("on"), told
    if family == "glm-image" and len(fields) > len(PICTURE) and name == "sequential_cpu_offload":
        status, answer = offloaded.json("POST", f"/v1/models/{offloaded.name}:predict", {"instances": [fields]})
        assert status == 400 and "ENABLE_SEQUENTIAL_CPU_OFFLOAD" in answer["error"]
        return
    first = pixels(offloaded, fields)
    assert difference(first, pixels(whole, fields)) < 0.01
    assert np.array_equal(first, pixels(offloaded, fields))


def test_a_poisoned_context_is_replaced(start: Callable[..., Server], tiny_models: Path, tmp_path: Path) -> None:
    """A prompt with tokens beyond the embedding: an assert on the device, the end of the process's CUDA context."""
    folder = tmp_path / "flux"
    shutil.copytree(tiny_models / "flux", folder)
    home = folder / "text_encoder_2"
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps({**config, "vocab_size": 110}))  # the ids of ASCII's letters
    weights = load_file(home / "model.safetensors")
    cut = {
        name: value[:110].clone() if value.shape[0] == config["vocab_size"] else value
        for name, value in weights.items()
    }
    save_file(cut, home / "model.safetensors", {"format": "pt"})
    server = start(folder, "--device", "cuda")
    server.wait_ready()
    good = {**PICTURE, "prompt": "fox"}
    before = pixels(server, good)
    status, answer = server.json("POST", "/v1/models/tiny:predict", {"instances": [{**good, "prompt": "\u00e9"}]})
    assert status == 503 and "engine" in answer["error"], answer
    server.wait_ready()
    assert np.array_equal(pixels(server, good), before)
    log = server.log.read_text()
    assert log.count("the device is lost; the engine ends") == 2  # it runs once more, and no third time
    assert "it runs once more" in log
    assert server.stop() == 0


@pytest.mark.parametrize("family", sorted({family for family, _ in CASES.values()}))
def test_the_default_is_bfloat16_and_repeats(serve: Serve, family: str) -> None:
    server = serve(family, "--device", "cuda")
    told = server.json("GET", f"/v2/models/{server.name}")[1]["properties"]
    assert "bfloat16" in told["dtypes"].values()
    if family.startswith("wan"):
        assert told["dtypes"]["vae"] == "float32"
    fields = next(fields for name, fields in CASES.values() if name == family)
    one, two = pixels(server, fields), pixels(server, fields)
    assert np.array_equal(one, two) and one.std() > 5


SETTINGS = {
    "the default": ([], ["tokens by kernels", "DiT by kernels"]),
    "8 bits": (
        ["--token_weights", "int8", "--denoiser_weights", "float8"],
        ["tokens by kernels from int8", "DiT by kernels in float8"],
    ),
    "float8 tokens": (["--token_weights", "float8"], ["tokens by kernels from float8", "DiT by kernels"]),
    "flash attention": (["--attention_backend", "flash"], ["flash attention"]),
    "native attention": (["--attention_backend", "native"], ["native attention"]),
    "four rows": (["--max_batch_size", "4"], ["tokens by kernels, 4 rows"]),
    "turns": (["--enable_cpu_offload", "true"], ["tokens by kernels", "DiT by kernels"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_may_decide_a_pictures_bits_is_told_and_repeats(serve: Serve, name: str) -> None:
    flags, words = SETTINGS[name]
    server = serve("glm-image", "--device", "cuda", *flags)
    told = server.json("GET", f"/v2/models/{server.name}")[1]["properties"]
    for case in ("glm-image", "glm-image edit"):
        prediction = server.predict(CASES[case][1])[0]
        assert prediction["engine_variant"] == told["engine_variant"]
        assert all(word in told["engine_variant"] for word in words), told
        first = pixels(server, CASES[case][1])
        assert np.array_equal(first, pixels(server, CASES[case][1])) and first.std() > 5


def test_pictures_of_glm_image_are_the_same_alone_and_in_company(serve: Serve) -> None:
    server = serve("glm-image", "--device", "cuda", "--max_batch_size", "4", "--max_batch_wait_ms", "2000")
    asked = [{**PICTURE, "prompt": f"picture {'x' * i}", "seed": i} for i in range(4)]
    together = server.predict(*asked)
    assert [p["batched"] for p in together] == [4] * 4
    for fields, one in zip(asked, together, strict=True):
        assert server.predict(fields)[0]["image"]["b64"] == one["image"]["b64"]

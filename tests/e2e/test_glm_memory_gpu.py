"""GLM-Image's models in turns on a CUDA device: the pictures of the whole placement, through the same graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import tiny
from runtime.device_manager import detect_device, free_memory
from runtime.families.glm_image.pipeline import Runner
from runtime.families.glm_image.stages import CHUNK, Stages, stages_of
from runtime.optimization_manager import OPTIMIZATIONS
from runtime.pipeline_loader import LoadedPipeline, load_pipeline
from runtime.types import PLAIN, Acceleration
from tests.glm import TEXT, drawn, source

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
REQUESTS = (TEXT, replace(TEXT, images=(source(0),))) * 2
EIGHT = Acceleration(token_weights="int8", denoiser_weights="float8")


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    assert torch.cuda.is_available(), "these tests need a CUDA device; none is visible"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("models"), "glm-image")


@pytest.fixture
def fraction() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def loaded(folder: Path, dtype: str, offload: str, acceleration: Acceleration = PLAIN) -> LoadedPipeline:
    settings = {**dict.fromkeys(OPTIMIZATIONS, "auto"), "cpu_offload": offload}
    return load_pipeline(folder, "cuda", dtype, settings, lambda *_: None, None, acceleration)


@pytest.mark.parametrize(
    ("dtype", "acceleration"), [("bfloat16", PLAIN), ("float32", PLAIN), ("bfloat16", EIGHT)], ids=str
)
def test_in_turns_it_draws_the_same_bytes(folder: Path, dtype: str, acceleration: Acceleration) -> None:
    whole, turns = (loaded(folder, dtype, offload, acceleration) for offload in ("false", "true"))
    stages = stages_of(turns.pipeline)
    assert stages is not None and stages_of(whole.pipeline) is None
    assert turns.optimizations["cpu_offload"] == "on: set to true"
    runners = [Runner(one.pipeline, one.acceleration) for one in (whole, turns)]
    assert runners[0].variant == runners[1].variant
    assert runners[1].variant.startswith("tokens by kernels")
    blockers = []
    for seed, request in enumerate(REQUESTS):
        expected, found = (
            drawn(one.pipeline, runner, request, seed, DEVICE)
            for one, runner in zip((whole, turns), runners, strict=True)
        )
        assert np.array_equal(expected, found), seed
        stages.release()
        blockers.append(torch.empty(2**20, dtype=torch.uint8, device=DEVICE))  # the weights come back elsewhere


def test_a_model_larger_than_the_ring_arrives_whole() -> None:
    """Tensors that end within a buffer, fill several, and are not as many bytes as the alignment."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(257, rows) for rows in (3, CHUNK // 257, 7, CHUNK // 512, 1)])
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    before = [weight.detach().clone() for weight in model.parameters()]
    stages = Stages({"one": model, "other": torch.nn.Linear(2, 2)}, torch.zeros(1, device=DEVICE).device)
    for name in ("one", "other", "one"):
        stages.take(name)
    assert all(torch.equal(weight.cpu(), value) for weight, value in zip(model.parameters(), before, strict=True))


def test_only_one_model_takes_memory(folder: Path) -> None:
    models = {name: torch.nn.Linear(8192, 8192) for name in ("one", "other")}
    stages = Stages(models, DEVICE)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for name in ("one", "other", "one"):
        stages.take(name)
        assert torch.cuda.memory_reserved() - before < 1.1 * 4 * 8192 * 8192
    stages.make_room(2**20)
    assert models["one"].weight.untyped_storage().nbytes() > 0, "there was room"
    stages.make_room(2**60)
    assert torch.cuda.memory_reserved() == before


def test_free_memory_is_what_the_allocator_may_take(fraction: None) -> None:
    device = detect_device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.1)
    free = free_memory(device)
    assert free is not None and device.total_memory is not None
    assert free <= 0.1 * device.total_memory
    held = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    assert free - free_memory(device) == len(held)  # type: ignore[operator]

"""ATTENTION_BACKEND, TOKEN_WEIGHTS and DENOISER_WEIGHTS: applied, told, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from runtime.engine.context import Context
from runtime.errors import StartupError
from runtime.families import registry
from runtime.families.registry import pipeline_half
from runtime.types import PLAIN, Acceleration

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def pipeline_of(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def runner_of(pipeline: Any, acceleration: Acceleration) -> Any:
    return pipeline_half(registry.family_of(type(pipeline).__name__)).Runner(pipeline, acceleration)


@pytest.mark.parametrize("model", ["flux", "wan-ti2v-5b", "glm-image"])
def test_the_attention_asked_for_is_used_and_told(tiny_models: Path, model: str) -> None:
    drawn = []
    for acceleration in (PLAIN, Acceleration(attention="native")):
        pipeline = pipeline_of(tiny_models / model)
        half = pipeline_half(registry.family_of(type(pipeline).__name__))
        runner = runner_of(pipeline, acceleration)
        asked = acceleration.attention != "auto"
        assert runner.variant == ("stock, native attention" if asked else "stock")
        chosen = {
            str(processor._attention_backend)
            for module in pipeline.transformer.modules()
            if hasattr(processor := getattr(module, "processor", None), "_attention_backend")
        }
        assert len(chosen) == 1 and ("NATIVE" in chosen.pop()) == asked
        request = half.warmup(half.facts(pipeline, tiny_models / model))
        drawn.append(np.asarray(runner.run(request, 1, Context(CPU, lambda: False, lambda _: None))))
    assert np.array_equal(*drawn), "PyTorch's own attention is what diffusers takes by itself"


@pytest.mark.parametrize(
    ("model", "acceleration", "said"),
    [
        ("wan-ti2v-5b", Acceleration(attention="cudnn"), "ATTENTION_BACKEND=cudnn: needs a CUDA device"),
        ("glm-image", Acceleration(attention="flash"), "ATTENTION_BACKEND=flash: needs a CUDA device"),
        ("sd15", Acceleration(attention="native"), "the attention of StableDiffusionPipeline cannot be chosen"),
        ("sd15", Acceleration(token_weights="int8"), "StableDiffusionPipeline has plain ones only"),
        ("wan-ti2v-5b", Acceleration(denoiser_weights="float8"), "WanPipeline has plain ones only"),
        ("glm-image", Acceleration(token_weights="int8"), "TOKEN_WEIGHTS=int8: needs GLM-Image's kernels"),
        ("glm-image", Acceleration(denoiser_weights="float8"), "DENOISER_WEIGHTS=float8: needs GLM-Image's kernels"),
    ],
)
def test_what_cannot_be_is_refused(tiny_models: Path, model: str, acceleration: Acceleration, said: str) -> None:
    pipeline = pipeline_of(tiny_models / model)
    with pytest.raises(StartupError, match=said):
        runner_of(pipeline, acceleration)

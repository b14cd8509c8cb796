"""GLM-Image in less memory than it takes whole: 8-bit layers in the place of plain ones, models that take turns, and
the planner that chooses. What needs a GPU of it is in tests/e2e/test_glm_memory_gpu.py."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from runtime.checkpoint import read_header
from runtime.device_manager import Device
from runtime.dtype_selector import DtypePlan
from runtime.errors import StartupError
from runtime.families.glm_image.memory import Sizes, choose, place_weights, sizes_of
from runtime.families.glm_image.pipeline import Runner
from runtime.families.glm_image.reference import float8, int8
from runtime.families.glm_image.stages import Stages, stages_of, take
from runtime.families.glm_image.weights import (
    DENOISER_LINEARS,
    TOKEN_LINEARS,
    EightBitLinear,
    attentions,
    eight_bits,
    fused,
    weight_of,
)
from runtime.optimization_manager import Decision, Placement, apply, plan
from runtime.types import PLAIN, Acceleration
from tests.glm import TEXT, drawn, source

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GIB = 2**30
CARD = Device("cuda", "a card", 80 * GIB, True)
EDIT = replace(TEXT, images=(source(0),))
# The checkpoint's, in bfloat16.
FULL = Sizes(20_228_491_520, 16_315_842_560, 13_853_765_760, 12_079_595_520, 435_314_944 + 812_201_286)
AUTO = Acceleration(token_weights="auto", denoiser_weights="auto")


def loaded(tiny_models: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(tiny_models / "glm-image")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def in_turns(pipeline: Any, acceleration: Acceleration = PLAIN) -> Stages:
    place_weights(pipeline, CPU, Placement(Decision(True, "a test"), acceleration, False))
    stages = stages_of(pipeline)
    assert stages is not None
    return stages


# --- 8-bit layers


@pytest.mark.parametrize("made", [int8, float8])
def test_an_8_bit_layer_is_what_its_weight_is(made: Any) -> None:
    linear = torch.nn.Linear(24, 40)
    eight = EightBitLinear(made(linear.weight), linear.bias.detach())
    given = torch.randn(3, 24)
    assert torch.equal(
        eight(given), torch.nn.functional.linear(given, weight_of(eight).whole(given.dtype), linear.bias)
    )
    assert (eight.in_features, eight.out_features) == (24, 40) and not list(eight.parameters())


@pytest.mark.parametrize("made", [None, int8, float8])
def test_fused_layers_lie_behind_one_another(made: Any) -> None:
    layers: list[Any] = [torch.nn.Linear(16, width) for width in (8, 4, 4)]
    if made is not None:
        layers = [EightBitLinear(made(layer.weight), layer.bias.detach()) for layer in layers]
    given = torch.randn(3, 16)
    apart = torch.cat([layer(given) for layer in layers], dim=-1)
    weight, bias = fused(*layers)
    again, _ = fused(*layers)
    assert torch.allclose(torch.nn.functional.linear(given, weight.whole(torch.float32), bias), apart)
    assert torch.equal(torch.cat([layer(given) for layer in layers], dim=-1), apart)
    assert weight.values.data_ptr() == again.values.data_ptr() == weight_of(layers[0]).values.data_ptr()


def test_8_bit_layers_take_the_place_of_the_originals(tiny_models: Path) -> None:
    pipeline = loaded(tiny_models)
    encoder = pipeline.vision_language_encoder
    names = [name for name, _ in encoder.named_modules() if TOKEN_LINEARS.search(name)]
    originals = [weakref.ref(encoder.get_submodule(name).weight) for name in names]
    before = sum(weight.nbytes for weight in encoder.parameters())
    linears = sum(encoder.get_submodule(name).weight.nbytes for name in names)
    eight_bits(encoder, TOKEN_LINEARS, "int8", CPU)
    gc.collect()
    assert len(names) == 6 * 2 and not any(original() for original in originals)
    assert sum(weight.nbytes for weight in encoder.parameters()) <= before - linears
    kept = [encoder.get_submodule(name) for name in names]
    eight_bits(encoder, TOKEN_LINEARS, "int8", CPU)
    assert all(encoder.get_submodule(name) is layer for name, layer in zip(names, kept, strict=True))


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_8_bit_tokens_are_those_of_the_rounded_weights(tiny_models: Path, kind: str) -> None:
    """Prompt and tokens alike: a plain model of the same rounded weights gives the same."""
    eight, rounded = loaded(tiny_models), loaded(tiny_models)
    eight_bits(eight.vision_language_encoder, TOKEN_LINEARS, kind, CPU)
    for name, module in eight.vision_language_encoder.named_modules():
        if isinstance(module, EightBitLinear):
            rounded.vision_language_encoder.get_submodule(name).weight.data = module.weight8.whole(torch.float32)
    for request in (TEXT, EDIT):
        pictures = [drawn(pipeline, Runner(pipeline, fast=True), request, 3, CPU) for pipeline in (eight, rounded)]
        assert np.array_equal(*pictures)


# --- turns


def test_neighbours_are_laid_as_they_are_fused(tiny_models: Path) -> None:
    pipeline = loaded(tiny_models)
    before = copy.deepcopy(pipeline.transformer.state_dict())
    in_turns(pipeline)
    for name, model in (("tokens", pipeline.vision_language_encoder), ("denoise", pipeline.transformer)):
        take(pipeline, name)
        seen = 0
        for layers in attentions(model):
            weight, bias = fused(*layers)
            assert bias is not None and bias.data_ptr() == layers[0].bias.data_ptr()
            assert weight.values.data_ptr() == layers[0].weight.data_ptr()
            assert torch.equal(weight.values, torch.cat([layer.weight for layer in layers]))
            seen += 1
        assert seen == 2
    assert all(torch.equal(value, before[name]) for name, value in pipeline.transformer.state_dict().items())


def test_one_model_is_there_at_a_time(tiny_models: Path) -> None:
    pipeline = loaded(tiny_models)
    encoder, transformer = pipeline.vision_language_encoder, pipeline.transformer
    plain = sum(weight.sum() for weight in encoder.parameters())
    stages = in_turns(pipeline)

    def there(model: Any) -> bool:
        sizes = {weight.untyped_storage().nbytes() > 0 for weight in [*model.parameters(), *model.buffers()]}
        assert len(sizes) == 1
        return sizes.pop()

    assert not there(encoder) and not there(transformer)
    for name in ("tokens", "denoise", "tokens", "tokens"):
        stages.take(name)
        assert (there(encoder), there(transformer)) == (name == "tokens", name == "denoise")
    assert sum(weight.sum() for weight in encoder.parameters()) == plain
    stages.release()
    assert not there(encoder) and not there(transformer) and there(pipeline.vae) and there(pipeline.text_encoder)


@pytest.mark.parametrize(
    "acceleration", [PLAIN, Acceleration(token_weights="int8", denoiser_weights="float8")], ids=["plain", "8-bit"]
)
def test_in_turns_it_draws_the_same_bytes(tiny_models: Path, acceleration: Acceleration) -> None:
    whole, turns = loaded(tiny_models), loaded(tiny_models)
    stages = in_turns(turns, acceleration)
    runners = Runner(whole, acceleration, True), Runner(turns, acceleration, True)
    assert runners[0].variant == runners[1].variant
    for seed, request in enumerate([TEXT, EDIT, TEXT, EDIT]):
        expected, found = (
            drawn(pipeline, runner, request, seed, CPU)
            for pipeline, runner in zip((whole, turns), runners, strict=True)
        )
        assert np.array_equal(expected, found)
        if seed == 2:
            stages.release()  # as a VAE does that needs the room
    assert stages.seconds > 0


def test_stock_takes_turns_too(tiny_models: Path) -> None:
    whole, turns = loaded(tiny_models), loaded(tiny_models)
    in_turns(turns)
    pictures = [drawn(pipeline, Runner(pipeline, fast=False), EDIT, 1, CPU) for pipeline in (whole, turns)]
    assert np.array_equal(*pictures)


# --- the planner


def test_sizes_are_those_of_the_models(tiny_models: Path) -> None:
    folder, pipeline = tiny_models / "glm-image", loaded(tiny_models)
    dtypes = DtypePlan(torch.float32)
    sizes = {
        name: sum(t.elements * 4 for file in (folder / name).glob("*.safetensors") for t in read_header(file).values())
        for name in ("vision_language_encoder", "transformer", "vae", "text_encoder")
    }
    found = sizes_of(folder, sizes, dtypes)
    for model, names, counted in (
        (pipeline.vision_language_encoder, TOKEN_LINEARS, found.token_linears),
        (pipeline.transformer, DENOISER_LINEARS, found.denoiser_linears),
    ):
        assert counted == sum(module.weight.nbytes for name, module in model.named_modules() if names.search(name)) > 0
    assert found.all == sum(sizes.values())


def chosen(free: float, **changes: Any) -> Placement | None:
    given: dict[str, Any] = {"asked": AUTO, "offload": "auto", "host_limit": 64 * GIB, "capability": (9, 0), **changes}
    return choose(FULL, free=int(free * GIB), **given)


PLAIN_PAIR, INT8_PAIR, LOSSY_PAIR = ("plain", "plain"), ("int8", "plain"), ("int8", "float8")
ASKED = Acceleration(token_weights="int8", denoiser_weights="float8")


@pytest.mark.parametrize(
    ("free", "changes", "turns", "weights"),
    [
        (78, {}, False, PLAIN_PAIR),
        (47, {}, False, PLAIN_PAIR),
        (47, {"offload": "true"}, True, PLAIN_PAIR),
        (31, {}, True, PLAIN_PAIR),
        (23.3, {}, True, PLAIN_PAIR),
        (22, {}, True, PLAIN_PAIR),
        (23.3, {"asked": PLAIN}, True, PLAIN_PAIR),
        (31, {"offload": "false"}, False, INT8_PAIR),
        (31, {"host_limit": 16 * GIB}, False, INT8_PAIR),
        (23.3, {"host_limit": 24 * GIB}, True, LOSSY_PAIR),
        (23.3, {"host_limit": 24 * GIB, "capability": (8, 6)}, None, None),
        (23.3, {"host_limit": 26 * GIB, "capability": (8, 6)}, True, INT8_PAIR),
        (23.3, {"host_limit": 24 * GIB, "asked": PLAIN}, None, None),
        (23.3, {"host_limit": 24 * GIB, "capability": (0, 0)}, None, None),
        (23.3, {"asked": ASKED}, True, LOSSY_PAIR),
        (31, {"asked": ASKED}, False, LOSSY_PAIR),
        (15.5, {}, True, LOSSY_PAIR),
        (8, {}, None, None),
        (23.3, {"asked": replace(AUTO, rows=8)}, True, INT8_PAIR),
        (47, {"asked": replace(AUTO, rows=8)}, False, PLAIN_PAIR),
    ],
)
def test_what_a_card_gets(free: float, changes: Any, turns: bool | None, weights: Any) -> None:
    found = chosen(free, **changes)
    if turns is None:
        assert found is None
        return
    assert found is not None and found.offload.on == turns
    assert (found.acceleration.token_weights, found.acceleration.denoiser_weights) == weights


def test_a_choice_says_why() -> None:
    found = chosen(23.3)
    assert found is not None
    need = "32.9 GiB of weights and a working set of 5.2 GiB"
    assert found.offload.why == (
        f"{need} do not fit in 23.3 GiB free; the token model and the DiT take turns on the device"
    )
    whole = chosen(78)
    assert whole is not None and whole.offload.why == f"{need} fit in 78.0 GiB free" and whole.directly
    lossy = chosen(31, host_limit=16 * GIB)
    told = need.replace("of weights", "of weights (25.3 GiB with 8-bit ones)")
    assert lossy is not None and lossy.offload.why == f"{told} fit in 31.0 GiB free"
    assert not lossy.directly, "the plain weights would not fit on the way"


def test_a_placement_decides_about_offload() -> None:
    found = chosen(23.3)
    assert found is not None

    def decided(**settings: str) -> dict[str, Decision]:
        return plan(settings, CARD, FULL.all, 23 * GIB, 64 * GIB, FULL.tokens, found)

    assert decided()["cpu_offload"] == Decision(True, f"auto, {found.offload.why}")
    assert not decided()["sequential_cpu_offload"].on
    assert decided(cpu_offload="true")["cpu_offload"] == Decision(True, "set to true")
    with pytest.raises(StartupError, match=r"the host's limit of 24\.0 GiB cannot hold the weights"):
        plan({}, CARD, FULL.all, 23 * GIB, 24 * GIB, FULL.tokens, None)


def test_a_family_places_its_own(tiny_models: Path) -> None:
    pipeline = loaded(tiny_models)
    decision = Decision(True, "a test")
    placed = Placement(decision, PLAIN, False)
    report = apply(pipeline, CARD, {"cpu_offload": decision}, lambda pipeline, _: place_weights(pipeline, CPU, placed))
    assert report == {"cpu_offload": "on: a test"} and stages_of(pipeline) is not None
    assert not hasattr(pipeline.transformer, "_hf_hook")

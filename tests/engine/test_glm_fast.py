"""GLM-Image's fast path on the CPU, by `reference` in float32: token for token and picture for picture what the stock
modules give. What the GPU's kernels add is compared with `reference` in tests/e2e/test_glm_kernels.py."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.engine.context import Context
from runtime.engine.running import clean, isolated_random_state
from runtime.errors import Cancelled, StartupError
from runtime.families.glm_image import decoder, reference
from runtime.families.glm_image.decoder import Sampling
from runtime.families.glm_image.pipeline import Runner
from runtime.families.glm_image.tokens import sampling
from runtime.families.glm_image.transformer import Kept, attention_backend
from runtime.families.glm_image.weights import fused
from runtime.types import PLAIN, Acceleration, GenerationRequest, Progress
from tests.glm import TEXT, source

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


EDIT = replace(TEXT, images=(source(0),))
TWO = replace(EDIT, images=(source(1), source(2, 96, 64)), width=96)


class Arm:
    """A pipeline with a runner, and what was seen of its last picture."""

    def __init__(self, folder: Path, fast: bool, acceleration: Acceleration = PLAIN) -> None:
        self.pipeline: Any = DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.runner = Runner(self.pipeline, acceleration, fast)
        self.prior: list[torch.Tensor] = []
        self.latents = torch.empty(0)
        self.progress: list[Progress] = []
        transformer, vae = self.pipeline.transformer, self.pipeline.vae
        transformer.register_forward_pre_hook(
            lambda _, __, given: self.prior.append(given["prior_token_id"]), with_kwargs=True
        )
        vae.decoder.register_forward_pre_hook(lambda _, given: setattr(self, "latents", given[0]))

    def draw(self, request: GenerationRequest, seed: int, should_stop: Callable[[], bool] = lambda: False) -> Any:
        self.prior.clear()
        self.progress.clear()
        try:
            with isolated_random_state(seed, CPU):
                context = Context(CPU, should_stop, self.progress.append)
                return np.asarray(self.runner.run(request, seed, context)).astype(int)
        finally:
            clean(self.pipeline)


@pytest.fixture(scope="module")
def stock(tiny_models: Path) -> Arm:
    return Arm(tiny_models / "glm-image", fast=False)


@pytest.fixture(scope="module")
def fast(tiny_models: Path) -> Arm:
    return Arm(tiny_models / "glm-image", fast=True)


# --- the same picture


@pytest.mark.parametrize(
    "request_",
    [TEXT, replace(TEXT, width=96), replace(TEXT, guidance_scale=1.0), EDIT, TWO],
    ids=["text", "wide", "unguided", "edit", "two-sources"],
)
def test_the_fast_path_draws_what_stock_draws(stock: Arm, fast: Arm, request_: GenerationRequest) -> None:
    for seed in range(3):
        expected, drawn = stock.draw(request_, seed), fast.draw(request_, seed)
        assert len(stock.prior) == len(fast.prior)
        assert all(torch.equal(one, other) for one, other in zip(stock.prior, fast.prior, strict=True))
        assert (stock.latents - fast.latents).norm() < 1e-6 * stock.latents.norm()
        assert np.abs(expected - drawn).max() <= 1  # a value at the edge of two levels


def test_any_mix_of_requests_draws_what_each_draws_alone(tiny_models: Path, fast: Arm) -> None:
    choose = random.Random(0)
    requests = [
        replace(
            request,
            prompt="picture " + "x" * choose.randrange(30) + choose.choice(["", ' "sign"']),
            width=choose.choice((32, 64, 96)),
            height=choose.choice((32, 64)),
            num_inference_steps=choose.choice((1, 2)),
        )
        for request in [TEXT, EDIT, TWO, replace(TEXT, guidance_scale=1.0)] * 4
    ]
    choose.shuffle(requests)
    alone = {}
    for i in (0, 5, 10):
        alone[i] = Arm(tiny_models / "glm-image", fast=True).draw(requests[i], i)
    for i, request in enumerate(requests):
        drawn = fast.draw(request, i)
        assert i not in alone or np.array_equal(drawn, alone[i])


def test_the_arms_are_what_they_say(stock: Arm, fast: Arm) -> None:
    assert stock.runner.variant == "stock"
    assert fast.runner.variant == "tokens by reference, DiT by reference, native attention"
    assert Runner(stock.pipeline).variant == "stock", "the CPU's default draws stock's bytes"


# --- the token stage


def test_tokens_are_told_when_they_are_there(fast: Arm) -> None:
    fast.draw(TEXT, 0)
    told = [p for p in fast.progress if p.stage == "tokens"]
    assert [p.step for p in told] == [*range(16, 260, 16), 260]
    assert {p.total for p in told} == {260}


@pytest.mark.parametrize("at", [0, 1, 15, 16, 100, 259])
def test_a_cancel_ends_the_token_stage_within_a_chunk(fast: Arm, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    expected = fast.draw(TEXT, 7)
    sampled = 0
    sample = reference.sample

    def counted(*arguments: Any) -> None:
        nonlocal sampled
        sampled += 1
        sample(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Cancelled):
        patch.setattr(reference, "sample", counted)
        fast.draw(EDIT if at < 4 else TEXT, 8, lambda: sampled >= at)
    assert sampled <= at + decoder.CHUNK
    assert np.array_equal(fast.draw(TEXT, 7), expected)


def test_a_longer_request_gets_more_room(tiny_models: Path, monkeypatch: pytest.MonkeyPatch, fast: Arm) -> None:
    expected = fast.draw(TEXT, 3), fast.draw(EDIT, 3)
    monkeypatch.setattr(decoder, "ROOM", 16)
    grown = Arm(tiny_models / "glm-image", fast=True)
    assert np.array_equal(grown.draw(EDIT, 3), expected[1])
    assert np.array_equal(grown.draw(TEXT, 3), expected[0])
    assert np.array_equal(grown.draw(EDIT, 3), expected[1])


def test_noise_is_one_stream_however_it_is_drawn(fast: Arm) -> None:
    stage = fast.runner._tokens.decoder
    assert stage is not None
    for seed in range(3):
        one, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        for begin in (0, 16, 32):
            stage._draw(begin, [(one, 40)]).result()
            at = begin % 32
            rows = [torch.empty(1, stage._drawn.shape[2]).exponential_(1, generator=other) for _ in range(16)]
            assert torch.equal(stage._drawn[at : at + 16, 0], torch.cat(rows))


def test_the_thread_that_draws_noise_has_the_same_stream() -> None:
    def drawn() -> torch.Tensor:
        return torch.empty(1, 16512).exponential_(1, generator=torch.Generator().manual_seed(5))

    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(drawn).result(), drawn())


@pytest.mark.parametrize(("temperature", "top_p"), [(0.9, 0.75), (1.0, 1.0), (2.0, 0.3), (0.5, 1e-6)])
def test_a_sampled_id_is_transformers(temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    processors = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
    for step in range(50):
        logits = torch.randn(200, generator=generator)
        noise = torch.empty(32, 1, 220).exponential_(1, generator=generator)
        scores = logits[None].clone()
        for processor in processors:
            scores = processor(None, scores)
        expected = (scores.softmax(-1)[0] / noise[step % 32, 0, :200]).argmax()
        ids, state = torch.zeros(1, 60, dtype=torch.long), torch.tensor([[step, 5, 50]], dtype=torch.int32)
        reference.sample(logits[None], noise, ids, state, temperature, top_p)
        assert ids[0, step] == expected and state.tolist() == [[step + 1, 5, 50]]


def test_what_the_sampler_does_not_know_is_left_to_stock() -> None:
    plain = [
        SuppressTokensLogitsProcessor([300]),
        TemperatureLogitsWarper(0.9),
        TopKLogitsWarper(288),
        TopPLogitsWarper(0.75),
    ]
    assert sampling(plain, 256) == Sampling(0.9, 0.75)
    assert sampling([], 256) == Sampling(1.0, 1.0)
    assert sampling([*plain, RepetitionPenaltyLogitsProcessor(1.1)], 256) is None
    assert sampling([TopKLogitsWarper(50)], 256) is None
    assert sampling([TopPLogitsWarper(0.75), TopPLogitsWarper(0.5)], 256) is None


def test_sampling_of_another_kind_draws_stocks_tokens(tiny_models: Path) -> None:
    arms = [Arm(tiny_models / "glm-image", fast=fast) for fast in (False, True)]
    for arm in arms:
        arm.pipeline.vision_language_encoder.generation_config.top_k = 20
        arm.draw(replace(TEXT, num_inference_steps=1), 0)
    assert torch.equal(arms[0].prior[0], arms[1].prior[0])


# --- several requests at a time


class Batches:
    """A pipeline with room for four rows."""

    def __init__(self, folder: Path) -> None:
        self.pipeline: Any = DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.runner = Runner(self.pipeline, Acceleration(rows=4), fast=True)
        self.progress: list[list[Progress]] = []

    def draw(self, rows: Sequence[tuple[GenerationRequest, int]], gone: Container[int] = ()) -> list[Any]:
        """Pixels of each row; None for one of the `gone`."""
        self.progress = [[] for _ in rows]
        own = [Context(CPU, partial(operator.contains, gone, i), told.append) for i, told in enumerate(self.progress)]
        context = Context(CPU, lambda: False, lambda _: None, own)
        drawn = self.runner.run_batch(list(rows), context)
        return [None if picture is None else np.asarray(picture).astype(int) for picture in drawn]

    def alone(self, request: GenerationRequest, seed: int) -> Any:
        return np.asarray(self.runner.run(request, seed, Context(CPU, lambda: False, lambda _: None))).astype(int)


@pytest.fixture(scope="module")
def batches(tiny_models: Path) -> Batches:
    return Batches(tiny_models / "glm-image")


MIXED = [(TEXT, 0), (TWO, 1), (replace(TEXT, prompt="x" * 40, width=32), 2), (replace(EDIT, width=96), 3)]


def test_rows_draw_what_each_draws_alone_wherever_they_stand(batches: Batches, fast: Arm) -> None:
    alone = [batches.alone(*row) for row in MIXED]
    for row, drawn in zip(MIXED, alone, strict=True):
        assert np.abs(fast.draw(*row) - drawn).max() <= 1, "one row of four is one row"
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [2, 3], [1]):
        drawn = batches.draw([MIXED[i] for i in order])
        assert all(np.array_equal(drawn[place], alone[i]) for place, i in enumerate(order)), order


def test_a_rows_tokens_do_not_depend_on_the_others(batches: Batches) -> None:
    """Not even in their last bits: what the other rows hold, and where a row stands, changes no logit."""
    stage = batches.runner._tokens.decoder
    assert stage is not None
    seen: list[dict[int, torch.Tensor]] = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0]):
        batches.draw([MIXED[i] for i in order])
        assert stage._room is not None
        seen.append({i: stage._room.ids[place].clone() for place, i in enumerate(order)})
        counts = [int(row[2]) for row in stage._state]
        assert [int(row[0]) for row in stage._state] == counts, "a row stops at what it wants"
        assert counts[len(order) :] == [1] * (4 - len(order)), "a row without a request wants nothing"
    for i in range(4):
        assert torch.equal(seen[0][i][:4], seen[1][i][:4])
    assert torch.equal(seen[0][0][:260], seen[2][0][:260])


def test_a_row_that_nobody_waits_for_is_not_drawn(batches: Batches) -> None:
    alone = [batches.alone(*row) for row in MIXED]
    drawn = batches.draw(MIXED, gone={1, 3})
    assert [picture is None for picture in drawn] == [False, True, False, True]
    assert np.array_equal(drawn[0], alone[0]) and np.array_equal(drawn[2], alone[2])
    assert not [p for p in batches.progress[1] if p.stage == "denoise"]


def test_progress_of_rows_is_their_own(batches: Batches) -> None:
    pair = replace(TEXT, n=2)
    batches.draw([(pair, 0), (pair, 1), (EDIT, 5)])
    tokens = [[(p.step, p.total) for p in told if p.stage == "tokens"] for told in batches.progress]
    assert tokens[0][-1] == (260, 260) and len(tokens[0]) == 17
    assert tokens[1] == [(260, 260)], "of a request's other rows all tokens are there when their picture begins"
    assert tokens[2] == tokens[0]
    for told in batches.progress:
        assert [p.step for p in told if p.stage == "denoise"] == [1, 2, 3]


def test_sampling_that_the_decoder_does_not_know_is_drawn_one_by_one(tiny_models: Path) -> None:
    unknown = Batches(tiny_models / "glm-image")
    unknown.pipeline.vision_language_encoder.generation_config.top_k = 20
    alone = [unknown.alone(*row) for row in MIXED[:2]]
    assert all(np.array_equal(*pair) for pair in zip(unknown.draw(MIXED[:2]), alone, strict=True))
    for told in unknown.progress:
        stages = [p.stage for p in told]
        assert stages == sorted(stages, reverse=True), "each one's tokens, then its picture"
        for stage in ("tokens", "denoise"):
            steps = [p.step for p in told if p.stage == stage]
            assert steps == sorted(set(steps))


def test_more_rows_than_a_kernel_holds_are_refused(tiny_models: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_models / "glm-image")
    with pytest.raises(StartupError, match="MAX_BATCH_SIZE=65: GLM-Image takes up to 64"):
        Runner(pipeline, Acceleration(rows=65))


def test_a_long_prompts_room_is_given_back(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = batches.runner._tokens.decoder
    assert stage is not None
    expected = batches.alone(*MIXED[0])
    kept = stage._room
    assert kept is not None
    monkeypatch.setattr(decoder, "ROOM", kept.keys.shape[3] - 1)
    batches.alone(*MIXED[0])
    assert stage._room is None
    monkeypatch.undo()
    assert np.array_equal(batches.alone(*MIXED[0]), expected)


def test_a_batch_that_is_stopped_leaves_nothing_behind(batches: Batches) -> None:
    expected = batches.alone(*MIXED[0])
    looks = 0

    def stop() -> bool:
        nonlocal looks
        looks += 1
        return looks > 9

    own = [Context(CPU, stop, lambda _: None) for _ in MIXED]
    with pytest.raises(Cancelled):
        list(batches.runner.run_batch(MIXED, Context(CPU, stop, lambda _: None, own)))
    assert np.array_equal(batches.alone(*MIXED[0]), expected)


def test_on_a_cpu_several_rows_are_by_reference_and_draw_stocks_bytes(tiny_models: Path, stock: Arm) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_models / "glm-image")
    pipeline.set_progress_bar_config(disable=True)
    runner = Runner(pipeline, Acceleration(rows=2))
    assert runner.variant == "tokens by reference, 2 rows, DiT by stock"
    drawn = runner.run(TEXT, 3, Context(CPU, lambda: False, lambda _: None))
    assert np.array_equal(np.asarray(drawn).astype(int), stock.draw(TEXT, 3))


# --- 8-bit weights


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_8_bit_weights_draw_nearly_the_same(tiny_models: Path, fast: Arm, weights: str) -> None:
    lossy = Arm(tiny_models / "glm-image", True, Acceleration(token_weights=weights, denoiser_weights="float8"))
    assert lossy.runner.variant == f"tokens by reference from {weights}, DiT by reference in float8, native attention"
    request = replace(EDIT, num_inference_steps=1)  # few tokens: the first that differs changes all after it
    lossy.draw(request, 0)
    fast.draw(request, 0)
    assert 1e-5 < (lossy.latents - fast.latents).norm() / fast.latents.norm() < 0.05


@pytest.mark.parametrize(("made", "error"), [(reference.int8, 0.01), (reference.float8, 0.04)])
def test_8_bit_rows_have_a_step_of_their_own(made: Callable[[torch.Tensor], reference.Weight], error: float) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(8)[:, None]
    weight[3] = 0
    back = made(weight).whole(torch.float32)
    assert ((back - weight).norm(dim=1) <= error * weight.norm(dim=1)).all()


# --- the pieces


def test_fused_layers_share_their_weights() -> None:
    layers = [torch.nn.Linear(4, width) for width in (8, 2, 2)]
    given = torch.randn(3, 4)
    apart = torch.cat([layer(given) for layer in layers], dim=-1)
    weight, bias = fused(*layers)
    assert bias is not None
    assert torch.allclose(torch.nn.functional.linear(given, weight.values, bias), apart, atol=1e-6)
    weight.values[8:10] = 0
    assert not layers[1].weight.any() and layers[0].weight.all()


def test_kept_results_go_by_identity() -> None:
    kept, made = Kept(most=2), []
    one, other, third = torch.zeros(1), torch.zeros(1), torch.zeros(1)

    def result(key: torch.Tensor) -> int:
        def make() -> int:
            made.append(key)
            return len(made)

        found: int = kept(make, key)
        return found

    assert [result(one), result(other), result(one), result(third), result(third)] == [1, 2, 1, 3, 3]
    assert result(one) == 4, "only the last two are kept"


def test_the_attention_of_a_device() -> None:
    assert attention_backend("auto", CPU, torch.bfloat16) == "native"
    assert attention_backend("native", CPU, torch.float32) == "native"
    with pytest.raises(StartupError, match="needs a CUDA device"):
        attention_backend("flash", CPU, torch.float32)

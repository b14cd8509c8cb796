"""GLM-Image's kernels on a CUDA device: each against `reference`, and the fast path against the stock modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from runtime import tiny
from runtime.engine.context import Context
from runtime.engine.running import clean, isolated_random_state
from runtime.errors import Cancelled
from runtime.families.glm_image import decoder, reference
from runtime.families.glm_image.pipeline import Runner
from runtime.types import Acceleration, GenerationRequest
from tests.glm import TEXT, source

pytestmark = pytest.mark.gpu

WEIGHTS = {"plain": reference.Weight, "int8": reference.int8, "float8": reference.float8}
ROWS = (1, 3, 8)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


REQUESTS = (
    TEXT,
    replace(TEXT, width=96),
    replace(TEXT, images=(source(0, 64, 64),)),
    replace(TEXT, images=(source(1, 64, 64), source(2, 96, 64)), width=96),
)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Any:
    assert torch.cuda.is_available(), "these tests need a CUDA device; none is visible"
    from runtime.families.glm_image import kernels

    return kernels


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    error = float((one.double() - other.double()).norm() / other.double().norm())
    assert error < TOLERANCE[other.dtype], error


def states(*rows: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96, 4096])
@pytest.mark.parametrize("rows", ROWS)
def test_embed_and_norm(kernels: Any, dtype: torch.dtype, size: int, rows: int) -> None:
    table, before, weight, post = (drawn(n, size, dtype=dtype) for n in (50, rows, 1, 1))
    ids, state = torch.randint(0, 50, (rows, 12), device="cuda"), states(*((2 + i, 5, 10) for i in range(rows)))
    results = []
    for ops in (kernels, reference):
        hidden, out, total, normed = (unwritten(rows, size, dtype=dtype) for _ in range(4))
        ops.embed(ids, state, table, weight[0], hidden, out, 1e-5)
        total.copy_(before)
        ops.norm(hidden, total, post[0], weight[0], normed, 1e-5)
        results.append((hidden, out, total, normed))
    for one, other in zip(*results, strict=True):
        close(one, other)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "columns"), [(40, 96), (4608, 4096), (4096, 4096), (4096, 13696), (13696, 4096), (16384, 4096)]
)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_and_gated(
    kernels: Any, dtype: torch.dtype, weights: str, outputs: int, columns: int, rows: int
) -> None:
    x, weight = drawn(rows, columns, dtype=dtype), drawn(2 * outputs, columns, dtype=dtype)
    weight, bias = weight / columns**0.5, drawn(outputs, dtype=dtype)
    half, whole = WEIGHTS[weights](weight[:outputs]), WEIGHTS[weights](weight)
    results = []
    for ops in (kernels, reference):
        outs = [unwritten(rows, outputs, dtype=dtype) for _ in range(3)]
        ops.linear(x, half, bias, outs[0])
        ops.linear(x, half, None, outs[1])
        ops.gated(x, whole, outs[2])
        results.append(outs)
    for one, other in zip(*results, strict=True):
        close(one, other)


@pytest.mark.parametrize(("tokens", "size"), [(77, 64), (77, 4096)])
def test_the_dits_kernels_in_float8(kernels: Any, tokens: int, size: int) -> None:
    """Steps of float8 are as wide as an eighth of a value: what rounding moves across one is seen."""
    dtype = torch.bfloat16
    x, branch, wide = (drawn(tokens, n * size, dtype=dtype) for n in (1, 1, 4))
    gate, shift, scale = (drawn(2, size, dtype=dtype) for _ in range(3))
    weight, bias = reference.float8(drawn(4 * size, size, dtype=dtype) / size**0.5), drawn(4 * size, dtype=dtype)
    results = []
    for ops in (kernels, reference):
        hidden, out = ops.modulated(x, shift, scale, 5, 1e-5, branch, gate, True)
        product = ops.product(reference.float8(x) if ops is reference else ops.eighth(x), weight, bias)
        rows = [out, ops.eighth(x), ops.eighth(wide, gelu=True)]
        results.append((hidden, product, *(row.whole(dtype) for row in rows)))
    for one, other in zip(*results, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 0.03


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "group", "width", "half"), [(1, 2, 32, 8), (2, 16, 128, 32)])
@pytest.mark.parametrize("each", [((1, 1),), ((60, 4),), ((60, 5),), ((700, 300),), ((1, 1), (700, 300), (60, 4))])
def test_attend(
    kernels: Any, dtype: torch.dtype, heads: int, group: int, width: int, half: int, each: tuple[tuple[int, int], ...]
) -> None:
    rows = len(each)
    qkv = drawn(rows, (heads * group + 2 * heads) * width, dtype=dtype)
    cos, sin = drawn(rows, 400, width, dtype=dtype), drawn(rows, 400, width, dtype=dtype)
    cos[..., 2 * half :], sin[..., 2 * half :] = 1, 0
    state = states(*((done, start, 400) for start, done in each))
    cache = drawn(2, 1, rows, heads, 1024, width, dtype=dtype)
    results = []
    for ops in (kernels, reference):
        made, out = cache.clone(), unwritten(rows, heads * group * width, dtype=dtype)
        (keys, values), room = made[:, 0], ops.scratch(made[0], heads * group)
        ops.attend(qkv, cos, sin, half, keys, values, state, room, out, width**-0.5)
        results.append((keys, values, out))
    for one, other in zip(*results, strict=True):
        close(one, other)


@pytest.mark.parametrize("top_p", [0.75, 0.2, 1.0, 1e-6])
@pytest.mark.parametrize("rows", [1, 3])
def test_sample(kernels: Any, top_p: float, rows: int) -> None:
    """Half-precision logits have equals at the edge of the top-p set. A row that has its ids gets no more."""
    for step in range(100):
        logits = drawn(rows, 16384, dtype=torch.bfloat16) * (1 + step % 3)
        noise = torch.empty(32, rows, 16512).exponential_(1).cuda()
        results = []
        for ops in (kernels, reference):
            ids = torch.zeros(rows, 128, dtype=torch.long, device="cuda")
            state = states(*((step + i, 3, 90) for i in range(rows)))
            ops.sample(logits, noise, ids, state, 0.9, top_p)
            results.append((ids.tolist(), state.tolist()))
        assert results[0] == results[1], step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(2, 16), (32, 128)])
@pytest.mark.parametrize("texts", [0, 1, 30])
def test_the_dits_kernels(kernels: Any, dtype: torch.dtype, heads: int, width: int, texts: int) -> None:
    tokens, size = 77, heads * width
    x, branch, qkv = (drawn(tokens, n * size, dtype=dtype) for n in (1, 1, 3))
    gate, shift, scale = (drawn(2, size, dtype=dtype) for _ in range(3))
    cos, sin = drawn(tokens - texts, width, dtype=torch.float32), drawn(tokens - texts, width, dtype=torch.float32)
    weight, bias = drawn(4 * size, size, dtype=dtype) / size**0.5, drawn(4 * size, dtype=dtype)
    results = [
        (
            *ops.modulated(x, shift, scale, texts, 1e-5),
            *ops.modulated(x, shift, scale, texts, 1e-5, branch, gate),
            *ops.queries_keys(qkv, cos, sin, texts, heads, 1e-5),
            ops.grown(x, weight, bias),
        )
        for ops in (kernels, reference)
    ]
    for one, other in zip(*results, strict=True):
        close(one, other)


class Arm:
    def __init__(self, folder: Path, fast: bool, dtype: torch.dtype) -> None:
        self.pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to("cuda")
        self.pipeline.set_progress_bar_config(disable=True)
        self.runner = Runner(self.pipeline, fast=None if fast else False)
        self.prior: list[torch.Tensor] = []
        self.latents = torch.empty(0)
        self.pipeline.transformer.register_forward_pre_hook(
            lambda _, __, given: self.prior.append(given["prior_token_id"]), with_kwargs=True
        )
        self.pipeline.vae.decoder.register_forward_pre_hook(lambda _, given: setattr(self, "latents", given[0]))

    def draw(self, request: GenerationRequest, seed: int, should_stop: Callable[[], bool] = lambda: False) -> Any:
        self.prior.clear()
        device = torch.device("cuda")
        try:
            with isolated_random_state(seed, device):
                return np.asarray(self.runner.run(request, seed, Context(device, should_stop, lambda _: None)))
        finally:
            clean(self.pipeline)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("models"), "glm-image")


@pytest.fixture(scope="module")
def arms(folder: Path) -> tuple[Arm, Arm]:
    return Arm(folder, True, torch.float32), Arm(folder, False, torch.float32)


def test_the_fast_path_draws_what_stock_draws(arms: tuple[Arm, Arm]) -> None:
    fast, stock = arms
    assert fast.runner.variant.startswith("tokens by kernels, DiT by kernels")
    assert stock.runner.variant == "stock"
    for request in REQUESTS:
        for seed in range(2):
            fast.draw(request, seed)
            stock.draw(request, seed)
            assert all(torch.equal(one, other) for one, other in zip(fast.prior, stock.prior, strict=True))
            assert (fast.latents - stock.latents).norm() < 1e-4 * stock.latents.norm()


def test_it_repeats_whatever_ran_between(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "ROOM", 64)  # so that requests outgrow the first graph
    fast = Arm(folder, True, torch.bfloat16)
    first = [fast.draw(request, 5) for request in REQUESTS]
    for request in REQUESTS:
        looks = 0

        def stop() -> bool:
            nonlocal looks
            looks += 1
            return looks > 3

        with pytest.raises(Cancelled):
            fast.draw(request, 6, stop)
    assert all(np.array_equal(fast.draw(request, 5), seen) for request, seen in zip(REQUESTS, first, strict=True))


MIXED = [(REQUESTS[0], 0), (REQUESTS[3], 1), (REQUESTS[1], 2), (REQUESTS[2], 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_draw_what_each_draws_alone_wherever_they_stand(folder: Path, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    runner = Runner(pipeline, Acceleration(rows=4))
    assert runner.variant.startswith("tokens by kernels, 4 rows")

    def context(rows: int = 0) -> Context:
        return Context(device, lambda: False, lambda _: None, [context() for _ in range(rows)])

    alone = [np.asarray(runner.run(request, seed, context())) for request, seed in MIXED]
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [2, 3], [1]):
        drawn = list(runner.run_batch([MIXED[i] for i in order], context(len(order))))
        assert all(np.array_equal(np.asarray(drawn[at]), alone[i]) for at, i in enumerate(order)), order


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_sums_are_its_own(kernels: Any, weights: str, dtype: torch.dtype) -> None:
    """Bit for bit: what the other rows hold, and where a row stands, changes nothing."""
    x, weight = drawn(8, 4096, dtype=dtype), WEIGHTS[weights](drawn(2 * 512, 4096, dtype=dtype) / 64)
    order = torch.randperm(8, device="cuda")
    results = []
    for given in (x, x[order], torch.cat([x[:1], 100 * drawn(7, 4096, dtype=dtype)])):
        out, gated = unwritten(8, 1024, dtype=dtype), unwritten(8, 512, dtype=dtype)
        kernels.linear(given, weight, None, out)
        kernels.gated(given, weight, gated)
        results.append((out, gated))
    for one, permuted, other in zip(*results, strict=True):
        assert torch.equal(one[order], permuted)
        assert torch.equal(one[0], other[0])

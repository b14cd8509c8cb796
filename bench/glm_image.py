"""GLM-Image on one GPU: stock diffusers against this engine, on the same full-size random weights.

    python -m bench.glm_image [--results bench/results/glm_image.json] [--parts startup,rates,eight,…]

Arms take turns in one process over one set of weights; outputs are compared before a ratio is printed. Rates are taken
at four sizes for text to image and editing (64 tokens, 3 forwards of each kind, 1 decode), and for eight requests at
1024 x 1024; totals computed from them are held against full runs at 1024 x 1024 and 50 steps. Both arms sample ids of
the code book alone: with random weights stock would end early or leave it. 8-bit weights take the originals' place:
they have a pipeline of their own, the same weights again, and are held against what stock gave before. Ceilings are
measured in a burst and over two seconds, before and after: long matrix products run into the card's power limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImageKVCache
from PIL import Image

from bench.full_size import BOOK, VISION_VOCAB, build
from runtime.engine.context import Context
from runtime.engine.running import clean, cpu_generator, isolated_random_state
from runtime.families.glm_image.pipeline import Runner
from runtime.families.glm_image.tokens import TokenStage, Wanted
from runtime.types import PLAIN, Acceleration, GenerationRequest

DEVICE = torch.device("cuda")
STEPS = 50
SIZES = ((512, 512), (1024, 1024), (1024, 1536), (2048, 2048))
PROMPT = 'a red fox under a sign that says "OPEN", in the rain, at night, neon lights, a street of a big city'
PARTS = ("startup", "rates", "eight", "full", "deviation", "eight_bit")
ROWS = 8
FEW = 10  # steps of each of the eight
REQUEST = GenerationRequest(
    prompt=PROMPT,
    width=1024,
    height=1024,
    num_inference_steps=STEPS,
    seed=0,
    n=1,
    output_format="png",
    guidance_scale=1.5,
    max_sequence_length=2048,
)


def seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def median(work: Callable[[], Any], times: int) -> float:
    work()
    return statistics.median(seconds(work) for _ in range(times))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def ceilings() -> dict[str, float]:
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    large = torch.randn(2**30, device=DEVICE, dtype=torch.bfloat16)
    copied = torch.empty_like(large)
    q, k, v = (torch.randn(1, 32, 4128, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    burst = median(lambda: a @ b, 5)

    def for_two_seconds(work: Callable[[], Any], flop: float) -> float:
        count = int(2 / median(work, 3))

        def often() -> None:
            for _ in range(count):
                work()

        seconds(often)
        return flop * count / seconds(often) / 1e12

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        attention = for_two_seconds(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), 4 * 4128**2 * 4096
        )
    return {
        "matmul_burst_tflops": 2 * 8192**3 / burst / 1e12,
        "matmul_two_seconds_tflops": for_two_seconds(lambda: a @ b, 2 * 8192**3),
        "attention_two_seconds_tflops": attention,
        "copy_tb_s": 2 * large.nbytes / median(lambda: copied.copy_(large), 5) / 1e12,
    }


class Arms:
    """One pipeline, by stock's forward and loop or by the engine's."""

    def __init__(self, acceleration: Acceleration = PLAIN) -> None:
        self.pipeline = build("glm-image", "cuda")
        self.pipeline.set_progress_bar_config(disable=True)
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        encoder, self.transformer = self.pipeline.vision_language_encoder, self.pipeline.transformer
        encoder.generation_config.suppress_tokens = list(range(BOOK, VISION_VOCAB))
        self.take(acceleration)
        self.stock_tokens = TokenStage(encoder, BOOK, None)  # stock's sampling with a request's own noise

    def take(self, acceleration: Acceleration = PLAIN) -> None:
        """The engine's arm."""
        self.transformer.__dict__.pop("forward", None)
        self.runner = Runner(self.pipeline, acceleration)
        self._forward = self.transformer.forward

    @contextmanager
    def stock(self) -> Iterator[None]:
        del self.transformer.__dict__["forward"]
        try:
            yield
        finally:
            self.transformer.forward = self._forward

    def inputs(self, width: int, height: int, source: Image.Image | None, count: int = 1) -> Any:
        content = [{"type": "text", "text": PROMPT}]
        if source is not None:
            content.insert(0, {"type": "image", "image": source})
        return self.pipeline.processor.apply_chat_template(
            [[{"role": "user", "content": content}]] * count,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": count > 1, "target_h": height, "target_w": width},
        ).to(DEVICE)

    def draw(self, request: GenerationRequest, seed: int = 1) -> tuple[Image.Image, dict[str, float]]:
        context = Context(DEVICE, lambda: False, lambda _: None)
        try:
            with isolated_random_state(seed, DEVICE):
                return self.runner.run(request, seed, context), context.timings
        finally:
            clean(self.pipeline)


def wanted(inputs: Any, count: int, seed: int = 1) -> Wanted:
    return Wanted(dict(inputs), count, cpu_generator(seed))


def source_picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8))


# --- rates


@dataclass
class Rate:
    mode: str
    width: int
    height: int
    arm: str
    tokens: int
    prefill_s: float
    token_ms: dict[str, float]  # by cached positions
    forward_ms: float  # conditional and unconditional, their mean
    forward_error: float  # the engine's output against stock's
    decode_s: float
    peak_gib: float
    total_s: float = 0.0

    def __post_init__(self) -> None:
        token = statistics.mean(self.token_ms.values())
        self.total_s = self.prefill_s + self.tokens * token / 1e3 + 2 * STEPS * self.forward_ms / 1e3 + self.decode_s


def lengthened(inputs: Any, by: int) -> Any:
    """The prompt, with `by` more words before it."""
    words = torch.randint(BOOK + 200, BOOK + 350, (len(inputs["input_ids"]), by), device=DEVICE)
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([words, inputs["input_ids"]], dim=1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    return longer


@torch.no_grad()
def token_rates(arms: Arms, width: int, height: int, source: Any, depths: int) -> dict[str, Any]:
    """Seconds of the prompt and the first token, and milliseconds of each of the next 64, by arm."""
    encoder = arms.pipeline.vision_language_encoder
    inputs = arms.inputs(width, height, source)
    grids = inputs["image_grid_thw"]
    tokens = int(grids[-2:].prod(-1).sum()) if source is None else int(grids[-1].prod())
    context = Context(DEVICE, lambda: False, lambda _: None)

    def stock(given: Any, count: int) -> None:
        encoder.generate(**given, max_new_tokens=count, do_sample=True)
        arms.stock_tokens.forget()

    def engine(given: Any, count: int) -> None:
        arms.runner._tokens.generate([wanted(given, count)], context)
        arms.runner._tokens.forget()

    found: dict[str, Any] = {"tokens": tokens}
    for name, run in (("stock", stock), ("engine", engine)):
        found[name] = {"token_ms": {}}
        for i in range(depths):
            given = lengthened(inputs, tokens * i // max(1, depths - 1)) if depths > 1 else inputs
            run(given, 65)  # cuDNN's attention makes a plan for each length that stock's cache comes to
            first = seconds(lambda given=given, run=run: run(given, 1))
            more = seconds(lambda given=given, run=run: run(given, 65))
            found[name].setdefault("prefill_s", first)
            found[name]["token_ms"][str(given["input_ids"].shape[1])] = (more - first) / 64 * 1e3
    return found


def forward_arguments(arms: Arms, width: int, height: int) -> dict[str, Any]:
    generator = torch.Generator(DEVICE).manual_seed(3)
    made = {"device": DEVICE, "generator": generator}
    ids = torch.randint(0, BOOK, (1, width // 16 * (height // 16)), **made)
    shape = (1, 16, height // 8, width // 8)
    return {
        "hidden_states": torch.randn(shape, dtype=torch.bfloat16, **made),
        "encoder_hidden_states": torch.randn(1, 6, 1472, dtype=torch.bfloat16, **made),
        "prior_token_id": ids,
        "prior_token_drop": torch.zeros_like(ids, dtype=torch.bool),
        "timestep": torch.tensor([500.0], device=DEVICE),
        "target_size": torch.tensor([[height, width]], device=DEVICE, dtype=torch.bfloat16),
        "crop_coords": torch.zeros(1, 2, device=DEVICE, dtype=torch.bfloat16),
        "return_dict": False,
    }


def forward_kinds(arms: Arms, width: int, height: int) -> list[dict[str, Any]]:
    """Arguments of a conditional and an unconditional forward."""
    given = forward_arguments(arms, width, height)
    text, drop = given["encoder_hidden_states"][:, :2].contiguous(), ~given["prior_token_drop"]
    return [given, {**given, "encoder_hidden_states": text, "prior_token_drop": drop}]


@torch.no_grad()
def forward_rates(arms: Arms, width: int, height: int, edit: bool) -> dict[str, Any]:
    """Milliseconds of a forward, the mean of a conditional and an unconditional one; and how far apart arms are."""
    transformer, kinds = arms.transformer, forward_kinds(arms, width, height)

    def prepared() -> None:
        if edit:
            caches = GlmImageKVCache(arms.transformer.config.num_layers)
            caches.set_mode("write")
            written = forward_arguments(arms, 1024, 1024)
            written["encoder_hidden_states"] = written["encoder_hidden_states"][:, :0]
            transformer(**{**written, "timestep": torch.zeros(1, device=DEVICE)}, kv_caches=caches)
            caches.set_mode("read")
            kinds[0]["kv_caches"] = caches

    def step() -> list[torch.Tensor]:
        timestep = kinds[0]["timestep"].clone()  # a pipeline's step has one of its own
        return [transformer(**{**kind, "timestep": timestep})[0] for kind in kinds]

    outputs: dict[str, list[torch.Tensor]] = {}
    times: dict[str, list[float]] = {"stock": [], "engine": []}
    for arm in ("stock", "engine") * 2:

        def measured(arm: str = arm) -> None:
            prepared()
            outputs[arm] = step()
            for _ in range(3):
                times[arm].append(seconds(step) / 2)

        if arm == "stock":
            with arms.stock():
                measured()
        else:
            measured()
            arms.runner._denoiser.forget() if arms.runner._denoiser else None
    error = max(relative(mine, stock) for mine, stock in zip(outputs["engine"], outputs["stock"], strict=True))
    return {"error": error, **{arm: statistics.median(found) * 1e3 for arm, found in times.items()}}


@torch.no_grad()
def decode_rate(arms: Arms, width: int, height: int) -> float:
    latents = torch.randn(1, 16, height // 8, width // 8, device=DEVICE, dtype=torch.bfloat16)
    return median(lambda: arms.pipeline.vae.decode(latents, return_dict=False), 1)


def rates(arms: Arms) -> list[Rate]:
    rows = []
    for mode in ("text", "edit"):
        source = source_picture() if mode == "edit" else None
        for width, height in SIZES:
            torch.cuda.reset_peak_memory_stats()
            depths = 3 if (width, height, mode) == (1024, 1024, "text") else 1
            tokens = token_rates(arms, width, height, source, depths)
            forwards = forward_rates(arms, width, height, mode == "edit")
            decode, peak = decode_rate(arms, width, height), torch.cuda.max_memory_allocated() / 2**30
            for arm in ("stock", "engine"):
                rows.append(
                    Rate(
                        mode,
                        width,
                        height,
                        arm,
                        tokens["tokens"],
                        tokens[arm]["prefill_s"],
                        tokens[arm]["token_ms"],
                        forwards[arm],
                        forwards["error"],
                        decode,
                        peak,
                    )
                )
            stock, engine = rows[-2:]
            ratio = f"{stock.total_s / engine.total_s:.2f}x" if engine.forward_error < 0.02 else "outputs differ"
            for row in (stock, engine):
                token = statistics.mean(row.token_ms.values())
                print(
                    f"{mode} {width}x{height} {row.arm:6}: prompt {row.prefill_s:.3f} s, {token:.2f} ms a token, "
                    f"{row.forward_ms:.1f} ms a forward, decode {row.decode_s:.3f} s, total {row.total_s:.2f} s",
                    flush=True,
                )
            print(f"  forwards differ by {engine.forward_error:.4f}; {ratio}", flush=True)
    return rows


@torch.no_grad()
def eight(arms: Arms) -> dict[str, Any]:
    """Eight requests at 1024 x 1024: milliseconds of a token and picture, and one run of the engine with few steps."""
    inputs, together = arms.inputs(1024, 1024, None), arms.inputs(1024, 1024, None, ROWS)
    context = Context(DEVICE, lambda: False, lambda _: None)

    def stock(count: int) -> None:
        arms.pipeline.vision_language_encoder.generate(**together, max_new_tokens=count, do_sample=True)
        arms.stock_tokens.forget()

    def engine(given: Any, used: int, count: int) -> list[torch.Tensor]:
        try:
            return arms.runner._tokens.generate([wanted(given, count, seed) for seed in range(used)], context)
        finally:
            arms.runner._tokens.forget()

    stock(2)
    first = seconds(lambda: stock(1))
    found: dict[str, Any] = {"stock_ms_a_token_and_picture": (seconds(lambda: stock(17)) - first) / 16 / ROWS * 1e3}
    arms.take(Acceleration(rows=ROWS))
    for used in (ROWS, 1):
        rates = {}
        for more in (0, 640, 1280):
            given = lengthened(inputs, more)
            engine(given, used, 2)
            first = seconds(lambda given=given, used=used: engine(given, used, 1))
            taken = seconds(lambda given=given, used=used: engine(given, used, 65)) - first
            rates[str(given["input_ids"].shape[1])] = taken / 64 / used * 1e3
        found["engine_ms_a_token_and_picture" if used > 1 else "engine_ms_a_token_alone"] = rates
    found["variant"] = arms.runner.variant
    found["alone_as_in_company"] = torch.equal(engine(inputs, 1, 256)[0], engine(inputs, ROWS, 256)[0])
    print(found, flush=True)
    rows = [Context(DEVICE, lambda: False, lambda _: None) for _ in range(ROWS)]
    torch.cuda.reset_peak_memory_stats()
    begun, found["there_after_s"] = time.perf_counter(), []
    few = replace(REQUEST, num_inference_steps=FEW)
    batch = arms.runner.run_batch(
        [(few, seed) for seed in range(ROWS)], Context(DEVICE, lambda: False, lambda _: None, rows)
    )
    for _ in batch:
        found["there_after_s"].append(time.perf_counter() - begun)
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    clean(arms.pipeline)
    arms.take()
    print(f"eight, {FEW} steps: there after {found['there_after_s']}", flush=True)
    return found


def denoised(arms: Arms, steps: int, ids: torch.Tensor, **more: Any) -> Any:
    """What the pipeline's own call makes of these tokens at 1024 x 1024."""
    return arms.pipeline(
        PROMPT,
        height=1024,
        width=1024,
        num_inference_steps=steps,
        guidance_scale=1.5,
        prior_token_ids=ids,
        generator=cpu_generator(1),
        **more,
    )


# --- full runs


def full(arms: Arms) -> dict[str, Any]:
    pipeline = arms.pipeline
    arms.draw(replace(REQUEST, num_inference_steps=1))
    results: dict[str, Any] = {"engine": [], "stock": []}

    def engine() -> None:
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        _, timings = arms.draw(REQUEST)
        total = time.perf_counter() - begun
        results["engine"].append({"total_s": total, **timings, "peak_gib": torch.cuda.max_memory_allocated() / 2**30})
        print(f"engine: {total:.2f} s, {timings}", flush=True)

    def stock() -> None:
        with arms.stock():
            begun = time.perf_counter()
            with torch.no_grad():
                tokens, _, _ = pipeline.generate_prior_tokens(
                    PROMPT, 1024, 1024, generator=torch.Generator("cpu").manual_seed(1)
                )
            torch.cuda.synchronize()
            stage = time.perf_counter() - begun
            denoised(arms, STEPS, tokens)
            torch.cuda.synchronize()
            total = time.perf_counter() - begun
        arms.stock_tokens.forget()
        results["stock"].append({"total_s": total, "tokens": stage})
        print(f"stock: {total:.2f} s, of it {stage:.2f} s in the token stage", flush=True)

    for _ in range(2):  # the first picture of a process makes what later ones find
        engine()
        stock()
    return results


# --- deviation


@dataclass(frozen=True)
class Stock:
    """What stock gives: two forwards' outputs, latents by steps, the picture of each, and 256 tokens."""

    forwards: list[torch.Tensor]
    latents: dict[int, torch.Tensor]
    tokens: torch.Tensor


def latents(arms: Arms, steps: int) -> torch.Tensor:
    ids = torch.randint(0, BOOK, (1, 64 * 64), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    found: torch.Tensor = denoised(arms, steps, ids, output_type="latent").images
    return found


@torch.no_grad()
def forwards(arms: Arms) -> list[torch.Tensor]:
    return [arms.transformer(**kind)[0] for kind in forward_kinds(arms, 1024, 1024)]


@torch.no_grad()
def stock_outputs(arms: Arms) -> Stock:
    context = Context(DEVICE, lambda: False, lambda _: None)
    with arms.stock():
        drawn = {steps: latents(arms, steps) for steps in (1, 10, STEPS)}
        made = forwards(arms)
    tokens = arms.stock_tokens.generate([wanted(arms.inputs(1024, 1024, None), 256)], context)[0]
    arms.stock_tokens.forget()
    return Stock(made, drawn, tokens)


@torch.no_grad()
def deviation(arms: Arms, stock: Stock) -> dict[str, Any]:
    """The same tokens and noise through both DiTs; the same noise through both token stages, each engine token after
    the ids that stock drew."""
    pipeline = arms.pipeline
    errors = [relative(*pair) for pair in zip(forwards(arms), stock.forwards, strict=True)]
    found: dict[str, Any] = {"forward_error": max(errors), "denoise": []}
    for steps, expected in stock.latents.items():
        mine = latents(arms, steps)
        arms.runner._denoiser.forget() if arms.runner._denoiser else None
        pictures = [
            np.asarray(pipeline.image_processor.postprocess(pipeline.vae.decode(given, return_dict=False)[0])[0])
            for given in (mine.to(pipeline.vae.dtype), expected.to(pipeline.vae.dtype))
        ]
        square = float(np.mean((pictures[0].astype(float) - pictures[1].astype(float)) ** 2))
        psnr = 10 * math.log10(255**2 / square) if square else math.inf
        found["denoise"].append({"steps": steps, "latents_error": relative(mine, expected), "psnr_db": psnr})
        print(found["denoise"][-1], flush=True)
    found["tokens"] = token_agreement(arms, stock.tokens)
    print(found["tokens"], flush=True)
    return found


@torch.no_grad()
def token_agreement(arms: Arms, stock: torch.Tensor) -> dict[str, Any]:
    context = Context(DEVICE, lambda: False, lambda _: None)
    inputs, stage = arms.inputs(1024, 1024, None), arms.runner._tokens
    decoder = stage.decoder
    assert decoder is not None
    alone = stage.generate([wanted(inputs, len(stock))], context)[0]
    stage.forget()
    step, forced = decoder._step, []

    def corrected() -> None:
        assert decoder._room is not None
        index = len(forced)
        decoder._room.ids[0, index] = stock[index]
        step()
        forced.append(decoder._room.ids[0, index + 1].clone())

    decoder._step = corrected  # type: ignore[method-assign]
    stage.generate([wanted(inputs, len(stock))], context)
    del decoder._step
    stage.forget()
    agree = torch.stack(forced) == stock[1:]
    same = alone == stock
    return {
        "of": len(agree),
        "agree_after_stocks_ids": int(agree.sum()),
        "first_difference_alone": int((~same).nonzero()[0]) if not same.all() else None,
    }


@torch.no_grad()
def eight_bit(weights: str, stock: Stock) -> dict[str, Any]:
    """The lossy options: a full run, and how far it is from stock."""
    gc.collect()  # the arms before
    arms = Arms(Acceleration(token_weights=weights, denoiser_weights="float8"))
    torch.cuda.empty_cache()
    arms.draw(replace(REQUEST, num_inference_steps=1))
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    _, timings = arms.draw(REQUEST)
    found: dict[str, Any] = {"variant": arms.runner.variant, "total_s": time.perf_counter() - begun, **timings}
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    found["forward_ms"] = median(lambda: forwards(arms), 5) / 2 * 1e3
    print(weights, found, flush=True)
    return {**found, "deviation": deviation(arms, stock)}


# --- start-up


def startup() -> dict[str, float]:
    """Seconds from weights in memory to a first small picture, in a fresh process: without and with a kernel cache."""
    with tempfile.TemporaryDirectory() as cache:
        found = []
        for _ in range(2):
            made = subprocess.run(
                [
                    "env",
                    f"TRITON_CACHE_DIR={cache}",
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "bench.glm_image",
                    "--first",
                ],
                check=True,
                capture_output=True,
                text=True,
            )
            found.append(float(made.stdout.split()[-1]))
    print(f"ready after weights: cold {found[0]:.1f} s, second {found[1]:.1f} s", flush=True)
    return {"cold_s": found[0], "second_s": found[1]}


def first() -> None:
    arms = Arms()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    arms.draw(replace(REQUEST, width=32, height=32, num_inference_steps=1))
    print(time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.glm_image")
    parser.add_argument("--results", type=Path, default=Path("bench/results/glm_image.json"))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first:
        first()
        return
    parts = options.parts.split(",")
    results: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}

    def keep(name: str, value: Any) -> None:
        results[name] = value
        options.results.write_text(json.dumps(results, indent=1) + "\n")

    if "startup" in parts:
        keep("startup", startup())
    arms = Arms()
    print("engine:", arms.runner.variant, flush=True)
    keep(
        "with",
        {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "variant": arms.runner.variant,
        },
    )
    arms.draw(replace(REQUEST, width=32, height=32, num_inference_steps=1))
    keep("ceilings_before", ceilings())
    print(results["ceilings_before"], flush=True)
    if "rates" in parts:
        rows = rates(arms)
        keep("rates", [asdict(row) for row in rows])
    if "full" in parts:
        keep("full", full(arms))
    if "eight" in parts:
        keep("eight", eight(arms))
    if {"deviation", "eight_bit"} & set(parts):
        stock = stock_outputs(arms)
        keep("deviation", deviation(arms, stock))
    if "eight_bit" in parts:
        del arms
        keep("eight_bit", {weights: eight_bit(weights, stock) for weights in ("int8", "float8")})
    keep("ceilings_after", ceilings())
    print(results["ceilings_after"], flush=True)
    if "rates" in results and "eight" in results:
        row = next(r for r in results["rates"] if (r["mode"], r["width"], r["arm"]) == ("text", 1024, "engine"))
        token = statistics.mean(results["eight"]["engine_ms_a_token_and_picture"].values())
        each = row["prefill_s"] + row["tokens"] * token / 1e3 + 2 * STEPS * row["forward_ms"] / 1e3 + row["decode_s"]
        keep("eight", {**results["eight"], "seconds_a_picture_from_rates": each})
        print(f"of eight: {each:.2f} s a picture, from rates", flush=True)
    if "rates" in results and "full" in results:
        for arm, whole in (("stock", results["full"]["stock"][-1]), ("engine", results["full"]["engine"][-1])):
            row = next(r for r in results["rates"] if (r["mode"], r["width"], r["arm"]) == ("text", 1024, arm))
            off = row["total_s"] / whole["total_s"] - 1
            print(f"{arm}: {whole['total_s']:.2f} s, from rates {row['total_s']:.2f} s ({off:+.1%})", flush=True)


if __name__ == "__main__":
    main()

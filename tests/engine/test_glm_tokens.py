"""GLM-Image's token stage, and what a generation leaves behind, whole or cancelled: runners in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from runtime.engine.context import Context
from runtime.engine.running import clean, isolated_random_state
from runtime.errors import Cancelled
from runtime.families import registry
from runtime.tiny import GLM_CODE_BOOK, GLM_IMAGE_END, GLM_VISION_VOCAB
from runtime.types import GenerationRequest, Progress, SourceImage
from tests.glm import TEXT, source

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
DENOISERS = ("transformer", "transformer_2", "unet")
OUTSIDE_BOOK = list(range(GLM_CODE_BOOK, GLM_VISION_VOCAB))


def pil(image: SourceImage) -> Image.Image:
    return Image.frombytes("RGB", (image.width, image.height), image.rgb)


GLM_TEXT = replace(TEXT, num_inference_steps=1, guidance_scale=1.0)  # one forward of the DiT
GLM_EDIT = replace(GLM_TEXT, images=(source(0),))


# --- what runs, and what is seen of it ---


@dataclass
class Watch:
    """What a pipeline's models were asked, seen by hooks. The runner's own hooks run before these: a forward that
    is stopped isn't counted."""

    forwards: dict[str, int] = field(default_factory=dict)
    sampled: list[int] = field(default_factory=list)  # ids of the token stage, as they come back to its model
    conditions: list[torch.Tensor] = field(default_factory=list)  # prior ids of each forward of GLM's DiT
    on_forward: Callable[[str, int], None] = lambda name, count: None

    def clear(self) -> None:
        self.forwards.clear()
        self.sampled.clear()
        self.conditions.clear()
        self.on_forward = lambda name, count: None

    def __post_init__(self) -> None:
        self.clear()

    def attach(self, pipeline: Any) -> None:
        for name in (*DENOISERS, "vision_language_encoder", "text_encoder", "vae.decoder"):
            module = pipeline
            for part in name.split("."):
                module = getattr(module, part, None)
            if isinstance(module, torch.nn.Module):
                kind = "denoiser" if name in DENOISERS else name
                module.register_forward_pre_hook(partial(self._before, kind), with_kwargs=True)

    def _before(self, name: str, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.forwards[name] = self.forwards.get(name, 0) + 1
        ids = kwargs.get("input_ids")
        if name == "vision_language_encoder" and ids.shape[-1] == 1:
            self.sampled.append(int(ids))
        if kwargs.get("prior_token_id") is not None:
            self.conditions.append(kwargs["prior_token_id"])
        self.on_forward(name, self.forwards[name])


class Bench:
    """One loaded pipeline with its runner, called as the engine's process calls it."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        half = registry.pipeline_half(registry.family_of(type(self.pipeline).__name__))
        self.runner = half.Runner(self.pipeline)
        self.watch = Watch()
        self.watch.attach(self.pipeline)
        self.progress: list[Progress] = []

    def draw(self, request: GenerationRequest, seed: int, should_stop: Callable[[], bool] = lambda: False) -> Any:
        """A picture's or a video's pixels."""
        self.progress.clear()
        try:
            with isolated_random_state(seed, CPU):
                context = Context(CPU, should_stop, self.progress.append)
                return np.asarray(self.runner.run(request, seed, context))
        finally:
            clean(self.pipeline)

    def cancel(self, request: GenerationRequest, seed: int, name: str, count: int) -> None:
        """Draw, but stop as soon as `count` forwards of the model `name` have begun."""
        stop = False

        def watch(forward: str, done: int) -> None:
            nonlocal stop
            stop = stop or (forward, done) == (name, count)

        self.watch.clear()
        self.watch.on_forward = watch
        with pytest.raises(Cancelled):
            self.draw(request, seed, lambda: stop)
        self.watch.on_forward = lambda name, count: None

    def kept_state(self) -> dict[tuple[str, str], str]:
        """Whatever the models' objects hold beside weights and submodules."""
        models = {n: c for n, c in self.pipeline.components.items() if isinstance(c, torch.nn.Module)}
        return {
            (f"{model}.{name}", key): repr(value)
            for model, root in models.items()
            for name, module in root.named_modules()
            for key, value in vars(module).items()
            if value is None or isinstance(value, torch.Tensor | int | float | list | tuple)
        } | {(n, "generation_config"): str(getattr(c, "generation_config", None)) for n, c in models.items()}


def stock_pipeline(folder: Path, **generation: Any) -> Any:
    """A pipeline of its own, untouched by any runner."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vision_language_encoder.generation_config.update(**generation)
    return pipeline


@pytest.fixture(scope="module")
def benches(tiny_models: Path) -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def bench(family: str) -> Bench:
        if family not in made:
            made[family] = Bench(tiny_models / family)
        made[family].watch.clear()
        return made[family]

    return bench


@pytest.fixture(scope="module")
def reference(tiny_models: Path) -> Callable[[str, GenerationRequest], Any]:
    """What a request gives with seed 11 on a pipeline on which nothing ran before, made once for each request."""
    made: list[tuple[str, GenerationRequest, Any]] = []

    def pixels(family: str, request: GenerationRequest) -> Any:
        for known, asked, drawn in made:
            if (known, asked) == (family, request):
                return drawn
        made.append((family, request, Bench(tiny_models / family).draw(request, 11)))
        return made[-1][2]

    return pixels


@pytest.fixture
def glm(benches: Callable[[str], Bench]) -> Bench:
    return benches("glm-image")


# --- the code book ---


def mixed(index: int) -> GenerationRequest:
    """Of five requests one is text to image, the long way; the others edit one or two sources."""
    prompt = f"picture {index}"
    if index % 5 == 0:
        side = 32 if index % 2 else 64
        return replace(GLM_TEXT, prompt=prompt, width=side, height=side)
    images = (source(index), source(index + 1, 96, 64))[: 1 + index % 2]
    return replace(GLM_EDIT, prompt=prompt, width=(32, 64, 96)[index % 3], images=images)


def test_200_seeds_give_200_pictures(glm: Bench) -> None:
    text_to_image = 0
    for seed in range(200):
        request = mixed(seed)
        glm.watch.clear()
        drawn = glm.draw(request, seed)
        assert drawn.shape == (request.height, request.width, 3), seed
        assert max(glm.watch.sampled, default=0) < GLM_CODE_BOOK, seed
        assert all(ids.min() >= 0 and ids.max() < GLM_CODE_BOOK for ids in glm.watch.conditions), seed
        grid = request.width // 32 * (request.height // 32)
        assert glm.watch.conditions[-1].shape == (1, 4 * grid), seed
        text_to_image += not request.images
    assert text_to_image == 40


def test_stock_leaves_the_code_book_on_the_same_model(tiny_models: Path) -> None:
    """The trap that the test above walks past: without the guard pictures die, by an early end or a row too far."""
    pipeline, watch = stock_pipeline(tiny_models / "glm-image"), Watch()
    watch.attach(pipeline)
    failed, outside, ended = 0, 0, 0
    for seed in range(30):
        request = mixed(seed)
        watch.clear()
        try:
            pipeline(
                request.prompt,
                [pil(image) for image in request.images] or None,
                request.height,
                request.width,
                num_inference_steps=1,
                guidance_scale=1.0,
                generator=torch.Generator().manual_seed(seed),
            )
        except (IndexError, RuntimeError):
            failed += 1
        ids = watch.sampled + [int(ids.max()) for ids in watch.conditions]
        outside += any(i >= GLM_CODE_BOOK for i in ids)
        ended += not watch.conditions
    assert failed >= 3
    assert outside >= 1, "an id that the DiT has no row for"
    assert ended >= 1, f"the end token {GLM_IMAGE_END}, before the grid is full"


@pytest.mark.parametrize(
    ("request_", "seeds"),
    [
        (GLM_TEXT, 10),
        (replace(GLM_TEXT, width=96), 2),
        (GLM_EDIT, 10),
        (replace(GLM_EDIT, images=(source(1), source(2, 96, 64))), 10),
    ],
    ids=["text", "text-wide", "edit", "edit-two"],
)
def test_tokens_are_stocks_one_by_one(tiny_models: Path, glm: Bench, request_: GenerationRequest, seeds: int) -> None:
    stock, seen = stock_pipeline(tiny_models / "glm-image", suppress_tokens=OUTSIDE_BOOK), Watch()
    seen.attach(stock)
    images = [[pil(image) for image in request_.images]] if request_.images else None
    different = set()
    for seed in range(100, 100 + seeds):
        seen.clear()
        with torch.no_grad():
            ids, image_ids, _ = stock.generate_prior_tokens(
                request_.prompt,
                request_.height,
                request_.width,
                images,
                generator=torch.Generator("cpu").manual_seed(seed),
            )
        glm.watch.clear()
        glm.draw(request_, seed)
        # Either feeds every id back but its last; stock samples one more, which nothing reads.
        assert glm.watch.sampled == seen.sampled[:-1]
        assert len(glm.watch.sampled) >= 3
        assert torch.equal(glm.watch.conditions[-1], ids)
        sources = glm.watch.conditions[:-1]
        assert len(sources) == len(request_.images)
        if image_ids is not None:
            assert torch.equal(torch.cat(sources), image_ids[0])
        different.add(tuple(ids.flatten().tolist()))
    assert len(different) > seeds // 2, "the seed decides the tokens"


def test_tokens_are_reported_and_counted(glm: Bench) -> None:
    """A text to image request has a preview grid of 256 before its own."""
    glm.draw(GLM_TEXT, 0)
    told = [p for p in glm.progress if p.stage == "tokens"]
    assert [p.step for p in told] == [*range(16, 260, 16), 260]
    assert {p.total for p in told} == {260}
    assert [(p.stage, p.step, p.total) for p in glm.progress[len(told) :]] == [("denoise", 1, 1)]


# --- random state ---


def test_the_global_random_state_stays(glm: Bench) -> None:
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    reference = glm.draw(GLM_EDIT, 5)
    assert torch.equal(torch.get_rng_state(), before)
    glm.cancel(GLM_EDIT, 5, "denoiser", 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)  # nor does it matter what it is
    assert np.array_equal(glm.draw(GLM_EDIT, 5), reference)


def test_the_token_stage_draws_from_its_own_generator(glm: Bench) -> None:
    """Even where a caller leaves the global state unprotected."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    glm.runner.run(GLM_EDIT, 5, Context(CPU, lambda: False, lambda _: None))
    assert torch.equal(torch.get_rng_state(), before)


def test_inside_the_isolation_the_seed_decides() -> None:
    before = torch.get_rng_state()
    drawn = []
    for seed in (7, 7, 8):
        torch.rand(1)
        with isolated_random_state(seed, CPU):
            drawn.append(float(torch.rand(1)))
    assert drawn[0] == drawn[1] != drawn[2]
    torch.set_rng_state(before)
    expected = [float(torch.rand(1)) for _ in range(2)]
    torch.set_rng_state(before)
    first = float(torch.rand(1))
    with pytest.raises(Cancelled), isolated_random_state(3, CPU):
        torch.rand(5)
        raise Cancelled("stop")
    assert [first, float(torch.rand(1))] == expected


# --- what a generation leaves behind ---

WAN = GenerationRequest(
    prompt="a red fox",
    negative_prompt="ugly",
    width=48,
    height=32,
    num_inference_steps=3,
    seed=0,
    n=1,
    output_format="mp4",
    guidance_scale=4.0,
    num_frames=9,
    fps=16,
    max_sequence_length=32,
)
SD = replace(GLM_TEXT, num_inference_steps=4, guidance_scale=7.5, max_sequence_length=None)
GUIDED = {"num_inference_steps": 3, "guidance_scale": 1.5}  # two forwards a step


@dataclass(frozen=True)
class Stop:
    """Cancel `request` as soon as forward `count` of `model` has begun; `ran` forwards of each kind may run by then."""

    family: str
    request: GenerationRequest
    model: str
    count: int
    ran: Mapping[str, int]

    def __str__(self) -> str:
        mode = "-edit" if self.request.images else ""
        return f"{self.family}{mode}-{self.model}-{self.count}"


TOKENS = "vision_language_encoder"
TEXT_TO_IMAGE, EDIT = replace(GLM_TEXT, **GUIDED), replace(GLM_EDIT, images=(source(0), source(3)), **GUIDED)
STOPS = (
    Stop("glm-image", TEXT_TO_IMAGE, TOKENS, 1, {TOKENS: 16}),
    Stop("glm-image", TEXT_TO_IMAGE, TOKENS, 100, {TOKENS: 112}),
    Stop("glm-image", TEXT_TO_IMAGE, TOKENS, 260, {TOKENS: 260}),  # the last one: nothing else begins
    Stop("glm-image", TEXT_TO_IMAGE, "text_encoder", 1, {TOKENS: 260, "text_encoder": 1}),
    Stop("glm-image", TEXT_TO_IMAGE, "denoiser", 1, {TOKENS: 260, "text_encoder": 2, "denoiser": 1}),
    Stop("glm-image", TEXT_TO_IMAGE, "denoiser", 4, {TOKENS: 260, "text_encoder": 2, "denoiser": 4}),
    Stop("glm-image", TEXT_TO_IMAGE, "denoiser", 6, {TOKENS: 260, "text_encoder": 2, "denoiser": 6}),
    Stop("glm-image", EDIT, TOKENS, 1, {TOKENS: 4}),
    Stop("glm-image", EDIT, "denoiser", 1, {TOKENS: 4, "text_encoder": 2, "denoiser": 1}),  # writes source 1
    Stop("glm-image", EDIT, "denoiser", 5, {TOKENS: 4, "text_encoder": 2, "denoiser": 5}),
    Stop("wan-t2v-a14b", WAN, "text_encoder", 1, {"text_encoder": 1}),
    Stop("wan-t2v-a14b", WAN, "denoiser", 1, {"text_encoder": 2, "denoiser": 1}),
    Stop("wan-t2v-a14b", WAN, "denoiser", 5, {"text_encoder": 2, "denoiser": 5}),
    Stop("wan-t2v-a14b", WAN, "vae.decoder", 1, {"text_encoder": 2, "denoiser": 6, "vae.decoder": 1}),
    Stop("wan-t2v-a14b", WAN, "vae.decoder", 2, {"text_encoder": 2, "denoiser": 6, "vae.decoder": 2}),
    Stop("wan-i2v-a14b", replace(WAN, images=(source(0),)), "denoiser", 3, {"text_encoder": 2, "denoiser": 3}),
    Stop("wan-ti2v-5b", replace(WAN, width=64), "denoiser", 3, {"text_encoder": 2, "denoiser": 3}),
    Stop("wan-ti2v-5b", replace(WAN, width=64, images=(source(0),)), "denoiser", 3, {"text_encoder": 2, "denoiser": 3}),
    Stop("sd15", SD, "text_encoder", 1, {"text_encoder": 1}),
    Stop("sd15", SD, "denoiser", 1, {"text_encoder": 2, "denoiser": 1}),
    Stop("sd15", SD, "denoiser", 3, {"text_encoder": 2, "denoiser": 3}),
)


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_a_cancel_stops_and_the_next_request_gives_its_bytes(
    benches: Callable[[str], Bench], reference: Callable[[str, GenerationRequest], Any], stop: Stop
) -> None:
    expected = reference(stop.family, stop.request)
    bench = benches(stop.family)
    bench.cancel(replace(stop.request, prompt="something else"), 3, stop.model, stop.count)
    assert bench.watch.forwards == stop.ran
    if stop.model != "vae.decoder":
        steps = [p.step for p in bench.progress if p.stage == "denoise"]
        assert max(steps, default=0) < min(stop.request.num_inference_steps, stop.ran.get("denoiser", 1))
    assert np.array_equal(bench.draw(stop.request, 11), expected)


@pytest.mark.parametrize("request_", [TEXT_TO_IMAGE, EDIT], ids=["text", "edit"])
def test_nothing_stays_on_the_models(tiny_models: Path, request_: GenerationRequest) -> None:
    bench = Bench(tiny_models / "glm-image")
    before = bench.kept_state()
    bench.draw(request_, 1)
    assert bench.kept_state() == before
    for model, count in ((TOKENS, 2), ("text_encoder", 1), ("denoiser", 1), ("denoiser", 4)):
        bench.cancel(request_, 1, model, count)
        assert bench.kept_state() == before, model


def test_the_token_stage_does_keep_state_on_its_own(tiny_models: Path) -> None:
    """What the test above would see: stock leaves it there."""
    bench = Bench(tiny_models / "glm-image")
    before = bench.kept_state()
    bench.pipeline.vision_language_encoder.generation_config.suppress_tokens = OUTSIDE_BOOK
    before |= {k: v for k, v in bench.kept_state().items() if k[1] == "generation_config"}
    bench.pipeline(GLM_EDIT.prompt, [pil(GLM_EDIT.images[0])], 64, 64, num_inference_steps=1)
    left = {key for _, key in bench.kept_state().items() ^ before.items()}
    assert left


@pytest.mark.parametrize("family", ["sd15", "wan-t2v-a14b", "glm-image"])
def test_progress_ends_at_its_total(benches: Callable[[str], Bench], family: str) -> None:
    request = {"sd15": SD, "wan-t2v-a14b": WAN, "glm-image": EDIT}[family]
    bench = benches(family)
    bench.draw(request, 1)
    told = [p for p in bench.progress if p.stage == "denoise"]
    assert told[-1].step == told[-1].total
    assert [p.step for p in told] == list(range(1, told[-1].total + 1))

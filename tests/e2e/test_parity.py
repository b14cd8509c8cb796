"""The server's pictures and videos against the stock diffusers pipeline, called directly with the same seed.

Every server is a real process. The stock arm takes nothing from the runtime but the two encoders, which are
deterministic: equal files mean equal pixels. Stock GLM-Image is called with the ids outside its code book suppressed;
where it fails with a source picture, the one correction is to resize the picture first.
"""

from __future__ import annotations

import base64
import functools
import io
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from runtime.cgroup import cpu_count
from runtime.media import encode_image, encode_video, frames_to_uint8

Size = tuple[int, int]

SEED = 2**40 + 7  # beyond 32 bits
# Quotes are GLM-Image's glyph text; ftfy rewrites the entity and the curly quotes for Wan.
PROMPT = 'a red fox under a sign that says "OPEN 开", “wide” &amp; low'
NEGATIVE = "ugly, deformed &amp; blurry"
GLM_CODE_BOOK, GLM_VISION_VOCAB = 256, 288  # of the tiny model; really 16,384 and 16,512
FPS = {"wan-ti2v-5b": 24}  # the other Wan checkpoints: 16
# What speaks to the server and not to the pipeline's call.
SERVER_FIELDS = {"seed", "n", "fps", "flow_shift", "output_format", "output_quality"}

# EulerDiscreteScheduler, with torch's tensors and numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

PICTURE = {"width": 64, "height": 64, "num_inference_steps": 3}
VIDEO = {"width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 3}


@pytest.fixture(autouse=True)
def engine_arithmetic() -> Iterator[None]:
    """As many threads as the engine takes, since sums depend on it; random state and threads as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cpu_count() - 1))
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


# --- the two arms ---


@dataclass(frozen=True)
class Case:
    """One request. `fields` are sent as they are and given to the stock call; `stock` is given to it besides.

    `sources` are sizes of the source pictures; `resized`, where stock can't do those, the sizes it gets instead.
    """

    family: str
    label: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    stock: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Size, ...] = ()
    resized: tuple[Size, ...] = ()

    @property
    def sent(self) -> dict[str, Any]:
        common = VIDEO if self.family.startswith("wan-") else PICTURE
        return {"prompt": PROMPT, "seed": SEED, **common, **self.fields}

    @property
    def body(self) -> dict[str, Any]:
        images = [base64.b64encode(png(i, size)).decode() for i, size in enumerate(self.sources)]
        return {**self.sent, **({"image": images[0] if len(images) == 1 else images} if images else {})}

    @property
    def pictures(self) -> list[Image.Image]:
        """What the stock call gets."""
        given = [picture(i, size) for i, size in enumerate(self.sources)]
        if not self.resized:
            return given
        return [p.resize(size, Image.Resampling.LANCZOS) for p, size in zip(given, self.resized, strict=True)]


@functools.cache
def picture(index: int, size: Size) -> Image.Image:
    """Coarse noise: large sources stay small files and keep some structure when they are resized."""
    cells = np.random.default_rng(index).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC if max(size) < 2000 else Image.Resampling.BOX)


@functools.cache
def png(index: int, size: Size) -> bytes:
    file = io.BytesIO()
    picture(index, size).save(file, "PNG", compress_level=1)
    return file.getvalue()


def stock(folder: Path, case: Case, seed: int) -> Any:
    """What the stock pipeline gives: a picture, or frames as floats from 0 to 1."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    arguments = {k: v for k, v in case.sent.items() if k not in SERVER_FIELDS} | dict(case.stock)
    if case.family == "glm-image":
        outside = list(range(GLM_CODE_BOOK, GLM_VISION_VOCAB))
        pipeline.vision_language_encoder.generation_config.suppress_tokens = outside
    if case.sources:
        arguments["image"] = case.pictures if case.family == "glm-image" else case.pictures[0]
        if isinstance(pipeline, WanPipeline):  # TI2V-5B: one checkpoint for both jobs
            pipeline = WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
    if "flow_shift" in case.sent:
        key = "flow_shift" if case.family.startswith("wan-") else "shift"
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, **{key: case.sent["flow_shift"]})
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(generator=torch.Generator("cpu").manual_seed(seed), **arguments)
    return output.frames[0] if hasattr(output, "frames") else output.images[0]


class Stock:
    """Stock results, each made once."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._made: dict[tuple[str, str, int], Any] = {}

    def __call__(self, case: Case, seed: int = SEED) -> Any:
        key = (case.family, case.label, seed)
        if key not in self._made:
            self._made[key] = stock(self._models / case.family, case, seed)
        return self._made[key]


@pytest.fixture(scope="module")
def by_stock(tiny_models: Path) -> Stock:
    return Stock(tiny_models)


def media(prediction: Mapping[str, Any]) -> list[bytes]:
    """Every file of a prediction, in order."""
    kind = "video" if "video" in prediction else "image"
    return [base64.b64decode(item["b64"]) for item in prediction.get(f"{kind}s", [prediction[kind]])]


def encoded(case: Case, drawn: Any) -> bytes:
    """The file that the server should send for what the stock pipeline has drawn."""
    sent = case.sent
    quality = sent.get("output_quality")
    if case.family.startswith("wan-"):
        return encode_video(frames_to_uint8(drawn), sent.get("fps", FPS.get(case.family, 16)), quality)
    return encode_image(drawn, sent.get("output_format", "png"), quality)


def decoded(video: bytes) -> list[np.ndarray[Any, Any]]:
    with av.open(io.BytesIO(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def assert_equal(case: Case, file: bytes, drawn: Any) -> None:
    """The server's `file` holds exactly what the stock pipeline has `drawn`."""
    if case.family.startswith("wan-"):
        frames = decoded(file)
        assert (len(frames), *frames[0].shape) == drawn.shape
    elif case.sent.get("output_format", "png") == "png":
        with Image.open(io.BytesIO(file)) as image:
            assert image.size == drawn.size
            difference = np.abs(np.asarray(image).astype(int) - np.asarray(drawn)).max()
            assert difference == 0, f"pixels differ by up to {difference}"
    assert file == encoded(case, drawn)


def by_family(*cases: Case) -> list[Any]:
    """Parameters; one worker serves all cases of a family, so that each server starts once."""
    return [
        pytest.param(case, id=f"{case.family}-{case.label}", marks=pytest.mark.xdist_group(case.family))
        for case in cases
    ]


def families(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


# --- every family and mode ---

WIDE = {"width": 96, "height": 64}
A14B_GUIDANCE = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}  # the authors'; diffusers' own is 5.0 for both
NEGATED = {"negative_prompt": NEGATIVE}

CASES = (
    # The tokens of a picture with another seed are other ones: n covers the token stage.
    Case("glm-image", "text", {}),
    Case("glm-image", "wide", WIDE),
    Case("glm-image", "n", {"n": 3, "num_inference_steps": 2}),
    Case("glm-image", "guidance", {"guidance_scale": 4.0}),
    Case("glm-image", "no-guidance", {"guidance_scale": 1.0}),
    Case("glm-image", "short-sequence", {"max_sequence_length": 3}),
    Case("glm-image", "edit", sources=((64, 64),)),
    Case("glm-image", "edit-wide", WIDE, sources=((128, 96),)),
    Case("glm-image", "edit-two", WIDE, sources=((64, 64), (96, 128))),
    Case("glm-image", "edit-n", {"n": 2, "num_inference_steps": 2}, sources=((64, 64),)),
    # Stock fails with these. Multiples of 32, the shorter side at least 64, the longer at most 256.
    Case("glm-image", "edit-70x90", sources=((70, 90),), resized=((64, 96),)),
    Case("glm-image", "edit-80x64", sources=((80, 64),), resized=((64, 64),)),
    Case("glm-image", "edit-33x40", sources=((33, 40),), resized=((64, 64),)),
    Case("glm-image", "edit-1000x700", sources=((1000, 700),), resized=((256, 192),)),
    Case("glm-image", "edit-1024x256", sources=((1024, 256),), resized=((256, 64),)),
    Case("glm-image", "edit-4000x3000", sources=((4000, 3000),), resized=((256, 192),)),
    Case("glm-image", "edit-8x8", sources=((8, 8),), resized=((64, 64),)),
    Case("glm-image", "edit-mixed", sources=((64, 64), (70, 90)), resized=((64, 64), (64, 96))),
    Case("wan-t2v-a14b", "text", {}, A14B_GUIDANCE),
    Case("wan-t2v-a14b", "longer", {"num_frames": 9, "width": 48, "height": 48}, A14B_GUIDANCE),
    Case("wan-t2v-a14b", "negative", NEGATED, A14B_GUIDANCE),
    Case("wan-t2v-a14b", "guidance-2", {"guidance_scale": 4.0, "guidance_scale_2": 6.5}),
    Case("wan-t2v-a14b", "guidance-of-both", {"guidance_scale": 6.5}),
    Case("wan-t2v-a14b", "no-guidance", {"guidance_scale": 1.0}),
    Case("wan-t2v-a14b", "flow-shift", {"flow_shift": 3.0}, A14B_GUIDANCE),
    Case("wan-t2v-a14b", "n", {"n": 2, "num_inference_steps": 2}, A14B_GUIDANCE),
    Case("wan-t2v-a14b", "fps-quality", {"fps": 10, "output_quality": 30, "num_inference_steps": 4}, A14B_GUIDANCE),
    Case("wan-t2v-a14b", "short-sequence", {"max_sequence_length": 8}, A14B_GUIDANCE),
    Case("wan-i2v-a14b", "image", {}, {"guidance_scale": 3.5}, sources=((64, 32),)),
    Case("wan-i2v-a14b", "other-size", {"guidance_scale": 5.0}, sources=((75, 41),)),
    Case("wan-i2v-a14b", "negative", {**NEGATED, "guidance_scale": 3.0, "guidance_scale_2": 5.0}, sources=((64, 32),)),
    Case("wan-i2v-a14b", "flow-shift", {"flow_shift": 2.0, "guidance_scale": 3.5}, sources=((64, 32),)),
    Case("wan-i2v-a14b", "n", {"n": 2, "num_inference_steps": 2}, {"guidance_scale": 3.5}, sources=((64, 32),)),
    Case("wan-ti2v-5b", "text", {}),
    Case("wan-ti2v-5b", "longer", {"num_frames": 9, "width": 96, "height": 64}),
    Case("wan-ti2v-5b", "negative", {**NEGATED, "guidance_scale": 3.0}),
    Case("wan-ti2v-5b", "flow-shift", {"flow_shift": 3.0}),
    Case("wan-ti2v-5b", "image", {}, sources=((64, 32),)),
    Case("wan-ti2v-5b", "image-negative", {**NEGATED, "guidance_scale": 3.0}, sources=((75, 41),)),
    Case("wan-ti2v-5b", "image-flow-shift", {"flow_shift": 3.0}, sources=((64, 32),)),
    Case("sd15", "text", {}),
    Case("sd15", "tall", {"width": 64, "height": 104}),
    Case("sd15", "negative", {**NEGATED, "guidance_scale": 9.0}),
    Case("sd15", "no-guidance", {"guidance_scale": 0.0}),
    Case("sd15", "rescale", {"guidance_rescale": 0.7}),
    Case("sd15", "n", {"n": 3, "num_inference_steps": 2}),
    Case("sdxl", "text", {}),
    Case("sdxl", "wide", WIDE),
    Case("sdxl", "negative", {**NEGATED, "guidance_scale": 9.0}),
    Case("sdxl", "negative-2", {**NEGATED, "negative_prompt_2": "green"}),
    Case("sdxl", "prompt-2", {"prompt_2": "a blue car"}),
    Case("sdxl", "rescale", {"guidance_rescale": 0.7}),
    Case("sdxl", "clip-skip", {"clip_skip": 1}),
    Case("sdxl", "unfinished", {"denoising_end": 0.5}),
    Case("sd3", "text", {}),
    Case("sd3", "wide", WIDE),
    Case("sd3", "negative", {**NEGATED, "guidance_scale": 4.0}),
    Case("sd3", "flow-shift", {"flow_shift": 1.5}),
    Case("sd3", "prompt-3", {"prompt_3": "a blue car"}),
    Case("sd3", "clip-skip", {"clip_skip": 1}),
    Case("sd3", "short-sequence", {"max_sequence_length": 8}),
    Case("flux", "text", {}),
    Case("flux", "wide", WIDE),
    Case("flux", "guidance", {"guidance_scale": 1.5}),
    Case("flux", "true-cfg", {**NEGATED, "true_cfg_scale": 4.0}),
    Case("flux", "prompt-2", {"prompt_2": "a blue car"}),
    Case("flux", "short-sequence", {"max_sequence_length": 8}),
)


@pytest.mark.parametrize("case", by_family(*CASES))
def test_every_picture_and_video_is_what_stock_gives(serve: Callable[..., Any], by_stock: Stock, case: Case) -> None:
    [prediction] = serve(case.family).predict(case.body)
    files = media(prediction)
    seeds = range(SEED, SEED + case.sent.get("n", 1))
    assert prediction["seeds"] == list(seeds)
    for seed, file in zip(seeds, files, strict=True):
        assert_equal(case, file, by_stock(case, seed))


@pytest.mark.parametrize("family", families(*dict.fromkeys(case.family for case in CASES)))
def test_every_argument_above_changes_the_stock_result(by_stock: Stock, family: str) -> None:
    """Otherwise a server that ignores one would pass."""
    drawn = {c.label: np.asarray(by_stock(c, SEED)).tobytes() for c in CASES if c.family == family}
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("case", by_family(*(c for c in CASES if c.resized and "4000" not in c.label)))
def test_stock_alone_fails_with_these_sources(tiny_models: Path, case: Case) -> None:
    """So only what fails is corrected above. 4000x3000 fails as well, after most of a minute."""
    with pytest.raises((RuntimeError, ValueError)):
        stock(tiny_models / case.family, replace(case, resized=()), SEED)


@pytest.mark.xdist_group("glm-image")
@pytest.mark.parametrize(("width", "height"), [(1000, 249), (64, 300), (4000, 3)])
def test_an_aspect_beyond_4_is_a_clear_error(serve: Callable[..., Any], width: int, height: int) -> None:
    server = serve("glm-image")
    case = Case("glm-image", "aspect", sources=((width, height),))
    status, answer = server.json("POST", f"/v1/models/{server.name}:predict", {"instances": [case.body]})
    assert status == 400
    assert f"image: {width} x {height}" in answer["error"]
    assert "aspect" in answer["error"] and "at most 4" in answer["error"]


# --- one request leaves nothing to the next ---


@pytest.mark.parametrize("family", families("wan-t2v-a14b", "wan-ti2v-5b", "sd3"))
def test_a_flow_shift_ends_with_its_request(serve: Callable[..., Any], by_stock: Stock, family: str) -> None:
    cases = {case.label: case for case in CASES if case.family == family}
    for label in ("flow-shift", "text", "flow-shift", "text"):
        [prediction] = serve(family).predict(cases[label].body)
        assert_equal(cases[label], media(prediction)[0], by_stock(cases[label]))


@pytest.mark.xdist_group("wan-ti2v-5b")
def test_both_jobs_of_ti2v_share_no_state(serve: Callable[..., Any], by_stock: Stock) -> None:
    cases = {case.label: case for case in CASES if case.family == "wan-ti2v-5b"}
    for label in ("image-flow-shift", "text", "image", "flow-shift", "image", "longer", "text"):
        [prediction] = serve("wan-ti2v-5b").predict(cases[label].body)
        assert_equal(cases[label], media(prediction)[0], by_stock(cases[label]))


@pytest.mark.parametrize(
    ("family", "label", "others"),
    [
        pytest.param(family, label, others, id=family, marks=pytest.mark.xdist_group(family))
        for family, label, others in (
            ("glm-image", "edit", ("text", "edit-two", "edit-70x90")),
            ("wan-t2v-a14b", "text", ("longer", "flow-shift", "no-guidance")),
            ("wan-ti2v-5b", "text", ("image", "flow-shift", "longer")),
            ("sd15", "text", ("tall", "negative", "rescale")),
            ("flux", "true-cfg", ("text", "wide", "guidance")),
        )
    ],
)
def test_identical_requests_give_identical_bytes_at_once_and_later(
    serve: Callable[..., Any], by_stock: Stock, family: str, label: str, others: tuple[str, ...]
) -> None:
    server = serve(family)
    cases = {case.label: case for case in CASES if case.family == family}
    labels = [label] * 3 + list(others)
    random.Random(20).shuffle(labels)
    with ThreadPoolExecutor(len(labels)) as pool:
        at_once = list(pool.map(lambda name: media(server.predict(cases[name].body)[0]), labels))
    in_one_call = [media(p) for p in server.predict(*(cases[name].body for name in (label, others[0], label)))]
    later = media(server.predict(cases[label].body)[0])
    expected = {name: [encoded(cases[name], by_stock(cases[name]))] for name in labels}
    assert dict(zip(labels, at_once, strict=True)) == expected
    assert [files for name, files in zip(labels, at_once, strict=True) if name == label] == [expected[label]] * 3
    assert in_one_call == [expected[label], expected[others[0]], expected[label]]
    assert later == expected[label]


# --- further models, payloads and formats ---


@pytest.mark.xdist_group("wan-t2v-a14b")
def test_a_checkpoint_with_one_expert(tiny_models: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    """As Wan 2.1's: the classes of Wan 2.2, without a second expert and without a boundary."""
    two = WanPipeline.from_pretrained(tiny_models / "wan-t2v-a14b")
    one = WanPipeline(**{**two.components, "transformer_2": None}, boundary_ratio=None)
    folder = tmp_path / "wan-2.1"
    one.save_pretrained(folder)
    server = start(folder)
    server.wait_ready()
    drawn = []
    for label, fields in (("text", {"guidance_scale": 5.0}), ("flow-shift", {**NEGATED, "flow_shift": 3.0})):
        case = Case("wan-t2v-a14b", label, fields)
        drawn.append(stock(folder, case, SEED))
        [prediction] = server.predict(case.body)
        assert_equal(case, media(prediction)[0], drawn[-1])
    assert not np.array_equal(*drawn)
    case = Case("wan-t2v-a14b", "second", {"guidance_scale_2": 3.0})
    status, answer = server.json("POST", f"/v1/models/{server.name}:predict", {"instances": [case.body]})
    assert status == 400 and "one expert" in answer["error"]
    assert server.stop() == 0


@pytest.mark.xdist_group("sd15")
def test_the_demo_clients_payload(serve: Callable[..., Any], tiny_models: Path) -> None:
    """No seed, no size, and the name that the demo calls every model by."""
    fields = {
        "prompt": "photo of the beach",
        "negative_prompt": "ugly, deformed, bad anatomy",
        "num_inference_steps": 60,
    }
    status, answer = serve("sd15").json("POST", "/v1/models/model:predict", {"instances": [fields]})
    assert status == 200, answer
    [prediction] = answer["predictions"]
    assert (prediction["prompt"], prediction["num_inference_steps"]) == (fields["prompt"], 60)
    case = Case("sd15", "demo", {**fields, "width": prediction["width"], "height": prediction["height"]})
    assert_equal(case, media(prediction)[0], stock(tiny_models / "sd15", case, prediction["seed"]))


@pytest.mark.xdist_group("sd15")
def test_an_argument_that_stock_cannot_take_is_refused(serve: Callable[..., Any], tiny_models: Path) -> None:
    """Stable Diffusion's clip_skip fails in diffusers 0.42 with transformers 5: no fault to be found in the log."""
    case = Case("sd15", "clip-skip", {"clip_skip": 1})
    with pytest.raises(AttributeError, match="text_model"):
        stock(tiny_models / "sd15", case, SEED)
    server = serve("sd15")
    status, answer = server.json("POST", f"/v1/models/{server.name}:predict", {"instances": [case.body]})
    assert status == 400, answer
    assert "clip_skip" in answer["error"]


@pytest.mark.xdist_group("sd15")
@pytest.mark.parametrize("quality", [None, 40])
@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lossy_formats(serve: Callable[..., Any], by_stock: Stock, output_format: str, quality: int | None) -> None:
    [text] = [case for case in CASES if (case.family, case.label) == ("sd15", "text")]
    quality_field = {} if quality is None else {"output_quality": quality}
    case = replace(text, fields={"output_format": output_format, **quality_field})
    [prediction] = serve("sd15").predict(case.body)
    assert prediction["image"]["format"] == output_format.upper()
    assert media(prediction) == [encode_image(by_stock(text), output_format, quality)]
    with Image.open(io.BytesIO(media(prediction)[0])) as image:
        assert image.format == output_format.upper()

"""What a request may say to each family: RequestChecker over capabilities as the engine tells them."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
import re
from collections.abc import Mapping
from typing import Any

import pytest
from PIL import Image

from runtime.errors import InvalidRequest, StartupError
from runtime.families.base import (
    ALIASES,
    COMMON,
    IMAGE_FORMATS,
    MAX_SEED,
    VIDEO_FORMATS,
    Limits,
    Parameter,
    neighbours,
    number,
)
from runtime.families.glm_image.request import source_size
from runtime.families.registry import FAMILIES, family_of, request_half
from runtime.families.requests import MAX_DRAWN_SEED, RequestChecker
from runtime.types import Capabilities, GenerationRequest

GLM = {
    "video": False,
    "edits": True,
    "special_tokens": ["<|image|>"],
    "source_shortest_edge": 512,
    "source_longest_edge": 2048,
}
WAN: dict[str, Any] = {
    "video": True,
    "multiple": 16,
    "temporal": 4,
    "experts": 2,
    "text_to_video": True,
    "image_to_video": False,
    "flow_shift": 12.0,
    "defaults": {
        "width": 1280,
        "height": 720,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 40,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
    },
}
I2V = {
    **WAN,
    "text_to_video": False,
    "image_to_video": True,
    "flow_shift": 5.0,
    "defaults": {**WAN["defaults"], "guidance_scale": 3.5, "guidance_scale_2": 3.5},
}
TI2V_DEFAULTS = {"width": 1280, "height": 704, "num_frames": 121, "fps": 24}
TI2V = {
    **WAN,
    "multiple": 32,
    "experts": 1,
    "image_to_video": True,
    "flow_shift": 5.0,
    "defaults": {**TI2V_DEFAULTS, "num_inference_steps": 50, "guidance_scale": 5.0},
}
WAN_2_1 = {
    **WAN,
    "experts": 1,
    "flow_shift": None,
    "defaults": {"width": 832, "height": 480, "num_frames": 81, "fps": 16}
    | {"num_inference_steps": 50, "guidance_scale": 5.0},
}
SD15: dict[str, Any] = {
    "pipeline": "StableDiffusionPipeline",
    "multiple": 8,
    "default_width": 512,
    "default_height": 512,
    "video": False,
    "takes": {
        "width": None,
        "height": None,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "negative_prompt": None,
    },
    "refused": {"flow_shift": "this model's scheduler has no fixed shift"},
    "extra": {
        "eta": {"kind": "number", "default": 0.0, "bounds": (None, None)},
        "guidance_rescale": {"kind": "number", "default": 0.0, "bounds": (None, None)},
        "clip_skip": {"kind": "integer", "default": None, "bounds": (None, None)},
    },
    "image_required": False,
    "negative_prompt_gate": "guidance_scale",
}
FLUX: dict[str, Any] = {
    **SD15,
    "pipeline": "FluxPipeline",
    "multiple": 16,
    "default_width": 1024,
    "default_height": 1024,
    "takes": {
        "width": None,
        "height": None,
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "max_sequence_length": 512,
        "negative_prompt": None,
    },
    "extra": {
        "prompt_2": {"kind": "string", "default": None, "bounds": (None, None)},
        "negative_prompt_2": {"kind": "string", "default": None, "bounds": (None, None)},
        "true_cfg_scale": {"kind": "number", "default": 1.0, "bounds": (None, None)},
    },
    "negative_prompt_gate": "true_cfg_scale",
}
SCHNELL = {
    **FLUX,
    "takes": {name: value for name, value in FLUX["takes"].items() if name != "guidance_scale"},
    "refused": {
        **FLUX["refused"],
        "guidance_scale": "this checkpoint has no guidance embedding; true_cfg_scale turns guidance on",
    },
}
SD3 = {**SD15, "pipeline": "StableDiffusion3Pipeline", "takes": {**SD15["takes"], "flow_shift": 3.0}, "refused": {}}
VIDEO = {
    **SD15,
    "pipeline": "LTXPipeline",
    "multiple": 32,
    "default_width": 704,
    "default_height": 512,
    "video": True,
    "takes": {**SD15["takes"], "num_frames": 161, "image": None},
    "image_required": True,
    "extra": {},
}
FACTS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "glm": ("glm_image", "GlmImagePipeline", GLM),
    "t2v": ("wan", "WanPipeline", WAN),
    "i2v": ("wan", "WanImageToVideoPipeline", I2V),
    "ti2v": ("wan", "WanPipeline", TI2V),
    "wan2.1": ("wan", "WanPipeline", WAN_2_1),
    "sd15": ("generic", "StableDiffusionPipeline", SD15),
    "flux": ("generic", "FluxPipeline", FLUX),
    "schnell": ("generic", "FluxPipeline", SCHNELL),
    "sd3": ("generic", "StableDiffusion3Pipeline", SD3),
    "video": ("generic", "LTXPipeline", VIDEO),
}
VIDEOS = ("t2v", "i2v", "ti2v", "wan2.1", "video")
WANS = VIDEOS[:-1]
NEED_IMAGE = ("i2v", "video")
TAKE_IMAGE = ("glm", "i2v", "ti2v", "video")


def checker(model: str, defaults: Mapping[str, Any] | None = None, **limits: int) -> RequestChecker:
    family, pipeline, facts = FACTS[model]
    return RequestChecker(
        Capabilities(
            family=family,
            pipeline_class=pipeline,
            media="video" if facts["video"] else "image",
            facts=facts,
            defaults=defaults or {},
            source="s",
            model_bytes=1,
            model_revision="r",
            device="cpu",
            dtypes={},
            optimizations={},
            engine_variant="v",
        ),
        Limits(**limits),
    )


def picture(width: int = 64, height: int = 64) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURE = picture()


def least(model: str) -> dict[str, Any]:
    """The smallest request that fits."""
    return {"prompt": "a dog", **({"image": PICTURE} if model in NEED_IMAGE else {})}


def run(given: RequestChecker, raw: Mapping[str, Any]) -> GenerationRequest:
    return given.complete(given.check(raw))


def ask(model: str, raw: Mapping[str, Any] | None = None, **fields: Any) -> GenerationRequest:
    """The request made of the smallest one and `fields`."""
    return run(checker(model), {**least(model), **(raw or {}), **fields})


def refused(model: str | RequestChecker, raw: Mapping[str, Any] | None = None, **fields: Any) -> str:
    given = checker(model) if isinstance(model, str) else model
    base = least(model) if isinstance(model, str) else {"prompt": "a dog"}
    with pytest.raises(InvalidRequest) as caught:
        run(given, {**base, **(raw or {}), **fields})
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


# --- defaults


DEFAULTS: dict[str, dict[str, Any]] = {
    "glm": {"width": 1024, "height": 1024, "num_inference_steps": 50, "guidance_scale": 1.5}
    | {"max_sequence_length": 2048},
    "t2v": {"width": 1280, "height": 720, "num_frames": 81, "fps": 16, "num_inference_steps": 40}
    | {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "flow_shift": 12.0, "max_sequence_length": 512},
    "i2v": {"width": 960, "height": 960, "num_frames": 81, "fps": 16, "num_inference_steps": 40}
    | {"guidance_scale": 3.5, "guidance_scale_2": 3.5, "flow_shift": 5.0, "max_sequence_length": 512},
    "ti2v": {"width": 1280, "height": 704, "num_frames": 121, "fps": 24, "num_inference_steps": 50}
    | {"guidance_scale": 5.0, "flow_shift": 5.0, "max_sequence_length": 512},
    "wan2.1": {"width": 832, "height": 480, "num_frames": 81, "fps": 16, "num_inference_steps": 50}
    | {"guidance_scale": 5.0, "max_sequence_length": 512},
    "sd15": {"width": 512, "height": 512, "num_inference_steps": 50, "guidance_scale": 7.5},
    "flux": {"width": 1024, "height": 1024, "num_inference_steps": 28, "guidance_scale": 3.5}
    | {"max_sequence_length": 512},
    "schnell": {"width": 1024, "height": 1024, "num_inference_steps": 28, "max_sequence_length": 512},
    "sd3": {"width": 512, "height": 512, "num_inference_steps": 50, "guidance_scale": 7.5, "flow_shift": 3.0},
    "video": {"width": 704, "height": 512, "num_inference_steps": 50, "guidance_scale": 7.5}
    | {"num_frames": 161, "fps": 16},
}


@pytest.mark.parametrize("model", FACTS)
def test_defaults(model: str) -> None:
    request = ask(model, seed=7)
    told = dataclasses.asdict(request)
    told.pop("images")
    assert len(request.images) == (model in NEED_IMAGE)
    assert told == {
        **dict.fromkeys(told),
        "prompt": "a dog",
        "seed": 7,
        "n": 1,
        "output_format": "mp4" if model in VIDEOS else "png",
        "extra": {},
        **DEFAULTS[model],
    }


EXPLICIT: dict[str, dict[str, Any]] = {
    "glm": {"width": 512, "height": 768, "num_inference_steps": 3, "guidance_scale": 2.5, "max_sequence_length": 9},
    "t2v": {"width": 832, "height": 480, "num_frames": 17, "fps": 8, "num_inference_steps": 3, "guidance_scale": 2.0}
    | {"guidance_scale_2": 1.5, "flow_shift": 3.0, "max_sequence_length": 9, "negative_prompt": "fog"},
    "ti2v": {"width": 832, "height": 480, "num_frames": 17, "fps": 8, "num_inference_steps": 3}
    | {"guidance_scale": 2.0, "flow_shift": 3.0, "max_sequence_length": 9, "negative_prompt": "fog"},
    "sd15": {"width": 64, "height": 72, "num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "fog"},
    "sd3": {"width": 64, "height": 72, "num_inference_steps": 3, "guidance_scale": 2.5, "flow_shift": 4.5},
    "video": {"width": 64, "height": 96, "num_frames": 18, "fps": 60, "num_inference_steps": 3},
}


@pytest.mark.parametrize("model", EXPLICIT)
def test_what_is_given_is_kept(model: str) -> None:
    fields = {**EXPLICIT[model], "seed": 5, "n": 2}
    formats = ("mp4",) if model in VIDEOS else ("jpeg", "webp")
    for output_format in formats:
        request = ask(model, fields, output_format=output_format, output_quality=80)
        assert {name: getattr(request, name) for name in fields} == fields
        assert (request.output_format, request.output_quality) == (output_format, 80)
        assert request.seeds == (5, 6)


def test_arguments_of_the_pipelines_own() -> None:
    assert ask("sd15", clip_skip=2, eta=0.5, guidance_rescale=0).extra == {"clip_skip": 2, "eta": 0.5}
    assert ask("sd15", clip_skip=None, eta=0.0).extra == {}  # the default, left to the pipeline
    assert ask("flux", prompt_2="a cat").extra == {"prompt_2": "a cat"}
    assert "clip_skip: 1.5 is not an integer" in refused("sd15", clip_skip=1.5)
    assert "prompt_2: 5 is not a string" in refused("flux", prompt_2=5)
    assert "at most 8000" in refused("flux", prompt_2="x" * 8001)


# --- names


@pytest.mark.parametrize("name", ["n", "num_images_per_prompt", "num_videos_per_prompt"])
@pytest.mark.parametrize("model", ["glm", "t2v", "sd15"])
def test_n_and_its_aliases(model: str, name: str) -> None:
    assert ask(model, {name: 2}).n == 2
    assert ask(model, {name: 2.0}).n == 2
    assert ask(model, {name: 2, "n": 2}).n == 2
    message = refused(model, {name: 11})
    assert message.startswith("n: 11 is not an integer from 1 to")


def test_two_names_of_one_field_may_not_disagree() -> None:
    for raw in ({"n": 1, "num_images_per_prompt": 2}, {"num_images_per_prompt": 2, "n": 1}):
        assert re.search(r"(n|num_images_per_prompt): \d contradicts n: \d; give one of them", refused("glm", raw))
    for raw in ({"size": "64x64", "width": 32}, {"height": 32, "size": "64x64"}):
        assert "contradicts" in refused("glm", raw)
    assert "images" in refused("glm", image=PICTURE, images=picture(32, 32))


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize("model", TAKE_IMAGE)
def test_pictures_and_their_alias(model: str, name: str) -> None:
    plain = {"prompt": "a dog"}
    for value in (PICTURE, [PICTURE], (PICTURE,), base64.b64decode(PICTURE), [base64.b64decode(PICTURE)]):
        (image,) = run(checker(model), {**plain, name: value}).images
        assert (image.width, image.height, image.rgb[:3]) == (64, 64, bytes((200, 100, 50)))


@pytest.mark.parametrize("model", ["glm", "t2v", "sd15"])
def test_size_is_width_and_height(model: str) -> None:
    for size in ("640x512", "640X512"):
        request = ask(model, size=size)
        assert (request.width, request.height) == (640, 512)
    assert ask(model, size="640x512", width=640).height == 512


@pytest.mark.parametrize(
    "size",
    [
        "640",
        "640x",
        "x512",
        "640x512x3",
        "640*512",
        "-640x512",
        "6.4x5",
        "６４０x512",
        "a dog",
        640,
        [640, 512],
        "1" * 99,
        f"1x{'1' * 31}",
        True,
        {"width": 1},
    ],
)
def test_sizes_of_another_form(size: Any) -> None:
    assert refused("glm", size=size).startswith("size: ")


EMPTY = [None, "", b"", [], (), {}]


@pytest.mark.parametrize("empty", EMPTY, ids=repr)
@pytest.mark.parametrize("model", FACTS)
def test_null_and_empty_count_as_absent(model: str, empty: Any) -> None:
    """For every field of every family, and for those that are refused or not known at all."""
    names = [*COMMON, *ALIASES, "size", *FACTS[model][2].get("extra", {}), "no_such_field"]
    raw = {**dict.fromkeys(names, empty), **least(model), "seed": 3}
    assert run(checker(model), raw) == ask(model, seed=3)


@pytest.mark.parametrize("empty", [*EMPTY, "absent"], ids=repr)
def test_required_fields(empty: Any) -> None:
    for model in FACTS:
        raw = {**least(model), "prompt": empty}
        if empty == "absent":
            del raw["prompt"]
        with pytest.raises(InvalidRequest, match=r"^prompt: missing; it must be a string of at most 8000 characters$"):
            checker(model).check(raw)
    for model in NEED_IMAGE:
        raw = {"prompt": "a dog", "image": empty}
        if empty == "absent":
            del raw["image"]
        with pytest.raises(InvalidRequest, match=r"^image: missing; it must be base64"):
            checker(model).check(raw)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("promt", "prompt"),
        ("Prompt", "prompt"),
        ("steps", None),
        ("num_steps", "num_inference_steps"),
        ("inference_steps", "num_inference_steps"),
        ("guidance", "guidance_scale"),
        ("negative-prompt", "negative_prompt"),
        ("num_image_per_prompt", "num_images_per_prompt"),
        ("sizes", "size"),
        ("seeds", "seed"),
        ("zzzzzz", None),
        ("self", None),
        ("generator", None),
        ("callback_on_step_end", None),
        ("prompt_embeds", "prompt"),
        ("x" * 100_000, None),
    ],
)
def test_unknown_fields_name_the_nearest_known_one(name: str, near: str | None) -> None:
    message = refused("sd15", {name: 1})
    assert message.startswith(repr(name)[:60])
    assert "is not a field of this model" in message
    if near is not None:
        assert f"did you mean {near}?" in message
    elif "did you mean" not in message:
        assert all(field in message for field in checker("sd15").schema.parameters)


def test_field_names_are_strings() -> None:
    with pytest.raises(InvalidRequest, match="name must be a string"):
        checker("sd15").check({"prompt": "a dog", 5: 1})  # type: ignore[dict-item]


# --- what a model has not


REFUSED = [
    ("glm", "negative_prompt", "fog", "has none"),
    ("glm", "guidance_scale_2", 2, "one denoiser"),
    ("glm", "flow_shift", 2, "shifts by the picture's size"),
    ("glm", "num_frames", 5, "pictures, not videos"),
    ("glm", "fps", 5, "pictures, not videos"),
    ("glm", "seconds", 5, "pictures, not videos"),
    ("t2v", "image", PICTURE, "from text alone"),
    ("t2v", "images", [PICTURE], "from text alone"),
    ("wan2.1", "image", PICTURE, "from text alone"),
    ("wan2.1", "flow_shift", 3, "no fixed shift"),
    ("wan2.1", "guidance_scale_2", 3, "one expert"),
    ("ti2v", "guidance_scale_2", 3, "one expert"),
    ("sd15", "image", PICTURE, "StableDiffusionPipeline takes no such argument"),
    ("sd15", "num_frames", 5, "StableDiffusionPipeline takes no such argument"),
    ("sd15", "fps", 5, "takes no such argument"),
    ("sd15", "seconds", 5, "takes no such argument"),
    ("sd15", "guidance_scale_2", 5, "takes no such argument"),
    ("sd15", "max_sequence_length", 5, "takes no such argument"),
    ("sd15", "flow_shift", 5, "no fixed shift"),
    ("flux", "flow_shift", 5, "no fixed shift"),
    ("schnell", "guidance_scale", 5, "true_cfg_scale"),
    ("video", "seconds", 5, "takes no such argument"),
]


@pytest.mark.parametrize(("model", "name", "value", "why"), REFUSED)
def test_refused_fields_say_why(model: str, name: str, value: Any, why: str) -> None:
    message = refused(model, {name: value})
    assert message.startswith(f"{ALIASES.get(name, name)}: ")
    assert "can't be used: " in message
    assert why in message


@pytest.mark.parametrize("model", FACTS)
def test_every_known_field_is_taken_or_refused_with_a_reason(model: str) -> None:
    schema = checker(model).schema
    assert set(COMMON) <= set(schema.parameters) | set(schema.refused)
    assert not set(schema.parameters) & set(schema.refused)
    assert all(schema.refused.values())
    tested = {name for of, name, _, _ in REFUSED if of == model}
    if model in ("glm", "sd15"):
        assert {ALIASES.get(name, name) for name in tested} == set(schema.refused)


# --- values that do not fit


WRONG: list[tuple[str, str, Any, str]] = [
    ("glm", "timeout", 0, "is not a finite number from 0.001 to 3600"),
    ("glm", "timeout", 3601, "is not a finite number from 0.001 to 3600"),
    ("glm", "dry_run", "yes", "is not true or false"),
    ("glm", "prompt", 5, "is not a string of at most 8000 characters"),
    ("glm", "prompt", True, "is not a string"),
    ("glm", "prompt", ["a dog"], "is not a string"),
    ("glm", "prompt", {"text": "a dog"}, "is not a string"),
    ("glm", "prompt", "x" * 8001, "a text of 8001 characters is too long; at most 8000 fit"),
    ("glm", "prompt", "dog \ud83d", "is not valid Unicode text"),
    ("sd15", "negative_prompt", 5, "is not a string"),
    ("sd15", "negative_prompt", "x" * 8001, "too long"),
    ("glm", "width", 1000, "the nearest that fit are 992 and 1024"),
    ("glm", "width", 0, "is not an integer from 32 to 4096 that is a multiple of 32"),
    ("glm", "width", -32, "is not an integer from 32"),
    ("glm", "height", 4097, "is not an integer from 32 to 4096"),
    ("glm", "height", 33, "the nearest that fit are 32 and 64"),
    ("glm", "width", "1024", "is not an integer"),
    ("glm", "width", 1024.5, "is not an integer"),
    ("glm", "width", True, "is not an integer"),
    ("glm", "width", [1024], "is not an integer"),
    ("glm", "width", float("nan"), "is not an integer"),
    ("glm", "width", float("inf"), "is not an integer"),
    ("sd15", "width", 100, "the nearest that fit are 96 and 104"),
    ("sd15", "width", 56, "is not an integer from 64"),
    ("flux", "height", 1000, "the nearest that fit are 992 and 1008"),
    ("t2v", "width", 850, "the nearest that fit are 848 and 864"),
    ("t2v", "width", 16, "is not an integer from 32"),
    ("ti2v", "height", 720, "the nearest that fit are 704 and 736"),
    ("glm", "num_inference_steps", 0, "is not an integer from 1 to 200"),
    ("glm", "num_inference_steps", 201, "is not an integer from 1 to 200"),
    ("glm", "num_inference_steps", 1e308, "is not an integer from 1 to 200"),
    ("glm", "guidance_scale", -0.1, "is not a finite number from 0 to 30"),
    ("glm", "guidance_scale", 30.1, "is not a finite number from 0 to 30"),
    ("glm", "guidance_scale", "high", "is not a finite number"),
    ("glm", "guidance_scale", False, "is not a finite number"),
    ("glm", "guidance_scale", float("nan"), "is not a finite number"),
    ("glm", "guidance_scale", float("-inf"), "is not a finite number"),
    ("glm", "guidance_scale", 10**400, "is not a finite number"),
    ("t2v", "guidance_scale_2", -1, "is not a finite number from 0 to 30"),
    ("t2v", "flow_shift", 0, "is not a finite number from 0.01 to 100"),
    ("t2v", "num_frames", 80, "the nearest that fit are 77 and 81"),
    ("t2v", "num_frames", 82, "is not an integer from 1 to 257 that is a multiple of 4 plus 1"),
    ("t2v", "num_frames", 0, "is not an integer from 1 to 257"),
    ("t2v", "num_frames", 261, "is not an integer from 1 to 257"),
    ("t2v", "fps", 0, "is not an integer from 1 to 60"),
    ("t2v", "fps", 61, "is not an integer from 1 to 60"),
    ("t2v", "fps", 23.976, "is not an integer"),
    ("t2v", "seconds", -1, "is not a finite number from 0"),
    ("t2v", "seconds", "5s", "is not a finite number"),
    ("t2v", "n", 5, "is not an integer from 1 to 4"),
    ("glm", "n", 0, "is not an integer from 1 to 10"),
    ("glm", "n", 11, "is not an integer from 1 to 10"),
    ("glm", "n", True, "is not an integer"),
    ("glm", "seed", -1, "is not an integer from 0"),
    ("glm", "seed", 2**63, "is not an integer from 0"),
    ("glm", "seed", "7", "is not an integer"),
    ("glm", "seed", 0.5, "is not an integer"),
    ("glm", "max_sequence_length", 0, "is not an integer from 1 to 2048"),
    ("glm", "max_sequence_length", 2049, "is not an integer from 1 to 2048"),
    ("t2v", "max_sequence_length", 513, "is not an integer from 1 to 512"),
    ("flux", "max_sequence_length", 513, "is not an integer from 1 to 512"),
    ("glm", "output_format", "gif", "is not one of png, jpeg, webp"),
    ("glm", "output_format", "mp4", "is not one of png, jpeg, webp"),
    ("glm", "output_format", 5, "is not one of png, jpeg, webp"),
    ("t2v", "output_format", "png", "is not one of mp4"),
    ("t2v", "output_format", "webm", "is not one of mp4"),
    ("t2v", "output_quality", 0, "is not an integer from 1 to 100"),
    ("t2v", "output_quality", 101, "is not an integer from 1 to 100"),
    ("i2v", "image", 5, "image[0]: 5 is not base64"),
    ("i2v", "image", True, "is not base64"),
    ("i2v", "image", {"b64": PICTURE}, "is not base64"),
    ("i2v", "image", [""], "is not base64"),
    ("i2v", "image", [None], "is not base64"),
    ("i2v", "image", [[PICTURE]], "is not base64"),
    ("i2v", "image", [PICTURE, PICTURE], "2 pictures; this model takes at most 1"),
    ("glm", "image", [PICTURE] * 5, "5 pictures; this model takes at most 4"),
    ("glm", "image", "x.png", "image: "),
    ("glm", "image", [PICTURE, "x.png"], "image[1]: "),
]


@pytest.mark.parametrize(("model", "name", "value", "says"), WRONG, ids=lambda x: str(x)[:40])
def test_values_that_do_not_fit(model: str, name: str, value: Any, says: str) -> None:
    message = refused(model, {name: value})
    assert message.startswith(name)
    assert says in message


def test_every_common_field_has_a_value_that_does_not_fit() -> None:
    assert {name for _, name, _, _ in WRONG} == set(COMMON)


@pytest.mark.parametrize(
    ("model", "fields", "kept"),
    [
        ("glm", {"width": 1024.0}, {"width": 1024}),
        ("glm", {"guidance_scale": 2}, {"guidance_scale": 2.0}),
        ("glm", {"output_format": "JPEG"}, {"output_format": "jpeg"}),
        ("glm", {"seed": 0}, {"seed": 0}),
        ("glm", {"seed": MAX_SEED}, {"seed": 2**63 - 1}),
        ("glm", {"guidance_scale": 0}, {"guidance_scale": 0.0}),
        ("glm", {"prompt": "x" * 8000}, {"prompt": "x" * 8000}),
        ("glm", {"prompt": " \n"}, {"prompt": " \n"}),
        ("glm", {"prompt": "犬 🐕\0"}, {"prompt": "犬 🐕\0"}),
        ("glm", {"size": "32x4096"}, {"width": 32, "height": 4096}),
        ("glm", {"size": "2048x2048"}, {"width": 2048}),
        ("t2v", {"num_frames": 1}, {"num_frames": 1}),
        ("t2v", {"num_frames": 257}, {"num_frames": 257}),
        ("t2v", {"size": "1920x1088"}, {"width": 1920}),
        ("t2v", {"n": 4}, {"n": 4}),
    ],
)
def test_values_that_just_fit(model: str, fields: dict[str, Any], kept: dict[str, Any]) -> None:
    request = ask(model, fields)
    assert {name: getattr(request, name) for name in kept} == kept
    assert all(type(getattr(request, name)) is type(value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("model", "size", "limit"),
    [("glm", "2048x2080", 2048 * 2048), ("t2v", "1920x1104", 1920 * 1088), ("sd15", "2048x2056", 2048 * 2048)],
)
def test_area(model: str, size: str, limit: int) -> None:
    width, height = map(int, size.split("x"))
    message = refused(model, size=size)
    assert message.startswith(f"width x height: {width} x {height} is {width * height} pixels; at most {limit} fit")


@pytest.mark.parametrize("name", COMMON)
def test_messages_quote_no_megabytes(name: str) -> None:
    for value in ("x" * 2**20, [1] * 2**16, {"x": "y" * 2**20}):
        for model in FACTS:
            try:
                ask(model, {name: value})
            except InvalidRequest as error:
                assert len(str(error)) < 500


def test_neighbours_fit_and_are_nearest() -> None:
    rng = random.Random(1)
    for _ in range(500):
        step, offset = rng.choice((2, 4, 8, 16, 32)), rng.choice((0, 1))
        low, high = rng.randrange(0, 40), rng.randrange(41, 300)
        p = Parameter("x", "integer", "", minimum=low, maximum=high, multiple_of=step, offset=offset)
        legal = [v for v in range(low, high + 1) if (v - offset) % step == 0]
        value = rng.choice([v for v in range(low, high + 1) if v not in legal])
        below, above = [v for v in legal if v < value], [v for v in legal if v > value]
        assert neighbours(p, value) == [*below[-1:], *above[:1]]


# --- rules between fields


@pytest.mark.parametrize(
    ("model", "fields", "says"),
    [
        ("t2v", {"guidance_scale": 1, "negative_prompt": "fog"}, "negative_prompt: it has no effect while"),
        ("t2v", {"guidance_scale": 0, "negative_prompt": "fog"}, "guidance_scale is 0"),
        ("ti2v", {"guidance_scale": 1.0, "negative_prompt": "fog"}, "guidance_scale is 1"),
        ("t2v", {"guidance_scale": 1, "guidance_scale_2": 3}, "guidance_scale_2: 3 has no effect"),
        ("sd15", {"guidance_scale": 1, "negative_prompt": "fog"}, "no effect while guidance_scale is 1"),
        ("flux", {"negative_prompt": "fog"}, "no effect while true_cfg_scale is 1"),
        ("flux", {"negative_prompt": "fog", "guidance_scale": 9}, "no effect while true_cfg_scale is 1"),
        ("glm", {"output_quality": 90}, "output_quality: 90 has no effect: png is lossless"),
        ("sd15", {"output_format": "png", "output_quality": 90}, "png is lossless"),
        ("t2v", {"seconds": 5, "num_frames": 81}, "seconds: 5 and num_frames: 81 both set the length"),
    ],
)
def test_fields_that_would_have_no_effect(model: str, fields: dict[str, Any], says: str) -> None:
    assert says in refused(model, fields)


def test_flux_takes_a_negative_prompt_with_its_own_guidance() -> None:
    assert ask("flux", negative_prompt="fog", true_cfg_scale=2).negative_prompt == "fog"


@pytest.mark.parametrize(
    ("model", "fields", "pair"),
    [
        ("t2v", {}, (4.0, 3.0)),
        ("t2v", {"guidance_scale": 4}, (4.0, 3.0)),
        ("t2v", {"guidance_scale": 6}, (6.0, 6.0)),  # the pipeline's own rule
        ("t2v", {"guidance_scale_2": 2}, (4.0, 2.0)),
        ("t2v", {"guidance_scale": 6, "guidance_scale_2": 2}, (6.0, 2.0)),
        ("t2v", {"guidance_scale": 1}, (1.0, 1.0)),
        ("t2v", {"guidance_scale": 1, "guidance_scale_2": 1}, (1.0, 1.0)),
        ("i2v", {}, (3.5, 3.5)),
        ("ti2v", {"guidance_scale": 6}, (6.0, None)),
    ],
)
def test_the_two_experts_guidance(model: str, fields: dict[str, Any], pair: tuple[float, float | None]) -> None:
    request = ask(model, fields)
    assert (request.guidance_scale, request.guidance_scale_2) == pair


# --- seeds


@pytest.mark.parametrize("model", FACTS)
def test_seeds_are_drawn_and_told(model: str) -> None:
    given = checker(model)
    seeds = {run(given, least(model)).seed for _ in range(64)}
    assert len(seeds) > 60
    assert all(0 <= seed < MAX_DRAWN_SEED == 2**32 for seed in seeds)
    assert max(seeds) > 2**28
    values = given.check(least(model))
    assert given.complete(values).seed == values["seed"]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_seed_plus_n_stays_a_seed(n: int) -> None:
    for model in FACTS:
        request = ask(model, seed=MAX_SEED - n + 1, n=n)
        assert request.seeds == tuple(range(MAX_SEED - n + 1, MAX_SEED + 1))
    if n > 1:
        message = refused("glm", seed=MAX_SEED - n + 2, n=n)
        assert message.startswith(f"seed: {MAX_SEED - n + 2} plus n - 1 = {n - 1} is more than 2^63 - 1")


# --- seconds and frames


@pytest.mark.parametrize(
    ("model", "fields", "frames"),
    [
        ("t2v", {"seconds": 5}, 81),
        ("t2v", {"seconds": 5.0, "fps": 16}, 81),
        ("t2v", {"seconds": 5, "fps": 24}, 121),
        ("ti2v", {"seconds": 5}, 121),
        ("ti2v", {"seconds": 5, "fps": 16}, 81),
        ("t2v", {"seconds": 0}, 1),
        ("t2v", {"seconds": 0.25}, 5),
        ("t2v", {"seconds": 16}, 257),
        ("t2v", {"seconds": 4, "fps": 1}, 5),
        ("t2v", {"fps": 24}, 81),  # fps alone sets the pace, not the length
        ("t2v", {"seconds": 1.12, "fps": 25}, 29),  # 1.12 x 25 is 28.000000000000004 in doubles
        ("t2v", {"seconds": 4.64, "fps": 25}, 117),
    ],
)
def test_seconds(model: str, fields: dict[str, Any], frames: int) -> None:
    request = ask(model, fields)
    assert request.num_frames == frames
    assert request.fps == fields.get("fps", DEFAULTS[model]["fps"])


def nearest_seconds(message: str) -> list[float]:
    told = re.search(r"the nearest that fit are (.*) seconds", message)
    assert told, message
    return [float(text) for text in re.findall(r"\d+\.?\d*(?:e-?\d+)?", told[1])]


def test_five_seconds_at_15_fps() -> None:
    message = refused("t2v", seconds=5, fps=15)
    assert message.startswith("seconds: 5 at 15 fps is 76 frames; frames must be a multiple of 4 plus 1")
    assert nearest_seconds(message) == [pytest.approx(4.8), pytest.approx(76 / 15, abs=0.001)]
    assert [ask("t2v", seconds=s, fps=15).num_frames for s in nearest_seconds(message)] == [73, 77]


def test_every_length_that_is_a_decimal_fits() -> None:
    """(frames - 1) / fps where that has at most six decimals: what a person can write exactly."""
    given = checker("t2v")
    failed = []
    for fps in range(1, 61):
        for frames in range(1, 258, 4):
            if (frames - 1) * 10**6 % fps == 0:
                values = {**given.check({"prompt": "a", "seconds": (frames - 1) / fps, "fps": fps}), "images": ()}
                try:
                    made = given.complete(values).num_frames
                except InvalidRequest:
                    made = None
                if made != frames:
                    failed.append((frames, fps, made))
    assert not failed


def test_the_neighbours_told_for_seconds_fit() -> None:
    """Whoever takes one of the two values from the message must not be refused again."""
    given, rng = checker("t2v", max_frames=161), random.Random(2)
    for _ in range(400):
        fps, seconds = rng.randint(1, 60), round(rng.uniform(0, 20), rng.choice((0, 1, 2)))
        raw = {"prompt": "a", "fps": fps}
        try:
            run(given, {**raw, "seconds": seconds})
        except InvalidRequest as error:
            near = nearest_seconds(str(error))
            assert 1 <= len(near) <= 2
            made = [run(given, {**raw, "seconds": value}).num_frames for value in near]
            assert all(frames is not None and frames <= 161 for frames in made)
            wanted = seconds * fps + 1
            legal = sorted((f for f in range(1, 162, 4)), key=lambda f: abs(f - wanted))
            assert legal[0] in made


# --- sizes that follow the source picture


@pytest.mark.parametrize(
    ("model", "source", "size"),
    [
        ("i2v", (1280, 720), (1280, 720)),
        ("i2v", (1920, 1080), (1280, 720)),
        ("i2v", (720, 1280), (720, 1280)),
        ("i2v", (100, 100), (960, 960)),
        ("i2v", (640, 480), (1104, 816)),
        ("ti2v", (1000, 1000), (928, 928)),
        ("ti2v", (1280, 704), (1280, 704)),
        ("i2v", (2000, 10), (4096, 64)),
        ("i2v", (10, 2000), (64, 4096)),
        ("glm", (1024, 1024), (1024, 1024)),
        ("glm", (1000, 1000), (992, 992)),
        ("glm", (100, 100), (512, 512)),
        ("glm", (4000, 4000), (2048, 2048)),
        ("glm", (4000, 1000), (2048, 512)),
        ("glm", (800, 600), (800, 608)),
    ],
)
def test_default_size_follows_the_source(model: str, source: tuple[int, int], size: tuple[int, int]) -> None:
    request = ask(model, image=picture(*source))
    assert (request.width, request.height) == size
    asked = ask(model, image=picture(*source), size="512x512")
    assert (asked.width, asked.height) == (512, 512)
    assert (asked.images[0].width, asked.images[0].height) == source


@pytest.mark.parametrize("model", ["i2v", "ti2v"])
def test_size_of_a_video_from_any_source(model: str) -> None:
    given, rng = checker(model), random.Random(3)
    own, multiple = FACTS[model][2]["defaults"], FACTS[model][2]["multiple"]
    for _ in range(60):
        width, height = rng.randint(200, 900), rng.randint(200, 900)
        request = run(given, {"prompt": "a", "image": picture(width, height)})
        assert request.width % multiple == request.height % multiple == 0
        assert 0.85 * own["width"] * own["height"] <= request.width * request.height <= own["width"] * own["height"]
        assert request.width / request.height == pytest.approx(width / height, rel=0.12)


def test_editing_uses_the_first_source() -> None:
    request = ask("glm", image=[picture(512, 1024), picture(1024, 512)])
    assert (request.width, request.height) == (512, 1024)
    assert [(i.width, i.height) for i in request.images] == [(512, 1024), (1024, 512)]


def test_sources_of_extreme_aspect() -> None:
    assert ask("glm", image=picture(400, 100)).width == 2048
    message = refused("glm", image=picture(401, 100))
    assert message == "image: 401 x 100 has an aspect of 4.01; at most 4 fits"
    assert refused("glm", image=[PICTURE, picture(100, 500)]).startswith("image[1]: 100 x 500 has an aspect of 5.00")


@pytest.mark.parametrize(("shortest", "longest"), [(512, 2048), (64, 256), (256, 1024), (500, 2000)])
def test_source_size(shortest: int, longest: int) -> None:
    rng = random.Random(shortest)
    facts = {
        "edits": True,
        "special_tokens": ["<|image|>"],
        "source_shortest_edge": shortest,
        "source_longest_edge": longest,
    }
    for _ in range(3000):
        height = round(2 ** rng.uniform(2, 13))
        width = round(height * 2 ** rng.uniform(-2, 2))
        if not 1 <= max(width, height) / min(width, height) <= 4:
            continue
        made = source_size(width, height, facts)
        assert all(side % 32 == 0 for side in made)
        assert max(made) <= longest
        assert min(made) >= shortest // 32 * 32
        assert max(made) / min(made) <= 4
        assert source_size(*made, facts) == made
        assert source_size(height, width, facts) == made[::-1]
        if shortest <= min(width, height) and max(width, height) <= longest:
            assert all(
                abs(side - was) <= 17 or side in (-(-shortest // 32) * 32, longest // 32 * 32)
                for side, was in zip(made, (width, height), strict=True)
            )


# --- what the operator sets


LIMITS: list[tuple[str, str, int, dict[str, Any], str]] = [
    ("glm", "max_pixels", 256 * 256, {"size": "256x288"}, "width x height"),
    ("t2v", "max_pixels", 256 * 256, {"size": "256x272"}, "width x height"),
    ("sd15", "max_pixels", 256 * 256, {"size": "256x264"}, "width x height"),
    ("t2v", "max_frames", 41, {"num_frames": 45}, "num_frames"),
    ("t2v", "max_frames", 41, {"seconds": 5}, "seconds"),
    ("video", "max_frames", 41, {"num_frames": 42}, "num_frames"),
    ("glm", "max_steps", 60, {"num_inference_steps": 61}, "num_inference_steps"),
    ("t2v", "max_steps", 60, {"num_inference_steps": 61}, "num_inference_steps"),
    ("sd15", "max_steps", 60, {"num_inference_steps": 61}, "num_inference_steps"),
    ("glm", "max_n", 2, {"n": 3}, "n"),
    ("t2v", "max_n", 2, {"n": 3}, "n"),
    ("sd15", "max_n", 2, {"n": 3}, "n"),
    ("glm", "max_prompt_length", 10, {"prompt": "x" * 11}, "prompt"),
    ("t2v", "max_prompt_length", 10, {"prompt": "x" * 11}, "prompt"),
    ("t2v", "max_prompt_length", 10, {"negative_prompt": "x" * 11}, "negative_prompt"),
    ("flux", "max_prompt_length", 10, {"prompt_2": "x" * 11}, "prompt_2"),
    ("glm", "max_source_images", 1, {"image": [PICTURE, PICTURE]}, "image"),
    ("glm", "max_source_image_bytes", 20, {"image": PICTURE}, "image"),
    ("glm", "max_source_image_pixels", 64 * 64 - 1, {"image": PICTURE}, "image"),
    ("i2v", "max_source_image_pixels", 64 * 64 - 1, {"image": PICTURE}, "image"),
]


@pytest.mark.parametrize(("model", "limit", "value", "fields", "named"), LIMITS)
def test_limits_of_the_operator_narrow(model: str, limit: str, value: int, fields: dict[str, Any], named: str) -> None:
    assert ask(model, fields).prompt
    assert refused(checker(model, **{limit: value}), {**least(model), **fields}).startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("model", "limit", "value", "fields"),
    [
        ("glm", "max_pixels", 4096 * 4096, {"size": "4096x4096"}),
        ("t2v", "max_pixels", 4096 * 4096, {"size": "4096x2048"}),
        ("sd15", "max_pixels", 4096 * 4096, {"size": "4096x4096"}),
        ("t2v", "max_frames", 401, {"num_frames": 401}),
        ("t2v", "max_frames", 401, {"seconds": 25}),
        ("video", "max_frames", 400, {"num_frames": 400}),
        ("glm", "max_steps", 500, {"num_inference_steps": 500}),
        ("t2v", "max_n", 20, {"n": 20}),
        ("sd15", "max_prompt_length", 9000, {"prompt": "x" * 9000}),
        ("glm", "max_source_images", 6, {"image": [PICTURE] * 6}),
    ],
)
def test_limits_of_the_operator_widen(model: str, limit: str, value: int, fields: dict[str, Any]) -> None:
    assert refused(model, fields)
    assert run(checker(model, **{limit: value}), {**least(model), **fields}).prompt


@pytest.mark.parametrize("model", FACTS)
@pytest.mark.parametrize("steps", [1, 10, 39])
def test_default_steps_keep_the_operators_limit(model: str, steps: int) -> None:
    assert run(checker(model, max_steps=steps), least(model)).num_inference_steps <= steps


@pytest.mark.parametrize("model", VIDEOS)
@pytest.mark.parametrize("frames", [1, 4, 5, 40, 80])
def test_default_frames_keep_the_operators_limit(model: str, frames: int) -> None:
    try:
        made = run(checker(model, max_frames=frames), least(model)).num_frames
    except InvalidRequest as error:  # which lengths another pipeline takes nobody knows
        assert model == "video" and str(error).startswith("num_frames: ")
    else:
        assert made is not None and 1 <= made <= frames
        assert model not in WANS or made % 4 == 1


@pytest.mark.parametrize("model", FACTS)
def test_the_default_size_keeps_the_operators_limit(model: str) -> None:
    """It may be refused, with words; it may not pass."""
    try:
        request = run(checker(model, max_pixels=256 * 256), least(model))
    except InvalidRequest as error:
        assert str(error).startswith("width x height: ")
    else:
        assert request.width * request.height <= 256 * 256


# --- generation_defaults.json


@pytest.mark.parametrize(
    ("model", "defaults", "fields", "made"),
    [
        ("glm", {"num_inference_steps": 8}, {}, {"num_inference_steps": 8}),
        ("glm", {"num_inference_steps": 8}, {"num_inference_steps": 9}, {"num_inference_steps": 9}),
        ("glm", {"size": "512x768"}, {}, {"width": 512, "height": 768}),
        ("glm", {"width": 512}, {"width": 640}, {"width": 640}),
        ("glm", {"num_images_per_prompt": 2}, {}, {"n": 2}),
        ("glm", {"output_format": "webp", "output_quality": 70}, {}, {"output_format": "webp", "output_quality": 70}),
        ("glm", {"seed": 42}, {}, {"seed": 42}),
        ("t2v", {"negative_prompt": "fog"}, {}, {"negative_prompt": "fog"}),
        ("t2v", {"guidance_scale": 1.0}, {}, {"guidance_scale": 1.0, "guidance_scale_2": 1.0}),
        ("t2v", {"num_frames": 41}, {}, {"num_frames": 41}),
        ("t2v", {"flow_shift": 5}, {}, {"flow_shift": 5.0}),
        ("sd15", {"clip_skip": 2}, {}, {"extra": {"clip_skip": 2}}),
        ("sd15", {"num_inference_steps": None, "negative_prompt": ""}, {}, {"num_inference_steps": 50}),
    ],
)
def test_defaults_of_the_model_folder(
    model: str, defaults: dict[str, Any], fields: dict[str, Any], made: dict[str, Any]
) -> None:
    request = run(checker(model, defaults), {**least(model), **fields})
    assert {name: getattr(request, name) for name in made} == made


@pytest.mark.parametrize(
    ("model", "defaults", "named"),
    [
        ("glm", {"num_inference_steps": 0}, "num_inference_steps: 0"),
        ("glm", {"steps": 8}, "'steps' is not a field"),
        ("glm", {"negative_prompt": "fog"}, "negative_prompt: "),
        ("glm", {"width": 1000}, "992 and 1024"),
        ("glm", {"size": "big"}, "size: "),
        ("glm", {"n": 1, "num_images_per_prompt": 2}, "contradicts"),
        ("t2v", {"output_format": "png"}, "output_format: 'png' is not one of mp4"),
        ("sd15", {"guidance_scale": "high"}, "guidance_scale: "),
    ],
)
def test_defaults_that_do_not_fit_end_the_start(model: str, defaults: dict[str, Any], named: str) -> None:
    with pytest.raises(StartupError) as caught:
        checker(model, defaults)
    message = str(caught.value)
    assert message.startswith("generation_defaults.json: ")
    assert named in message
    assert "\n" not in message


def test_defaults_beyond_the_operators_limit_end_the_start() -> None:
    with pytest.raises(StartupError, match=r"^generation_defaults\.json: num_inference_steps: 50"):
        checker("glm", {"num_inference_steps": 50}, max_steps=40)


@pytest.mark.parametrize(
    ("model", "defaults"),
    [
        ("t2v", {"seconds": 5, "num_frames": 81}),
        ("t2v", {"seconds": 5, "fps": 15}),
        ("t2v", {"size": "4096x4096"}),
        ("glm", {"image": "not a picture"}),
    ],
)
def test_defaults_that_make_every_request_fail_end_the_start(model: str, defaults: dict[str, Any]) -> None:
    with pytest.raises(StartupError, match=r"^generation_defaults\.json: "):
        checker(model, defaults)


@pytest.mark.parametrize(
    ("model", "defaults", "fields", "made"),
    [
        ("t2v", {"num_frames": 41}, {"seconds": 5}, {"num_frames": 81}),
        ("t2v", {"seconds": 5}, {"num_frames": 41}, {"num_frames": 41}),
        ("t2v", {"negative_prompt": "fog"}, {"guidance_scale": 1}, {"negative_prompt": None}),
        ("t2v", {"negative_prompt": "fog", "guidance_scale": 1}, {}, {"negative_prompt": None}),
        ("t2v", {"negative_prompt": "fog", "guidance_scale": 1}, {"guidance_scale": 5}, {"negative_prompt": "fog"}),
        ("flux", {"negative_prompt": "fog"}, {}, {"negative_prompt": None}),
        ("flux", {"negative_prompt": "fog"}, {"true_cfg_scale": 2}, {"negative_prompt": "fog"}),
        ("glm", {"output_quality": 80}, {}, {"output_quality": None}),
        ("glm", {"output_quality": 80}, {"output_format": "jpeg"}, {"output_quality": 80}),
        ("glm", {"output_format": "jpeg", "output_quality": 80}, {"output_format": "png"}, {"output_quality": None}),
    ],
)
def test_a_request_overrides_what_a_default_contradicts(
    model: str, defaults: dict[str, Any], fields: dict[str, Any], made: dict[str, Any]
) -> None:
    """A client can't know the folder's defaults: they never make its own legal request illegal."""
    request = run(checker(model, defaults), {**least(model), **fields})
    assert {name: getattr(request, name) for name in made} == made


@pytest.mark.parametrize("model", ["glm", "t2v", "sd15"])
def test_a_limit_below_every_size_is_not_blamed_on_the_folder(model: str) -> None:
    """There is no generation_defaults.json here: the operator must read which setting to change."""
    with pytest.raises(StartupError) as caught:
        checker(model, max_pixels=100)
    assert "generation_defaults.json" not in str(caught.value)
    assert "at most 100 fit" in str(caught.value)


def test_a_default_prompt_makes_the_prompt_optional() -> None:
    assert run(checker("glm", {"prompt": "a dog"}), {}).prompt == "a dog"


# --- schemas and the registry


@pytest.mark.parametrize("model", FACTS)
def test_defaults_in_the_schema_fit_it(model: str) -> None:
    schema = checker(model).schema
    for p in schema.parameters.values():
        if p.default is not None:
            values = checker(model).check({**least(model), p.name: p.default})
            assert values[p.name] == p.default
    formats = schema.parameters["output_format"].choices
    assert formats == (VIDEO_FORMATS if model in VIDEOS else IMAGE_FORMATS)


@pytest.mark.parametrize("model", FACTS)
def test_fields_describe_themselves(model: str) -> None:
    for p in checker(model).schema.parameters.values():
        assert p.description.endswith("."), p.name
        assert p.fits()


def test_requests_are_frozen_and_the_values_are_not_the_callers() -> None:
    raw = {"prompt": "a dog", "size": "64x64", "image": [PICTURE]}
    request = ask("glm", raw)
    assert raw == {"prompt": "a dog", "size": "64x64", "image": [PICTURE]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("class_name", "family"),
    [
        ("GlmImagePipeline", "glm_image"),
        ("WanPipeline", "wan"),
        ("WanImageToVideoPipeline", "wan"),
        ("StableDiffusionPipeline", "generic"),
        ("WanVACEPipeline", "generic"),
        ("", "generic"),
    ],
)
def test_family_of_a_pipeline_class(class_name: str, family: str) -> None:
    assert family_of(class_name) == family


def test_every_family_has_a_request_half() -> None:
    assert {family for family, _, _ in FACTS.values()} == set(FAMILIES)
    for family in FAMILIES:
        half = request_half(family)
        assert callable(half.schema) and callable(half.complete)


@pytest.mark.parametrize(("value", "text"), [(1.0, "1"), (3, "3"), (0.01, "0.01"), (7.5, "7.5")])
def test_numbers_in_messages(value: float, text: str) -> None:
    assert number(value) == text

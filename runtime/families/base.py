"""What a model family keeps: a request half (no torch) and a pipeline half (in the engine).

The request half is a module `families/<name>/request.py` with three functions:

    schema(facts, limits) -> Schema                       what a request may say to this model
    complete(values, facts, limits) -> GenerationRequest  rules between fields, and what is left out
    batch_key(request, facts) -> GenerationRequest | None requests with equal keys may run together; None runs alone

The pipeline half is a module `families/<name>/pipeline.py` with

    facts(pipeline, folder) -> dict JSON values for the request half
    warmup(facts)                   the request of the smallest result
    Runner(pipeline, acceleration)  `.run(request, seed, context) -> list of frames or one picture`, and where
                                    `batch_key` gives keys `.run_batch([(request, seed), …], context)`, which gives
                                    those one after another, None for one whose own context (`context.rows`) stopped;
                                    `.variant`: what of the acceleration and of the device decides a result's bytes

and, where the family knows better than the loader where its weights should lie,

    plan_memory(folder, sizes, dtypes, device, acceleration, optimizations, free, host_limit) -> Placement | None
    place_weights(pipeline, device, chosen)

Adding a family: the folder and one line in `registry.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from runtime.errors import InvalidRequest, shown

Kind = Literal["string", "integer", "number", "boolean", "image"]

MAX_SEED = 2**63 - 1  # torch.Generator.manual_seed takes a signed 64-bit value


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds an operator may set; None leaves the family's own."""

    max_pixels: int | None = None
    max_frames: int | None = None
    max_steps: int | None = None
    max_n: int | None = None
    max_prompt_length: int | None = None
    max_source_images: int | None = None
    max_source_image_bytes: int = 32 * 2**20
    max_source_image_pixels: int = 40_000_000
    max_timeout: int = 3600


@dataclass(frozen=True, slots=True)
class Parameter:
    """One field of a request: its type and what fits.

    A legal integer is `offset` above a multiple of `multiple_of`. `default` None means that the
    family fills it in (or that the field is optional); `required` fields have no default.
    """

    name: str
    kind: Kind
    description: str
    default: Any = None
    required: bool = False
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int = 1
    offset: int = 0
    choices: tuple[str, ...] | None = None
    max_length: int | None = None
    max_items: int = 1

    def fits(self) -> str:
        """The values that fit, in words, for error messages and docs."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {
            "string": "a string",
            "integer": "an integer",
            "number": "a finite number",
            "boolean": "true or false",
            "image": "base64 or a data URI of a PNG, JPEG, WebP or GIF picture",
        }[self.kind]
        if self.kind == "string" and self.max_length is not None:
            words += f" of at most {self.max_length} characters"
        if self.minimum is not None and self.maximum is not None:
            words += f" from {number(self.minimum)} to {number(self.maximum)}"
        elif self.minimum is not None:
            words += f" of at least {number(self.minimum)}"
        if self.multiple_of > 1:
            words += f" that is a multiple of {self.multiple_of}" + (f" plus {self.offset}" if self.offset else "")
        return words


@dataclass(frozen=True, slots=True)
class Schema:
    """The fields a model takes, by name, and the known fields that it refuses, with the reason."""

    parameters: Mapping[str, Parameter]
    refused: Mapping[str, str] = field(default_factory=dict)


# Every field that some family knows; a family narrows it with `parameter(name, …)` or refuses it with a reason.
COMMON: dict[str, Parameter] = {
    p.name: p
    for p in (
        Parameter("prompt", "string", "What to draw.", required=True, max_length=8000),
        Parameter("negative_prompt", "string", "What to keep out of the picture.", max_length=8000),
        Parameter("image", "image", "A source picture."),
        Parameter("width", "integer", "Width in pixels."),
        Parameter("height", "integer", "Height in pixels."),
        Parameter("num_inference_steps", "integer", "Denoising steps.", minimum=1, maximum=200),
        Parameter("guidance_scale", "number", "Classifier-free guidance.", minimum=0, maximum=30),
        Parameter("guidance_scale_2", "number", "Guidance of the low-noise expert.", minimum=0, maximum=30),
        Parameter("flow_shift", "number", "Shift of the flow-matching schedule.", minimum=0.01, maximum=100),
        Parameter("num_frames", "integer", "Frames of the video.", minimum=1),
        Parameter("fps", "integer", "Frames a second of the encoded video.", minimum=1, maximum=60),
        Parameter("seconds", "number", "Length of the video; an alternative to num_frames.", minimum=0, maximum=600),
        Parameter("seed", "integer", "Start of the noise; drawn when absent.", minimum=0, maximum=MAX_SEED),
        Parameter("n", "integer", "How many; number i is drawn with seed + i.", default=1, minimum=1, maximum=10),
        Parameter("output_format", "string", "File format of the result."),
        Parameter("output_quality", "integer", "Quality of a lossy format.", minimum=1, maximum=100),
        Parameter("timeout", "number", "Seconds after which the request is stopped and answered 504.", minimum=0.001),
        Parameter("dry_run", "boolean", "Check the request and predict its seconds without running it.", default=False),
        Parameter("max_sequence_length", "integer", "Prompt tokens the text encoder sees.", minimum=1),
    )
}

# Names that mean another field: the pipelines' and the peers' own.
ALIASES = {"num_images_per_prompt": "n", "num_videos_per_prompt": "n", "images": "image"}
# Fields that are the server's to keep: no family narrows or refuses them.
OURS = ("seed", "output_format", "output_quality", "timeout", "dry_run")
# Fields that `normalise` turns into others.
SHORTHANDS = ("size",)

IMAGE_FORMATS = ("png", "jpeg", "webp")
VIDEO_FORMATS = ("mp4",)


def parameter(name: str, **changes: Any) -> Parameter:
    """The common field `name`, narrowed to a model."""
    return replace(COMMON[name], **changes)


def table(*parameters: Parameter) -> dict[str, Parameter]:
    return {p.name: p for p in parameters}


def cap(limit: int | None, own: int) -> int:
    """An operator's limit where there is one, else the family's own."""
    return own if limit is None else limit


def number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def normalise(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fold aliases and shorthands of one request into the common names; null and empty count as absent.

    Raises InvalidRequest where two names of one field disagree.
    """
    values: dict[str, Any] = {}

    def put(name: str, value: Any, given_as: str) -> None:
        if name in values and values[name] != value:
            raise InvalidRequest(
                f"{given_as}: {shown(value)} contradicts {name}: {shown(values[name])}; give one of them"
            )
        values[name] = value

    for key, value in raw.items():
        if not isinstance(key, str):
            raise InvalidRequest(f"a field's name must be a string, not {shown(key)}")
        if value is None or (isinstance(value, str | bytes | list | tuple | dict) and len(value) == 0):
            continue
        if key == "size":
            width, height = parse_size(value)
            put("width", width, "size")
            put("height", height, "size")
        else:
            put(ALIASES.get(key, key), value, key)
    return values


def parse_size(value: Any) -> tuple[int, int]:
    """(width, height) of "WxH". Raises InvalidRequest."""
    parts = value.lower().split("x") if isinstance(value, str) and len(value) < 32 else []
    if len(parts) == 2 and all(p.isascii() and p.isdigit() for p in parts):
        return int(parts[0]), int(parts[1])
    raise InvalidRequest(f'size: {shown(value)} is not of the form "WIDTHxHEIGHT", for example "1024x1024"')


def check(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """Each value checked against its parameter, defaults filled in. Images pass as they are.

    Raises InvalidRequest naming the field, the value and what would fit.
    """
    for name, value in values.items():
        if name in schema.refused:
            raise InvalidRequest(f"{name}: {shown(value)} can't be used: {schema.refused[name]}")
        if name not in schema.parameters:
            raise InvalidRequest(unknown_field(schema, name))
    checked: dict[str, Any] = {}
    for p in schema.parameters.values():
        if p.name in values:
            checked[p.name] = check_value(p, values[p.name])
        elif p.required:
            raise InvalidRequest(f"{p.name}: missing; it must be {p.fits()}")
        else:
            checked[p.name] = p.default
    return checked


def unknown_field(schema: Schema, name: str) -> str:
    known = [*schema.parameters, *schema.refused, *ALIASES, *SHORTHANDS]
    near = get_close_matches(name[:64], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(sorted(schema.parameters))}"
    return f"{shown(name)} is not a field of this model; {hint}"


def check_value(p: Parameter, value: Any) -> Any:
    """`value` as `p` wants it, or InvalidRequest. Numbers are not read from strings, nor booleans from numbers."""

    def refuse(why: str = "") -> InvalidRequest:
        text = p.kind == "string" and not p.choices and not isinstance(value, int | float)
        told = _form_of(value) if text else shown(value)  # prompts stay out of the log
        return InvalidRequest(f"{p.name}: {told} {why or 'is not ' + p.fits()}")

    if p.kind == "image":
        return value
    if p.kind == "string":
        if not isinstance(value, str):
            raise refuse()
        if p.max_length is not None and len(value) > p.max_length:
            raise refuse(f"is too long; at most {p.max_length} fit")
        if any("\ud800" <= c <= "\udfff" for c in value):  # lone surrogates: legal in JSON, in no encoding
            raise refuse("is not valid Unicode text")
        if p.choices and value.lower() not in p.choices:
            raise refuse()
        return value.lower() if p.choices else value
    if p.kind == "boolean":
        if not isinstance(value, bool):
            raise refuse()
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse()
    if isinstance(value, float) and not math.isfinite(value):
        raise refuse()
    if p.kind == "integer":
        if isinstance(value, float) and not value.is_integer():
            raise refuse()
        value = int(value)
    else:
        try:
            value = float(value)
        except OverflowError:
            raise refuse() from None
    if (p.minimum is not None and value < p.minimum) or (p.maximum is not None and value > p.maximum):
        raise refuse()
    if p.kind == "integer" and (value - p.offset) % p.multiple_of:
        raise refuse(f"is not {p.fits()}; the nearest that fit are {' and '.join(map(str, neighbours(p, value)))}")
    return value


def neighbours(p: Parameter, value: int) -> list[int]:
    """The legal values just below and just above an illegal one."""
    below = (value - p.offset) // p.multiple_of * p.multiple_of + p.offset
    return [
        v
        for v in (below, below + p.multiple_of)
        if (p.minimum is None or v >= p.minimum) and (p.maximum is None or v <= p.maximum)
    ]


def within(p: Parameter) -> Any:
    """The default of `p`, lowered to what an operator's limit leaves legal."""
    if p.default is None or p.maximum is None or isinstance(p.default, str) or p.default <= p.maximum:
        return p.default
    if p.kind != "integer":
        return p.maximum
    return (int(p.maximum) - p.offset) // p.multiple_of * p.multiple_of + p.offset


def fit_pixels(width: int, height: int, limit: int, multiple: int, least: int) -> tuple[int, int]:
    """A default size lowered to at most `limit` pixels, its aspect kept as far as multiples allow."""
    if width * height <= limit:
        return width, height
    scale = math.sqrt(limit / (width * height))
    return tuple(max(least, int(side * scale) // multiple * multiple) for side in (width, height))  # type: ignore[return-value]


def check_pixels(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise InvalidRequest(
            f"width x height: {width} x {height} is {width * height} pixels; at most {limit} fit "
            f"(for example {int(math.sqrt(limit))} x {int(math.sqrt(limit))} and below)"
        )


def _form_of(value: Any) -> str:
    """What a text that does not fit is, without what it says."""
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    if isinstance(value, bytes):
        return "a file"
    return "an object" if isinstance(value, dict) else "a list"

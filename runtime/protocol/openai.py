"""OpenAI's images API: wire to fields, results to wire; and what the videos API shares with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import InvalidRequest, shown
from runtime.families.base import ALIASES, COMMON, Schema
from runtime.protocol.v1 import describe, estimated
from runtime.protocol.wire import Base64, parse
from runtime.types import Estimate, GeneratedMedia, GenerationResult, Media

MAX_TEXT = 2**20  # characters of a field that is no picture

# OpenAI's and the peers' fields that change nothing here: accepted, and named in the answer's `ignored`.
IGNORED = frozenset(
    ("quality", "moderation", "style", "partial_images", "safety_identifier", "input_fidelity", "complexity", "user")
)
# OpenAI's fields that ask for what no model here can do.
REFUSED = {
    "mask": "no model here repaints a part of a picture; say in the prompt what shall change",
    "markup": "no model here reads marks in a picture; say in the prompt what shall change",
    "svg": "pictures are drawn in pixels",
    "frame_count": "pictures don't move",
    "frame_duration_ms": "pictures don't move",
}
# Names of source pictures; what they hold may be base64, a data URI, a file, a URL or {"image_url": …}.
PICTURES = ("image", "images", "image_url", "url")
VIDEO_PICTURES = ("input_reference", "reference_url", "image_reference", *PICTURES)

RESPONSE_FORMATS = ("b64_json", "url", "file")
BACKGROUNDS = ("auto", "opaque")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for. `fields` is what `RequestChecker.check` takes, without the pictures, which may be bytes,
    text or URLs: `pictures` holds them with the names they came under."""

    fields: dict[str, Any] = field(repr=False)
    pictures: tuple[tuple[str, Any], ...] = field(repr=False)
    response_format: str
    stream: bool
    ignored: tuple[str, ...]


def body_schema(names: Sequence[str], pictures: Sequence[str], **own: dict[str, Any]) -> dict[str, Any]:
    """A request's JSON schema, for the OpenAPI document: common fields by name, and a protocol's own."""
    known = {n: {"description": COMMON[n].description, "type": COMMON[n].kind} for n in names}
    shown = {
        n: {"description": "A picture: base64, a data URI, a file of a form, a URL, or several."} for n in pictures
    }
    text = {n: {"type": "string"} for n in ("model", "size", "user")}
    return {"type": "object", "properties": {**known, **text, **shown, **own}, "required": ["prompt"]}


_COMMON = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "width", "height", "timeout")
_OWN: dict[str, dict[str, Any]] = {
    "response_format": {"type": "string", "enum": list(RESPONSE_FORMATS)},
    "background": {"type": "string", "enum": list(BACKGROUNDS)},
    "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
    "stream": {"type": "boolean"},
    "quality": {"type": "string"},
}
_IMAGE = (*_COMMON, "n", "output_format", "output_quality", "max_sequence_length", "dry_run")
_VIDEO = (*_COMMON, "num_frames", "fps", "guidance_scale_2", "flow_shift", "max_sequence_length", "dry_run")
GENERATION_SCHEMA = body_schema(_IMAGE, (), **_OWN)
EDIT_SCHEMA = body_schema(_IMAGE, PICTURES, **_OWN)
VIDEO_SCHEMA = body_schema(_VIDEO, VIDEO_PICTURES, seconds={"type": ["string", "number"]})


# --- wire to fields


def decode_image(raw: Mapping[str, Any], form: bool, edit: bool, schema: Schema, media: Media) -> Asked:
    """A body of images/generations or images/edits; of a form all values are text. Raises InvalidRequest."""
    if media != "image":
        raise InvalidRequest("model: the served model makes videos; send the request to /v1/videos")
    if edit and "image" not in schema.parameters:
        raise InvalidRequest(f"image: {schema.refused.get('image', 'this model takes no source pictures')}")
    if not edit and "image" in schema.parameters and schema.parameters["image"].required:
        raise InvalidRequest("image: this model edits pictures; send one with the prompt to /v1/images/edits")
    values, pictures = split(raw, PICTURES)
    if pictures and not edit:
        raise InvalidRequest(f"{pictures[0][0]}: a request with source pictures goes to /v1/images/edits")
    if edit and not pictures:
        raise InvalidRequest("image: missing; it must be a PNG, JPEG, WebP or GIF picture, or several")
    values = typed(values, schema) if form else values
    response_format = chosen(values, "response_format", RESPONSE_FORMATS)
    stream = _flag(values, "stream")
    if stream and response_format != "b64_json":
        raise InvalidRequest(f"response_format: {shown(response_format)} can't be streamed; b64_json can")
    if values.pop("background", "auto") not in BACKGROUNDS:
        raise InvalidRequest(
            f"background: {shown(raw['background'])} can't be used: no model here draws transparency; "
            f"use one of {', '.join(BACKGROUNDS)}"
        )
    ignored = sorted(name for name in IGNORED & values.keys() - schema.parameters.keys())
    for name, reason in REFUSED.items():
        if name in values and name not in schema.parameters:
            raise InvalidRequest(f"{name}: can't be used: {reason}")
    ignored += _compression(values, schema)
    fields = {name: value for name, value in values.items() if name not in ignored}
    return Asked(fields, pictures, response_format, stream, tuple(ignored))


def split(raw: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """The fields that are given, and the pictures among them, which `names` may hold. `model` and a `size` of "auto"
    say nothing about the picture."""
    given = {name: value for name, value in raw.items() if value is not None and value != "" and name != "model"}
    pictures: list[tuple[str, Any]] = []
    for name in names:
        if name in given:
            value = given.pop(name)
            pictures += [(name, item) for item in (value if isinstance(value, list) else [value])]
    for name, value in given.items():
        if isinstance(value, str | bytes) and len(value) > MAX_TEXT:
            told = name if re.fullmatch(r"\w{1,80}", name) else shown(name)
            raise InvalidRequest(f"{told}: {len(value)} characters; at most {MAX_TEXT} fit")
    if given.get("size") == "auto":
        del given["size"]
    return given, tuple(pictures)


def typed(values: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """A form's text as the numbers and booleans that the fields want; what is none stays text, for the checker to
    refuse."""
    kinds = {name: parameter.kind for name, parameter in (COMMON | dict(schema.parameters)).items()}
    kinds |= {"stream": "boolean", "output_compression": "integer"}
    return {name: as_number(kinds.get(ALIASES.get(name, name), ""), value) for name, value in values.items()}


def as_number(kind: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    if kind == "boolean":
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), value)
    if len(text) > 40:
        return value
    if kind == "integer" and re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        return int(text)
    if kind in ("integer", "number") and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return float(text)
    return value


def chosen(values: dict[str, Any], name: str, choices: tuple[str, ...]) -> str:
    """Take the field `name` out of `values`; the first of `choices` where it isn't given."""
    value = values.pop(name, choices[0])
    if value not in choices:
        raise InvalidRequest(f"{name}: {shown(value)} is not one of {', '.join(choices)}")
    return str(value)


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.pop(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: {shown(value)} is not true or false")
    return value


def _compression(values: dict[str, Any], schema: Schema) -> list[str]:
    """OpenAI's output_compression, 0 to 100, is the quality of a lossy format; of PNG it's ignored."""
    value = values.get("output_compression")
    if value is None:
        return []
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 100:
        raise InvalidRequest(f"output_compression: {shown(value)} is not an integer from 0 to 100")
    if values.get("output_format", schema.parameters["output_format"].default) == "png":
        return ["output_compression"]
    quality = max(1, values.pop("output_compression"))
    if values.setdefault("output_quality", quality) != quality:
        raise InvalidRequest(
            f"output_quality: {shown(values['output_quality'])} contradicts output_compression: {value}; "
            "give one of them"
        )
    return []


def source(name: str, value: Any) -> tuple[bool, Any]:
    """One picture: (True, URL) for one to fetch, else (False, bytes or text). Raises InvalidRequest."""
    if isinstance(value, str) and value.lstrip()[:1] == "{":  # an object in a form's text
        value = parse(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        inner = value.get("image_url", value.get("url"))
        if isinstance(inner, dict):
            inner = inner.get("url")
        if not isinstance(inner, str) or "file_id" in value:
            raise InvalidRequest(
                f'{name}: {shown(value)} is not like {{"image_url": "data:image/png;base64,…"}}; no files are kept here'
            )
        value = inner
    if isinstance(value, str) and re.match(r"(?i)\s*https?:", value):
        return True, value.strip()
    return False, value


# --- results to wire


def encode_images(
    results: Sequence[GenerationResult], envelope: Mapping[str, Any], identity: str, created: float, urls: list[str]
) -> dict[str, Any]:
    """OpenAI's ImagesResponse, with what else is known of the result. `urls` replace the pictures where there are
    any. `envelope`: model and ignored."""
    (result,) = results
    told = describe(result)
    data: list[dict[str, Any]] = [
        {**({"url": urls[i]} if urls else {"b64_json": Base64(item.data)}), "seed": item.seed}
        for i, item in enumerate(result.media)
    ]
    return {
        "id": identity,
        "created": int(created),
        "model": envelope["model"],
        "data": data,
        "background": "opaque",
        "output_format": result.media[0].format,
        "size": f"{told['width']}x{told['height']}",
        "usage": usage(result),
        **told,
        "ignored": list(envelope["ignored"]),
    }


def usage(result: GenerationResult) -> dict[str, Any]:
    """OpenAI's counts of tokens: nothing here is billed by them, so they are zero; clients add them up."""
    details = {"image_tokens": 0, "text_tokens": 0}
    return {
        "input_tokens": 0,
        "input_tokens_details": details,
        "output_tokens": 0,
        "output_tokens_details": details,
        "total_tokens": 0,
        "image_count": len(result.media),
    }


def completed_event(
    result: GenerationResult, item: GeneratedMedia, index: int, envelope: Mapping[str, Any], created: float
) -> dict[str, Any]:
    """The last event of one streamed picture."""
    return {
        "type": f"{event_name(envelope)}.completed",
        "created_at": int(created),
        "b64_json": Base64(item.data),
        "index": index,
        "background": "opaque",
        "quality": "auto",
        "output_format": item.format,
        "size": f"{item.width}x{item.height}",
        "usage": usage(result),
        **describe(result),
        "seed": item.seed,
        "model": envelope["model"],
        "ignored": list(envelope["ignored"]),
    }


def event_name(envelope: Mapping[str, Any]) -> str:
    return "image_edit" if envelope["edit"] else "image_generation"


def encode_model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "diffusion-runtime"}


def encode_estimate(estimate: Estimate, envelope: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a dry run."""
    request = estimate.request
    size = {"size": f"{request.width}x{request.height}"}
    return {"model": envelope["model"], "data": [], **size, **estimated(estimate), "ignored": list(envelope["ignored"])}

"""From the fields of one request to a GenerationRequest, for the model that is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any

from PIL import Image

from runtime.errors import InvalidRequest, StartupError, shown
from runtime.families.base import IMAGE_FORMATS, VIDEO_FORMATS, Limits, Schema, check, normalise, parameter, within
from runtime.families.registry import request_half
from runtime.media import read_image
from runtime.types import DEFAULTS_FILE, Capabilities, GenerationRequest, SourceImage

EXCLUSIVE = (("seconds", "num_frames"), ("num_frames", "seconds"))
MAX_DRAWN_SEED = 2**32  # drawn seeds stay exact in a client whose numbers are doubles


def warmup_request(capabilities: Capabilities, limits: Limits, width: int, height: int) -> GenerationRequest:
    """A request of one step and this size. Raises StartupError for a size that no request may ask for."""
    checker, source = RequestChecker(capabilities, limits), BytesIO()
    Image.new("RGB", (64, 64)).save(source, "PNG")
    parameters = checker.schema.parameters
    pictures = {name: source.getvalue() for name in ("image",) if name in parameters and parameters[name].required}
    size = {"prompt": "warm-up", "seed": 0, "n": 1, "width": width, "height": height, "num_inference_steps": 1}
    try:
        return checker.complete(checker.check({**size, **pictures}))
    except InvalidRequest as error:
        raise StartupError(f"WARMUP_SIZES {width}x{height}: {error}") from error


class RequestChecker:
    """Checks requests against the loaded model. `check` is cheap; `complete` decodes pictures: run it in a thread."""

    def __init__(self, capabilities: Capabilities, limits: Limits) -> None:
        self._half = request_half(capabilities.family)
        self._limits = limits
        self._rules = (capabilities.facts, limits)
        self.media = capabilities.media
        self.schema = self._with_defaults(self._half.schema(*self._rules), capabilities, limits)
        self._probe(bool(capabilities.defaults))

    @staticmethod
    def _with_defaults(schema: Schema, capabilities: Capabilities, limits: Limits) -> Schema:
        """`schema` with the fields of every model, the model folder's own defaults, and defaults within the limits.

        Raises StartupError for a folder's default that does not fit.
        """
        formats = VIDEO_FORMATS if capabilities.media == "video" else IMAGE_FORMATS
        parameters = {
            **schema.parameters,
            "seed": parameter("seed"),
            "output_format": parameter("output_format", choices=formats, default=formats[0]),
            "timeout": parameter("timeout", maximum=limits.max_timeout),
            "dry_run": parameter("dry_run"),
            "output_quality": parameter("output_quality"),
        }
        try:
            own = normalise(capabilities.defaults)
            if "image" in own:
                raise InvalidRequest("image: a picture cannot be a default")
            optional = Schema({name: replace(p, required=False) for name, p in parameters.items()}, schema.refused)
            values = check(optional, own)
        except InvalidRequest as error:
            raise StartupError(f"{DEFAULTS_FILE}: {error}") from error
        for name, rival in EXCLUSIVE:
            if name in own and rival not in own and rival in parameters:
                parameters[rival] = replace(parameters[rival], default=None)
        for name in own:
            parameters[name] = replace(parameters[name], default=values[name], required=False)
        return Schema({name: replace(p, default=within(p)) for name, p in parameters.items()}, schema.refused)

    def _probe(self, folder_has_defaults: bool) -> None:
        """Raises StartupError where the folder's defaults or the operator's limits make every request fail."""
        needs = {name: "x" for name in ("prompt", "image") if name in self.schema.parameters}
        try:
            values = self.check({name: value for name, value in needs.items() if self.schema.parameters[name].required})
            self.draft(values)
        except InvalidRequest as error:
            blamed = DEFAULTS_FILE if folder_has_defaults else "with these limits no request can be served"
            raise StartupError(f"{blamed}: {error}") from error

    def check(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The request's values, typed and in range, defaults filled in; pictures still encoded.

        `given` names the fields that the request itself has: a family's rules let a default yield, not a request.
        """
        given = normalise(raw)
        values = check(self.schema, given)
        for name, rival in EXCLUSIVE:  # what the request says wins over a default that contradicts it
            if name in given and rival not in given and rival in values:
                values[rival] = None
        quality, output_format = values["output_quality"], values["output_format"]
        if output_format == "png" and quality is not None:
            if "output_quality" not in given:
                values["output_quality"] = None
            else:
                raise InvalidRequest(
                    f"output_quality: {quality} has no effect: png is lossless; jpeg and webp have a quality"
                )
        if values["seed"] is None:
            values["seed"] = secrets.randbelow(MAX_DRAWN_SEED)
        last = values["seed"] + values["n"] - 1
        if last > (self.schema.parameters["seed"].maximum or last):
            raise InvalidRequest(f"seed: {values['seed']} plus n - 1 = {values['n'] - 1} is more than 2^63 - 1")
        if "image" in values:
            values["images"] = self._listed(values.pop("image"))
        return {**values, "given": frozenset(given)}

    def _listed(self, given: Any) -> list[Any]:
        pictures = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
        most = self.schema.parameters["image"].max_items
        if len(pictures) > most:
            raise InvalidRequest(f"image: {len(pictures)} pictures; this model takes at most {most}")
        for i, picture in enumerate(pictures):
            if not isinstance(picture, str | bytes) or not picture:
                raise InvalidRequest(f"image[{i}]: {shown(picture)} is not {self.schema.parameters['image'].fits()}")
        return pictures

    def draft(self, values: dict[str, Any]) -> GenerationRequest:
        """What `complete` gives, with stand-ins for the source pictures: cheap, and enough to predict the cost."""
        return self._completed(values, tuple(SourceImage(512, 512, b"") for _ in values.get("images") or ()))

    def batch_key(self, request: GenerationRequest) -> GenerationRequest | None:
        """Requests with equal keys may run together; None runs alone."""
        key: GenerationRequest | None = self._half.batch_key(request, self._rules[0])
        return key

    def complete(self, values: dict[str, Any]) -> GenerationRequest:
        """Decode the pictures and apply the family's rules between fields."""
        pictures = values.get("images") or []
        images: tuple[SourceImage, ...] = tuple(
            read_image(
                picture,
                field="image" if len(pictures) == 1 else f"image[{i}]",
                max_bytes=self._limits.max_source_image_bytes,
                max_pixels=self._limits.max_source_image_pixels,
            )
            for i, picture in enumerate(pictures)
        )
        return self._completed(values, images)

    def _completed(self, values: dict[str, Any], images: tuple[SourceImage, ...]) -> GenerationRequest:
        own = {name: value for name, value in values.items() if name not in ("timeout", "dry_run")}
        request: GenerationRequest = self._half.complete({**own, "images": images}, *self._rules)
        return request

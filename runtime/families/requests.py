"""From the fields of one request to a GenerationRequest, for the model that is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from runtime.errors import InvalidRequest, StartupError, shown
from runtime.families.base import IMAGE_FORMATS, VIDEO_FORMATS, Limits, Schema, check, normalise, parameter
from runtime.families.registry import request_half
from runtime.media import read_image
from runtime.types import Capabilities, GenerationRequest, SourceImage

MAX_DRAWN_SEED = 2**32  # drawn seeds stay exact in a client whose numbers are doubles


class RequestChecker:
    """Checks requests against the loaded model. `check` is cheap; `complete` decodes pictures: run it in a thread."""

    def __init__(self, capabilities: Capabilities, limits: Limits) -> None:
        self._half = request_half(capabilities.family)
        self._facts = capabilities.facts
        self._limits = limits
        self.media = capabilities.media
        self.schema = self._with_defaults(self._half.schema(self._facts, limits), capabilities)

    @staticmethod
    def _with_defaults(schema: Schema, capabilities: Capabilities) -> Schema:
        """`schema` with the model folder's own defaults. Raises StartupError for one that does not fit."""
        from dataclasses import replace

        formats = VIDEO_FORMATS if capabilities.media == "video" else IMAGE_FORMATS
        parameters = {
            **schema.parameters,
            "seed": parameter("seed"),
            "output_format": parameter("output_format", choices=formats, default=formats[0]),
            "output_quality": parameter("output_quality"),
        }
        try:
            probe = Schema({k: replace(p, required=False) for k, p in parameters.items()}, schema.refused)
            defaults = check(probe, normalise(capabilities.defaults))
        except InvalidRequest as error:
            raise StartupError(f"generation_defaults.json: {error}") from error
        for name in normalise(capabilities.defaults):
            parameters[name] = replace(parameters[name], default=defaults[name])
        return Schema(parameters, schema.refused)

    def check(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The request's values, typed and in range, defaults filled in; pictures still encoded."""
        values = check(self.schema, normalise(raw))
        quality, output_format = values["output_quality"], values["output_format"]
        if quality is not None and output_format == "png":
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
        return values

    def _listed(self, given: Any) -> list[Any]:
        pictures = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
        most = self.schema.parameters["image"].max_items
        if len(pictures) > most:
            raise InvalidRequest(f"image: {len(pictures)} pictures; this model takes at most {most}")
        for i, picture in enumerate(pictures):
            if not isinstance(picture, str | bytes) or not picture:
                raise InvalidRequest(f"image[{i}]: {shown(picture)} is not {self.schema.parameters['image'].fits()}")
        return pictures

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
        request: GenerationRequest = self._half.complete({**values, "images": images}, self._facts, self._limits)
        return request

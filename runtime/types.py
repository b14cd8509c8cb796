"""The values that travel through the runtime. Frozen, picklable, free of torch and kserve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Scalar = str | int | float | bool
Media = Literal["image", "video"]

# In a model folder, a JSON object: the defaults of requests to that model.
DEFAULTS_FILE = "generation_defaults.json"


@dataclass(frozen=True, slots=True)
class SourceImage:
    """A decoded source picture: `rgb` holds height x width x 3 bytes, row by row."""

    width: int
    height: int
    rgb: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One checked request: every field a pipeline needs is filled in and legal for the loaded model.

    `width`, `height` are pixels; `fps` frames a second; picture i of `n` is drawn with `seed + i`.
    A field is None where the model or the mode has no such thing. `extra` holds what only the
    generic family takes: further scalar arguments of the pipeline's own `__call__`.
    """

    prompt: str
    width: int
    height: int
    num_inference_steps: int
    seed: int
    n: int
    output_format: str
    output_quality: int | None = None
    negative_prompt: str | None = None
    images: tuple[SourceImage, ...] = ()
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    num_frames: int | None = None
    fps: int | None = None
    max_sequence_length: int | None = None
    extra: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.n))


@dataclass(frozen=True, slots=True)
class GeneratedMedia:
    """One encoded picture or video. `format` is png, jpeg, webp or mp4."""

    data: bytes = field(repr=False)
    format: str
    width: int
    height: int
    seed: int
    num_frames: int | None = None
    fps: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What a request gave. `timings` maps a stage's name to seconds.

    `engine_variant` names what else, beside the seed, may decide the bytes: device, dtype, library
    versions and lossy options. `batched` is how many pictures were drawn in one pass, of this request and of others;
    `costs` is this request's own part of the device's seconds.
    """

    request: GenerationRequest
    media: tuple[GeneratedMedia, ...]
    timings: Mapping[str, float]
    engine_variant: str
    model_revision: str
    batched: int = 1
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a dry run gives: predicted seconds on the device, and until the device would be free for it."""

    request: GenerationRequest
    seconds: float
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is: `step` of `total` in `stage` (tokens, denoise, decode, encode)."""

    stage: str
    step: int
    total: int


@dataclass(frozen=True, slots=True)
class Acceleration:
    """What is fixed at the start and may change a picture's bits: the attention's kernel, the number format that the
    weights of the token stage and of the denoiser are read in, and the rows of a batch."""

    attention: str = "auto"
    token_weights: str = "plain"
    denoiser_weights: str = "plain"
    rows: int = 1


PLAIN = Acceleration()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the engine tells the server once the model is loaded. `source` is where it came from, without secrets,
    `model_bytes` the size of its weights as loaded.

    `facts` are JSON values that the family's request half turns into limits and defaults;
    `defaults` come from the model folder's `generation_defaults.json`, where there is one.
    """

    family: str
    pipeline_class: str
    media: Media
    facts: Mapping[str, Any]
    defaults: Mapping[str, Any]
    source: str
    model_bytes: int
    model_revision: str
    device: str
    dtypes: Mapping[str, str]
    optimizations: Mapping[str, str]
    engine_variant: str

"""What a job is: the values that the stores keep and the routes tell. Frozen, JSON all through, free of torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import orjson

from runtime.types import GeneratedMedia, GenerationRequest, GenerationResult

Status = Literal["queued", "in_progress", "completed", "failed"]  # the OpenAI SDK's literals
CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}
LONG = 64 * 2**10  # bytes of a value in a row that is a picture rather than a parameter
MAX_ATTEMPTS = 2  # a job whose server died under it is run once more


@dataclass(frozen=True, slots=True)
class JobRequest:
    """All that any process needs to run a job, now or after a restart.

    `api` says which protocol asked ("images", "videos", "v1", "v2"), `rows` holds the fields of each prompt as
    `RequestChecker.check` takes them, seeds fixed and pictures in base64; `envelope` what else the protocol's encoder
    needs. `created` is in seconds since 1970. `key` is a digest of credential and idempotency key, or empty;
    `fingerprint` a digest of the body that came with it.
    """

    id: str
    api: str
    created: float
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)
    envelope: Mapping[str, Any] = field(default_factory=dict, repr=False)
    key: str = ""
    fingerprint: str = ""

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> JobRequest:
        values = orjson.loads(text)
        return cls(**{**values, "rows": tuple(values["rows"])})


@dataclass(frozen=True, slots=True)
class StoredMedia:
    """One picture or video of a finished job: `key` is its name in the result store, `size` its bytes."""

    key: str
    size: int
    format: str
    width: int
    height: int
    seed: int
    num_frames: int | None = None
    fps: int | None = None

    @property
    def content_type(self) -> str:
        return CONTENT_TYPES[self.format]


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A GenerationResult whose media lie in the result store."""

    request: Mapping[str, Any] = field(repr=False)  # GenerationRequest without its pictures
    media: tuple[StoredMedia, ...]
    timings: Mapping[str, float]
    engine_variant: str
    model_revision: str
    batched: int = 1

    @classmethod
    def of(cls, result: GenerationResult, keys: list[str]) -> StoredResult:
        """`keys`: where each of the result's media was put."""
        request = {f.name: getattr(result.request, f.name) for f in fields(GenerationRequest) if f.name != "images"}
        media = tuple(
            StoredMedia(key, len(m.data), m.format, m.width, m.height, m.seed, m.num_frames, m.fps)
            for key, m in zip(keys, result.media, strict=True)
        )
        return cls(request, media, dict(result.timings), result.engine_variant, result.model_revision, result.batched)

    def restored(self, data: list[bytes]) -> GenerationResult:
        """The result again, without its source pictures; `data` holds the media's bytes, in order."""
        media = tuple(
            GeneratedMedia(content, m.format, m.width, m.height, m.seed, m.num_frames, m.fps)
            for content, m in zip(data, self.media, strict=True)
        )
        request = GenerationRequest(**self.request)
        return GenerationResult(request, media, self.timings, self.engine_variant, self.model_revision, self.batched)


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: `code` in snake case ("cancelled", "out_of_memory", …), the message a client may read, and the
    HTTP status that the same error has on a synchronous route."""

    code: str
    message: str
    http_status: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended, at `ended` seconds since 1970: either results, one for each row, or an error."""

    ended: float
    results: tuple[StoredResult, ...] = ()
    error: JobError | None = None

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Outcome:
        values = orjson.loads(text)
        results = tuple(
            StoredResult(**{**r, "media": tuple(StoredMedia(**m) for m in r["media"])}) for r in values["results"]
        )
        return cls(values["ended"], results, JobError(**values["error"]) if values["error"] else None)

    @property
    def media(self) -> list[StoredMedia]:
        return [item for result in self.results for item in result.media]


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is. `fraction` goes from 0 to 1 and never back; `eta` is predicted seconds until its end."""

    status: Status = "queued"
    fraction: float = 0.0
    eta: float | None = None
    stage: str | None = None
    step: int | None = None
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as a store knows it. `attempts` counts the runs that were begun, `started` is when the last one was
    (seconds since 1970). `available` is False once the results have expired or made room for others."""

    request: JobRequest
    attempts: int = 0
    started: float | None = None
    progress: JobProgress = JobProgress()
    outcome: Outcome | None = None
    available: bool = True

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def status(self) -> Status:
        if self.outcome is not None:
            return "failed" if self.outcome.error else "completed"
        return self.progress.status

    def told(self, progress: JobProgress) -> Job:
        return replace(self, progress=progress)


def cancelled() -> Outcome:
    """The outcome of a job that was cancelled while nobody had it."""
    return Outcome(time.time(), error=JobError("cancelled", "the job was cancelled", 499))


def server_died() -> Outcome:
    """The outcome of a job whose attempts are used up."""
    message = "the server ended while it ran this job, and ended again when it was run once more"
    return Outcome(time.time(), error=JobError("server_died", message, 500))


def progress_of(outcome: Outcome) -> JobProgress:
    return JobProgress("failed") if outcome.error else JobProgress("completed", 1.0, 0.0)


def brief(request: JobRequest) -> JobRequest:
    """The request without the long values of its rows: its source pictures. It itself where it has none."""
    if all(_length(value) <= LONG for row in request.rows for value in row.values()):
        return request
    return replace(request, rows=tuple(_without_long(row) for row in request.rows))


def _without_long(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if _length(value) <= LONG}


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list | tuple) else 0

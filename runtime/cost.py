"""How many seconds a request will hold the device: a small model that learns from finished requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.types import GenerationRequest

KEEP = 64  # finished requests that the fits look back on
DEVICE_STAGES = ("prepare", "tokens", "denoise", "decode")  # encoding runs beside the next request


def area(request: GenerationRequest) -> float:
    """Pixels of one result, all frames counted."""
    return float(request.width * request.height * (request.num_frames or 1))


def steps(request: GenerationRequest) -> float:
    return float(request.num_inference_steps)


@dataclass
class Line:
    """seconds ≈ fixed + rate x units, both at least 0, by least squares over the last samples."""

    samples: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEEP))

    def add(self, units: float, seconds: float) -> None:
        self.samples.append((units, seconds))

    def at(self, units: float) -> float:
        """0 without samples. With one size alone all of it is taken as fixed: better too little than too much,
        as a small warm-up says nothing of a large picture."""
        if not self.samples:
            return 0.0
        count = len(self.samples)
        mean_x = sum(x for x, _ in self.samples) / count
        mean_y = sum(y for _, y in self.samples) / count
        spread = sum((x - mean_x) ** 2 for x, _ in self.samples)
        rate = sum((x - mean_x) * (y - mean_y) for x, y in self.samples) / spread if spread else 0.0
        if rate <= 0:
            return mean_y
        fixed = mean_y - rate * mean_x
        if fixed < 0:  # through the origin instead
            return units * sum(x * y for x, y in self.samples) / sum(x * x for x, _ in self.samples)
        return fixed + rate * units


class CostModel:
    """Predicts device seconds from size, frames, steps and n; a shape seen before is predicted from itself."""

    def __init__(self) -> None:
        self._lines = {stage: Line() for stage in DEVICE_STAGES}
        self._seen: dict[tuple[int, ...], dict[str, float]] = {}

    def learn(self, request: GenerationRequest, timings: Mapping[str, float]) -> None:
        """Take in a finished request; `timings` are seconds by stage for all of its n results."""
        each = {stage: timings.get(stage, 0.0) / request.n for stage in DEVICE_STAGES}
        each["denoise"] /= steps(request)
        for stage, seconds in each.items():
            self._lines[stage].add(area(request), seconds)
        before = self._seen.get(_shape(request), each)
        self._seen[_shape(request)] = {stage: (before[stage] + each[stage]) / 2 for stage in each}
        while len(self._seen) > KEEP:
            del self._seen[next(iter(self._seen))]

    def stages(self, request: GenerationRequest) -> dict[str, float]:
        """Seconds on the device of one picture or video, by stage, in their order; 0 while nothing is known."""
        each = self._seen.get(_shape(request)) or {s: line.at(area(request)) for s, line in self._lines.items()}
        return {stage: seconds * (steps(request) if stage == "denoise" else 1) for stage, seconds in each.items()}

    def predict(self, request: GenerationRequest) -> float:
        """Seconds on the device; 0 while nothing is known."""
        return sum(self.stages(request).values()) * request.n

    def step(self, request: GenerationRequest) -> float:
        """Seconds between two signs of life of a request at work."""
        return self.predict(request) / (request.n * request.num_inference_steps)


def _shape(request: GenerationRequest) -> tuple[int, ...]:
    guided = int(bool(request.guidance_scale and request.guidance_scale > 1))
    return (request.width, request.height, request.num_frames or 1, len(request.images), guided)

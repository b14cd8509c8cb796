"""The cost model: what it predicts from nothing, from a warm-up, from shapes seen and from other shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.cost import CostModel, Line
from runtime.types import GenerationRequest

SMALL = GenerationRequest("a fox", 64, 64, num_inference_steps=1, seed=0, n=1, output_format="png", guidance_scale=5.0)


def timings(request: GenerationRequest, per_pixel_step: float, fixed_step: float = 0.0) -> dict[str, float]:
    """Seconds of a machine whose steps cost so much a pixel, and as much again once for decoding."""
    pixels = request.width * request.height * (request.num_frames or 1)
    step = fixed_step + per_pixel_step * pixels
    return {
        "prepare": 0.1 * request.n,
        "denoise": step * request.num_inference_steps * request.n,
        "decode": per_pixel_step * pixels * request.n,
        "encode": 9.0,  # not on the device
        "total": 99.0,
    }


def true_seconds(request: GenerationRequest, per_pixel_step: float, fixed_step: float = 0.0) -> float:
    return sum(v for k, v in timings(request, per_pixel_step, fixed_step).items() if k not in ("encode", "total"))


def test_nothing_is_known_at_first() -> None:
    assert CostModel().predict(SMALL) == 0.0


def test_a_shape_that_was_seen_is_predicted_from_itself() -> None:
    model = CostModel()
    seen = replace(SMALL, width=1024, height=1024, num_inference_steps=20)
    model.learn(seen, timings(seen, 1e-7))
    for asked in (seen, replace(seen, num_inference_steps=50), replace(seen, n=4), replace(seen, seed=9)):
        assert model.predict(asked) == pytest.approx(true_seconds(asked, 1e-7), rel=1e-6)


def test_a_warm_up_alone_promises_too_little_rather_than_too_much() -> None:
    model = CostModel()
    model.learn(SMALL, timings(SMALL, 1e-7, fixed_step=0.02))
    large = replace(SMALL, width=1024, height=1024, num_inference_steps=50)
    assert 0 < model.predict(large) <= true_seconds(large, 1e-7, fixed_step=0.02)


def test_other_sizes_follow_from_two_that_were_seen() -> None:
    model = CostModel()
    for side in (64, 512):
        seen = replace(SMALL, width=side, height=side, num_inference_steps=10)
        model.learn(seen, timings(seen, 1e-7, fixed_step=0.02))
    for width, height, steps, n in ((1024, 1024, 50, 1), (256, 512, 8, 3), (2048, 512, 30, 1)):
        asked = replace(SMALL, width=width, height=height, num_inference_steps=steps, n=n)
        assert model.predict(asked) == pytest.approx(true_seconds(asked, 1e-7, fixed_step=0.02), rel=0.01)


def test_a_change_of_speed_is_followed() -> None:
    model = CostModel()
    for speed in (1e-7,) * 3 + (2e-7,) * 8:
        model.learn(SMALL, timings(SMALL, speed))
    assert model.predict(SMALL) == pytest.approx(true_seconds(SMALL, 2e-7), rel=0.05)


def test_frames_count() -> None:
    model = CostModel()
    for frames in (5, 21):
        seen = replace(SMALL, num_frames=frames, num_inference_steps=4)
        model.learn(seen, timings(seen, 1e-7))
    asked = replace(SMALL, num_frames=81, num_inference_steps=4)
    assert model.predict(asked) == pytest.approx(true_seconds(asked, 1e-7), rel=0.01)


@pytest.mark.parametrize(
    ("samples", "units", "seconds"),
    [
        ([], 10, 0.0),
        ([(10, 2.0)], 10, 2.0),
        ([(10, 2.0)], 1000, 2.0),
        ([(10, 2.0), (10, 4.0)], 99, 3.0),
        ([(10, 2.0), (20, 3.0)], 40, 5.0),
        ([(10, 3.0), (20, 1.0)], 40, 2.0),  # a falling line is noise: the mean
        ([(10, 1.0), (20, 4.0)], 20, 3.6),  # a negative start: through the origin
    ],
)
def test_lines(samples: list[tuple[float, float]], units: float, seconds: float) -> None:
    line = Line()
    for sample in samples:
        line.add(*sample)
    assert line.at(units) == pytest.approx(seconds)

"""How many seconds a job at work has left, by its own speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import wraps

import pytest

from runtime.scheduler import Job
from runtime.types import GenerationRequest, Progress

REQUEST = GenerationRequest("a fox", 1024, 1024, 50, seed=0, n=1, output_format="png")


def job(cost: float, started: float, pictures: int = 1) -> Job:
    made = Job(REQUEST, "id", "id", asyncio.get_running_loop().create_future(), cost, None)
    made.started, made.batch_pictures = time.monotonic() - started, pictures
    return made


def on_a_loop(test: Callable[[], None]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        async def body() -> None:
            test()

        asyncio.run(body())

    return run


@on_a_loop
def test_before_its_pictures_a_job_waits_for_all_of_its_pass() -> None:
    assert job(10, 5).left() == pytest.approx(5, abs=0.5)
    assert job(10, 5, pictures=8).left() == pytest.approx(75, abs=0.5)


@on_a_loop
def test_a_picture_of_a_pass_is_measured_from_its_own_first_step() -> None:
    """The last of eight: 76 s of tokens and of others' pictures lie behind it, which say nothing of its own speed."""
    last = job(10.6, 76, pictures=8)
    last.progress, last.fraction = Progress("denoise", 1, 50), 0.1
    last.advanced = time.monotonic()
    last.paced = (last.advanced, 0.1)
    assert last.left() == pytest.approx(0.9 * 10.6, abs=0.5), "nothing but the prediction yet"
    last.paced, last.fraction = (last.advanced - 5, 0.1), 0.55
    assert last.left() == pytest.approx(5, abs=0.5)
    last.fraction = 1.0
    assert last.left() == 0

"""A job while this process has it: what runs for it, how far it is, and why it is being stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from runtime.jobs.record import Job, JobProgress, JobRequest
from runtime.metrics import Count

if TYPE_CHECKING:
    from runtime import scheduler

ALMOST = 0.99  # of the progress until the results are kept


@dataclass(eq=False)
class Active:
    """`prompts` are the scheduler's jobs, one for each row; none while it waits for the model. `eta` predicts the
    seconds until one of them is done."""

    request: JobRequest
    eta: Callable[[scheduler.Job], float] = field(repr=False)
    attempts: int = 0
    prompts: list[scheduler.Job] = field(default_factory=list, repr=False)
    started: float | None = None
    stop: Literal["", "cancelled", "lost", "stopping"] = ""  # the last: with the server
    task: asyncio.Task[None] | None = None
    counted: asyncio.Task[None] | None = None  # keeps that an attempt was begun
    count: Count = field(default_factory=Count, repr=False)
    furthest: float = 0.0

    def view(self) -> Job:
        return Job(self.request, self.attempts, self.started, self.progress())

    def progress(self) -> JobProgress:
        if not self.prompts:
            return JobProgress()
        total = sum(job.cost for job in self.prompts) or float(len(self.prompts))
        done = sum((1.0 if job.ended else job.fraction) * (job.cost or 1.0) for job in self.prompts)
        self.furthest = max(self.furthest, min(ALMOST, done / total))  # a run once more begins behind it
        left = [job for job in self.prompts if not job.ended]
        step = next((job.progress for job in left if job.started), None)
        return JobProgress(
            "queued" if self.started is None else "in_progress",
            self.furthest,
            round(max(map(self.eta, left), default=0.0), 3),
            step.stage if step else None,
            step.step if step else None,
            step.total if step else None,
        )

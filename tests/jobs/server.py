"""`python -m tests.jobs.server`: a process that opens the stores its environment names and does as it is told.

It reads a JSON list a line, [method, arguments…], and answers each with a line. Ends with the runtime's line on stderr
and status 1 where the stores cannot be opened.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from runtime import settings
from runtime.errors import StartupError
from runtime.jobs.ids import new_id
from runtime.jobs.open import open_stores
from runtime.jobs.record import JobProgress, JobRequest, Outcome
from runtime.jobs.store import JobStore, Lifetimes, ResultStore, Unavailable


def answer(jobs: JobStore, results: ResultStore, method: str, *arguments: Any) -> Any:
    match method:
        case "create":
            job = JobRequest(new_id("videos"), "videos", time.time(), ({"prompt": arguments[0], "seed": 7},))
            jobs.create(job)
            return job.id
        case "take":
            return [request.id for request in jobs.take()]
        case "start":
            return jobs.start(*arguments)
        case "beat":
            return jobs.beat(
                {job_id: JobProgress("in_progress", fraction) for job_id, fraction in arguments[0].items()}
            )
        case "finish":
            return jobs.finish(arguments[0], Outcome(time.time()))
        case "put":
            return results.put(arguments[0], b"x" * arguments[1], "image/png", {})
        case "release":
            return jobs.release()
    raise ValueError(method)


if __name__ == "__main__":
    chosen = settings.load([])
    lifetimes = Lifetimes(600, 3600, 7200, 2**30)
    try:
        stores = open_stores(chosen.data_dir, chosen.output_uri, chosen.storage, lifetimes, float(sys.argv[1]))
    except StartupError as error:
        print(f"diffusion-runtime: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            told = answer(*stores, *json.loads(line))
        except Unavailable as error:
            told = {"unavailable": str(error)}
        print(json.dumps(told), flush=True)
    stores[0].close()

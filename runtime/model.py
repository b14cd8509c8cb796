"""The model as KServe sees it: a `kserve.Model` whose work happens in the engine process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
from kserve import InferRequest, InferResponse, Model
from kserve.model_repository import ModelRepository

from runtime import metrics
from runtime.engine.client import READY, UNLOADED, EngineClient, fatal
from runtime.errors import InvalidRequest, ModelNotFound, NotImplementedHere, NotReady, StartupError, shown
from runtime.families.requests import RequestChecker
from runtime.idempotency import Idempotency, digest, key_of
from runtime.jobs.manager import Jobs
from runtime.jobs.open import open_stores
from runtime.logs import credential, log, request_id
from runtime.metrics import Count
from runtime.protocol import v1, v2
from runtime.scheduler import Job, Scheduler
from runtime.settings import Settings
from runtime.types import Estimate, GenerationRequest, GenerationResult


@dataclass(frozen=True)
class Checked:
    """Rows that were checked; their pictures are not decoded yet. `timeout` is in seconds, infinity where none is
    asked for."""

    checker: RequestChecker
    values: list[dict[str, Any]]
    drafts: list[GenerationRequest]
    costs: list[float]
    label: str
    timeout: float
    dry_run: bool

    async def complete(self) -> list[GenerationRequest]:
        """The requests, pictures decoded. Raises InvalidRequest."""
        if not any(values.get("images") for values in self.values):
            return self.drafts
        return await asyncio.to_thread(
            lambda: [_named(self.label, i, self.checker.complete, values) for i, values in enumerate(self.values)]
        )


MAX_ENGINE_FAILURES = 3  # in a row; then the process ends and Kubernetes takes over
SOUND_SECONDS = 60.0  # an engine that served so long begins a new row
BACKOFF_SECONDS = 1.0  # before the first restart of a dead engine; doubles with each


def deaths_in_a_row(before: int, served: float) -> int:
    """With that of an engine that has `served` so many seconds."""
    return 1 if served > SOUND_SECONDS else before + 1


class DiffusionModel(Model):  # type: ignore[misc]
    """One diffusers pipeline behind v1 and v2. Ready exactly while its engine is."""

    def __init__(self, settings: Settings, engine: EngineClient, scheduler: Scheduler) -> None:
        super().__init__(settings.model_name)
        self.settings = settings
        self.engine = engine
        self.scheduler = scheduler
        self._checker: RequestChecker | None = None
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._idempotency = Idempotency(settings.idempotency_hold_s)
        self.jobs = Jobs(
            self,
            lambda: open_stores(
                settings.data_dir,
                settings.output_uri,
                settings.storage,
                settings.lifetimes,
                settings.job_lease_s,
            ),
            settings.lifetimes,
            settings.job_lease_s,
            settings.log_prompts,
        )
        self._watch_metrics()

    # --- KServe's lifecycle: loading is the supervisor's; these must neither load nor claim readiness

    def load(self) -> bool:
        return self.engine.state == READY

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    async def healthy(self) -> bool:
        return (
            self.engine.state == READY
            and self._checker is not None
            and self.jobs.opened
            and not self.scheduler.draining
        )

    def describe(self) -> str:
        """Why the model is not ready, in words."""
        if self.scheduler.draining:
            return "draining: the server is shutting down"
        if self._checker is not None and not self.jobs.opened:
            return "opening the store of jobs"
        return self.engine.describe()

    async def supervise(self) -> None:
        """Keep an engine running. Raises StartupError when the model cannot be loaded or the engine keeps dying."""
        failures = 0
        while True:
            await self._wanted.wait()
            self.engine.start(restarted=failures > 0)
            if not await self._loaded():
                if self.engine.state == UNLOADED:
                    continue
                raise fatal(self.engine)
            ready_at = time.monotonic()
            capabilities = self.engine.capabilities
            assert capabilities is not None
            self._checker = RequestChecker(capabilities, self.settings.limits)
            for drawn in self.engine.warmup:
                self.scheduler.costs.learn(*drawn)
            for stage, seconds in self.engine.load_seconds.items():
                metrics.LOAD_SECONDS.labels(self.name, stage).set(seconds)
            log(
                logging.INFO,
                f"ready: {capabilities.pipeline_class} as {self.name}",
                source=capabilities.source,
                bytes=capabilities.model_bytes,
                seconds=round(time.monotonic() - self.engine.begun, 1),
                device=capabilities.device,
                dtypes=dict(capabilities.dtypes),
                revision=capabilities.model_revision,
            )
            await self.engine.wait_exited()
            self._checker = None
            if self.engine.state == UNLOADED:
                continue
            failures = deaths_in_a_row(failures, time.monotonic() - ready_at)
            metrics.RESTARTS.labels(self.name).inc()
            if failures > MAX_ENGINE_FAILURES:
                raise StartupError(f"the engine died {failures} times in a row: {self.engine.reason}")
            await asyncio.sleep(BACKOFF_SECONDS * 2 ** (failures - 1))

    async def _loaded(self) -> bool:
        """True once the engine is ready, False once it is gone."""
        waits = [asyncio.ensure_future(self.engine.ready.wait()), asyncio.ensure_future(self.engine.wait_exited())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self.engine.ready.is_set()

    async def unload_from_api(self) -> None:
        """End the engine and free its device. Raises NotImplementedHere unless ENABLE_REPOSITORY_API."""
        self._allow_repository_api()
        self._wanted.clear()
        await self.engine.stop()
        self.scheduler.abort("the model is not ready (unloaded)")

    async def load_from_api(self) -> None:
        """Start the engine and return when the model is loaded. Raises NotImplementedHere and NotReady."""
        self._allow_repository_api()
        self._wanted.set()
        await asyncio.sleep(0)  # let the supervisor start the engine
        if not await self._loaded():
            raise NotReady(f"the model could not be loaded ({self.engine.describe()})")

    def _allow_repository_api(self) -> None:
        if not self.settings.enable_repository_api:
            raise NotImplementedHere("the repository API is off; ENABLE_REPOSITORY_API=true turns it on")

    # --- requests

    def validate(self, payload: Any) -> Any:
        return payload  # KServe's own check knows less than the protocols' decoders

    async def answer(self, payload: Any, headers: Mapping[str, str], body: bytes) -> dict[str, Any] | InferResponse:
        """What `predict` gives, once for all callers with the same Idempotency-Key and the same `body`."""

        async def work() -> Any:
            return (await self(payload, headers=dict(headers)))[0]

        return await self.once(headers, body, work, payload.id if isinstance(payload, InferRequest) else None)

    async def once(
        self, headers: Mapping[str, str], body: bytes, work: Callable[[], Awaitable[Any]], identity: str | None = None
    ) -> Any:
        """What `work` gives, run once for all callers with the same Idempotency-Key and the same `body`. `identity` is
        the request's own id, which is its key where JOIN_BY_REQUEST_ID says so. Raises InvalidRequest, Conflict."""
        key = key_of(headers, self.settings.join_by_request_id, identity)
        if key is None:
            return await work()
        # A dry run is another request, though its body is the same.
        fingerprint = await digest(body) + (" dry" if _dry_run(headers) else "")
        return await self._idempotency.run((credential.get(), key), fingerprint, work)

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> dict[str, Any] | InferResponse:
        """v1: a decoded JSON body to a body whose media are `Base64`. v2: InferRequest to InferResponse."""
        if isinstance(payload, InferRequest):
            with self.counted("grpc" if payload.from_grpc else "v2") as count:
                rows, label = self.decoded(payload)
                results = await self.generate(rows, label, headers or {}, count)
            return v2.encode(results, payload, self.name, payload.id or request_id.get())
        with self.counted("v1") as count:
            rows, label = self.decoded(payload)
            results = await self.generate(rows, label, headers or {}, count)
        return v1.encode(results, self.name)

    def decoded(self, payload: Any) -> tuple[list[dict[str, Any]], str]:
        """The fields of each prompt of a v1 body or an InferRequest, and what to call a prompt in messages."""
        checker, most = self.checker, self.settings.max_instances
        if not isinstance(payload, InferRequest):
            return v1.decode(payload, most), "instances"
        v2.requested(payload, checker.media)
        rows = v2.decode(payload, checker.schema, most)
        return rows, "prompt" if len(rows) > 1 else ""

    @contextlib.contextmanager
    def counted(self, protocol: str) -> Iterator[Count]:
        """Counts the prompts of one call by how the block ends."""
        count = Count()
        try:
            yield count
        except BaseException as error:
            if count.outcome is not None:
                metrics.REQUESTS.labels(self.name, protocol, metrics.outcome(error)).inc(count.prompts)
            raise
        if count.outcome is not None:
            metrics.REQUESTS.labels(self.name, protocol, count.outcome).inc(count.prompts)

    @property
    def checker(self) -> RequestChecker:
        """What a request may say to the loaded model. Raises NotReady while there is none, and while draining."""
        if self._checker is None or self.engine.state != READY or self.scheduler.draining:
            raise NotReady(f"the model is not ready ({self.describe()})", retry_after=5)
        return self._checker

    async def generate(
        self,
        rows: list[dict[str, Any]],
        label: str,
        headers: Mapping[str, str],
        count: Count,
        watch: Callable[[list[Job]], None] = lambda jobs: None,
    ) -> list[GenerationResult] | list[Estimate]:
        """Check every row before any of them costs anything, then run them. `label` names a row in messages; `watch`
        is given the scheduler's jobs once they wait."""
        count.prompts, begun = len(rows), time.monotonic()
        checked = self.check(rows, label, headers)
        timeout = min(checked.timeout, float(self.settings.max_timeout))
        if checked.dry_run:
            count.outcome = "dry_run"
            waits = itertools.accumulate([self.scheduler.wait_seconds(), *checked.costs[:-1]])
            return [Estimate(*told) for told in zip(checked.drafts, checked.costs, waits, strict=True)]
        with self.scheduler.admit(checked.costs):
            requests = await checked.complete()
            jobs = self.enqueue(checked, requests, request_id.get(), begun + timeout)
        watch(jobs)
        return await self.finish(jobs, timeout, begun)

    def check(self, rows: list[dict[str, Any]], label: str, headers: Mapping[str, str]) -> Checked:
        """All that can be said against the rows before their pictures are decoded. Raises InvalidRequest, NotReady."""
        checker = self.checker
        values = [_named(label, i, checker.check, row) for i, row in enumerate(rows)]
        drafts = [_named(label, i, checker.draft, row) for i, row in enumerate(values)]
        return Checked(
            checker,
            values,
            drafts,
            [self.scheduler.costs.predict(draft) for draft in drafts],
            label,
            min(self._timeout(headers), *(row["timeout"] or math.inf for row in values)),
            _dry_run(headers) or any(row["dry_run"] for row in values),
        )

    def enqueue(
        self,
        checked: Checked,
        requests: list[GenerationRequest],
        identity: str,
        deadline: float = math.inf,
        on_start: Callable[[], None] = lambda: None,
    ) -> list[Job]:
        """The scheduler's jobs for what `checked.complete` gave. What was admitted runs, though the server drains."""
        return self.scheduler.enqueue(requests, identity, checked.checker.batch_key, deadline, on_start)

    async def finish(self, jobs: list[Job], seconds: float, begun: float) -> list[GenerationResult]:
        """The jobs' results, logged and counted. Raises what `Scheduler.results` raises."""
        try:
            results = await self.scheduler.results(jobs, seconds, begun)
        except BaseException as error:
            for job in jobs:
                self._log_request(job.request, metrics.outcome(error), {"total": time.monotonic() - job.admitted})
            raise
        for result in results:
            self._log_request(result.request, "ok", result.timings)
            metrics.finished(self.name, result)
        return results

    def _timeout(self, headers: Mapping[str, str]) -> float:
        """Seconds of the header X-Request-Timeout; infinity without one. Raises InvalidRequest."""
        most = float(self.settings.max_timeout)
        text = headers.get("x-request-timeout")
        if text is None:
            return math.inf
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds <= most:
            raise InvalidRequest(f"X-Request-Timeout: {shown(text)} is not a number of seconds up to {most:g}")
        return seconds

    def _log_request(self, request: GenerationRequest, outcome: str, timings: Any) -> None:
        log(
            logging.INFO,
            "request",
            outcome=outcome,
            size=f"{request.width}x{request.height}",
            frames=request.num_frames,
            steps=request.num_inference_steps,
            n=request.n,
            seed=request.seed,
            sources=len(request.images) or None,
            prompt=request.prompt if self.settings.log_prompts else None,
            timings={stage: round(seconds, 4) for stage, seconds in timings.items()},
        )

    def _watch_metrics(self) -> None:
        """Gauges that are read when Prometheus asks."""
        engine, scheduler = self.engine, self.scheduler

        def host_memory() -> float:
            total = 0
            for pid in filter(None, (os.getpid(), engine.pid)):
                with contextlib.suppress(psutil.Error):
                    total += psutil.Process(pid).memory_info().rss
            return float(total)

        for gauge, read in (
            (metrics.QUEUE_DEPTH, lambda: scheduler.depth),
            (metrics.QUEUE_SECONDS, scheduler.wait_seconds),
            (metrics.PROGRESS, scheduler.progress),
            (metrics.READY, lambda: engine.state == READY and self._checker is not None and not scheduler.draining),
            (metrics.DEVICE_MEMORY, lambda: engine.memory.device),
            (metrics.DEVICE_MEMORY_PEAK, lambda: engine.memory.device_peak),
            (metrics.HOST_MEMORY, host_memory),
            (metrics.LOAD_BYTES, lambda: engine.load_bytes),
        ):
            gauge.labels(self.name).set_function(read)

        def advanced(stage: str, steps: int) -> None:
            if counter := {"denoise": metrics.STEPS, "tokens": metrics.TOKENS}.get(stage):
                counter.labels(self.name).inc(steps)

        scheduler.on_advance = advanced
        scheduler.on_batch = metrics.BATCH_SIZE.labels(self.name).observe

    # --- metadata

    def metadata(self) -> dict[str, Any]:
        """v2 metadata; `parameters` describe each field. Before READY the inputs are not known yet."""
        told: dict[str, Any] = {"name": self.name, "platform": "diffusers", "inputs": [], "outputs": []}
        capabilities, checker = self.engine.capabilities, self._checker
        if capabilities is None or checker is None:
            return told
        return {
            **told,
            "inputs": v2.inputs(checker.schema),
            "outputs": v2.outputs(checker.media),
            "properties": {
                "family": capabilities.family,
                "pipeline": capabilities.pipeline_class,
                "source": capabilities.source,
                "revision": capabilities.model_revision,
                "bytes": capabilities.model_bytes,
                "load_seconds": {stage: round(seconds, 3) for stage, seconds in self.engine.load_seconds.items()},
                "device": capabilities.device,
                "dtypes": dict(capabilities.dtypes),
                "optimizations": dict(capabilities.optimizations),
                "engine_variant": capabilities.engine_variant,
                "parameters": v2.parameters(checker.schema),
                "refused": dict(checker.schema.refused),
            },
        }


def _dry_run(headers: Mapping[str, str]) -> bool:
    return headers.get("x-dry-run", "").lower() in ("1", "true", "yes")


def _named(label: str, index: int, function: Any, argument: Any) -> Any:
    try:
        return function(argument)
    except InvalidRequest as error:
        raise InvalidRequest(f"{label}[{index}]: {error}" if label else str(error)) from error


class Repository(ModelRepository):  # type: ignore[misc]
    """The one model, found under its name and its aliases."""

    def __init__(self, model: DiffusionModel, aliases: tuple[str, ...]) -> None:
        super().__init__()
        self.update(model)
        self._aliases = dict.fromkeys(aliases, model.name)

    def get_model(self, name: str) -> DiffusionModel | None:
        model: DiffusionModel | None = self.models.get(name) or self.models.get(self._aliases.get(name, ""))
        return model

    def unload(self, name: str) -> None:
        """KServe's server unloads every model when it stops; ours ends with its engine."""


def find_model(repository: ModelRepository, name: str, version: str = "") -> DiffusionModel:
    """The model `name`. Raises ModelNotFound, and NotImplementedHere for a version."""
    model = repository.get_model(name)
    if model is None:
        known = ", ".join(repository.get_models())
        raise ModelNotFound(f"model {name[:80]!r} is not served here; this server has {known}")
    if version:
        raise NotImplementedHere("model versions are not served; leave the version out")
    found: DiffusionModel = model
    return found

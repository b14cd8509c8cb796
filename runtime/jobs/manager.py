"""Jobs: requests that outlive their connection. The manager runs them, the stores remember them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from runtime.jobs.record import Job, StoredMedia
from runtime.types import GenerationResult


class Jobs:
    """All jobs of the server. Every method raises NotReady where the store cannot be reached."""

    async def submit(
        self,
        model: Any,
        api: str,
        rows: list[dict[str, Any]],
        label: str,
        headers: Mapping[str, str],
        envelope: Mapping[str, Any],
        body: bytes = b"",
    ) -> Job:
        """Check, admit and keep a job; on return it survives a restart. `label` names a row in messages as in
        DiffusionModel._generate; `body` is what an Idempotency-Key in `headers` stands for: the same key and body give
        the job that is there already. Raises what a synchronous request raises before it runs."""
        raise NotImplementedError

    async def get(self, job_id: str) -> Job:
        """Raises NotFound and Gone."""
        raise NotImplementedError

    async def page(
        self, apis: tuple[str, ...], after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Job], bool]:
        """Jobs behind the id `after`, and whether more follow. Raises NotFound for an `after` that is not known."""
        raise NotImplementedError

    async def remove(self, job_id: str) -> Job:
        """Cancel a job that waits or runs (it is `failed` with code `cancelled` then), forget one that has ended.
        The job as it was before. Raises NotFound and Gone."""
        raise NotImplementedError

    def watch(self, job_id: str) -> AsyncIterator[Job]:
        """The job at each step forward, the last time when it has ended."""
        raise NotImplementedError

    async def wait(self, job_id: str) -> Job:
        """The job once it has ended."""
        raise NotImplementedError

    async def results(self, job: Job) -> list[GenerationResult]:
        """The results of a completed job, bytes and all. Raises Gone where they have expired."""
        raise NotImplementedError

    async def media(self, job_id: str, index: int) -> StoredMedia:
        """Picture or video `index` of a completed job. Raises NotFound, Gone, and NotReady while it is not there yet."""
        raise NotImplementedError

    def read(self, media: StoredMedia, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Its bytes [start, end) in chunks; blocks: for a thread."""
        raise NotImplementedError

    async def url(self, job: Job, index: int, base_url: str) -> str:
        """A URL of limited life for picture or video `index`: the store's own, or one of this server below `base_url`
        that needs no key."""
        raise NotImplementedError

"""The few things that jobs and results do with an object store, with retries and in words of ours.

Times are the store's: the age of an object is the Date of the answer that told of it less its LastModified. Both have
whole seconds, so an age is right to within one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from botocore import exceptions as boto_errors

from runtime.errors import StartupError
from runtime.jobs.store import Unavailable
from runtime.storage.s3 import S3Source
from runtime.storage.source import Transient

CHUNK = 2**20
PATIENCE = 20.0  # seconds of one operation, its retries and waits together
FIRST_WAIT, LONGEST_WAIT = 0.2, 4.0
MAX_URL_SECONDS = 7 * 86_400  # of signature version 4
DENIED = "access denied; these credentials need s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject there"

_FAILURES = (boto_errors.BotoCoreError, boto_errors.ClientError)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Entry:
    """An object of a listing: `key` below the prefix, `modified` in seconds since 1970, `age` in seconds."""

    key: str
    size: int
    modified: float
    age: float


class Bucket:
    """Objects below a prefix. Keys are relative to it. Every method raises Unavailable; safe to use from threads."""

    def __init__(self, source: S3Source, patience: float = PATIENCE) -> None:
        self.uri = source.uri
        self._source, self._client, self._patience = source, source.client, patience

    def put(
        self,
        key: str,
        data: bytes,
        content_type: str = "application/json",
        metadata: Mapping[str, str] | None = None,
        patience: float | None = None,
    ) -> None:
        self._retried(
            lambda: self._client.put_object(
                **self._named(key), Body=data, ContentType=content_type, Metadata=dict(metadata or {})
            ),
            patience,
        )

    def create(self, key: str, data: bytes) -> bool:
        """Put an object where there is none; False where there is one. Of several that try, one succeeds."""
        unsure = False

        def once() -> bool:
            nonlocal unsure
            try:
                self._client.put_object(**self._named(key), Body=data, ContentType="application/json", IfNoneMatch="*")
            except boto_errors.ClientError as error:
                if _status(error) == 412:  # it may be ours, and its answer was lost
                    return unsure and self._get(key) == data
                unsure = unsure or _status(error) >= 500
                raise
            except boto_errors.BotoCoreError:
                unsure = True
                raise
            return True

        return self._retried(once)

    def get(self, key: str) -> bytes | None:
        return self._retried(lambda: self._get(key))

    def age(self, key: str) -> float | None:
        """Seconds since the object was written; None where there is none."""

        def once() -> float | None:
            try:
                told = self._client.head_object(**self._named(key))
            except boto_errors.ClientError as error:
                if _status(error) == 404:
                    return None
                raise
            return self._now(told) - _seconds(told["LastModified"])

        return self._retried(once)

    def list(self, prefix: str, after: str = "") -> Iterator[Entry]:
        """The objects whose keys begin with `prefix` and follow `after`, in order; a request for each thousand."""
        root = self._source.prefix
        where = {"Bucket": self._source.bucket, "Prefix": root + prefix}
        start = {"StartAfter": root + after} if after else {}
        while True:
            page = self._retried(lambda start=start: self._client.list_objects_v2(**where, **start))  # type: ignore[misc]
            now = self._now(page)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # a folder that a console made
                    modified = _seconds(entry["LastModified"])
                    yield Entry(entry["Key"].removeprefix(root), entry["Size"], modified, now - modified)
            if not page.get("IsTruncated"):
                return
            start = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """One at a time: not every store has DeleteObjects, nor takes the checksum that botocore sends with it."""
        self._retried(lambda: self._client.delete_object(**self._named(key)))

    def stream(self, key: str, start: int, end: int | None) -> Iterator[bytes]:
        """The bytes [start, end) of an object, resumed where the connection breaks. Raises KeyError for none."""
        version: dict[str, str] = {}

        def opened(at: int) -> Any:
            reach = "" if end is None else str(end - 1)
            wanted = {"Range": f"bytes={at}-{reach}"} if at or reach else {}
            try:
                return self._client.get_object(**self._named(key), **wanted, **version)
            except boto_errors.ClientError as error:
                if _status(error) == 404:
                    raise KeyError(key) from None
                if _status(error) == 416:
                    return None
                raise

        at, failures = start, 0
        while end is None or at < end:
            answer = self._retried(lambda at=at: opened(at))  # type: ignore[misc]
            if answer is None:
                return
            version = {"IfMatch": answer["ETag"]}
            try:
                for part in answer["Body"].iter_chunks(CHUNK):
                    at, failures = at + len(part), 0
                    yield part
                return
            except _FAILURES as error:
                failures += 1
                if failures == 5:
                    raise Unavailable(str(self._told(error))) from None
            finally:
                answer["Body"].close()

    def url(self, key: str, seconds: float, disposition: str) -> str:
        """A presigned URL of a GET; nothing is asked of the store. Whole seconds, never more than asked."""
        whole = int(min(seconds, MAX_URL_SECONDS))
        if whole < 1:
            raise ValueError(f"a URL for {seconds} seconds")
        asked = {**self._named(key), "ResponseContentDisposition": disposition}
        try:
            made: str = self._client.generate_presigned_url("get_object", Params=asked, ExpiresIn=whole)
        except _FAILURES as error:
            raise Unavailable(str(self._told(error))) from None
        return made

    def close(self) -> None:
        self._source.close()

    def _get(self, key: str) -> bytes | None:
        try:
            body = self._client.get_object(**self._named(key))["Body"]
        except boto_errors.ClientError as error:
            if _status(error) == 404 and error.response.get("Error", {}).get("Code") != "NoSuchBucket":
                return None
            raise
        try:
            data: bytes = body.read()
        finally:
            body.close()
        return data

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self._source.bucket, "Key": self._source.prefix + key}

    def _now(self, answer: Mapping[str, Any]) -> float:
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        try:
            return _seconds(parsedate_to_datetime(date))
        except ValueError:
            raise Unavailable(f"{self.uri}: the store's answers have no Date, which leases are timed by") from None

    def _retried(self, call: Callable[[], _Answer], patience: float | None = None) -> _Answer:
        begun, attempt = time.monotonic(), 0
        allowed = self._patience if patience is None else patience
        while True:
            attempt += 1
            try:
                return call()
            except _FAILURES as error:
                reason = self._told(error)
            if not isinstance(reason, Transient):
                raise Unavailable(str(reason))
            wait = random.uniform(FIRST_WAIT / 4, min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))
            if time.monotonic() - begun + wait > allowed:
                raise Unavailable(f"{self.uri}: {reason}; gave up after {attempt} attempts")
            time.sleep(wait)

    def _told(self, error: Exception) -> Exception:
        if isinstance(error, boto_errors.IncompleteReadError):
            return Transient("an answer that ended early")
        if isinstance(error, boto_errors.ClientError):
            if _status(error) == 409:  # ConditionalRequestConflict
                return Transient("status 409")
            if error.response.get("Error", {}).get("Code") == "AccessDenied":
                return StartupError(f"{self.uri}: {DENIED}")
        return self._source.failed(error)


def probe(bucket: Bucket, name: str) -> None:
    """Raises StartupError, one line, for a store that cannot be written or does not honour If-None-Match."""
    key = f"probe/{name}"
    refused = f"{bucket.uri}: the store does not honour If-None-Match, so servers could not share jobs in it"
    try:
        first = bucket.create(key, b"first")
        second = bucket.create(key, b"second")
        seen = bucket.age(key)
        bucket.delete(key)
    except Unavailable as error:
        raise StartupError(f"OUTPUT_URI: {error}") from None
    if not first or second or seen is None:
        raise StartupError(f"OUTPUT_URI: {refused}; name another store, or set DATA_DIR instead")


def _status(error: boto_errors.ClientError) -> int:
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def _seconds(moment: datetime) -> float:
    return moment.timestamp()

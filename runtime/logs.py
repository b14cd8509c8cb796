"""Logging: one JSON object a line, or one readable line on a terminal. Both processes use it."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import orjson

logger = logging.getLogger("diffusion_runtime")
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
MAX_ID_LENGTH = 128


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # an integer beyond 64 bits, a lone surrogate, a key that is no scalar
            return orjson.dumps({key: _plain(value) for key, value in line.items()}).decode()


def _plain(value: Any) -> Any:
    try:
        orjson.dumps(value)
    except TypeError:
        return ascii(value)
    return value


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = {"request_id": request_id.get()} if request_id.get() else {}
        fields = "".join(f" {key}={value}" for key, value in {**told, **getattr(record, "fields", {})}.items())
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{clock} {record.levelname.lower():7} {record.getMessage()}{fields}{trace}"


def configure(level: str, format: str) -> None:
    """Send every logger of this process to stderr in one format. `format`: auto, json or text."""
    handler = logging.StreamHandler(sys.stderr)
    text = format == "text" or (format == "auto" and sys.stderr.isatty())
    handler.setFormatter(_TextFormatter() if text else _JsonFormatter())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    logger.setLevel(level.upper())
    logging.captureWarnings(True)
    # Probes come every few seconds; every generation has a line of its own.
    for noisy in ("uvicorn.access", "uvicorn.error", "kserve", "kserve.trace", "httpx"):
        logging.getLogger(noisy).handlers[:] = []
        logging.getLogger(noisy).propagate = True
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log(level: int, message: str, exc_info: Any = None, **fields: Any) -> None:
    """One line with `fields` beside the message; fields that are None are left out."""
    logger.log(level, message, exc_info=exc_info, extra={"fields": {k: v for k, v in fields.items() if v is not None}})


@contextlib.contextmanager
def request_scope(given: str | None) -> Iterator[str]:
    """The id of a request, for its log lines and its response: the client's own, or a new one."""
    identity = (
        given if given and len(given) <= MAX_ID_LENGTH and given.isprintable() and given.isascii() else uuid.uuid4().hex
    )
    token = request_id.set(identity)
    try:
        yield identity
    finally:
        request_id.reset(token)


def unexpected(error: BaseException, identity: str) -> str:
    """Log a fault of ours with its traceback; returns what the client may read of it."""
    log(logging.ERROR, f"internal error: {type(error).__name__}", exc_info=error)
    return f"internal error (request {identity}); the server's log has the details"


def with_request_id(text: str, identity: str) -> str:
    """A message of ours, for 5xx answers: where to look in the log."""
    return text if identity in text else f"{text} (request {identity})"

"""Logging: one JSON object a line, or one readable line on a terminal. Both processes use it."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

logger = logging.getLogger("diffusion_runtime")
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
trace_id: contextvars.ContextVar[str] = contextvars.ContextVar("trace_id", default="")  # W3C's, if the client sent one
credential: contextvars.ContextVar[str] = contextvars.ContextVar("credential", default="")  # whose key: access.Keys
MAX_ID_LENGTH = 128

# https://www.w3.org/TR/trace-context: a later version may append fields, ff is none.
TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")
TRACESTATE_MEMBER = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~]")
MAX_TRACESTATE_MEMBERS = 32


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(_identity())
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # an integer beyond 64 bits, a lone surrogate, a key that is no scalar
            return orjson.dumps({key: _plain(value) for key, value in line.items()}).decode()


def _identity() -> dict[str, str]:
    """What every line of a request says of it."""
    told = {"request_id": request_id.get(), "trace_id": trace_id.get()}
    return {name: value for name, value in told.items() if value}


def _plain(value: Any) -> Any:
    try:
        orjson.dumps(value)
    except TypeError:
        return ascii(value)
    return value


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={value}" for key, value in {**_identity(), **getattr(record, "fields", {})}.items())
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
def request_scope(given: str | None, trace: str = "") -> Iterator[str]:
    """The id of a request, for its log lines and its response: the client's own, or a new one. `trace`: its trace id.

    Whose key it came with may be set inside, in `credential`.
    """
    identity = (
        given if given and len(given) <= MAX_ID_LENGTH and given.isprintable() and given.isascii() else uuid.uuid4().hex
    )
    tokens = [
        (variable, variable.set(value))
        for variable, value in ((request_id, identity), (trace_id, trace), (credential, ""))
    ]
    try:
        yield identity
    finally:
        for variable, token in tokens:
            variable.reset(token)


def trace_context(headers: Iterable[tuple[str, str]]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The trace id in a request's headers (names in lower case), or "", and the headers that carry it on.

    What is malformed is as good as absent, as W3C's Trace Context asks.
    """
    pairs = list(headers)
    parents = [value.strip() for name, value in pairs if name == "traceparent"]
    match = TRACEPARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if match is None or (match[1] == "00" and match[3] is not None):
        return "", ()
    members = [part.strip(" \t") for name, value in pairs if name == "tracestate" for part in value.split(",")]
    members = [member for member in members if member]
    echoed = [("traceparent", parents[0])]
    if 0 < len(members) <= MAX_TRACESTATE_MEMBERS and all(map(TRACESTATE_MEMBER.fullmatch, members)):
        echoed.append(("tracestate", ",".join(members)))
    return match[2], tuple(echoed)


def unexpected(error: BaseException, identity: str) -> str:
    """Log a fault of ours with its traceback; returns what the client may read of it."""
    log(logging.ERROR, f"internal error: {type(error).__name__}", exc_info=error)
    return f"internal error (request {identity}); the server's log has the details"


def with_request_id(text: str, identity: str) -> str:
    """A message of ours, for 5xx answers: where to look in the log."""
    return text if identity in text else f"{text} (request {identity})"

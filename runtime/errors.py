"""Every error a client can meet, in one tree. Each class carries its HTTP status and its gRPC code.

    DiffusionError
    ├── InvalidRequest      400  INVALID_ARGUMENT     the request is wrong; the message names the field
    ├── Unauthorized        401  UNAUTHENTICATED      a key is needed, and none or a wrong one came
    ├── ModelNotFound       404  NOT_FOUND            no model, or no version, of that name is served here
    ├── NotFound            404  NOT_FOUND            no request, job or result of that id is known
    ├── Conflict            409  ABORTED              the idempotency key came with another body
    ├── Gone                410  NOT_FOUND            a job or its results have expired
    ├── PayloadTooLarge     413  RESOURCE_EXHAUSTED   the body is larger than MAX_BODY_BYTES
    ├── QueueFull           429  RESOURCE_EXHAUSTED   more is waiting than is allowed; try later
    ├── Cancelled           499  CANCELLED            the client went away or asked to stop
    ├── GenerationFailed    500  INTERNAL             a fault of ours; the log has the details
    ├── NotImplementedHere  501  UNIMPLEMENTED        a part of the protocol that this server lacks or has off
    ├── NotReady            503  UNAVAILABLE          loading, draining or restarting; try later
    ├── DeadlineExceeded    504  DEADLINE_EXCEEDED    the request's time ran out
    └── OutOfMemory         507  RESOURCE_EXHAUSTED   the accelerator's memory does not hold this request

`StartupError` is no answer to a client: it ends the process with one line.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any


class DiffusionError(Exception):
    """Base of all errors that reach a client; `str()` of it is the message the client reads.

    `retry_after` is in seconds and becomes the Retry-After header.
    """

    http_status = 500
    grpc_code = "INTERNAL"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    @property
    def code(self) -> str:
        """The class's name in snake case, for clients that branch on a word."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


class InvalidRequest(DiffusionError):
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class Unauthorized(DiffusionError):
    http_status = 401
    grpc_code = "UNAUTHENTICATED"


class ModelNotFound(DiffusionError):
    http_status = 404
    grpc_code = "NOT_FOUND"


class NotFound(DiffusionError):
    http_status = 404
    grpc_code = "NOT_FOUND"


class Conflict(DiffusionError):
    http_status = 409
    grpc_code = "ABORTED"


class Gone(DiffusionError):
    http_status = 410
    grpc_code = "NOT_FOUND"


class PayloadTooLarge(DiffusionError):
    http_status = 413
    grpc_code = "RESOURCE_EXHAUSTED"


class QueueFull(DiffusionError):
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"


class Cancelled(DiffusionError):
    http_status = 499
    grpc_code = "CANCELLED"


class GenerationFailed(DiffusionError):
    http_status = 500
    grpc_code = "INTERNAL"


class NotImplementedHere(DiffusionError):
    http_status = 501
    grpc_code = "UNIMPLEMENTED"


class NotReady(DiffusionError):
    http_status = 503
    grpc_code = "UNAVAILABLE"


class DeadlineExceeded(DiffusionError):
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class OutOfMemory(DiffusionError):
    http_status = 507
    grpc_code = "RESOURCE_EXHAUSTED"


class StartupError(Exception):
    """The server cannot start with what it was given; the message is the one line the operator reads."""


def all_errors() -> list[type[DiffusionError]]:
    """Every concrete error class, for the tables in the docs and the tests."""
    return list(DiffusionError.__subclasses__())


def shown(value: Any, limit: int = 80) -> str:
    """`value` as an error message quotes it: its repr, cut so that a megabyte of base64 is not echoed.

    Neither the depth nor the length of what a client sends costs anything here.
    """
    if isinstance(value, str | bytes):
        text = repr(value[: limit + 1])
    elif isinstance(value, list | tuple | dict):
        brief = reprlib.Repr()
        brief.maxlevel, brief.maxstring = 4, limit
        brief.maxlist = brief.maxtuple = brief.maxdict = limit // 2
        text = brief.repr(value)
    else:
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"

"""JSON bodies whose large parts are never held as text: base64 is made chunk by chunk while it is sent."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from runtime.errors import InvalidRequest

CHUNK = 3 * 2**18  # bytes of media a chunk: a multiple of 3, so that chunks of base64 join without padding
MAX_VALUES = 500_000  # in a request body; parsing that many takes some 50 ms


@dataclass(frozen=True, slots=True)
class Base64:
    """Bytes that a JSON body shows as a base64 string."""

    data: bytes | bytearray = field(repr=False)

    def __len__(self) -> int:
        return -(-len(self.data) // 3) * 4

    def chunks(self) -> Iterator[bytes]:
        view = memoryview(self.data)
        for start in range(0, len(view), CHUNK):
            yield base64.b64encode(view[start : start + CHUNK])

    def text(self) -> str:
        return b"".join(self.chunks()).decode("ascii")


def pieces(value: Any) -> Iterator[bytes | Base64]:
    """`value` as JSON: text, with Base64 objects left in place (without their quotes)."""
    if isinstance(value, Base64):
        yield b'"'
        yield value
        yield b'"'
    elif isinstance(value, dict):
        for i, (key, item) in enumerate(value.items()):
            yield (b"{" if i == 0 else b",") + orjson.dumps(key) + b":"
            yield from pieces(item)
        yield b"}" if value else b"{}"
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield b"[" if i == 0 else b","
            yield from pieces(item)
        yield b"]" if value else b"[]"
    else:
        yield orjson.dumps(value)


def parse(body: bytes | bytearray | memoryview) -> Any:
    """The JSON value of a request body. Raises InvalidRequest."""
    # Parsing holds the event loop; base64 has neither of these characters, however long it is.
    text = bytes(body) if isinstance(body, memoryview) else body
    if text.count(b",") + text.count(b"[") > MAX_VALUES:
        raise InvalidRequest(f"body: more than {MAX_VALUES} JSON values")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"body: not valid JSON: {error} (NaN and Infinity are no JSON values)") from None

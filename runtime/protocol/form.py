"""multipart/form-data, as browsers, curl and the OpenAI SDK send it: bytes to fields."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import orjson

from runtime.errors import InvalidRequest, shown

MAX_PARTS = 1000
MAX_HEADER_BYTES = 8192  # of one part

_BOUNDARY = re.compile(r'(?i);\s*boundary\s*=\s*(?:"([^"]{1,200})"|([^;,\s"]{1,200}))')
_NAME = re.compile(r'(?i);\s*name\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\s"]+))')
_FILENAME = re.compile(r"(?i);\s*filename\*?\s*=")
_KEYED = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")


def is_form(content_type: str) -> bool:
    return content_type.split(";")[0].strip().lower() == "multipart/form-data"


def parse_form(body: bytes, content_type: str) -> dict[str, Any]:
    """The fields of a form. Text is str, a file is bytes; `name[]`, or a name that comes again, makes a list, and
    `name[key]` an object. For a thread: it takes a while for large files. Raises InvalidRequest."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise InvalidRequest("body: the Content-Type multipart/form-data has no boundary")
    delimiter = b"\r\n--" + (found[1] or found[2]).encode("latin-1")
    body = b"\r\n" + body  # the first delimiter may have no line break before it
    if body.count(delimiter) > MAX_PARTS:
        raise InvalidRequest(f"body: {body.count(delimiter)} parts; at most {MAX_PARTS} fit")
    _, *parts = body.split(delimiter)
    if not parts or not parts[-1].startswith(b"--"):
        raise InvalidRequest("body: the form is cut off: its last boundary is missing")
    fields: dict[str, Any] = {}
    for part in parts[:-1]:
        name, value = _part(part)
        _put(fields, name, value)
    return fields


def fingerprint(fields: Mapping[str, Any]) -> bytes:
    """The same for the same fields, whatever boundary a client drew for them. For a thread."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return ["file", hashlib.sha256(value).hexdigest()]
        return [plain(item) for item in value] if isinstance(value, list) else value

    return orjson.dumps({name: plain(value) for name, value in fields.items()}, option=orjson.OPT_SORT_KEYS)


def _part(part: bytes) -> tuple[str, str | bytes]:
    start = part.find(b"\r\n")  # blanks may follow a boundary
    end = part.find(b"\r\n\r\n", start, start + MAX_HEADER_BYTES)
    if start < 0 or part[:start].strip(b" \t") or end < 0:
        raise InvalidRequest("body: a part of the form has no header, or one that is too long")
    header = part[start:end].decode("utf-8", "replace")
    lines = re.split(r"\r\n(?![ \t])", header)
    disposition = next((line for line in lines if line.lower().startswith("content-disposition:")), "")
    name = _NAME.search(disposition)
    if name is None or not (name[1] or name[2]):
        raise InvalidRequest("body: a part of the form has no name")
    data = part[end + 4 :]
    if _FILENAME.search(disposition):
        return name[1] or name[2], data
    try:
        # Browsers send the line ends of a text as CRLF; in JSON the same text has LF, and must draw the same.
        return name[1] or name[2], data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:  # a file by its content, whatever its header says
        return name[1] or name[2], data


def _put(fields: dict[str, Any], name: str, value: str | bytes) -> None:
    keyed = _KEYED.fullmatch(name)
    if keyed is not None and keyed[2]:
        inner = fields.setdefault(keyed[1], {})
        if not isinstance(inner, dict) or keyed[2] in inner:
            raise InvalidRequest(f"{keyed[1]}: given more than once, as {shown(name)} too")
        inner[keyed[2]] = value
    elif keyed is not None or name in fields:
        plain = keyed[1] if keyed is not None else name
        before = fields.get(plain, [])
        fields[plain] = [*(before if isinstance(before, list) else [before]), value]
    else:
        fields[name] = value

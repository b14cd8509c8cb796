"""Request bodies that are JSON or a form."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from runtime.errors import InvalidRequest, shown
from runtime.protocol.form import fingerprint, is_form, parse_form
from runtime.protocol.wire import parse


async def fields_of(request: Request) -> tuple[dict[str, Any], bool, bytes]:
    """The body's fields, whether it is a form, whose values are all text, and bytes that stand for the body: equal for
    equal requests. What isn't a form is read as JSON whatever its type says: curl's default is another form's.

    Raises InvalidRequest.
    """
    body, content_type = await request.body(), request.headers.get("content-type", "")
    if is_form(content_type):
        fields = await asyncio.to_thread(parse_form, body, content_type)
        return fields, True, await asyncio.to_thread(fingerprint, fields)
    fields = parse(body)
    if not isinstance(fields, dict):
        raise InvalidRequest(f'body: {shown(fields)} is not an object like {{"prompt": "a dog"}}')
    return fields, False, body

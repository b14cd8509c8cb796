"""Ids of jobs: a job's api, and when it was made."""

from __future__ import annotations

import re
import secrets
import time

_ID = re.compile(r"[a-z0-9]{1,16}_[0-9a-f]{28}")


def new_id(api: str) -> str:
    """An id that sorts by its time: milliseconds since 1970 in hex, then 64 random bits."""
    return f"{api.removesuffix('s')}_{int(time.time() * 1000):012x}{secrets.token_hex(8)}"


def is_id(text: str) -> bool:
    """Whether `new_id` may have made this. Clients send what they like: anything else is nobody's id, and no key."""
    return _ID.fullmatch(text) is not None


def sort_key(job_id: str) -> str:
    """What jobs of all apis are ordered by: the id without its api."""
    return job_id.rpartition("_")[2]


def created_at(job_id: str) -> float:
    """When the id was made, in seconds since 1970."""
    return int(sort_key(job_id)[:12], 16) / 1000

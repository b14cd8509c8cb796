"""Who may call: keys from API_KEY and API_KEY_FILE, of which this process keeps digests alone."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import parse_qs

from runtime.errors import StartupError, Unauthorized
from runtime.logs import log

SHORTEST = 8
LARGEST_FILE = 2**20
LOOK_SECONDS = 1.0  # between two looks at the file's status

# What probes and Prometheus ask for, and the page that asks its reader for a key; they carry none. Each is a whole
# path, as the router sees it: decoded, and not normalised by anybody.
OPEN_PATHS = re.compile(
    r"/|/health|/metrics|/v2/health/(live|ready)|/v2/models/[^/]+(/versions/[^/]+)?/ready|/v1/models/[^/:]+"
    r"|/ui(/|/[a-z]+\.(js|css))?",
    re.ASCII,
)
OPEN_METHODS = frozenset(
    f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")
)


SIGNED_PATHS = re.compile(r"(/openai)?/v1/jobs/[^/]+/content/[0-9]+", re.ASCII)


def is_signed(method: str, path: str, query: bytes) -> bool:
    """Whether this HTTP request comes with a signature instead of a key: its route must check it."""
    return (
        method in ("GET", "HEAD")
        and SIGNED_PATHS.fullmatch(path) is not None
        and "signature" in parse_qs(query.decode("latin-1"), keep_blank_values=True)
    )


def is_open(method: str, path: str) -> bool:
    """Whether this HTTP request needs no key."""
    return method in ("GET", "HEAD") and OPEN_PATHS.fullmatch(path) is not None


class Keys:
    """The keys that open this server; where there are none, it is open to all. For the event loop's thread alone."""

    def __init__(self, fixed: Iterable[bytes] = (), file: Path | None = None) -> None:
        """`fixed`: digests. Raises StartupError where the file holds no good keys."""
        self._fixed = frozenset(fixed)
        self._file = file
        self._seen: tuple[int, int, int] | None = None
        self._complaint = ""
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._digests = self._fixed if file is None else self._fixed | self._read(file)

    @classmethod
    def from_settings(cls, api_key: str, api_key_file: str | None) -> Keys:
        """Raises StartupError, which names the setting and never a key."""
        parts = [(f"key {i}", part.strip()) for i, part in enumerate(re.split(r"[,\n]", api_key), 1)]
        fixed = _digests("API_KEY", parts) if api_key else frozenset()
        keys = cls(fixed, Path(api_key_file) if api_key_file else None)
        told = "access: a key is needed" if keys.required else "access: no key is set, every route is open"
        log(logging.INFO, told, keys=len(keys._digests) or None)
        return keys

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def require(self, headers: Mapping[str, str]) -> str:
        """`credential`, or Unauthorized."""
        found = self.credential(headers)
        if found is None:
            what = "the key is not valid" if any(_given(headers)) else "a key is needed"
            raise Unauthorized(f"{what}; send one as `X-API-Key: KEY` or as `Authorization: Bearer KEY`")
        return found

    def credential(self, headers: Mapping[str, str]) -> str | None:
        """A name of the key in these headers (lower case) that tells nothing about it; "" where none is needed, None
        where it's missing or wrong. A valid X-API-Key goes before the bearer token, which may be a proxy's."""
        self._look()
        if not self._digests:
            return ""
        by_header, by_token = (self._match(key) for key in _given(headers))
        return by_header or by_token

    def _match(self, key: str) -> str | None:
        given, found = _digest(key), None
        for digest in self._digests:  # all of them: how long it takes says nothing
            if hmac.compare_digest(digest, given):
                found = digest.hex()[:16]
        return found

    def _look(self) -> None:
        """Read the file again if it has changed. While it can't be read the old keys stay."""
        if self._file is None or (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        try:
            # Follows links: a Secret's update swaps one of the links on the way to the file.
            if _status(self._file) == self._seen:
                return
            self._digests = self._fixed | self._read(self._file)
            self._complaint = ""
            log(logging.INFO, "API_KEY_FILE was read again", keys=len(self._digests))
        except (OSError, StartupError) as error:
            if isinstance(error, OSError):
                self._seen = None
            told = str(error) if isinstance(error, StartupError) else _unreadable(self._file, error)
            if told != self._complaint:
                self._complaint = told
                log(logging.WARNING, f"{told}; the keys of before stay valid")

    def _read(self, file: Path) -> frozenset[bytes]:
        source = f"API_KEY_FILE={file}"
        try:
            self._seen = _status(file)  # before the content: a change in between is found by the next look
            with file.open("rb") as stream:
                content = stream.read(LARGEST_FILE + 1)
        except OSError as error:
            self._seen = None
            raise StartupError(_unreadable(file, error)) from None
        if len(content) > LARGEST_FILE:
            raise StartupError(f"{source}: larger than {LARGEST_FILE} bytes")
        lines = content.decode("utf-8-sig", "replace").split("\n")
        parts = [(f"line {i}", line.strip()) for i, line in enumerate(lines, 1)]
        return _digests(source, [(where, key) for where, key in parts if not key.startswith("#")])


def _given(headers: Mapping[str, str]) -> tuple[str, str]:
    """What stands in X-API-Key and what stands in Authorization as a bearer token."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    return headers.get("x-api-key", "").strip(), token.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _digests(source: str, keys: Iterable[tuple[str, str]]) -> frozenset[bytes]:
    """Digests of `keys`, each with its place in `source`; blank ones don't count."""
    found = set()
    for where, key in keys:
        if not key:
            continue
        if len(key) < SHORTEST:
            raise StartupError(f"{source}: {where} is shorter than {SHORTEST} characters")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise StartupError(f"{source}: {where} holds a character other than visible ASCII")
        found.add(_digest(key))
    if not found:
        raise StartupError(f"{source}: holds no key")
    return frozenset(found)


def _status(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _unreadable(file: Path, error: OSError) -> str:
    return f"API_KEY_FILE={file}: {error.strerror}"

"""Ranged GETs into memory of the caller: one kept-alive connection for each thread and host.

http.client and not urllib3: its `readinto` copies nothing, which is what 16 MiB reads at gigabytes a second cost.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import ssl
import threading
import urllib.request
from collections.abc import Mapping
from urllib.parse import SplitResult, unquote, urlsplit

import certifi

from runtime.storage.source import Transient

TIMEOUT = 30.0  # seconds without a byte, or for connecting
MAX_ERROR = 8192  # bytes read of an error's body
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class Refused(Exception):
    """An answer that repeating does not change. `location` is a redirect's; `body` the start of the answer's."""

    def __init__(self, status: int, body: bytes = b"", location: str | None = None) -> None:
        super().__init__(f"status {status}")
        self.status, self.body, self.location = status, body, location


class Ranges:
    """Reads ranges of URLs. Safe to share between threads; each keeps its own connections until `close`."""

    def __init__(self, verify: bool | str = True) -> None:
        """`verify`: False, True, or the path of a file with certificates to trust beside the system's."""
        self._verify = verify
        self._own = threading.local()
        self._all: list[http.client.HTTPConnection] = []

    def read(self, url: str, start: int, into: memoryview, headers: Mapping[str, str] | None = None) -> None:
        """Fill `into` with the bytes of `url` from `start` on.

        Raises Transient for whatever may pass, Refused for an answer that is no such range, ssl.SSLError for a
        certificate that is not trusted. No message holds the URL.
        """
        if not into:
            return
        parts = urlsplit(url)
        connection, target, through = self._connection(parts)
        wanted = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{start + len(into) - 1}"}
        asked = {**wanted, **(headers or {}), **through}
        complete = False
        try:
            connection.request("GET", target, headers=asked)
            answer = connection.getresponse()
            _check(answer, start, len(into), asked)
            got = 0
            while got < len(into):
                count = answer.readinto(into[got:])
                if not count:
                    raise Transient(f"the answer ended after {got} of {len(into)} bytes")
                got += count
            complete = answer.isclosed() or not answer.read(1)
        except ssl.SSLCertVerificationError:
            raise
        except http.client.InvalidURL as exc:  # its message holds the address
            raise Refused(400) from exc
        except TimeoutError as exc:
            raise Transient(f"no byte for {TIMEOUT:.0f} s") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise Transient(f"{type(exc).__name__}: {exc}".splitlines()[0]) from exc
        finally:
            if not complete:  # what is left in it belongs to this answer
                self._forget(parts)

    def close(self) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._own = threading.local()

    def _connection(self, parts: SplitResult) -> tuple[http.client.HTTPConnection, str, Mapping[str, str]]:
        """This thread's connection to the URL's host, what to ask it for, and headers for a proxy between."""
        headers: Mapping[str, str] = {}
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        proxy = _proxy(parts)
        if proxy is not None and parts.scheme == "http":
            target, headers = f"http://{parts.netloc}{target}", _proxy_headers(proxy)
        kept: dict[tuple[str, str], http.client.HTTPConnection] = self._own.__dict__.setdefault("kept", {})
        key = (parts.scheme, parts.netloc)
        if key not in kept:
            kept[key] = self._connect(parts, proxy)
            self._all.append(kept[key])
        return kept[key], target, headers

    def _connect(self, parts: SplitResult, proxy: SplitResult | None) -> http.client.HTTPConnection:
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "http":
            at = (host, port) if proxy is None else (proxy.hostname or "", proxy.port)
            return http.client.HTTPConnection(*at, timeout=TIMEOUT)
        context = self._context()
        if proxy is None:
            return http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=context)
        connection = http.client.HTTPSConnection(proxy.hostname or "", proxy.port, timeout=TIMEOUT, context=context)
        connection.set_tunnel(host, port, _proxy_headers(proxy))
        return connection

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self._verify is True:
            context.load_verify_locations(certifi.where())  # what botocore and the Hub's library trust
        if isinstance(self._verify, str):
            context.load_verify_locations(self._verify)
        elif not self._verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _forget(self, parts: SplitResult) -> None:
        connection = self._own.kept.pop((parts.scheme, parts.netloc), None)
        if connection is not None:
            connection.close()
            with contextlib.suppress(ValueError):
                self._all.remove(connection)


def _check(answer: http.client.HTTPResponse, start: int, length: int, asked: Mapping[str, str]) -> None:
    """Raises unless the answer is these bytes: a 206 of the range, or the whole object where the range covers it.

    Refused of 200 or 206 means that the server does not answer ranges, of 416 that the object ends before the range,
    of 412 that it is not the one of If-Match.
    """
    if answer.status in (200, 206):
        told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
        begin = int(told[1]) if told else 0
        size = int(answer.headers.get("Content-Length", -1))
        etag = answer.headers.get("ETag")
        if etag and asked.get("If-Match") and etag.strip('"') != asked["If-Match"].strip('"'):
            raise Refused(412)  # by a store that does not know If-Match
        if 0 <= size < length:
            raise Refused(416)
        if begin != start or (answer.status == 206 and not told) or size > length:
            raise Refused(answer.status)
        return
    body = answer.read(MAX_ERROR)
    if answer.status in RETRIED:
        code = re.search(rb"<Code>(\w+)</Code>", body)
        raise Transient(f"status {answer.status}" + (f" {code[1].decode()}" if code else f" {answer.reason}"[:80]))
    raise Refused(answer.status, body, answer.headers.get("Location"))


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for this URL, as botocore and the Hub's library would take it."""
    address = urllib.request.getproxies().get(parts.scheme)
    if not address or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urlsplit(address if "://" in address else f"http://{address}")


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}

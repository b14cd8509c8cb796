"""Pictures that a request names by URL: over https, from hosts that the operator names, at public addresses only.

The name is resolved once; every address it has is checked, the connection is made to a checked address itself, and
its other end is checked again. So a DNS server that changes its answer in between gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Self
from urllib.parse import urlsplit

import httpcore

from runtime import __version__
from runtime.errors import InvalidRequest, shown
from runtime.logs import log

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

HTTPS_PORT = 443
MAX_URL = 8192
MAX_ADDRESSES = 4  # tried one after the other
CONNECT_SECONDS = 5.0  # for each of them
AT_ONCE = 8  # fetches of this process; each may hold a picture's largest file in memory
SETTING = "ALLOWED_IMAGE_HOSTS"
FITS = "send the picture itself, as base64"

# What no public host has, beside what `ipaddress` knows in every version of Python that is supported.
NEVER = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("192.0.0.0/24", "192.88.99.0/24"),  # protocol assignments (Oracle's metadata), relays of 6to4
        "168.63.129.16/32",  # Azure's wire server, a public address that only its own machines reach
        *("2001::/23", "2002::/16", "3fff::/20"),  # Teredo and others, 6to4, documentation
    )
)
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

HEADERS = {
    "Accept": "image/*",
    "Accept-Encoding": "identity",  # a compressed body could be a thousand times its size
    "Connection": "close",
    "User-Agent": f"diffusion-runtime/{__version__}",  # some hosts answer nobody without a name
}


async def fetch_picture(
    url: str,
    field: str,
    hosts: tuple[str, ...],
    max_bytes: int,
    seconds: float = 20.0,
    *,
    resolve: Resolve | None = None,
    permitted: Callable[[str], bool] | None = None,
    trust: ssl.SSLContext | None = None,
) -> bytes:
    """The file at `url`, of at most `max_bytes`, within `seconds` in all. Whether it is a picture is not looked at.

    `hosts` are ALLOWED_IMAGE_HOSTS: `name`, `*.name` for all below it (not itself), each with `:port` for another
    port than 443; empty allows none. Only https is spoken, with the certificate checked, to addresses that are
    public; redirects, compressed bodies, passwords in the URL and proxies of the environment are not for us.

    Raises InvalidRequest, starting with `field`, for everything else. Until the host has answered over TLS the
    message is one and the same, whatever went wrong (no name, a private address, a refused connection, silence): a
    client can't map a network by it. The log tells which it was.

    `resolve`, `permitted` and `trust` are for tests, which can only reach this machine.
    """
    place = f"{field}: {_quoted(url)}"
    host, port, target = _allowed(url, place, hosts)
    answered = False
    try:
        async with asyncio.timeout(seconds), _slots(asyncio.get_running_loop()):
            address = httpcore.URL(scheme="https", host=host, port=port, target=target)
            headers = {"Host": host if port == HTTPS_PORT else f"{host}:{port}", **HEADERS}
            addresses = await (resolve or _resolve)(host, port)
            async with (
                _Checked(addresses, permitted or is_public) as backend,
                httpcore.AsyncConnectionPool(trust or await _trust(), network_backend=backend) as pool,
                pool.stream("GET", address, headers=list(headers.items())) as answer,
            ):
                answered = True
                _check_head(answer, place, max_bytes)
                data = bytearray()
                async for chunk in answer.aiter_stream():
                    data += chunk
                    if len(data) > max_bytes:
                        raise _too_large(place, max_bytes)
                return bytes(data)
    except (OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
        # TimeoutError is an OSError, as are a name that has no address and a certificate that is not trusted.
        log(logging.INFO, "a picture's URL was not fetched", host=host, reason=f"{type(error).__name__}: {error}")
        if not answered:
            raise InvalidRequest(
                f"{place} could not be fetched: its host must have public addresses only and answer there within "
                f"{seconds:g} s, with a valid certificate; or {FITS}"
            ) from error
        late = isinstance(error, TimeoutError)
        what = f"took longer than {seconds:g} s" if late else "broke off"
        raise InvalidRequest(f"{place} could not be fetched: the transfer {what}; {FITS}") from error


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody on the Internet could reach: not private, loopback, link-local,
    shared (CGNAT), multicast, reserved, nor a cloud's metadata; nor such a one inside an IPv4-mapped or NAT64 address.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in NAT64:
            ip = ipaddress.IPv4Address(ip.packed[12:])
        elif ip not in GLOBAL_UNICAST or ip.scope_id is not None:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NEVER)


def _allowed(url: str, place: str, hosts: tuple[str, ...]) -> tuple[str, int, str]:
    """Host, port, and path with query of a URL that may be asked for. Raises InvalidRequest."""
    if not hosts:
        raise InvalidRequest(f"{place} is not fetched: {SETTING} names no host; {FITS}")
    if len(url) > MAX_URL:
        raise InvalidRequest(f"{place} has {len(url)} characters; a URL of at most {MAX_URL} fits")
    if not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise InvalidRequest(f"{place} is no URL: spaces, backslashes and all that is not ASCII must be %-encoded")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", HTTPS_PORT if parts.port is None else parts.port
    except ValueError:
        raise InvalidRequest(f"{place} is no URL; https://host/path fits") from None
    if parts.scheme != "https":
        raise InvalidRequest(f"{place} is not fetched: only https:// is; or {FITS}")
    if "@" in parts.netloc:
        raise InvalidRequest(f"{place} is not fetched: a URL must hold no user name and no password")
    if not any(_matches(host, port, pattern) for pattern in hosts):
        raise InvalidRequest(
            f"{place} is not fetched: its host is not in {SETTING} ({shown(', '.join(hosts), 200)}); or {FITS}"
        )
    if len(host) > 253 or not re.fullmatch(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", host):  # below a *.name
        raise InvalidRequest(f"{place} is no URL: its host is no name")
    return host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _matches(host: str, port: int, pattern: str) -> bool:
    name, _, only = pattern.lower().partition(":")
    if port != int(only or HTTPS_PORT):
        return False
    return host.endswith(name[1:]) and len(host) >= len(name) if name.startswith("*.") else host == name


def _quoted(url: str) -> str:
    """What an error repeats of a URL: neither its query, where signatures stand, nor a password."""
    if len(url) > MAX_URL:
        return shown(url[:20], 40)
    return shown(re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0]))


def _check_head(answer: httpcore.Response, place: str, max_bytes: int) -> None:
    """Refuse what the body need not be read for."""
    headers = [(name.lower(), value.strip().lower()) for name, value in answer.headers]
    if 300 <= answer.status < 400:
        raise InvalidRequest(f"{place} is not fetched: it redirects ({answer.status}); name the final URL")
    if answer.status != 200:
        raise InvalidRequest(f"{place} could not be fetched: its host answered {answer.status}; {FITS}")
    if any(name == b"content-encoding" and value not in (b"", b"identity") for name, value in headers):
        raise InvalidRequest(f"{place} is not fetched: its host compresses it although asked not to; {FITS}")
    if any(name == b"content-length" and int(value) > max_bytes for name, value in headers):
        raise _too_large(place, max_bytes)


def _too_large(place: str, max_bytes: int) -> InvalidRequest:
    return InvalidRequest(f"{place} is larger than {max_bytes} bytes; a smaller file fits")


class _Checked(httpcore.AnyIOBackend):
    """How httpcore connects: to one of the addresses that were checked, whatever the host's name says by then."""

    def __init__(self, addresses: Sequence[str], permitted: Callable[[str], bool]) -> None:
        self._addresses, self._permitted = addresses, permitted
        self._open: list[httpcore.AsyncNetworkStream] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """httpcore leaves a connection open whose TLS handshake was cancelled, as by a timeout."""
        for stream in self._open:
            await stream.aclose()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's word for it)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """`host` is not looked at. Raises httpcore.ConnectError, also if one of several addresses is not permitted."""
        if not self._addresses or not all(map(self._permitted, self._addresses)):
            raise httpcore.ConnectError(f"{host} has the addresses {list(self._addresses)}, not all of them permitted")
        error: Exception = httpcore.ConnectError(f"{host} was not tried")
        for address in self._addresses[:MAX_ADDRESSES]:
            try:
                stream = await super().connect_tcp(address, port, CONNECT_SECONDS)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                error = exc
                continue
            self._open.append(stream)
            peer = stream.get_extra_info("socket").getpeername()[0]
            if self._permitted(peer) and ipaddress.ip_address(peer) == ipaddress.ip_address(address):
                return stream
            raise httpcore.ConnectError(f"{host} at {address} led to {peer}")
        raise error


async def _resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, by the system's resolver. Raises OSError."""
    try:
        name = str(ipaddress.ip_address(host))
    except ValueError:
        name = f"{host}."  # a whole name: a pod's search path would ask the cluster's own domains first
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(_resolvers(), lambda: socket.getaddrinfo(name, port, type=socket.SOCK_STREAM))
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


@cache
def _resolvers() -> ThreadPoolExecutor:
    """Threads of their own: a name whose server is silent holds one for half a minute."""
    return ThreadPoolExecutor(AT_ONCE, "resolve")


@lru_cache(maxsize=4)
def _slots(loop: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    """A semaphore belongs to the loop that waits for it."""
    return asyncio.Semaphore(AT_ONCE)


async def _trust() -> ssl.SSLContext:
    return await asyncio.to_thread(_system_trust)  # reading the authorities takes tens of milliseconds


@cache
def _system_trust() -> ssl.SSLContext:
    """The system's authorities and certifi's, as for the Hub. AWS_CA_BUNDLE is for the object store only."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context

"""Pictures by URL, against real TLS servers and a real DNS server that changes its mind.

They reach only this machine, so most pass a predicate of their own for what is public. The defaults as they are, in a
network of its own: tests/e2e/test_urls_resolver.py.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpcore
import pytest

from runtime.errors import InvalidRequest
from runtime.urls import fetch_picture, is_public
from tests.server.far_hosts import Authority, Host, answer, ask, dns_server, head, tls_host

NAME = "pictures.example.com"
BODY = bytes(range(256)) * 300
Fetch = Callable[..., bytes]


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def here(*addresses: str) -> Callable[[str, int], Any]:
    async def resolve(_: str, __: int) -> list[str]:
        return list(addresses)

    return resolve


@pytest.fixture
def fetch(authority: Authority) -> Fetch:
    """`fetch(host, path)`: what is at a path of a host on 127.0.0.1, which counts as public here."""

    def get(host: Host, path: str = "/cat.png", **changed: Any) -> bytes:
        arguments = {
            "field": "image_url",
            "hosts": (f"{NAME}:{host.port}",),
            "max_bytes": 2**20,
            "seconds": 60.0,
            "resolve": here("127.0.0.1"),
            "permitted": "127.0.0.1".__eq__,
            "trust": authority.context,
        }
        return asyncio.run(fetch_picture(f"https://{NAME}:{host.port}{path}", **{**arguments, **changed}))

    return get


@pytest.fixture
def serving(authority: Authority) -> Iterator[Callable[..., Host]]:
    with ExitStack() as stack:

        def start(behave: Callable[[ssl.SSLSocket], None], *names: str, **place: Any) -> Host:
            return stack.enter_context(tls_host(authority.issue(*(names or (NAME,))), behave, **place))

        yield start


def refused(run: Callable[[], Any]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        run()
    message = str(caught.value)
    assert message.startswith("image_url: ") and len(message) < 500
    return message


# --- what is fetched


def test_a_picture_comes_as_it_is(serving: Callable[..., Host], fetch: Fetch) -> None:
    host = serving(answer(BODY))
    assert fetch(host, "/a%20b/cat.png?sig=abc%2F&x=1#part") == BODY
    ((name, asked),) = host.asked
    lines = asked.decode().split("\r\n")
    assert name == NAME and lines[0] == "GET /a%20b/cat.png?sig=abc%2F&x=1 HTTP/1.1"
    told = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    assert told.pop("user-agent").startswith("diffusion-runtime/")
    assert told == {
        "host": f"{NAME}:{host.port}",
        "accept": "image/*",
        "accept-encoding": "identity",
        "connection": "close",
    }


@pytest.mark.parametrize("ending", ["chunked", "close"])
def test_a_body_without_a_length(serving: Callable[..., Host], fetch: Fetch, ending: str) -> None:
    def chunked(sock: ssl.SSLSocket) -> None:
        sock.sendall(head("200 OK", "Transfer-Encoding: chunked"))
        for start in range(0, len(BODY), 7000):
            part = BODY[start : start + 7000]
            sock.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        sock.sendall(b"0\r\n\r\n")

    def closed(sock: ssl.SSLSocket) -> None:
        sock.sendall(head("200 OK") + BODY)
        with suppress(OSError):
            sock.unwrap()

    assert fetch(serving(chunked if ending == "chunked" else closed)) == BODY


def test_the_second_address_where_the_first_is_dead(serving: Callable[..., Host], fetch: Fetch) -> None:
    host = serving(answer(BODY), address="127.0.0.3")
    found = fetch(host, resolve=here("127.0.0.2", "127.0.0.3"), permitted=("127.0.0.2", "127.0.0.3").__contains__)
    assert found == BODY


def test_many_at_once_take_their_turns(serving: Callable[..., Host], authority: Authority) -> None:
    now, most, lock, together = 0, 0, threading.Lock(), threading.Event()

    def slow(sock: ssl.SSLSocket) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if most >= 2:
                together.set()
        together.wait(30)
        time.sleep(0.1)
        with lock:
            now -= 1
        answer(BODY)(sock)

    host = serving(slow)

    async def all_of_them() -> list[bytes]:
        url, hosts = f"https://{NAME}:{host.port}/x", (f"{NAME}:{host.port}",)
        options: dict[str, Any] = {"resolve": here("127.0.0.1"), "permitted": "127.0.0.1".__eq__, "seconds": 60.0}
        one = (fetch_picture(url, "image_url", hosts, 2**20, **options, trust=authority.context) for _ in range(20))
        return await asyncio.gather(*one)

    assert asyncio.run(all_of_them()) == [BODY] * 20
    assert 2 <= most <= 8


def test_a_caller_who_leaves_ends_the_transfer(serving: Callable[..., Host], authority: Authority) -> None:
    begun, gone = threading.Event(), threading.Event()

    def drip(sock: ssl.SSLSocket) -> None:
        sock.sendall(head("200 OK", "Content-Length: 1000000"))
        begun.set()
        with suppress(OSError):
            while sock.send(b"x"):
                time.sleep(0.02)
        gone.set()

    host = serving(drip)

    async def leave() -> None:
        options: dict[str, Any] = {"resolve": here("127.0.0.1"), "permitted": "127.0.0.1".__eq__, "seconds": 60.0}
        url, hosts = f"https://{NAME}:{host.port}/x", (f"{NAME}:{host.port}",)
        task = asyncio.create_task(fetch_picture(url, "image_url", hosts, 2**20, **options, trust=authority.context))
        assert await asyncio.to_thread(begun.wait, 60)
        await asyncio.sleep(0.1)  # for the head to come and some of the body
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert gone.wait(60)


# --- which URLs are asked for at all

ALLOWED = ("pictures.example.com", "*.cdn.example.com", "other.example.com:8443")


def attempt(url: str, hosts: tuple[str, ...] = ALLOWED) -> list[tuple[str, int]]:
    """Where a fetch of `url` would have gone to; nowhere is an error."""
    asked: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return []

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(fetch_picture(url, "image_url", hosts, 1000, resolve=resolve))
    if not asked:
        raise caught.value
    return asked


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://pictures.example.com/x", ("pictures.example.com", 443)),
        ("https://pictures.example.com", ("pictures.example.com", 443)),
        ("HTTPS://Pictures.Example.COM:443/x", ("pictures.example.com", 443)),
        ("https://a.cdn.example.com/x", ("a.cdn.example.com", 443)),
        ("https://b.a.cdn.example.com/x", ("b.a.cdn.example.com", 443)),
        ("https://other.example.com:8443/x", ("other.example.com", 8443)),
    ],
)
def test_hosts_that_are_named(url: str, place: tuple[str, int]) -> None:
    assert attempt(url) == [place]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://pictures.example.com/x", "only https:// is"),
        ("ftp://pictures.example.com/x", "only https:// is"),
        ("//pictures.example.com/x", "only https:// is"),
        ("file:///etc/passwd", "only https:// is"),
        ("pictures.example.com/x", "only https:// is"),
        ("", "no URL"),
        ("https://", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://pictures.example.com:8443/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://pictures.example.com:80/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://pictures.example.com:0/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://pictures.example.com:99999/x", "no URL"),
        ("https://pictures.example.com:x/x", "no URL"),
        ("https://[::1/x", "no URL"),
        ("https://[::1]/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://other.example.com/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://cdn.example.com/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://evilcdn.example.com/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://.cdn.example.com/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://a..cdn.example.com/x", "its host is no name"),
        ("https://..cdn.example.com/x", "its host is no name"),
        ("https://%61.cdn.example.com/x", "its host is no name"),
        ("https://" + "a" * 64 + ".cdn.example.com/x", "its host is no name"),
        ("https://" + "a." * 130 + "cdn.example.com/x", "its host is no name"),
        ("https://pictures.example.com.evil.test/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://pictures.example.com./x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://evil.test/?https://pictures.example.com/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://evil.test#pictures.example.com", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://127.0.0.1/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://2130706433/x", "not in ALLOWED_IMAGE_HOSTS"),
        ("https://pictures.example.com@evil.test/x", "user name"),
        ("https://user:verysecret@pictures.example.com/x", "user name"),
        ("https://@pictures.example.com/x", "user name"),
        ("https://pictures.example.com\\@evil.test/x", "no URL"),
        ("https:\\\\pictures.example.com/x", "no URL"),
        ("https://pictures.example.com/a b", "no URL"),
        (" https://pictures.example.com/", "no URL"),
        ("https://pictures.example.com/\r\nHost: evil.test", "no URL"),
        ("https://pictures.example.com/x\0", "no URL"),
        ("https://píctures.example.com/x", "no URL"),
        ("https://pictures.example.com/é", "no URL"),
        ("https://pictures.example.com/\ud800", "no URL"),
        ("https://pictures.example.com/" + "x" * 9000, "at most 8192"),
    ],
)
def test_urls_that_are_not_asked_for(url: str, says: str) -> None:
    message = refused(lambda: attempt(url))
    assert says in message
    assert "verysecret" not in message


def test_off_unless_hosts_are_named() -> None:
    message = refused(lambda: attempt("https://pictures.example.com/cat.png?sig=verysecret", ()))
    assert "https://pictures.example.com/cat.png" in message and "ALLOWED_IMAGE_HOSTS names no host" in message
    assert "verysecret" not in message


# --- which addresses are connected to


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("169.254.169.254", "169.254.0.1", "100.64.0.1", "100.100.100.200", "100.127.255.255"),
        *("192.0.0.1", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1"),
        *("224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
        *("::", "::1", "::127.0.0.1", "::8.8.8.8", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254"),
        *("ff02::1", "ff0e::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::", "3fff::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::ffff:0:8.8.8.8"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::10.1.2.3", "64:ff9b:1::808:808", "5f00::1", "4000::1"),
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2606:4700::1%1"),
        *("", "localhost", "127.1", "0x7f000001", "8.8.8.8:443"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "172.32.0.1",
        "100.128.0.1",
        "2606:4700::1",
        "2a00:1450::1",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
    ],
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


def unreachable(message: str) -> str:
    """The one message of everything that goes wrong before a host has answered over TLS, without the URL's port."""
    assert "its host must have public addresses only and answer there" in message
    return message[message.index(" could not be fetched") :]


def test_by_default_this_machine_is_not_public(
    serving: Callable[..., Host], fetch: Fetch, caplog: pytest.LogCaptureFixture
) -> None:
    host = serving(answer(b"internal"), "127.0.0.1", "localhost")
    with caplog.at_level(logging.INFO):
        for name in ("127.0.0.1", "localhost"):  # a name for this machine, by the system's resolver
            with pytest.raises(InvalidRequest) as caught:
                url = f"https://{name}:{host.port}/"
                asyncio.run(fetch_picture(url, "image_url", (f"{name}:{host.port}",), 1000))
            unreachable(str(caught.value))
            assert "127.0.0.1]" not in str(caught.value)
    assert host.connections == 0
    assert "not all of them permitted" in json.dumps([r.__dict__["fields"] for r in caplog.records])
    unreachable(refused(lambda: fetch(host, permitted=None)))
    assert host.connections == 0


def test_one_private_address_among_several_is_enough(serving: Callable[..., Host], fetch: Fetch) -> None:
    host = serving(answer(BODY))
    for addresses in (("127.0.0.1", "127.0.0.2"), ("127.0.0.2", "127.0.0.1"), ()):
        unreachable(refused(lambda: fetch(host, resolve=here(*addresses))))  # noqa: B023
    assert host.connections == 0


def neighbours(serving: Callable[..., Host]) -> tuple[Host, Host]:
    """On 127.0.0.2 and on 127.0.0.1, at the same port."""
    for _ in range(20):
        public = serving(answer(BODY), address="127.0.0.2")
        with suppress(OSError):  # where somebody else has that port
            return public, serving(answer(b"internal"), address="127.0.0.1", port=public.port)
    raise AssertionError("no port that is free on both")


@pytest.mark.parametrize("answers", [(["127.0.0.2"], ["127.0.0.1"]), (["127.0.0.2"], ["127.0.0.1"], ["127.0.0.2"])])
def test_a_dns_server_that_changes_its_answer_gains_nothing(
    serving: Callable[..., Host], fetch: Fetch, answers: tuple[list[str], ...]
) -> None:
    """127.0.0.2 stands for a public address, 127.0.0.1 for the pod's own services, with a certificate as good."""
    public, private = neighbours(serving)
    with dns_server(*answers) as names:

        async def resolve(host: str, _: int) -> list[str]:
            return ask(names.address, host)

        assert fetch(public, resolve=resolve, permitted="127.0.0.2".__eq__) == BODY
        assert names.questions == [NAME], "a name is asked for once"
        assert ask(names.address, NAME) == ["127.0.0.1"], "by now it says otherwise"
        if len(answers) == 2:  # and whoever comes now is refused
            unreachable(refused(lambda: fetch(public, resolve=resolve, permitted="127.0.0.2".__eq__)))
    assert (public.connections, private.connections) == (1, 0)


def test_the_other_end_of_the_connection_is_checked(
    serving: Callable[..., Host], fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever may lie between the check and the socket: here the library connects to somewhere else."""
    host = serving(answer(b"internal"))
    real = httpcore.AnyIOBackend.connect_tcp

    async def elsewhere(self: Any, address: str, *rest: Any) -> Any:
        return await real(self, "127.0.0.1", *rest)

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", elsewhere)
    for permitted in ("127.0.0.2".__eq__, ("127.0.0.1", "127.0.0.2").__contains__):
        unreachable(refused(lambda: fetch(host, resolve=here("127.0.0.2"), permitted=permitted)))  # noqa: B023
    assert host.asked == []


def test_one_message_for_all_that_fails_before_a_host_answers(
    serving: Callable[..., Host], fetch: Fetch, authority: Authority, tmp_path: Path
) -> None:
    good = serving(answer(BODY))
    silent = socket.create_server(("127.0.0.1", 0))  # connects, then says nothing
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = Host(closed.getsockname()[1])

    async def no_name(*_: Any) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    async def no_answer(*_: Any) -> list[str]:
        await asyncio.sleep(60)
        return []

    def gibberish(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"220 mail.internal ESMTP\r\n")

    with silent:
        cases = {
            "no name": lambda: fetch(good, resolve=no_name, seconds=1),
            "no answer of the DNS server": lambda: fetch(good, resolve=no_answer, seconds=1),
            "private": lambda: fetch(good, permitted=None, seconds=1),
            "refused": lambda: fetch(dead, seconds=1),
            "silent": lambda: fetch(Host(silent.getsockname()[1]), seconds=1),
            "another authority": lambda: fetch(good, trust=Authority(tmp_path).context, seconds=1),
            "another name": lambda: fetch(serving(answer(BODY), "evil.example.com"), seconds=1),
            "TLS, then silence": lambda: fetch(serving(lambda _: time.sleep(1.5)), seconds=1),
            "no HTTP": lambda: fetch(serving(gibberish), seconds=1),
            "closed": lambda: fetch(serving(lambda _: None), seconds=1),
        }
        said = {name: unreachable(refused(run)) for name, run in cases.items()}
    assert len(set(said.values())) == 1, said


# --- what a host may answer


@pytest.mark.parametrize(
    "status",
    [
        "301 Moved Permanently",
        "302 Found",
        "303 See Other",
        "307 Temporary Redirect",
        "308 Permanent Redirect",
        "304 Not Modified",
    ],
)
def test_redirects_are_not_followed(serving: Callable[..., Host], fetch: Fetch, status: str) -> None:
    inside = serving(answer(b"internal"))
    host = serving(answer(b"", status, f"Location: https://{NAME}:{inside.port}/secret"))
    message = refused(lambda: fetch(host))
    assert f"redirects ({status[:3]}); name the final URL" in message and "secret" not in message
    assert inside.connections == 0 and len(host.asked) == 1


@pytest.mark.parametrize(
    "status", ["404 Not Found", "401 Unauthorized", "500 Oops", "204 No Content", "206 Partial Content"]
)
def test_other_answers(serving: Callable[..., Host], fetch: Fetch, status: str) -> None:
    assert f"its host answered {status[:3]}" in refused(lambda: fetch(serving(answer(b"", status))))


def test_size_is_known_before_the_body(serving: Callable[..., Host], fetch: Fetch) -> None:
    over = threading.Event()

    def large(sock: ssl.SSLSocket) -> None:
        sock.sendall(head("200 OK", f"Content-Length: {10**12}"))
        over.wait(90)  # no byte of it before the refusal

    assert "larger than 1000 bytes" in refused(lambda: fetch(serving(large), max_bytes=1000))
    over.set()
    host = serving(answer(BODY))
    assert fetch(host, max_bytes=len(BODY)) == BODY
    assert f"larger than {len(BODY) - 1} bytes" in refused(lambda: fetch(host, max_bytes=len(BODY) - 1))


def test_a_body_without_end_is_cut(serving: Callable[..., Host], fetch: Fetch) -> None:
    sent = 0

    def endless(sock: ssl.SSLSocket) -> None:
        nonlocal sent
        sock.sendall(head("200 OK"))
        with suppress(OSError):
            while True:
                sent += sock.send(b"x" * 65536)

    assert "larger than 1048576 bytes" in refused(lambda: fetch(serving(endless)))
    assert sent < 2**24, "what the sockets hold, and no more"


def test_a_slow_drip_ends_in_time(serving: Callable[..., Host], fetch: Fetch) -> None:
    def drip(sock: ssl.SSLSocket) -> None:
        sock.sendall(head("200 OK", "Content-Length: 1000000"))
        with suppress(OSError):
            while sock.send(b"x"):  # hours
                time.sleep(0.05)

    def drip_head(sock: ssl.SSLSocket) -> None:
        with suppress(OSError):
            while sock.send(b"H"):
                time.sleep(0.05)

    # The first has seconds enough for its head to come on a slow machine.
    for behave, says, seconds in ((drip, "took longer than 3 s", 3), (drip_head, "answer there within 1 s", 1)):
        host, begun = serving(behave), time.monotonic()
        assert says in refused(lambda: fetch(host, seconds=seconds))  # noqa: B023
        assert time.monotonic() - begun < 30


def test_an_endless_head_is_cut(serving: Callable[..., Host], fetch: Fetch) -> None:
    sent = 0

    def endless(sock: ssl.SSLSocket) -> None:
        nonlocal sent
        sock.sendall(b"HTTP/1.1 200 OK\r\n")
        with suppress(OSError):
            while True:
                sent += sock.send(b"X-Filler: " + b"x" * 4096 + b"\r\n")

    unreachable(refused(lambda: fetch(serving(endless))))
    assert sent < 2**24


def test_a_body_that_breaks_off(serving: Callable[..., Host], fetch: Fetch) -> None:
    def half(sock: ssl.SSLSocket) -> None:
        sock.sendall(head("200 OK", f"Content-Length: {len(BODY)}") + BODY[:1000])

    assert "the transfer broke off" in refused(lambda: fetch(serving(half)))


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "GZIP", "identity, gzip", "zstd"])
def test_a_compressed_body_is_refused_unread(serving: Callable[..., Host], fetch: Fetch, encoding: str) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    host = serving(answer(bomb, "200 OK", f"Content-Encoding: {encoding}"))
    assert "compresses it although asked not to" in refused(lambda: fetch(host))


def test_a_bomb_that_does_not_say_so_stays_packed(serving: Callable[..., Host], fetch: Fetch) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    assert fetch(serving(answer(bomb))) == bomb
    assert fetch(serving(answer(bomb, "200 OK", "Content-Encoding: identity"))) == bomb

    def in_transfer(sock: ssl.SSLSocket) -> None:
        sock.sendall(head("200 OK", "Transfer-Encoding: gzip, chunked") + b"5\r\nhello\r\n0\r\n\r\n")

    refused(lambda: fetch(serving(in_transfer)))


def test_no_proxy_no_cookie_no_password(
    serving: Callable[..., Host], fetch: Fetch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = serving(answer(b"from the proxy"), "127.0.0.1")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    (tmp_path / ".netrc").write_text(f"machine {NAME} login me password verysecret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    host = serving(answer(BODY, "200 OK", "Set-Cookie: a=b; Path=/"))
    assert fetch(host) == fetch(host) == BODY
    assert proxy.connections == 0
    assert not any(b"cookie" in asked.lower() or b"authorization" in asked.lower() for _, asked in host.asked)

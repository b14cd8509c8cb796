"""URLs of every shape: refused in few words, or asked for at a host and port that the operator named. No network."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidRequest
from runtime.urls import fetch_picture, is_public
from tests.fuzz.inputs import checked, more

HOSTS = ("pictures.example.com", "*.cdn.example.com", "other.example.com:8443")
PARTS = (
    *(
        "https://",
        "http://",
        "https:",
        "//",
        "/",
        "\\",
        "@",
        ":",
        "?",
        "#",
        "[",
        "]",
        "%",
        "%2e",
        "%40",
        ".",
        "..",
        "-",
    ),
    *("pictures.example.com", "a.cdn.example.com", "cdn.example.com", "other.example.com", "8443", "443", "0", "user"),
    *("127.0.0.1", "[::1]", "2130706433", "\t", "\r\n", " ", "\0", "é", "０", "℀", "。", "\ud800", "evil.test"),
)
urls = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=10).map("".join),
    st.text().map("https://".__add__),
    st.text().map("https://pictures.example.com".__add__),
    st.text(),
)


@more(10)
@given(url=urls)
def test_urls(url: str) -> None:
    asked: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return []  # which ends it

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(fetch_picture(url, "image_url", HOSTS, 1000, resolve=resolve))
    assert checked(str(caught.value)).startswith("image_url: ")
    for host, port in asked:
        named = host == HOSTS[0] or host.endswith(".cdn.example.com")
        assert (named and port == 443) or (host, port) == ("other.example.com", 8443)


@more(10)
@given(address=st.one_of(st.text(), st.ip_addresses().map(str)))
def test_addresses(address: str) -> None:
    assert is_public(address) in (True, False)

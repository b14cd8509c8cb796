"""The page's files over HTTP, without a browser."""

from __future__ import annotations

import http.client
import re

from runtime.access import is_open
from tests.conftest import ROOT, Serve

FOLDER = ROOT / "runtime" / "ui"
KEY = "key-of-the-page"


def test_the_page_is_small_and_self_contained() -> None:
    files = sorted(FOLDER.iterdir())
    assert {path.suffix for path in files} == {".html", ".js", ".css"}
    assert sum(path.stat().st_size for path in files) < 40 * 1024
    for path in files:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|\bstyle=|\bonclick=|innerHTML|eval\(", text), path.name


def test_headers_and_revalidation(serve: Serve) -> None:
    server = serve("sd15", "--api_key", KEY)
    status, headers, body = server.request("GET", "/ui/")  # no key is needed for what holds no secret
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    names = re.findall(r'(?:src|href)="([\w.]+)"', body.decode())
    assert {"app.js", "style.css"} <= set(names)
    for name in ["", *(path.name for path in FOLDER.iterdir() if path.suffix != ".html")]:
        status, headers, body = server.request("GET", f"/ui/{name}")
        assert status == 200 and body == (FOLDER / (name or "index.html")).read_bytes()
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-cache"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        status, again, body = server.request("GET", f"/ui/{name}", headers={"If-None-Match": headers["etag"]})
        assert (status, body, again["etag"]) == (304, b"", headers["etag"])
        assert server.request("HEAD", f"/ui/{name}")[0] == 200
    for name in ("index.html", "app.py", "..%2Fmodel.py", "__init__.py", "x/app.js"):
        assert server.request("GET", f"/ui/{name}", headers={"X-API-Key": KEY})[0] == 404
    assert server.request("POST", "/ui/", b"x", headers={"X-API-Key": KEY})[0] == 405


def test_what_of_the_page_is_open() -> None:
    for path in ("/ui", "/ui/", "/ui/app.js", "/ui/style.css"):
        assert is_open("GET", path) and is_open("HEAD", path) and not is_open("POST", path)
    for path in ("/uix", "/ui/x", "/ui/x/app.js", "//ui", "/ui//app.js", "/ui/../v2/models", "/ui/app.js/..", "/x/ui"):
        assert not is_open("GET", path)


def test_the_redirect_holds_below_a_prefix(serve: Serve) -> None:
    server = serve("sd15", "--api_key", KEY)
    connection = http.client.HTTPConnection(server.http.removeprefix("http://"))
    connection.request("GET", "/ui")
    response = connection.getresponse()
    assert (response.status, response.headers["location"]) == (307, "ui/")
    connection.close()


def test_it_can_be_switched_off(serve: Serve) -> None:
    server = serve("sd15", ENABLE_UI="false")
    for path in ("/ui", "/ui/", "/ui/app.js", "/ui/style.css"):
        status, answer = server.json("GET", path)
        assert status == 404 and "ENABLE_UI" in answer["error"]
    assert server.predict({"prompt": "a dog", "seed": 1})

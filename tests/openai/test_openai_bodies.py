"""Bodies of the OpenAI routes, good and bad: JSON, forms of every make, and what no client should send."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

import pytest

from runtime.errors import InvalidRequest
from runtime.protocol.form import MAX_PARTS, fingerprint, parse_form
from tests.conftest import Serve, Server
from tests.openai.clients import error_of, form, picture, size_of

SMALL = {"prompt": "a red fox", "num_inference_steps": 2, "seed": 7}
GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"


def post(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    status, _, content = server.request("POST", path, body, headers)
    return status, content


def drawn(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> list[bytes]:
    status, content = post(server, path, body, headers)
    told = json.loads(content)
    assert status == 200, told
    return [base64.b64decode(item["b64_json"]) for item in told["data"]]


# --- forms, as bytes


def test_a_form() -> None:
    body, headers = form(
        [
            ("prompt", "ein Fuchs,\r\ngrößer"),
            ("image[]", b"\x89PNG\r\n--xyzz\r\n"),
            ("image[]", b""),
            ("url", "a"),
            ("url", "b"),
            ("input_reference[image_url]", "c"),
        ]
    )
    assert parse_form(body, headers["Content-Type"]) == {
        "prompt": "ein Fuchs,\ngrößer",
        "image": [b"\x89PNG\r\n--xyzz\r\n", b""],
        "url": ["a", "b"],
        "input_reference": {"image_url": "c"},
    }


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n--b--\r\n', "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n--b--', 'Multipart/Form-Data; boundary="b"'),
        (b"--b \t\r\ncontent-disposition:form-data;name=x\r\n\r\n1\r\n--b--", "multipart/form-data;boundary=b"),
        (
            b'preamble\r\n--b\r\nX-A: b\r\nContent-Disposition: form-data;\r\n name="x"\r\n\r\n1\r\n--b--epilogue',
            "multipart/form-data; charset=utf-8; boundary=b",
        ),
    ],
)
def test_forms_of_other_makes(body: bytes, content_type: str) -> None:
    assert parse_form(body, content_type) == {"x": "1"}


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "multipart/form-data; boundary=b"),
        (b"--b--", "multipart/form-data"),
        (b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1', "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n--b', "multipart/form-data; boundary=b"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\n1\r\n--b--", "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name=""\r\n\r\n1\r\n--b--', "multipart/form-data; boundary=b"),
        (b"--b\r\n\r\n1\r\n--b--", "multipart/form-data; boundary=b"),
        (b"--b\r\nno end of the header\r\n--b--", "multipart/form-data; boundary=b"),
        (b"--b\r\nX: " + b"y" * 10_000 + b"\r\n\r\n1\r\n--b--", "multipart/form-data; boundary=b"),
        (b"--b\r\nX: y\r\n\r\n" * (MAX_PARTS + 1) + b"--b--", "multipart/form-data; boundary=b"),
        (b'{"prompt": "x"}', "multipart/form-data; boundary=b"),
    ],
)
def test_broken_forms(body: bytes, content_type: str, serve: Serve) -> None:
    with pytest.raises(InvalidRequest, match=r"^body: "):
        parse_form(body, content_type)
    status, content = post(serve("sd15"), GENERATE, body, {"Content-Type": content_type})
    error = error_of(status, content)
    assert status == 400 and error["param"] is None and error["message"].startswith("body: ")


def test_large_forms_are_read_fast() -> None:
    near = b"\r\n--xyzz" * 5_000_000  # nearly the boundary, everywhere
    body, headers = form([("image", near)])
    began = time.thread_time()  # not of those that the machine is shared with
    assert parse_form(body, headers["Content-Type"]) == {"image": near}
    assert time.thread_time() - began < 5


def test_the_fingerprint_is_the_fields() -> None:
    fields: list[tuple[str, str | bytes]] = [("prompt", "x"), ("image", b"1"), ("image", b"2")]
    one, other = form(fields, "one"), form(fields, "other")
    changed = form([("prompt", "x"), ("image", b"1"), ("image", b"3")], "one")
    marks = [fingerprint(parse_form(body, headers["Content-Type"])) for body, headers in (one, other, changed)]
    assert marks[0] == marks[1] != marks[2]


# --- bodies that are served


def test_a_form_is_the_same_request(serve: Serve) -> None:
    server = serve("sd15")
    fields = {**SMALL, "n": 2, "guidance_scale": 5.5, "size": "64x96", "output_format": "webp"}
    body, headers = form([(name, str(value)) for name, value in fields.items()])
    assert drawn(server, GENERATE, body, headers) == drawn(server, GENERATE, fields)


def test_json_edits_take_pictures_in_every_form(serve: Serve) -> None:
    server, encoded = serve("glm-image"), base64.b64encode(picture()).decode()
    address = f"data:image/png;base64,{encoded}"
    ways: list[dict[str, Any]] = [
        {"image": encoded},
        {"image": [encoded]},
        {"images": [address]},
        {"image": {"image_url": address}},
        {"images": [{"image_url": address}]},
        {"images": [{"type": "image_url", "image_url": {"url": address}}]},
        {"url": address},
    ]
    made = [drawn(server, EDIT, {**SMALL, **way}) for way in ways]
    body, headers = form([*((name, str(value)) for name, value in SMALL.items()), ("image", picture())])
    made.append(drawn(server, EDIT, body, headers))
    assert len({tuple(pictures) for pictures in made}) == 1


def test_a_file_for_an_answer(serve: Serve) -> None:
    server = serve("sd15")
    status, headers, content = server.request("POST", GENERATE, {**SMALL, "response_format": "file"})
    assert (status, headers["content-type"]) == (200, "image/png") and size_of(content) == (64, 64)
    assert re.search(r'attachment; filename="\w+\.png"', headers["content-disposition"])
    assert [content] == drawn(server, GENERATE, SMALL)
    assert error_of(*post(server, GENERATE, {**SMALL, "response_format": "file", "n": 2}))["param"] == "n"


@pytest.mark.parametrize("way", [{"stream": True}, {"response_format": "url"}, {}])
def test_a_dry_run(serve: Serve, way: dict[str, Any]) -> None:
    server = serve("sd15")
    status, told = server.json("POST", GENERATE, {**SMALL, **way}, {"X-Dry-Run": "1"})
    assert status == 200 and told["dry_run"] is True and told["data"] == []
    assert told["size"] == "64x64" and told["predicted_seconds"] >= 0
    assert server.json("POST", GENERATE, {**SMALL, **way, "dry_run": True})[1]["dry_run"] is True


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/x-www-form-urlencoded", ""])
def test_json_of_any_content_type(serve: Serve, content_type: str) -> None:
    assert drawn(serve("sd15"), GENERATE, json.dumps(SMALL).encode(), {"Content-Type": content_type})


def test_large_answers_are_streamed_past_the_probes(serve: Serve) -> None:
    server = serve("sd15")
    status, headers, content = server.request("POST", GENERATE, {**SMALL, "n": 4, "size": "512x512"})
    assert status == 200 and int(headers["content-length"]) == len(content)
    assert len(json.loads(content)["data"]) == 4


# --- bodies that are refused


NONSENSE: list[tuple[Any, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"null", None),
    (b"[]", None),
    (b'"x"', None),
    (b"\xff\xfe", None),
    (b'{"prompt": NaN}', None),
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": "x" * 9000}, "prompt"),
    ({"prompt": "x" * 2_000_000}, "prompt"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 10**30}, "n"),
    ({"prompt": "x", "n": 10**15}, "n"),
    ({"prompt": "x", "n": -1}, "n"),
    ({"prompt": "x", "n": 1.5}, "n"),
    ({"prompt": "x", "n": True}, "n"),
    ({"prompt": "x", "n": [1]}, "n"),
    ({"prompt": "x", "size": 64}, "size"),
    ({"prompt": "x", "size": "64×64"}, "size"),
    ({"prompt": "x", "size": "-64x64"}, "size"),
    ({"prompt": "x", "size": "65x64"}, "width"),
    ({"prompt": "x", "size": "9999999x9999999"}, "width"),
    ({"prompt": "x", "size": "64x64", "width": 128}, "width"),
    ({"prompt": "x", "model": 5}, "model"),
    ({"prompt": "x", "model": "../../etc"}, None),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stream": True, "response_format": "url"}, "response_format"),
    ({"prompt": "x", "response_format": ["url"]}, "response_format"),
    ({"prompt": "x", "background": ["opaque"]}, "background"),
    ({"prompt": "x", "background": {}}, "background"),
    ({"prompt": "x", "output_compression": "50"}, "output_compression"),
    ({"prompt": "x", "output_compression": 50, "output_quality": 60, "output_format": "jpeg"}, "output_quality"),
    ({"prompt": "x", "output_format": 5}, "output_format"),
    ({"prompt": "x", "seed": "7"}, "seed"),
    ({"prompt": "x", "num_inference_steps": 10**6}, "num_inference_steps"),
    ({"prompt": "x", "timeout": 0}, "timeout"),
    ({"prompt": "x", "output_path": "/etc/passwd"}, "output_path"),
    ({"prompt": "x", "svg": {"model": "x"}}, "svg"),
    ({"prompt": "x", "frame_count": 5}, "frame_count"),
    ({"prompt": "x", "image": "abc"}, "image"),
    ({"prompt": "x", "": 5}, None),
]


@pytest.mark.parametrize("i", range(len(NONSENSE)))
def test_nonsense(serve: Serve, i: int) -> None:
    body, param = NONSENSE[i]
    status, content = post(serve("sd15"), GENERATE, body, {"Content-Type": "application/json"})
    error = error_of(status, content)
    assert error["param"] == param and len(content) < 2000
    assert error["type"] == "invalid_request_error"


PICTURES: list[Any] = [
    b"this is a text file",
    "not base64 at all!",
    "",
    5,
    {"file_id": "file-123"},
    {"image_url": 5},
    {"image_url": "https://example.com/cat.png"},
    "https://example.com/cat.png",
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "/etc/passwd",
    "data:image/svg+xml;base64,PHN2Zy8+",
    [],
    [[]],
    [None],
]


@pytest.mark.parametrize("i", range(len(PICTURES)))
@pytest.mark.parametrize("kind", ["json", "form"])
def test_pictures_that_are_none(serve: Serve, kind: str, i: int) -> None:
    value = PICTURES[i]
    server = serve("glm-image")
    if kind == "form":
        if not isinstance(value, str | bytes):
            value = json.dumps(value)
        body, headers = form([("prompt", "x"), ("image", value)])
        error = error_of(*post(server, EDIT, body, headers))
    else:
        value = value.decode() if isinstance(value, bytes) else value
        error = error_of(*post(server, EDIT, {"prompt": "x", "image": value}))
    assert error["param"] in ("image", "image_url"), error


def test_too_many_pictures(serve: Serve) -> None:
    body, headers = form([("prompt", "x"), *[("image[]", picture())] * 9])
    error = error_of(*post(serve("glm-image"), EDIT, body, headers))
    assert error["param"] == "image" and "at most 4" in error["message"]


def test_a_field_of_100_megabytes(serve: Serve) -> None:
    server = serve("sd15")
    large = "x" * 100_000_000
    body, headers = form([("prompt", large)])
    assert error_of(*post(server, GENERATE, body, headers))["param"] == "prompt"
    assert error_of(*post(server, GENERATE, {"prompt": large}))["param"] == "prompt"
    body, headers = form([("prompt", "x"), (large[:10_000_000], "x")])
    assert error_of(*post(server, GENERATE, body, headers))["param"] is None
    assert error_of(*post(server, GENERATE, {"prompt": "x", large[:10_000_000]: 1}))


def test_a_body_over_the_limit(serve: Serve) -> None:
    server = serve("sd15", MAX_BODY_BYTES="100000")
    status, content = post(server, GENERATE, {"prompt": "x" * 200_000})
    assert (status, error_of(status, content)["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("GET", "/v1/images/nothing", 404, "not_found"),
        ("POST", "/openai/v1/chat/completions", 404, "not_found"),
        ("GET", "/openai/v1/models/nobody", 404, "model_not_found"),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
        ("GET", "/openai", 404, "not_found"),
    ],
)
def test_wrong_places(serve: Serve, method: str, path: str, status: int, code: str) -> None:
    got, headers, content = serve("sd15").request(method, path, b"{}" if method != "GET" else None)
    assert (got, error_of(got, content)["code"], headers["x-should-retry"]) == (status, code, "false")


def test_kserves_routes_keep_their_shape(serve: Serve) -> None:
    server = serve("sd15")
    for path in ("/v1/models/nobody", "/v2/models/nobody", "/v1/nothing"):
        status, headers, content = server.request("GET", path)
        assert status == 404 and isinstance(json.loads(content)["error"], str)
        assert "x-should-retry" not in headers


def test_the_openapi_document_describes_the_bodies(serve: Serve) -> None:
    status, told = serve("sd15", ENABLE_DOCS_URL="true").json("GET", "/openapi.json")
    assert status == 200
    for path in (GENERATE, EDIT, "/v1/videos", "/v1/videos/sync", "/v1/video/generations"):
        content = told["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data"}
        assert content["application/json"]["schema"]["required"] == ["prompt"]
    assert not [path for path in told["paths"] if path.startswith("/openai")]

"""Keys and trace ids: what is a key, who is let in, what is open, and that no secret is ever shown."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from runtime import access
from runtime.access import OPEN_METHODS, Keys, is_open, is_signed
from runtime.errors import StartupError, Unauthorized
from runtime.logs import credential, log, logger, request_scope, trace_context, trace_id
from runtime.middleware import Guard
from runtime.settings import Settings, load

ONE, TWO, THREE = "first-key-4711", "second-key-4712", "third-key-4713"


def name_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def refused(api_key: str = "", file: Path | None = None) -> str:
    """The line that ends the start."""
    with pytest.raises(StartupError) as caught:
        Keys.from_settings(api_key, str(file) if file else None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is a key


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (ONE, [ONE]),
        (f"{ONE},{TWO}", [ONE, TWO]),
        (f" {ONE} ,\n{TWO}\r\n,, {THREE}\n", [ONE, TWO, THREE]),
        ("x" * 8, ["x" * 8]),
        ("#=/+~'\"\\", ["#=/+~'\"\\"]),
    ],
)
def test_keys_of_the_variable(text: str, keys: list[str]) -> None:
    store = Keys.from_settings(text, None)
    assert store.required
    for key in keys:
        assert store.credential({"x-api-key": key}) == store.credential(bearer(key)) == name_of(key)
    for wrong in (text if len(keys) > 1 else "", ONE[:-1], ONE + "x", ONE.upper(), "#", ","):
        assert store.credential({"x-api-key": wrong}) is None


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (f"{ONE}", [ONE]),
        (f"\n# the team's\n{ONE}\r\n\n  {TWO}\t\n   # not this: {THREE}\n", [ONE, TWO]),
        (f"\ufeff{ONE}\n", [ONE]),
        ("with,comma\n", ["with,comma"]),
    ],
)
def test_keys_of_the_file(tmp_path: Path, content: str, keys: list[str]) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content.encode())
    store = Keys.from_settings("", str(file))
    assert [store.credential(bearer(key)) for key in keys] == [name_of(key) for key in keys]
    assert store.credential(bearer(THREE)) is None
    both = Keys.from_settings(THREE, str(file))
    assert all(both.credential(bearer(key)) for key in (*keys, THREE))


@pytest.mark.parametrize("text", ["short", f"{ONE},short-7", f"{ONE},sécret-sécret", f"{ONE} {TWO}", f"{ONE}\x00"])
def test_what_is_no_key_ends_the_start(tmp_path: Path, text: str) -> None:
    lines = [refused(text)]
    (tmp_path / "keys").write_text(text.replace(",", "\n"))
    lines.append(refused(file=tmp_path / "keys"))
    assert lines[0].startswith("API_KEY: key ") and "keys: line " in lines[1]
    for line in lines:
        assert not any(secret in line for secret in (ONE, TWO, "short-7", "short ", "sécret"))


def test_no_key_where_one_was_meant_ends_the_start(tmp_path: Path) -> None:
    assert refused(" , ,\n") == "API_KEY: holds no key"
    file = tmp_path / "keys"
    for content in (b"", b"\n\n", b"# none yet\n"):
        file.write_bytes(content)
        assert refused(file=file) == f"API_KEY_FILE={file}: holds no key"
        assert refused(ONE, file)  # even beside a variable
    file.write_bytes(b"x" * (access.LARGEST_FILE + 1))
    assert "larger than" in refused(file=file)
    assert refused(file=tmp_path / "nothing") == f"API_KEY_FILE={tmp_path / 'nothing'}: No such file or directory"
    assert "Is a directory" in refused(file=tmp_path)


def test_no_key_set_lets_everybody_in() -> None:
    for store in (Keys(), Keys.from_settings("", None)):
        assert not store.required
        assert store.require({}) == store.require(bearer("anything at all")) == ""


# --- who is let in


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"x-api-key": ONE}, ONE),
        ({"x-api-key": f" {ONE}\t"}, ONE),
        ({"authorization": f"bearer {ONE}"}, ONE),
        ({"authorization": f"BEARER   {ONE} "}, ONE),
        ({"x-api-key": ONE, **bearer("sha256~of-openshifts-proxy")}, ONE),
        ({"x-api-key": ONE, **bearer(TWO)}, ONE),
        ({"x-api-key": "wrong-key", **bearer(TWO)}, TWO),
        ({"x-api-key": "", **bearer(TWO)}, TWO),
        ({}, None),
        ({"x-api-key": ""}, None),
        ({"authorization": ""}, None),
        ({"authorization": "Bearer"}, None),
        ({"authorization": "Bearer "}, None),
        ({"authorization": ONE}, None),
        ({"authorization": f"Basic {ONE}"}, None),
        ({"authorization": f"Bearer{ONE}"}, None),
        ({"authorization": f"Bearer {ONE} {TWO}"}, None),
        ({"x-api-key": f"Bearer {ONE}"}, None),
        ({"x-api-key": f"{ONE},{TWO}"}, None),
        ({"x-api-key": name_of(ONE)}, None),
        ({"x-api-key": hashlib.sha256(ONE.encode()).hexdigest()}, None),
        ({"x-api-key": ONE + "é\xff"}, None),
        ({"x-api-key": "\ud800" * 3}, None),
        ({"x-api-key": "x" * 100_000}, None),
        ({"api-key": ONE, "x-api_key": ONE, "cookie": f"x-api-key={ONE}"}, None),
    ],
)
def test_credentials(headers: dict[str, str], key: str | None) -> None:
    store = Keys.from_settings(f"{ONE},{TWO}", None)
    assert store.credential(headers) == (name_of(key) if key else None)


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong-key-99"}, bearer("wrong-key-99")])
def test_a_refusal_says_how_and_nothing_else(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized) as caught:
        Keys.from_settings(ONE, None).require(headers)
    text = str(caught.value)
    assert "X-API-Key" in text and "Authorization: Bearer" in text
    assert "wrong-key-99" not in text and ONE not in text and name_of(ONE) not in text


@pytest.mark.parametrize("given", [ONE, TWO, THREE, "wrong-key-99"])
def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """The right key does not end the loop, and what is compared are digests of one length."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    real = hmac.compare_digest
    store = Keys.from_settings(f"{ONE},{TWO},{THREE}", None)
    monkeypatch.setattr(access.hmac, "compare_digest", compare)
    store.credential({"x-api-key": given})
    assert len(compared) == 2 * 3  # of both headers, whichever came
    assert {len(part) for pair in compared for part in pair} == {32}


def test_a_check_costs_microseconds() -> None:
    store = Keys.from_settings(f"{ONE},{TWO},{THREE}", None)
    began = time.thread_time()  # not of those that the machine is shared with
    for _ in range(1000):
        store.credential({"x-api-key": ONE})
    assert time.thread_time() - began < 0.5


# --- secrets stay secret


def test_only_digests_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(TWO)
    store = Keys.from_settings(ONE, str(file))
    held = repr(vars(store)) + repr(store)
    assert ONE not in held and TWO not in held


def test_settings_do_not_show_the_key() -> None:
    for settings in (load(["--api_key", ONE], {}), load([], {"API_KEY": f" {ONE}\n"})):
        assert settings.api_key is not None and settings.api_key.get_secret_value() == ONE
        for shown in (repr(settings), str(settings), repr(settings.model_dump()), settings.model_dump_json()):
            assert ONE not in shown
    with pytest.raises(StartupError) as caught:
        load(["--api_key", ONE, "--http_port", "x"], {"API_KEY": TWO})
    assert ONE not in str(caught.value) and TWO not in str(caught.value)
    assert Settings().api_key is None and load([], {"API_KEY": " \n"}).api_key is None


def test_keys_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger.name)
    file = tmp_path / "keys"
    file.write_text(TWO)
    store = Keys.from_settings(ONE, str(file))
    store.credential({"x-api-key": ONE})
    file.write_text(f"{THREE}\nshort-7")
    look(store)
    told = " ".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "a key is needed" in told and "line 2" in told
    assert not any(secret in told for secret in (ONE, TWO, THREE, "short-7", name_of(ONE)))


def test_an_open_server_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger.name)
    Keys.from_settings("", None)
    assert "every route is open" in caplog.text


# --- the file changes


def look(store: Keys) -> None:
    """As if a second had passed."""
    store._next_look = 0
    store.credential({})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def rewrite(file: Path, text: str) -> None:
    file.write_text(text)


def replace(file: Path, text: str) -> None:
    other = file.with_name("new")
    other.write_text(text)
    other.rename(file)


@pytest.mark.parametrize("change", [rewrite, replace])
def test_a_changed_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, str], None]
) -> None:
    monkeypatch.setattr(access.time, "monotonic", lambda: 1000.0)
    file = tmp_path / "keys"
    file.write_text(ONE)
    store = Keys.from_settings(THREE, str(file))
    change(file, f"{TWO}\n")
    assert store.credential(bearer(TWO)) is None  # not within the second
    look(store)
    assert store.credential(bearer(TWO)) == name_of(TWO)
    assert store.credential(bearer(ONE)) is None
    assert store.credential(bearer(THREE)) == name_of(THREE)


def test_the_same_size_and_another_time_is_a_change(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("same-size-1")
    os.utime(file, ns=(1, 1))
    store = Keys.from_settings("", str(file))
    file.write_text("same-size-2")
    look(store)
    assert store.credential(bearer("same-size-2")) and not store.credential(bearer("same-size-1"))


def test_a_secret_volumes_update_is_seen(tmp_path: Path) -> None:
    """keys -> ..data/keys, ..data -> a folder; an update renames another link over ..data."""
    for name, key in (("..1", ONE), ("..2", TWO)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(key.ljust(20, "x"))
        os.utime(tmp_path / name / "keys", ns=(1, 1))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys").symlink_to("..data/keys")
    store = Keys.from_settings("", str(tmp_path / "keys"))
    assert store.credential(bearer(ONE.ljust(20, "x")))
    (tmp_path / "..tmp").symlink_to("..2")
    (tmp_path / "..tmp").rename(tmp_path / "..data")
    look(store)
    assert store.credential(bearer(TWO.ljust(20, "x"))) and not store.credential(bearer(ONE.ljust(20, "x")))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_text(""), "holds no key"),
        (lambda file: file.write_text(f"{TWO}\nshort"), "line 2 is shorter"),
        (lambda file: (file.unlink(), file.mkdir()), "Is a directory"),
    ],
    ids=["gone", "empty", "short", "folder"],
)
def test_a_file_that_cannot_be_read_leaves_the_old_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], Any], said: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(ONE)
    store = Keys.from_settings("", str(file))
    spoil(file)
    for _ in range(3):
        look(store)
        assert store.credential(bearer(ONE)) == name_of(ONE)
        assert store.credential({}) is None
    (warning,) = warnings(caplog)  # once
    assert said in warning
    if file.is_dir():
        file.rmdir()
    file.write_text(f"{THREE}\n")
    look(store)
    assert store.credential(bearer(THREE)) and not store.credential(bearer(ONE))
    file.unlink()
    look(store)
    assert len(warnings(caplog)) == 2  # and once more for the next time


def test_a_file_that_comes_back_as_it_was_is_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(ONE)
    store = Keys.from_settings("", str(file))
    file.rename(tmp_path / "away")
    look(store)
    (tmp_path / "away").rename(file)
    look(store)
    assert store.credential(bearer(ONE)) and store._complaint == ""


def test_the_file_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(ONE)
    looks, clock = [], [1000.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: clock[0])
    real = access._status
    monkeypatch.setattr(access, "_status", lambda path: (looks.append(clock[0]), real(path))[1])
    store = Keys.from_settings("", str(file))
    for _ in range(50):
        store.credential(bearer(ONE))
        clock[0] += 0.1
    assert 5 <= len(looks) <= 6


# --- what is open


OPEN = [
    "/",
    "/health",
    "/metrics",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/tiny/ready",
    "/v2/models/tiny/versions/1/ready",
    "/v1/models/tiny",
]
CLOSED = [
    "",
    "//",
    "/.",
    "/health/",
    "/openai/health",
    "/openai/v1/models/tiny",
    "/v1/jobs/x/content/0",
    "/metrics/",
    "/metrics/x",
    "//metrics",
    "/METRICS",
    "/docs",
    "/openapi.json",
    "/v1",
    "/v1/models",
    "/v1/models/",
    "/v1/models/tiny/",
    "/v1/models/tiny:predict",
    "/v1/models/tiny/x",
    "/v1/models/../models/tiny:predict",
    "//v1/models/tiny",
    "/V1/models/tiny",
    "/v2",
    "/v2/models",
    "/v2/models/tiny",
    "/v2/models/tiny/infer",
    "/v2/models/tiny/infer/ready",
    "/v2/models/tiny/versions/1",
    "/v2/models/tiny/versions/1/infer",
    "/v2/models//ready",
    "/v2/health",
    "/v2/health/",
    "/v2/health/live/",
    "/v2/health/live/x",
    "/v2/health/../models",
    "/v2/health/live/../../models",
    "/v2/health/ready;/v2/models",
    "/v2/health/live\n",
    "/V2/health/live",
    "/v2/Health/live",
    "//v2/health/live",
    "/v2//health/live",
    "/v2/repository/index",
    "/v2/repository/models/tiny/load",
    "/x/v2/health/live",
    "/v2/health/live?x",
    "/v2/health%2flive",
    "http://x/v2/health/live",
    "*",
]


def test_what_is_open() -> None:
    assert [path for path in OPEN if not (is_open("GET", path) and is_open("HEAD", path))] == []
    assert [path for path in CLOSED if is_open("GET", path)] == []
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "ANY"):
        assert not any(is_open(method, path) for path in OPEN)
    assert {method.rpartition("/")[2] for method in OPEN_METHODS} == {"ServerLive", "ServerReady", "ModelReady"}


@pytest.mark.parametrize("path", ["/v1/jobs/image_1/content/0", "/openai/v1/jobs/video_1/content/12"])
def test_what_is_signed(path: str) -> None:
    """The route of a job's media, and it alone, takes a signature for a key; it must check what this lets through."""
    for query in (
        b"signature=x",
        b"expires=5&signature=",
        b"signature",
        b"a=b&signature=c&signature=d",
        b"%73ignature=x",
    ):
        assert is_signed("GET", path, query) and is_signed("HEAD", path, query)
        assert not is_signed("POST", path, query) and not is_signed("DELETE", path, query)
        for other in (path + "/", path + "x", path[:-2], "/v1/models", path.replace("content", "result"), f"/{path}"):
            assert not is_signed("GET", other, query), other
    for query in (b"", b"expires=5", b"Signature=x", b"x=signature", b"signatures=x"):
        assert not is_signed("GET", path, query)


# --- the guard


def guarded(keys: Keys | None, path: str, *headers: tuple[str, str], method: str = "GET") -> tuple[int, dict, bytes]:
    """What a request gets from an app that answers with the credential and the trace id that it sees."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": f"{credential.get()} {trace_id.get()}".encode()})

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run(Guard(app, 1000, keys)(scope, receive, send))
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], told, sent[1]["body"]


def test_the_guard_asks_before_the_body_is_read() -> None:
    keys = Keys.from_settings(ONE, None)
    for given in ([], [("X-API-Key", "wrong-key-99")], [("Authorization", "Bearer wrong-key-99")]):
        status, headers, body = guarded(keys, "/v2", *given, ("content-length", "99999"), method="POST")
        assert status == 401 and headers["www-authenticate"] == "Bearer" and headers["x-request-id"]
        assert list(orjson.loads(body)) == ["error"] and b"99" not in body
    status, headers, body = guarded(keys, "/v2", ("X-Api-Key", ONE))
    assert (status, body) == (200, f"{name_of(ONE)} ".encode())
    assert "www-authenticate" not in headers
    assert guarded(keys, "/v2/health/live")[::2] == (200, b" ")
    assert guarded(Keys(), "/v2", ("x-api-key", ONE))[::2] == guarded(None, "/v2")[::2] == (200, b" ")
    assert credential.get() == ""


def test_refusals_for_lack_of_a_key_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger.name)
    keys = Keys.from_settings(ONE, None)
    caplog.clear()
    for path in ("/v2/health/../models", "/x/ready"):
        guarded(keys, path, ("x-api-key", "wrong-key-99"))
        assert vars(caplog.records[-1])["fields"]["path"] == path
    assert "wrong-key-99" not in caplog.text + str([vars(record) for record in caplog.records])


def test_websockets_are_closed() -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def app(*_: Any) -> None:
        raise AssertionError

    asyncio.run(Guard(app, 1000)({"type": "websocket", "path": "/", "headers": []}, app, send))
    assert sent == ["websocket.close"]


# --- trace ids


TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize("value", [GOOD, f" {GOOD} ", f"00-{TRACE}-{PARENT}-00", f"cc-{TRACE}-{PARENT}-01-what-comes"])
def test_a_trace_id_passes_through(value: str) -> None:
    assert trace_context([("traceparent", value)]) == (TRACE, (("traceparent", value.strip()),))
    status, headers, body = guarded(None, "/v2", ("traceparent", value), ("tracestate", "a=1"))
    assert (status, body) == (200, f" {TRACE}".encode())
    assert (headers["traceparent"], headers["tracestate"]) == (value.strip(), "a=1")
    assert trace_id.get() == ""


@pytest.mark.parametrize(
    "value",
    [
        "",
        TRACE,
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}x-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-0g",
        f"00-{TRACE}-{PARENT}-01\nx: y",
        f"cc-{TRACE}-{PARENT}-01-\xe9",
        f"cc-{TRACE}-{PARENT}-01x",
        "x" * 100_000,
    ],
)
def test_what_is_no_trace_id_is_ignored(value: str) -> None:
    pairs = [("traceparent", value), ("tracestate", "a=1")]
    assert trace_context(pairs) == ("", ())
    status, headers, body = guarded(None, "/v2", *pairs)
    assert (status, body) == (200, b" ") and not {"traceparent", "tracestate"} & set(headers)


def test_two_parents_are_none() -> None:
    assert trace_context([("traceparent", GOOD), ("traceparent", GOOD)]) == ("", ())
    assert trace_context([]) == trace_context([("tracestate", "a=1")]) == ("", ())


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        (["rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"], "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        (["a=1", "b=2 , c=3"], "a=1,b=2,c=3"),
        (["tenant@system=a:b c;d,,"], "tenant@system=a:b c;d"),
        ([",".join(f"k{i}=v" for i in range(32))], ",".join(f"k{i}=v" for i in range(32))),
        ([",".join(f"k{i}=v" for i in range(33))], None),
        ([""], None),
        ([","], None),
        (["a"], None),
        (["a="], None),
        (["a=b=c"], None),
        (["A=1"], None),
        (["a=\xe9"], None),
        (["a=1\nx: y"], None),
        ([f"a={'x' * 256}"], f"a={'x' * 256}"),
        ([f"a={'x' * 257}"], None),
    ],
)
def test_trace_states(given: list[str], echoed: str | None) -> None:
    trace, headers = trace_context([("traceparent", GOOD), *(("tracestate", value) for value in given)])
    assert trace == TRACE
    assert dict(headers) == {"traceparent": GOOD, **({"tracestate": echoed} if echoed else {})}


@pytest.mark.parametrize("format", ["_JsonFormatter", "_TextFormatter"])
def test_the_trace_id_is_in_every_line_of_its_request(format: str) -> None:
    from runtime import logs

    formatter, lines = getattr(logs, format)(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(formatter.format(record))  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with request_scope("my-id", TRACE):
            credential.set("0123456789abcdef")
            log(logging.WARNING, "inside")
        log(logging.WARNING, "outside")
    finally:
        logger.removeHandler(handler)
    assert TRACE in lines[0] and "trace_id" in lines[0] and "my-id" in lines[0]
    assert "trace_id" not in lines[1]
    assert "0123456789abcdef" not in lines[0]

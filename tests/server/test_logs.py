"""Logging: what a line looks like in both formats, request ids, what is configured."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime
from typing import Any

import pytest

from runtime.logs import MAX_ID_LENGTH, log, logger, request_id, request_scope, unexpected

# Runs in a process of its own: `configure` takes over the root logger.
PRELUDE = """
import logging, sys, warnings
from runtime.logs import *
level, format = sys.argv[1:]
configure(level, format)
"""


def lines(code: str, level: str = "info", format: str = "json") -> list[str]:
    made = subprocess.run(
        [sys.executable, "-W", "default", "-c", PRELUDE + code, level, format], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == ""
    return made.stderr.splitlines()


def objects(code: str, level: str = "info") -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(code, level)]


def test_a_json_line() -> None:
    (told,) = objects("log(logging.INFO, 'ready: \"x\"\\n犬', seconds=1.5, sizes={'a': [1]}, nothing=None)")
    moment = datetime.strptime(told.pop("time"), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - moment).total_seconds()) < 60
    assert told == {
        "level": "info",
        "logger": "diffusion_runtime",
        "message": 'ready: "x"\n犬',
        "seconds": 1.5,
        "sizes": {"a": [1]},
    }


def test_every_json_line_parses() -> None:
    told = objects("""
log(logging.WARNING, "object", value=object(), path=__import__("pathlib").Path("/x"), data=b"\\xff")
log(logging.INFO, "number", value=1.5)
logging.getLogger("other").error("100%% of %s", "it")
logging.getLogger("diffusion_runtime.loader").info("loading %s", "x")
""")
    assert [entry["message"] for entry in told[:2]] == ["object", "number"]
    assert (told[2]["logger"], told[2]["level"], told[2]["message"]) == ("other", "error", "100% of it")
    assert (told[3]["logger"], told[3]["message"]) == ("diffusion_runtime.loader", "loading x")


@pytest.mark.parametrize(
    "value", ["2**80", "{1: 2}", "'\\ud800'", "float('nan')", "{'a': {(1, 2): object()}}", "[{3}]"]
)
def test_no_value_breaks_the_line(value: str) -> None:
    (told,) = objects(f"log(logging.INFO, 'x', value={value})")
    assert told["message"] == "x" and "value" in told


def test_exceptions_are_one_json_line() -> None:
    (told,) = objects("""
try:
    raise ValueError("the reason")
except ValueError as error:
    log(logging.ERROR, "failed", exc_info=error, part="x")
""")
    assert told["message"] == "failed" and told["part"] == "x"
    assert told["traceback"].startswith("Traceback (most recent call last):\n")
    assert told["traceback"].endswith("\nValueError: the reason")


def test_request_ids_in_lines() -> None:
    told = objects("""
log(logging.INFO, "before")
with request_scope("my-id"):
    log(logging.INFO, "inside")
log(logging.INFO, "after")
""")
    assert [entry.get("request_id") for entry in told] == [None, "my-id", None]


def test_text_lines() -> None:
    made = lines(
        """
log(logging.INFO, "ready", seconds=1.5, nothing=None)
with request_scope("my-id"):
    log(logging.WARNING, "slow")
try:
    raise ValueError("the reason")
except ValueError as error:
    log(logging.ERROR, "failed", exc_info=error)
""",
        format="text",
    )
    assert re.fullmatch(r"\d\d:\d\d:\d\d info    ready seconds=1\.5", made[0])
    assert re.match(r"\d\d:\d\d:\d\d warning slow", made[1])
    assert re.fullmatch(r"\d\d:\d\d:\d\d error   failed", made[2])
    assert made[3] == "Traceback (most recent call last):"
    assert made[-1] == "ValueError: the reason"


def test_auto_is_json_where_there_is_no_terminal() -> None:
    (line,) = lines("log(logging.INFO, 'x')", format="auto")
    assert json.loads(line)["message"] == "x"


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_levels(level: str, shown: list[str]) -> None:
    code = "for n in (10, 20, 30, 40): log(n, logging.getLevelName(n).lower())"
    assert [entry["message"] for entry in objects(code, level)] == shown


def test_others_loggers_and_warnings_come_in_the_same_format() -> None:
    told = objects("""
logging.getLogger("kserve").addHandler(logging.StreamHandler())
logging.getLogger("uvicorn.error").propagate = False
configure(level, format)
for name in ("kserve", "uvicorn.error", "uvicorn.access", "kserve.trace", "httpx"):
    logging.getLogger(name).info("chatter")
    logging.getLogger(name).warning("trouble")
logging.getLogger("other").info("chatter")
warnings.warn("careful")
""")
    assert [entry["logger"] for entry in told[:5]] == [
        "kserve",
        "uvicorn.error",
        "uvicorn.access",
        "kserve.trace",
        "httpx",
    ]
    assert {entry["message"] for entry in told[:5]} == {"trouble"}
    assert len(told) == 6
    assert told[5]["logger"] == "py.warnings" and "careful" in told[5]["message"]


def test_configuring_twice_does_not_write_twice() -> None:
    assert len(lines("configure(level, format)\nlog(logging.INFO, 'x')")) == 1


@pytest.mark.parametrize("given", ["my-id", "a b", "x" * MAX_ID_LENGTH])
def test_a_given_id_is_kept(given: str) -> None:
    with request_scope(given) as identity:
        assert identity == given == request_id.get()
    assert request_id.get() == ""


@pytest.mark.parametrize("given", [None, "", "x" * (MAX_ID_LENGTH + 1), "a\nb", "a\0b", "é", "犬", "\x7f"])
def test_an_id_that_could_spoil_a_header_or_a_line_is_replaced(given: str | None) -> None:
    with request_scope(given) as identity:
        assert re.fullmatch("[0-9a-f]{32}", identity)
        assert request_id.get() == identity


def test_scopes_nest_and_end_with_errors() -> None:
    with request_scope("outer"):
        with pytest.raises(ValueError), request_scope("inner"):
            raise ValueError
        assert request_id.get() == "outer"


def test_threads_have_ids_of_their_own() -> None:
    seen = []
    with request_scope("mine"):
        thread = threading.Thread(target=lambda: seen.append(request_id.get()))
        thread.start()
        thread.join()
    assert seen == [""]


def test_unexpected_errors_are_logged_and_hidden(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise RuntimeError("secret-4711")
    except RuntimeError as error:
        told = unexpected(error, "my-id")
    assert told == "internal error (request my-id); the server's log has the details"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "secret-4711" in caplog.text and "Traceback" in caplog.text


def test_fields_travel_beside_the_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger.name)
    log(logging.INFO, "100% done", seed=5, prompt=None)
    (record,) = caplog.records
    assert record.getMessage() == "100% done"
    assert vars(record)["fields"] == {"seed": 5}

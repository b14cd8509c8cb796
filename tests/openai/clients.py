"""The OpenAI SDK and curl, pointed at a server of the tests."""

from __future__ import annotations

import io
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from tests.conftest import Server

# Work that goes on until it is stopped, on a fast machine too.
ENDLESS: dict[str, Any] = {"width": 256, "height": 256, "num_inference_steps": 200, "n": 10}


def sdk(server: Server, place: str = "/v1", key: str = "not-needed", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.http + place, api_key=key, **options)


def picture(colour: str = "red", size: tuple[int, int] = (64, 64), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.size


def lines(server: Server, message: str = "refused") -> list[dict[str, Any]]:
    """The server's log lines with this message."""
    found = []
    for line in server.log.read_text().splitlines():
        if line.startswith("{") and (told := json.loads(line)).get("message") == message:
            found.append(told)
    return found


def error_of(status: int, body: bytes) -> dict[str, Any]:
    """The error in an answer that must be a refusal in OpenAI's shape."""
    told = json.loads(body)
    assert 400 <= status < 500, told
    assert told.keys() == {"error"} and told["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(told["error"]["message"], str) and isinstance(told["error"]["code"], str)
    error: dict[str, Any] = told["error"]
    return error


def until(true: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
    return found


def state_of(server: Server, identity: str) -> str | None:
    """The scheduler's state of the request with this id."""
    status, job = server.json("GET", f"/v2/models/{server.name}/requests/{identity}")
    return str(job["state"]) if status == 200 else None


def curl(*arguments: str, cwd: Path) -> bytes:
    """What real curl prints; it must succeed."""
    done = subprocess.run(["curl", "-sS", "--max-time", "120", *arguments], cwd=cwd, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def shell(script: str, cwd: Path) -> bytes:
    """What a line of documentation prints in bash."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=cwd, capture_output=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def form(fields: Sequence[tuple[str, str | bytes]], boundary: str = "xyzzy") -> tuple[bytes, dict[str, str]]:
    """A form's body and headers; bytes are files."""
    body = b""
    for name, value in fields:
        file = '; filename="a.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={boundary}"}

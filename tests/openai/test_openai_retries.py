"""Retries of synchronous requests over OpenAI's routes: the same Idempotency-Key pays once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Serve

IMAGE = {"prompt": "a fox", "num_inference_steps": 30}
VIDEO = {"prompt": "a fox", "num_inference_steps": 30, "size": "64x64", "num_frames": 5}


@pytest.mark.parametrize(
    ("family", "path", "body"),
    [
        ("sd15", "/v1/images/generations", IMAGE),
        ("wan-ti2v-5b", "/v1/video/generations", VIDEO),
        ("wan-ti2v-5b", "/v1/videos/sync", VIDEO),
    ],
)
def test_a_retry_joins_what_runs(serve: Serve, family: str, path: str, body: dict[str, Any]) -> None:
    """Without a seed in the request each generation would draw another one."""
    server = serve(family)
    key = {"Idempotency-Key": f"retry {path}", "Content-Type": "application/json"}
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: server.request("POST", path, body, key), range(2)))
    answers.append(server.request("POST", path, body, key))
    assert [status for status, _, _ in answers] == [200] * 3
    assert len({drawn(content) for _, _, content in answers}) == 1
    status, refused = server.json("POST", path, {**body, "prompt": "a cat"}, key)
    assert status == 409 and "another body" in refused["error"]["message"]
    fresh = server.request("POST", path, body, {**key, "Idempotency-Key": f"another {path}"})
    assert fresh[0] == 200 and drawn(fresh[2]) != drawn(answers[0][2])


def drawn(content: bytes) -> Any:
    return json.loads(content)["data"][0]["b64_json"] if content.startswith(b"{") else content

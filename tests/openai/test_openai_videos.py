"""Videos as jobs, with the OpenAI SDK and plain HTTP: from POST to the last byte range."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from typing import Any

import av
import openai
import pytest
from PIL import Image

from tests.conftest import Gate, Serve, Server
from tests.jobs.holds import frozen
from tests.openai.clients import ENDLESS, error_of, form, lines, picture, sdk, until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

SMALL: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 2, "fps": 8, "seed": 7}
LONG: dict[str, Any] = {"size": "480x320", "num_frames": 33, "num_inference_steps": 200, "seed": 7}
SIZE: Any = "64x96"


def frames_of(video: bytes) -> tuple[int, int, int, float]:
    """Frames, width, height and frames a second."""
    with av.open(io.BytesIO(video)) as file:
        stream = file.streams.video[0]
        frames = list(file.decode(video=0))
        assert stream.average_rate is not None
        return len(frames), frames[0].width, frames[0].height, float(stream.average_rate)


def finished(server: Server, video_id: str) -> dict[str, Any]:
    def ended() -> Any:
        status, told = server.json("GET", f"/v1/videos/{video_id}")
        assert status == 200, told
        return told if told["status"] in ("completed", "failed") else None

    told: dict[str, Any] = until(ended, 120)
    return told


def made(server: Server, **fields: Any) -> dict[str, Any]:
    """A completed video."""
    status, told = server.json("POST", "/v1/videos", {"prompt": "a fox", "size": SIZE, **SMALL, **fields})
    assert status == 200, told
    return finished(server, told["id"])


# --- the SDK


@pytest.mark.parametrize("place", ["/v1", "/openai/v1"])
def test_create_and_poll(serve: Serve, place: str) -> None:
    with sdk(serve("wan-t2v-a14b"), place) as client:
        video = client.videos.create_and_poll(
            prompt="a fox",
            model="tiny",
            size=SIZE,
            poll_interval_ms=100,
            extra_body={**SMALL, "user": "me", "response_format": "url"},
        )
        assert (video.status, video.progress, video.object, video.model) == ("completed", 100, "video", "tiny")
        assert (video.size, video.seconds, video.prompt) == ("64x96", "0.5", "a fox")
        assert video.completed_at and video.expires_at and video.created_at <= video.completed_at < video.expires_at
        assert video.error is None and video.remixed_from_video_id is None
        told = video.to_dict()
        assert (told["seed"], told["num_frames"], told["fps"], told["ignored"]) == (
            7,
            5,
            8,
            ["user", "response_format"],
        )
        assert told["inference_time_s"] > 0 and "denoise" in told["stage_durations"]  # type: ignore[operator]
        content = client.videos.download_content(video.id)
        assert frames_of(content.read()) == (5, 64, 96, 8.0)
        assert content.response.headers["content-type"] == "video/mp4"
        with Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").read())) as still:
            assert still.format == "WEBP" and still.width / still.height == pytest.approx(64 / 96, rel=0.1)
        with pytest.raises(openai.BadRequestError) as caught:
            client.videos.download_content(video.id, variant="spritesheet")
        assert caught.value.param == "variant"
        gone = client.videos.delete(video.id)
        assert (gone.id, gone.object, gone.deleted) == (video.id, "video.deleted", True)
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.NotFoundError):
            client.videos.delete(video.id)


def test_create_and_retrieve(serve: Serve) -> None:
    server = serve("wan-t2v-a14b")
    with sdk(server) as client:
        with frozen(server):
            video = client.videos.create(prompt="a fox", size=SIZE, seconds="1", extra_body={"fps": 8, **_steps(40)})  # type: ignore[arg-type]
            assert video.id.startswith("video_") and video.status in ("queued", "in_progress")
            assert (video.size, video.seconds, video.expires_at, video.completed_at) == ("64x96", "1", None, None)
            assert video.to_dict()["num_frames"] == 9
            raw = client.videos.with_raw_response.retrieve(video.id)
            assert 250 <= int(raw.headers["openai-poll-after-ms"]) <= 5000
        done = client.videos.poll(video.id)
        assert done.status == "completed" and done.seconds == "1"
        assert frames_of(client.videos.download_content(video.id).read())[0] == 9


def _steps(count: int) -> dict[str, Any]:
    return {"num_inference_steps": count, "seed": 7}


def test_progress_never_goes_back(serve: Serve) -> None:
    server = serve("wan-t2v-a14b")
    long = {**LONG, "size": "256x192"}
    for body, enough in (({"num_inference_steps": 60}, 100), (long, 5)):  # to its end; in many steps
        _, told = server.json("POST", "/v1/videos", {"prompt": "a fox", "seed": 7, **body})
        seen, stages = [], set()
        while told["status"] in ("queued", "in_progress") and len(set(seen)) <= enough:
            seen.append(told["progress"])
            stages.add(told.get("stage"))
            if told["status"] == "in_progress":
                assert told["eta_seconds"] >= 0
            time.sleep(0.05)
            _, told = server.json("GET", f"/v1/videos/{told['id']}")
        assert seen == sorted(seen)
        if body is long:
            assert len(set(seen)) > 5 and "denoise" in stages and told["progress"] < 100
            server.request("DELETE", f"/v1/videos/{told['id']}")
        else:
            assert told["status"] == "completed" and told["progress"] == 100


def test_input_reference(serve: Serve) -> None:
    server = serve("wan-i2v-a14b")
    with sdk(server) as client:
        video = client.videos.create_and_poll(
            prompt="it moves", input_reference=("cat.png", picture(size=(96, 64))), extra_body=SMALL
        )
        assert video.status == "completed"
        content = client.videos.download_content(video.id).read()
        count, width, height, _ = frames_of(content)
        assert count == 5 and width > height and video.size == f"{width}x{height}"
    # The SDK has types for an object here, and sends it in brackets.
    address = "data:image/png;base64," + base64.b64encode(picture(size=(96, 64))).decode()
    fields = [(name, str(value)) for name, value in SMALL.items()]
    body, headers = form([("prompt", "it moves"), ("input_reference[image_url]", address), *fields])
    status, _, same = server.request("POST", "/v1/videos/sync", body, headers)
    assert status == 200 and same == content


def test_list(start: Callable[..., Server]) -> None:
    server = start("wan-t2v-a14b")  # nobody else's videos, nor those of a run before
    server.wait_ready()
    ids = [made(server, seed=seed)["id"] for seed in range(5)]
    with sdk(server) as client:
        assert [video.id for video in client.videos.list()] == ids[::-1]
        assert [video.id for video in client.videos.list(order="asc")] == ids
        page = client.videos.list(limit=2, order="asc")
        assert [video.id for video in page.data] == ids[:2] and page.has_more and page.last_id == ids[1]
        assert [video.id for video in page] == ids  # it turns the pages itself
        last = client.videos.list(after=ids[3], order="asc")
        assert [video.id for video in last.data] == ids[4:] and last.has_more is False
        assert not client.videos.list(after=ids[0]).data
        with pytest.raises(openai.NotFoundError):
            client.videos.list(after="video_000000000000ffffffffffffffff")
    status, told = server.json("GET", "/v1/videos?limit=3")
    assert (told["object"], told["first_id"], told["last_id"]) == ("list", ids[4], ids[2])
    for query in ("limit=0", "limit=101", "limit=x", "limit=", "limit=1.5", "order=newest", "order="):
        status, _, content = server.request("GET", f"/v1/videos?{query}")
        assert error_of(status, content)["param"] == query.partition("=")[0]


def test_the_same_seed_the_same_video(serve: Serve) -> None:
    server = serve("wan-t2v-a14b")
    (prediction,) = server.predict({"prompt": "a fox", "size": SIZE, **SMALL})
    expected = base64.b64decode(prediction["video"]["b64"])
    status, _, content = server.request("GET", f"/v1/videos/{made(server)['id']}/content")
    assert status == 200 and content == expected
    status, headers, content = server.request("POST", "/v1/videos/sync", {"prompt": "a fox", "size": SIZE, **SMALL})
    assert status == 200 and content == expected
    assert (headers["content-type"], headers["x-model"], headers["x-seed"]) == ("video/mp4", "tiny", "7")
    assert float(headers["x-inference-time-s"]) > 0 and "denoise" in json.loads(headers["x-stage-durations"])
    assert headers["x-request-id"]
    status, told = server.json("POST", "/v1/video/generations", {"prompt": "a fox", "size": SIZE, **SMALL})
    assert status == 200 and base64.b64decode(told["data"][0]["b64_json"]) == expected
    assert (told["seed"], told["num_frames"], told["size"], told["ignored"]) == (7, 5, "64x96", [])
    assert told["timings"]["denoise"] > 0


# --- an end to it


def test_delete_stops_the_device(serve: Serve) -> None:
    server = serve("wan-t2v-a14b")
    before = _steps_drawn(server)
    _, told = server.json("POST", "/v1/videos", {"prompt": "a fox", **LONG})
    until(lambda: server.json("GET", f"/v1/videos/{told['id']}")[1]["status"] == "in_progress")
    assert server.json("DELETE", f"/v1/videos/{told['id']}") == (
        200,
        {"id": told["id"], "object": "video.deleted", "deleted": True},
    )
    status, told = server.json("GET", f"/v1/videos/{told['id']}")
    assert (status, told["status"], told["error"]["code"]) == (200, "failed", "cancelled")
    assert told["error"]["message"] and told["expires_at"] is None
    until(lambda: not [job for job in _jobs(server) if job["state"] in ("running", "queued")])
    made(server)
    assert _steps_drawn(server) - before < LONG["num_inference_steps"]
    status, _, content = server.request("GET", f"/v1/videos/{told['id']}/content")
    assert (status, error_of(status, content)["code"]) == (404, "not_found")
    with sdk(server) as client:
        assert client.videos.poll(told["id"]).error.code == "cancelled"  # type: ignore[union-attr]
    assert server.json("DELETE", f"/v1/videos/{told['id']}")[0] == 200  # now it is forgotten
    assert server.json("GET", f"/v1/videos/{told['id']}")[0] == 404


def _steps_drawn(server: Server) -> float:
    lines = server.request("GET", "/metrics")[2].decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("diffusion_steps_total{"))


def _jobs(server: Server) -> list[dict[str, Any]]:
    requests: list[dict[str, Any]] = server.json("GET", "/v2/models/tiny/requests")[1]["requests"]
    return requests


def test_leaving_a_synchronous_video_stops_the_device(serve: Serve) -> None:
    server = serve("wan-t2v-a14b")
    for path in ("/v1/videos/sync", "/v1/video/generations"):
        with pytest.raises(OSError):
            server.request("POST", path, {"prompt": "a fox", **LONG}, timeout=1)
        until(lambda: not [job for job in _jobs(server) if job["state"] in ("running", "queued")])


def test_a_failed_video_tells_why(serve: Serve) -> None:
    server = serve("wan-t2v-a14b")
    _, told = server.json("POST", "/v1/videos", {"prompt": "a fox", **LONG, "timeout": 0.5})
    told = finished(server, told["id"])
    assert (told["status"], told["error"]["code"]) == ("failed", "deadline_exceeded")
    status, content = server.json("GET", f"/v1/jobs/{told['id']}/result")
    assert status == 504 and content["error"]["code"] == "deadline_exceeded"


def test_content_that_is_not_there_yet(serve: Serve) -> None:
    server = serve("wan-t2v-a14b")
    _, told = server.json("POST", "/v1/videos", {"prompt": "a fox", **LONG})
    for path in (f"/v1/videos/{told['id']}/content", f"/v1/jobs/{told['id']}/result"):
        status, headers, content = server.request("GET", path)
        assert status == 503 and json.loads(content)["error"]["code"] == "not_ready"
        assert int(headers["retry-after"]) >= 1 and "x-should-retry" not in headers
    server.request("DELETE", f"/v1/videos/{told['id']}")


# --- ranges


@pytest.fixture(scope="module")
def video(serve: Serve) -> tuple[Server, str, bytes]:
    """A server, the path of a video's content and the whole of it."""
    server = serve("wan-t2v-a14b")
    path = f"/v1/videos/{made(server)['id']}/content"
    status, headers, content = server.request("GET", path)
    assert (status, headers["accept-ranges"], int(headers["content-length"])) == (200, "bytes", len(content))
    assert len(content) > 1000
    return server, path, content


Video = tuple[Server, str, bytes]


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, None),
        ("bytes=0-", 0, None),
        ("bytes=-100", -100, None),
        ("bytes=-99999999", 0, None),
        ("bytes=10-99999999", 10, None),
        ("Bytes = 5 - 9", 5, 10),
    ],
)
def test_ranges(video: Video, asked: str, start: int, end: int | None) -> None:
    server, path, whole = video
    status, headers, content = server.request("GET", path, headers={"Range": asked})
    assert status == 206 and content == whole[start:end]
    first = start if start >= 0 else len(whole) + start
    assert headers["content-range"] == f"bytes {first}-{first + len(content) - 1}/{len(whole)}"
    assert int(headers["content-length"]) == len(content) and headers["content-type"] == "video/mp4"


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=99999999-100000000", "bytes=-0"])
def test_ranges_that_hold_no_byte(video: Video, asked: str) -> None:
    server, path, whole = video
    status, headers, content = server.request("GET", path, headers={"Range": asked})
    assert (status, headers["content-range"], content) == (416, f"bytes */{len(whole)}", b"")


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-1,5-9", "bytes=9-5", "bytes=-", "bytes=a-b", "items=0-1", "bytes 0-1", "bytes=0-1x", "bytes=²-", ""],
)
def test_ranges_that_mean_the_whole(video: Video, asked: str) -> None:
    server, path, whole = video
    status, headers, content = server.request("GET", path, headers={"Range": asked.encode().decode("latin-1")})
    assert status == 200 and content == whole and "content-range" not in headers


def test_if_range(video: Video) -> None:
    server, path, whole = video
    _, first, _ = server.request("HEAD", path)
    for tag, status in (
        (first["etag"], 206),
        (first["last-modified"], 206),
        ('"another"', 200),
        (f"W/{first['etag']}", 200),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 200),
    ):
        got, _, content = server.request("GET", path, headers={"Range": "bytes=0-9", "If-Range": tag})
        assert got == status and content == (whole[:10] if status == 206 else whole)


def test_what_a_client_has_already(video: Video) -> None:
    server, path, _ = video
    _, first, _ = server.request("HEAD", path)
    for headers, status in (
        ({"If-None-Match": first["etag"]}, 304),
        ({"If-None-Match": f'"x", W/{first["etag"]}'}, 304),
        ({"If-None-Match": '"x"', "If-Modified-Since": first["last-modified"]}, 200),
        ({"If-Modified-Since": first["last-modified"]}, 304),
        ({"If-Modified-Since": "Wed, 21 Oct 2015 07:28:00 GMT"}, 200),
        ({"If-Modified-Since": "yesterday"}, 200),
    ):
        got, told, content = server.request("GET", path, headers=headers)
        assert got == status and bool(content) == (status == 200) and told["etag"] == first["etag"]


def test_head(video: Video) -> None:
    server, path, whole = video
    for headers, status, length in (({}, 200, len(whole)), ({"Range": "bytes=5-9"}, 206, 5)):
        got, told, content = server.request("HEAD", path, headers=headers)
        assert (got, int(told["content-length"]), content) == (status, length, b"")
        assert told["content-type"] == "video/mp4"


# --- jobs of other kinds


def test_pictures_by_url(serve: Serve) -> None:
    server = serve("sd15", API_KEY="sk-proj-1234567890")
    with sdk(server, key="sk-proj-1234567890") as client:
        small: dict[str, Any] = {"num_inference_steps": 2, "seed": 7}
        made = client.images.generate(prompt="x", n=2, response_format="url", extra_body=small)
        plain = client.images.generate(prompt="x", n=2, extra_body=small)
    assert made.data and plain.data
    urls = [image.url or "" for image in made.data]
    assert all(image.b64_json is None for image in made.data)
    for url, image in zip(urls, plain.data, strict=True):
        status, headers, content = server.request("GET", url.removeprefix(server.http))  # without a key
        assert (status, headers["content-type"]) == (200, "image/png")
        assert content == base64.b64decode(image.b64_json or "")
    path = urls[0].removeprefix(server.http)
    bare = path.partition("?")[0]
    for forged in (
        bare,
        f"{bare}?signature=",
        path[:-1] + ("0" if path[-1] != "0" else "1"),
        path.replace("/0?", "/1?"),
    ):
        status, _, content = server.request("GET", forged)
        assert error_of(status, content)["code"] == "invalid_api_key" and status == 401
    key = {"X-API-Key": "sk-proj-1234567890"}
    assert server.request("GET", f"{bare}?expires=99999999999&signature=x", headers=key)[0] == 401
    assert server.request("GET", bare, headers=key)[0] == 200


@pytest.mark.parametrize("place", ["/v1", "/openai/v1"])
def test_prefer_respond_async(serve: Serve, place: str) -> None:
    server = serve("sd15")
    body = {"prompt": "x", "num_inference_steps": 2, "seed": 7, "n": 2, "quality": "high"}
    status, headers, content = server.request(
        "POST", f"{place}/images/generations", body, {"Prefer": "wait=10, Respond-Async; x=y"}
    )
    told = json.loads(content)
    assert status == 202 and headers["preference-applied"] == "respond-async"
    assert headers["location"] == f"{place}/jobs/{told['id']}"
    assert (told["object"], told["api"]) == ("job", "images")

    def ended() -> Any:
        status, told = server.json("GET", headers["location"])
        assert status == 200 and 0 <= told["progress"] <= 100
        return told if told["status"] == "completed" else None

    told = until(ended)
    assert told["progress"] == 100 and told["completed_at"] < told["expires_at"] and told["available"]
    status, result = server.json("GET", told["result"])
    plain = server.json("POST", "/v1/images/generations", body)[1]
    assert status == 200 and result["data"] == plain["data"] and result["ignored"] == ["quality"]
    for i, item in enumerate(told["content"]):
        assert item["content_type"] == "image/png"
        status, _, content = server.request("GET", item["url"])
        assert status == 200 and content == base64.b64decode(plain["data"][i]["b64_json"])
        assert len(content) == item["bytes"]
    for bad in ("2", "-1", "x", "²", "99999999999999999999"):
        path = f"{place}/jobs/{told['id']}/content/{bad.encode().decode('latin-1') if bad.isascii() else '%C2%B2'}"
        status, _, content = server.request("GET", path)
        assert (status, error_of(status, content)["code"]) == (404, "not_found")
    assert server.json("GET", f"/v1/videos/{told['id']}")[0] == 404  # it is none
    assert server.json("DELETE", f"{place}/jobs/{told['id']}")[0] == 200
    assert server.json("GET", f"{place}/jobs/{told['id']}")[0] == 404


def test_the_same_key_gives_the_same_job(serve: Serve) -> None:
    server = serve("wan-i2v-a14b")
    fields: list[tuple[str, str | bytes]] = [(name, str(value)) for name, value in SMALL.items() if name != "seed"]
    fields += [("prompt", "x"), ("input_reference", picture())]
    ids = set()
    for boundary in ("one", "other"):  # what a client's retry sends
        body, headers = form(fields, boundary)
        status, _, content = server.request("POST", "/v1/videos", body, {**headers, "Idempotency-Key": "again"})
        assert status == 200
        ids.add(json.loads(content)["id"])
    assert len(ids) == 1
    status, headers, content = server.request(
        "POST", "/v1/videos", form([*fields, ("seed", "8")])[0], {**form([])[1], "Idempotency-Key": "again"}
    )
    assert (status, error_of(status, content)["code"]) == (409, "conflict") and headers["x-should-retry"] == "false"
    before = len(lines(server))
    with sdk(server) as client, pytest.raises(openai.ConflictError):
        client.videos.create(prompt="y", input_reference=picture(), extra_headers={"Idempotency-Key": "again"})
    assert len(lines(server)) == before + 1  # the SDK asks again after a 409, unless told not to


def test_leaving_a_request_by_url_ends_its_job(serve: Serve) -> None:
    server = serve("sd15")
    with pytest.raises(OSError):
        body = {"prompt": "x", **ENDLESS, "response_format": "url"}
        server.request("POST", "/v1/images/generations", body, timeout=1)
    until(lambda: not [job for job in _jobs(server) if job["state"] in ("running", "queued")])


def test_a_dry_run_makes_no_job(serve: Serve) -> None:
    server = serve("wan-t2v-a14b")
    before = server.json("GET", "/v1/videos?limit=1")[1]["first_id"]
    for path in ("/v1/videos", "/v1/videos/sync", "/v1/video/generations"):
        status, told = server.json("POST", path, {"prompt": "x", **SMALL}, {"X-Dry-Run": "1"})
        assert status == 200 and told["dry_run"] is True and told["num_frames"] == 5, told
    assert server.json("GET", "/v1/videos?limit=1")[1]["first_id"] == before


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"n": 2}, "n"),
        ({"n": "1"}, "n"),
        ({"seconds": "x"}, "seconds"),
        ({"seconds": "5", "num_frames": 17}, "seconds"),
        ({"seconds": "0.01"}, "seconds"),
        ({"num_frames": 80}, "num_frames"),
        ({"size": "854x480"}, "width"),
        ({"fps": 1000}, "fps"),
        ({"input_reference": "x"}, "input_reference"),
        ({"reference_url": "https://example.com/x.png"}, "reference_url"),
        ({"response_format": "file"}, "response_format"),
        ({"model": "sora-2"}, None),
        ({"video": "x"}, "video"),
        ({"num_inference_steps": "many"}, "num_inference_steps"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync", "/v1/video/generations"])
def test_refused_fields(serve: Serve, path: str, fields: dict[str, Any], param: str | None) -> None:
    status, headers, content = serve("wan-t2v-a14b").request("POST", path, {"prompt": "x", **fields})
    error = error_of(status, content)
    assert error["param"] == param and headers["x-should-retry"] == "false"
    assert status == (404 if "model" in fields else 400)


def test_urls_are_off(serve: Serve) -> None:
    server = serve("wan-i2v-a14b")
    for name, value in (
        ("reference_url", "https://example.com/x.png"),
        ("input_reference", {"image_url": "https://example.com/x.png"}),
        ("image_url", "http://127.0.0.1/x.png"),
        ("image_reference", '{"image_url": "https://example.com/x.png"}'),
    ):
        status, _, content = server.request("POST", "/v1/videos", {"prompt": "x", name: value})
        error = error_of(status, content)
        assert status == 400 and error["param"] == name and "ALLOWED_IMAGE_HOSTS" in error["message"]


def test_a_full_queue(serve: Serve) -> None:
    server = serve("wan-t2v-a14b", MAX_QUEUE_SIZE="1", MAX_QUEUE_SECONDS="100000")
    with sdk(server, max_retries=0) as client:
        with frozen(server):
            first = client.videos.create(prompt="x", extra_body=LONG)
            until(lambda: client.videos.retrieve(first.id).status == "in_progress")
            second = client.videos.create(prompt="x", extra_body=LONG)
            with pytest.raises(openai.RateLimitError) as caught:
                client.videos.create(prompt="x", extra_body=LONG)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for video in (second, first):
            client.videos.delete(video.id)


def test_while_it_loads(start: Callable[..., Server], gate: Gate) -> None:
    gate.shut("loading")
    server = start("wan-t2v-a14b", **gate.environment)

    def refused() -> Any:
        try:
            status, headers, content = server.request("POST", "/v1/videos", {"prompt": "x", **SMALL})
        except OSError:
            return None
        return status, headers, content

    status, headers, content = until(refused)
    assert status == 503 and json.loads(content)["error"]["code"] == "not_ready"
    assert headers["retry-after"] and "x-should-retry" not in headers
    gate.open("loading")
    server.wait_ready()
    assert made(server)["status"] == "completed"

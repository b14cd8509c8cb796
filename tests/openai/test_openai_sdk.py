"""The OpenAI SDK, as it comes from its index, against a real server: pictures, models, errors."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types import Image, ImagesResponse
from openai.types.image_edit_completed_event import ImageEditCompletedEvent
from openai.types.image_gen_completed_event import ImageGenCompletedEvent

from tests.conftest import Gate, Serve, Server
from tests.jobs.holds import frozen
from tests.openai.clients import ENDLESS, lines, picture, sdk, size_of, state_of, until

KEY = "sk-proj-1234567890"
SMALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 7}


def data_of(image: Image) -> bytes:
    assert image.b64_json is not None
    return base64.b64decode(image.b64_json)


def drawn(response: ImagesResponse) -> list[bytes]:
    assert response.data
    return [data_of(image) for image in response.data]


# --- pictures


@pytest.mark.parametrize("place", ["/v1", "/openai/v1"])
def test_generate(serve: Serve, place: str) -> None:
    with sdk(serve("sd15"), place) as client:
        made = client.images.generate(
            model="tiny", prompt="a red fox", size="128x64", n=2, quality="high", user="me", extra_body=SMALL
        )
    assert [size_of(data) for data in drawn(made)] == [(128, 64)] * 2
    assert (made.size, made.output_format, made.background) == ("128x64", "png", "opaque")
    assert made.created > 1_700_000_000 and made.usage is not None and made.usage.total_tokens == 0
    told = made.to_dict()
    assert (told["seed"], told["seeds"], told["num_inference_steps"]) == (7, [7, 8], 2)
    assert (told["width"], told["height"], told["ignored"]) == (128, 64, ["quality", "user"])
    assert set(told) >= {"timings", "batched", "engine_variant", "model_revision", "id", "model"}
    assert [image.model_extra for image in made.data or []] == [{"seed": 7}, {"seed": 8}]


def test_a_seed_means_the_same_in_each_protocol(serve: Serve) -> None:
    server = serve("sd15")
    (prediction,) = server.predict({"prompt": "a red fox", "width": 64, "height": 64, **SMALL})
    with sdk(server) as client:
        made = client.images.generate(prompt="a red fox", size="64x64", extra_body=SMALL)
    assert drawn(made) == [base64.b64decode(prediction["image"]["b64"])]


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_formats(serve: Serve, form: Any) -> None:
    with sdk(serve("sd15")) as client:
        made = {
            quality: drawn(
                client.images.generate(
                    prompt="x", output_format=form, output_compression=quality, size="256x256", extra_body=SMALL
                )
            )[0]
            for quality in (0, 50, 100)
        }
    assert size_of(made[50]) == (256, 256)
    assert len(made[0]) < len(made[50]) < len(made[100])


def test_what_has_no_effect_is_told(serve: Serve) -> None:
    with sdk(serve("sd15")) as client:
        made = client.images.generate(
            prompt="x",
            size="auto",
            background="auto",
            moderation="low",
            style="vivid",
            output_compression=80,  # of a PNG
            partial_images=2,
            safety_identifier="someone",
            extra_body=SMALL,
        )
    told = made.to_dict()
    assert told["size"] == "64x64"
    assert set(told["ignored"]) == {  # type: ignore[arg-type]
        *("moderation", "style", "partial_images", "safety_identifier", "output_compression")
    }


def test_edit_with_one_file(serve: Serve) -> None:
    with sdk(serve("glm-image")) as client:
        made = client.images.edit(
            image=("cat.png", picture()), prompt="make it blue", size="96x64", n=2, extra_body=SMALL
        )
    assert [size_of(data) for data in drawn(made)] == [(96, 64)] * 2
    assert made.to_dict()["seeds"] == [7, 8]


def test_edit_with_several_files(serve: Serve) -> None:
    server = serve("glm-image")
    files = [picture("red"), picture("green", form="JPEG")]
    with sdk(server) as client:
        both = client.images.edit(image=files, prompt="mix", extra_body=SMALL)
        one = client.images.edit(image=files[:1], prompt="mix", extra_body=SMALL)
    encoded = [base64.b64encode(file).decode() for file in files]
    (prediction,) = server.predict({"prompt": "mix", "images": encoded, **SMALL})
    assert drawn(both) == [base64.b64decode(prediction["image"]["b64"])]
    assert drawn(both) != drawn(one)


def test_edit_by_data_urls(serve: Serve) -> None:
    """As vLLM-Omni documents it: no file, and `url` in the form instead."""
    address = "data:image/png;base64," + base64.b64encode(picture()).decode()
    with sdk(serve("glm-image")) as client:
        made = client.images.edit(image=[], prompt="mix", extra_body={"url": [address, address], **SMALL})
        same = client.images.edit(image=[picture(), picture()], prompt="mix", extra_body=SMALL)
    assert drawn(made) == drawn(same)


def test_files_are_not_taken_for_fields(serve: Serve) -> None:
    with sdk(serve("glm-image")) as client, pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=picture(), mask=picture(), prompt="x", extra_body=SMALL)
    assert caught.value.param == "mask" and "repaints" in caught.value.message


# --- streams


def test_stream(serve: Serve) -> None:
    server = serve("sd15")
    with sdk(server) as client:
        with client.images.generate(
            prompt="a red fox", size="256x256", stream=True, n=2, extra_body={"num_inference_steps": 30, "seed": 7}
        ) as stream:
            *before, first, second = stream
        whole = client.images.generate(
            prompt="a red fox", size="256x256", n=2, extra_body={"num_inference_steps": 30, "seed": 7}
        )
    assert before and {event.type for event in before} == {"image_generation.progress"}
    told = [event.to_dict() for event in before]
    parts = [event["progress"] for event in told]
    assert parts == sorted(parts) and parts[0] >= 0 and parts[-1] <= 1  # type: ignore[type-var, operator]
    assert all(event["eta_seconds"] >= 0 for event in told)  # type: ignore[operator]
    assert {"step", "total", "stage"} <= told[-1].keys()
    for event, seed in ((first, 7), (second, 8)):
        assert isinstance(event, ImageGenCompletedEvent)
        assert (event.type, event.size, event.output_format) == ("image_generation.completed", "256x256", "png")
        assert (event.background, event.quality, event.usage.total_tokens) == ("opaque", "auto", 0)
        assert event.to_dict()["seed"] == seed
    assert [base64.b64decode(event.b64_json) for event in (first, second)] == drawn(whole)


def test_stream_of_an_edit(serve: Serve) -> None:
    with (
        sdk(serve("glm-image")) as client,
        client.images.edit(image=picture(), prompt="blue", stream=True, extra_body=SMALL) as stream,
    ):
        *before, last = stream
    assert {event.type for event in before} <= {"image_edit.progress"}
    assert isinstance(last, ImageEditCompletedEvent) and last.type == "image_edit.completed"
    assert size_of(base64.b64decode(last.b64_json)) == (64, 64)


def test_an_error_in_a_stream(serve: Serve) -> None:
    with sdk(serve("sd15")) as client:
        stream = client.images.generate(prompt="x", stream=True, extra_body={**ENDLESS, "timeout": 2})
        with stream, pytest.raises(openai.APIError) as caught:
            list(stream)
    assert not isinstance(caught.value, openai.APIStatusError)  # it came after the status
    assert (caught.value.type, caught.value.code) == ("server_error", "deadline_exceeded")
    assert caught.value.message.startswith("timeout: 2 s passed")


def test_what_is_refused_has_its_status_in_a_stream_too(serve: Serve) -> None:
    with sdk(serve("sd15")) as client, pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", stream=True, size="1x1")
    assert caught.value.param == "width"


def test_leaving_a_stream_stops_the_device(serve: Serve) -> None:
    server = serve("sd15")
    with sdk(server) as client:
        stream = client.images.generate(
            prompt="x", stream=True, extra_body=ENDLESS, extra_headers={"x-request-id": "leaves-a-stream"}
        )
        assert next(iter(stream)).type == "image_generation.progress"
        until(lambda: state_of(server, "leaves-a-stream") == "running")
        stream.close()
    until(lambda: state_of(server, "leaves-a-stream") == "cancelled")


def test_leaving_a_plain_request_stops_the_device(serve: Serve) -> None:
    server = serve("sd15")
    with sdk(server, timeout=2, max_retries=0) as client, pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="x", extra_body=ENDLESS, extra_headers={"x-request-id": "leaves"})
    until(lambda: state_of(server, "leaves") == "cancelled")


# --- models


@pytest.mark.parametrize("place", ["/v1", "/openai/v1"])
def test_models(serve: Serve, place: str) -> None:
    server = serve("sd15", MODEL_ALIASES="model,zai-org/GLM-Image")
    with sdk(server, place) as client:
        (listed,) = client.models.list()
        for name in ("tiny", "model", "zai-org/GLM-Image"):
            found = client.models.retrieve(name)
            assert (found.id, found.object, found.owned_by) == (name, "model", "diffusion-runtime")
            assert found.created == listed.created > 1_700_000_000
        assert listed.id == "tiny"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-image-1")
        made = client.images.generate(model="zai-org/GLM-Image", prompt="x", extra_body=SMALL)
        assert made.data


def test_one_list_for_two_worlds(serve: Serve) -> None:
    status, told = serve("sd15").json("GET", "/v1/models")
    assert status == 200
    assert told["models"] == ["tiny"] and told["object"] == "list"
    assert [entry["id"] for entry in told["data"]] == ["tiny"]
    status, told = serve("sd15").json("GET", "/v1/models/tiny")
    assert (status, told["name"], told["ready"], told["id"], told["object"]) == (200, "tiny", True, "tiny", "model")


def test_health(start: Callable[..., Server], serve: Serve, gate: Gate) -> None:
    assert serve("sd15").json("GET", "/health") == (200, {"status": "ok"})
    gate.shut("loading")
    server = start("glm-image", API_KEY=KEY, **gate.environment)
    told = until(lambda: _health(server))
    assert told[0] == 503 and told[1]["error"]
    gate.open("loading")
    server.wait_ready()
    assert server.json("GET", "/health") == (200, {"status": "ok"})  # without a key


def _health(server: Server) -> tuple[int, Any] | None:
    try:
        return server.json("GET", "/health")
    except OSError:  # not listening yet
        return None


# --- errors


def test_bad_requests(serve: Serve) -> None:
    server = serve("sd15")
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"size": "64x"}, "size", "invalid_value"),
        ({"size": "64x65"}, "height", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"prompt": ""}, "prompt", "missing_required_parameter"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"output_format": "svg"}, "output_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"response_format": "json"}, "response_format", "invalid_value"),
        ({"extra_body": {"colour": "red"}}, "colour", "unknown_parameter"),
        ({"extra_body": {"mask": "x"}}, "mask", "invalid_value"),
        ({"extra_body": {"num_inference_steps": "2"}}, "num_inference_steps", "invalid_value"),
        ({"extra_body": {"image": "x"}}, "image", "invalid_value"),
    ]
    with sdk(server) as client:
        for changes, param, code in wrong:
            before = len(lines(server))
            with pytest.raises(openai.BadRequestError) as caught:
                client.images.generate(**{"prompt": "x", **changes})
            error = caught.value
            assert (error.param, error.code, error.type) == (param, code, "invalid_request_error"), changes
            assert error.response.headers["x-should-retry"] == "false"
            assert error.request_id
            assert len(lines(server)) == before + 1  # asked once


def test_the_wrong_kind_of_model(serve: Serve) -> None:
    with sdk(serve("wan-i2v-a14b")) as client:
        with pytest.raises(openai.BadRequestError, match="/v1/videos"):
            client.images.generate(prompt="x")
        with pytest.raises(openai.BadRequestError, match="/v1/videos"):
            client.images.edit(prompt="x", image=picture())
    with sdk(serve("sd15")) as client, pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(prompt="x", image=picture())
    assert caught.value.param == "image"
    status, told = serve("sd15").json("POST", "/v1/videos", {"prompt": "x"})
    assert status == 400 and "/v1/images/generations" in told["error"]["message"]


def test_unknown_models(serve: Serve) -> None:
    with sdk(serve("sd15")) as client, pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(model="gpt-image-1", prompt="x")
    assert (caught.value.code, caught.value.type) == ("model_not_found", "invalid_request_error")


def test_authentication(serve: Serve) -> None:
    server = serve("sd15", API_KEY=KEY)
    with sdk(server, key=KEY) as client:
        assert client.images.generate(prompt="x", extra_body=SMALL).data
        assert [model.id for model in client.models.list()] == ["tiny"]
    for place in ("/v1", "/openai/v1"):
        with sdk(server, place, key="sk-wrong-one") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.images.generate(prompt="x")
        assert caught.value.code == "invalid_api_key"


def test_rate_limits(serve: Serve) -> None:
    server = serve("sd15", MAX_QUEUE_SIZE="1", MAX_QUEUE_SECONDS="100000")
    met: list[Any] = []

    def ask(client: openai.OpenAI) -> None:
        try:
            met.append(client.images.generate(prompt="x", extra_body=SMALL))
        except openai.APIError as error:
            met.append(error)

    with sdk(server, max_retries=0) as client:
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(5)]
        with frozen(server):  # one runs and one waits until all others have been refused
            for thread in threads:
                thread.start()
            until(lambda: len(met) >= 3)
        for thread in threads:
            thread.join()
    limited = [error for error in met if isinstance(error, openai.RateLimitError)]
    assert len(limited) >= 3 and len([made for made in met if isinstance(made, ImagesResponse)]) == 5 - len(limited)
    for error in limited:
        assert (error.type, error.code) == ("rate_limit_error", "rate_limit_exceeded")
        assert int(error.response.headers["retry-after"]) >= 1
        assert "x-should-retry" not in error.response.headers


def test_the_sdk_asks_again_after_a_rate_limit(serve: Serve) -> None:
    """With its own retries everybody is served in the end."""
    server = serve("sd15", MAX_QUEUE_SIZE="1", MAX_QUEUE_SECONDS="100000")
    met: list[Any] = []

    def ask(client: openai.OpenAI) -> None:
        met.append(client.images.generate(prompt="x", extra_body={"num_inference_steps": 20}))

    with sdk(server, max_retries=30) as client:
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(met) == 4


def test_final_errors_are_not_asked_again(serve: Serve) -> None:
    server = serve("sd15")
    before = len(lines(server))
    with sdk(server) as client, pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="x", extra_body={**ENDLESS, "timeout": 0.3})
    assert caught.value.status_code == 504 and caught.value.code == "deadline_exceeded"
    assert len(lines(server)) == before + 1

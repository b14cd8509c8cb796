"""EMBED_METADATA through a whole server: what its files say, and that they say nothing by default."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Any

import av
import pytest
from PIL import Image

if TYPE_CHECKING:
    from tests.conftest import Serve, Server

FOX = {"prompt": "a red fox, ü", "negative_prompt": "blurry", "seed": 7, "n": 2, "num_inference_steps": 2}
FOX |= {"width": 64, "height": 64}
CLIP = {"prompt": "a red fox", "seed": 5, "num_inference_steps": 2, "num_frames": 5, "width": 64, "height": 64}


def pictures(server: Server, **more: Any) -> list[bytes]:
    (prediction,) = server.predict({**FOX, **more})
    return [base64.b64decode(item["b64"]) for item in prediction["images"]]


def told(png: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return {name: str(text) for name, text in image.text.items()}  # type: ignore[attr-defined]


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.tobytes()


@pytest.mark.parametrize("prompts", [False, True])
def test_a_png_says_what_made_it(serve: Serve, prompts: bool) -> None:
    plain = pictures(serve("sd15"))
    settings = {"EMBED_METADATA": "true"} | ({"LOG_PROMPTS": "true"} if prompts else {})
    server = serve("sd15", **settings)
    files = pictures(server)
    assert files == pictures(server), "no time and no id in them"
    revision = server.json("GET", "/v2/models/tiny")[1]["properties"]["revision"]
    for seed, file, other in zip((7, 8), files, plain, strict=True):
        text = told(file)
        assert (text["model"], text["revision"], text["seed"]) == ("tiny", revision, str(seed))
        parameters = json.loads(text["parameters"])
        assert (parameters["width"], parameters["num_inference_steps"]) == (64, 2)
        assert pixels(file) == pixels(other) and told(other) == {}
        if prompts:
            assert (text["prompt"], text["negative_prompt"]) == (FOX["prompt"], "blurry")
        else:
            assert b"fox" not in file and b"blurry" not in file
    assert pictures(server, output_format="webp") == pictures(serve("sd15"), output_format="webp")


def test_an_mp4_says_what_made_it(serve: Serve) -> None:
    def drawn(server: Server) -> tuple[bytes, list[bytes], str | None]:
        (prediction,) = server.predict(CLIP)
        data = base64.b64decode(prediction["video"]["b64"])
        with av.open(io.BytesIO(data)) as container:
            frames = [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]
            return data, frames, container.metadata.get("comment")

    data, frames, comment = drawn(serve("wan-ti2v-5b", EMBED_METADATA="true"))
    plain, want, nothing = drawn(serve("wan-ti2v-5b"))
    assert frames == want and nothing is None and data != plain and b"fox" not in data
    assert comment is not None
    text = json.loads(comment)
    assert (text["model"], text["seed"]) == ("tiny", "5") and json.loads(text["parameters"])["num_frames"] == 5
    assert "prompt" not in text


def test_a_picture_is_the_same_file_alone_and_among_others(serve: Serve) -> None:
    server = serve("sd15", EMBED_METADATA="true")
    both = pictures(server)
    (alone,) = server.predict({**FOX, "seed": 8, "n": 1})
    assert base64.b64decode(alone["image"]["b64"]) == both[1]

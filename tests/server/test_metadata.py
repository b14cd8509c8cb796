"""What files say of themselves: nothing by default, and with EMBED_METADATA what made them. Read back by other code."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from runtime.media import encode_image, encode_video, thumbnail
from runtime.metadata import metadata_of
from runtime.types import GenerationRequest, SourceImage

REQUEST = GenerationRequest(
    prompt="a fox in München ☃",
    width=48,
    height=32,
    num_inference_steps=4,
    seed=7,
    n=2,
    output_format="png",
    negative_prompt="blurry",
    guidance_scale=2.5,
    extra={"clip_skip": 1, "prompt_2": "a secret fox"},
)
METADATA = metadata_of(REQUEST, 8, "glm", "abc123", prompts=True)


def picture(width: int = 48, height: int = 32, shift: int = 0, mode: str = "RGB") -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    bands = np.stack([(5 * x + shift) % 256, (3 * y) % 256, (x * y + shift) % 256], -1).astype(np.uint8)
    return Image.fromarray(bands).convert(mode)


def clip(width: int = 64, height: int = 48) -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(picture(width, height, 9 * i)) for i in range(5)])


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """Name and content of each chunk, after the checksum was compared."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        name, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert zlib.crc32(name + data) == int.from_bytes(png[at + 8 + length : at + 12 + length], "big")
        found.append((name, data))
        at += 12 + length
    return found


def texts(png: bytes) -> dict[str, str]:
    """What the text chunks say, by PNG's own definition."""
    found = {}
    for name, data in chunks(png):
        key, _, rest = data.partition(b"\0")
        if name == b"tEXt":
            found[key.decode()] = rest.decode("latin-1")
        elif name == b"iTXt":
            assert rest[:2] == b"\0\0", "not compressed"
            found[key.decode()] = rest[2:].split(b"\0", 2)[2].decode()
    return found


def comment(mp4: bytes) -> Any:
    with av.open(io.BytesIO(mp4)) as container:
        text = container.metadata.get("comment")
    return None if text is None else json.loads(text)


def frames_of(mp4: bytes) -> list[bytes]:
    with av.open(io.BytesIO(mp4)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


# --- what is told


def test_model_revision_seed_and_parameters() -> None:
    told = metadata_of(REQUEST, 8, "glm", "abc123")
    assert list(told) == ["model", "revision", "seed", "parameters"]
    assert (told["model"], told["revision"], told["seed"]) == ("glm", "abc123", "8")
    assert json.loads(told["parameters"]) == {
        "width": 48,
        "height": 32,
        "num_inference_steps": 4,
        "guidance_scale": 2.5,
        "output_format": "png",
        "clip_skip": 1,
    }


def test_no_word_of_the_client_without_leave() -> None:
    assert "fox" not in str(metadata_of(REQUEST, 7, "glm", "r")) and "blurry" not in str(
        metadata_of(REQUEST, 7, "glm", "r")
    )
    told = metadata_of(REQUEST, 7, "glm", "r", prompts=True)
    assert (told["prompt"], told["negative_prompt"]) == ("a fox in München ☃", "blurry")
    assert json.loads(told["parameters"])["prompt_2"] == "a secret fox"


def test_a_picture_says_the_same_alone_and_as_one_of_many() -> None:
    from dataclasses import replace

    alone = replace(REQUEST, seed=8, n=1)
    assert metadata_of(alone, 8, "glm", "r") == metadata_of(REQUEST, 8, "glm", "r")
    with_source = replace(alone, images=(SourceImage(1, 1, b"abc"),))
    assert json.loads(metadata_of(with_source, 8, "glm", "r")["parameters"])["source_images"] == 1


# --- PNG


def test_without_metadata_a_file_holds_none() -> None:
    png = encode_image(picture(), "png", None)
    assert [name for name, _ in chunks(png)] == [b"IHDR", b"IDAT", b"IEND"]
    for nothing in (None, {}):
        assert encode_image(picture(), "png", None, nothing) == png
        assert encode_video(clip(), 16, None, nothing) == encode_video(clip(), 16, None)
    assert comment(encode_video(clip(), 16, None)) is None


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1"])
def test_a_png_carries_it_and_keeps_its_pixels(mode: str) -> None:
    plain, told = (encode_image(picture(mode=mode), "png", None, m) for m in (None, METADATA))
    assert texts(told) == METADATA
    kinds = {d.partition(b"\0")[0]: name for name, d in chunks(told) if name in (b"tEXt", b"iTXt")}
    assert kinds.pop(b"prompt") == b"iTXt" and set(kinds.values()) == {b"tEXt"}
    assert [c for c in chunks(told) if c[0] not in (b"tEXt", b"iTXt")] == chunks(plain)
    names = [name for name, _ in chunks(told)]
    assert names.index(b"iTXt") < names.index(b"IDAT"), "found without reading the picture"
    with Image.open(io.BytesIO(told)) as read, Image.open(io.BytesIO(plain)) as other:
        assert read.tobytes() == other.tobytes() and read.mode == other.mode
        assert {k: str(v) for k, v in read.text.items()} == METADATA  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["a\0b", "", "x" * 8000, "☃" * 8000, "a\nb\ttab", "}{\"'\\"])
def test_any_prompt_fits_into_a_file(text: str) -> None:
    assert comment(encode_video(clip(), 16, None, {"prompt": text})) == {"prompt": text}
    read = texts(encode_image(picture(), "png", None, {"prompt": text}))
    assert read == {"prompt": text.replace("\0", "�")}, "PNG knows no such character"


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_jpeg_and_webp_go_without(format: str) -> None:
    assert encode_image(picture(), format, None, METADATA) == encode_image(picture(), format, None)


def test_what_the_picture_brings_along_is_dropped() -> None:
    image = picture()
    image.info["prompt"] = "somebody else's"
    assert texts(encode_image(image, "png", None, {"seed": "7"})) == {"seed": "7"}


# --- MP4


def test_an_mp4_carries_it_and_keeps_its_frames() -> None:
    plain, told = (encode_video(clip(), 16, None, m) for m in (None, METADATA))
    assert comment(told) == METADATA
    assert frames_of(told) == frames_of(plain)
    assert told.index(b"moov") < told.index(b"mdat"), "it begins to play before it is all there"


def test_the_same_gives_the_same_bytes() -> None:
    digests = {
        hashlib.sha256(encode_image(picture(), "png", None, METADATA)).digest()
        + hashlib.sha256(encode_video(clip(), 16, None, METADATA)).digest()
        for _ in range(4)
    }
    assert len(digests) == 1


# --- thumbnails


@pytest.mark.parametrize(
    ("size", "longest", "wanted"),
    [((640, 360), 512, (512, 288)), ((360, 640), 512, (288, 512)), ((64, 48), 512, (64, 48)), ((64, 48), 16, (16, 12))],
)
def test_a_thumbnail_is_the_first_frame(size: tuple[int, int], longest: int, wanted: tuple[int, int]) -> None:
    frames = np.empty((3, size[1], size[0], 3), np.uint8)
    for frame, colour in zip(frames, ((200, 30, 40), (0, 255, 0), (0, 0, 255)), strict=True):
        frame[:] = colour
        frame[:, : size[0] // 2] //= 2  # left and right differ
    video = encode_video(frames, 16, 90)
    made = thumbnail(video, longest)
    with Image.open(io.BytesIO(made)) as image:
        assert image.format == "WEBP" and image.size == wanted
        shown = np.asarray(image.convert("RGB")).astype(int)
    assert abs(shown[:, : wanted[0] // 2 - 2] - (100, 15, 20)).max() < 12
    assert abs(shown[:, wanted[0] // 2 + 2 :] - (200, 30, 40)).max() < 12
    assert thumbnail(video, longest) == made


@pytest.mark.parametrize("cut", [0, 8, 100, 500])
def test_no_thumbnail_of_what_is_no_video(cut: int) -> None:
    with pytest.raises(ValueError, match="not an MP4"):
        thumbnail(encode_video(clip(), 16, None)[:cut])
    with pytest.raises(ValueError, match="not an MP4"):
        thumbnail(encode_image(picture(), "png", None))

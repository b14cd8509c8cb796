"""Real files, built here with Pillow, through the real decoders."""

from __future__ import annotations

import base64
import io
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from runtime.errors import InvalidRequest
from runtime.jobs.record import CONTENT_TYPES
from runtime.media import encode_image, encode_video, frames_to_uint8, read_image
from runtime.types import SourceImage

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def read(value: Any, max_bytes: int = 2**20, max_pixels: int = 10**6) -> SourceImage:
    return read_image(value, field="image", max_bytes=max_bytes, max_pixels=max_pixels)


def refused(value: Any, **limits: int) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read(value, **limits)
    message = str(caught.value)
    assert message.startswith("image: ")
    assert len(message) < 400
    return message


def pixels(source: SourceImage) -> npt.NDArray[np.uint8]:
    return np.frombuffer(source.rgb, np.uint8).reshape(source.height, source.width, 3)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def smooth(width: int = 48, height: int = 32, shift: float = 0) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    bands = [120 + 90 * np.sin((x + shift) / 9), 120 + 90 * np.cos((y - shift) / 7), 2 * x + y + shift]
    return Image.fromarray(np.stack(bands, -1).clip(0, 255).astype(np.uint8))


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_file(width: int, height: int, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


PNG, JPEG, WEBP, GIF = (
    saved(smooth(), "PNG"),
    saved(smooth(), "JPEG", quality=90),
    saved(smooth(), "WEBP", quality=90),
    saved(smooth(), "GIF"),
)
FILES = {"PNG": PNG, "JPEG": JPEG, "WEBP": WEBP, "GIF": GIF}


# Reading


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (PNG, 0),
        (JPEG, 30),
        (saved(smooth(), "JPEG", quality=90, progressive=True), 30),
        (saved(smooth(), "WEBP", lossless=True), 0),
        (WEBP, 40),
        (GIF, 40),
    ],
    ids=["png", "jpeg", "progressive", "webp-lossless", "webp", "gif"],
)
def test_formats(data: bytes, tolerance: int) -> None:
    want = np.asarray(smooth()).astype(int)
    for value in (data, b64(data), b64(data).encode()):
        source = read(value)
        assert (source.width, source.height) == (48, 32)
        assert abs(pixels(source) - want).max() <= tolerance


PALETTE = Image.new("P", (2, 1), 1)
PALETTE.putpalette([0, 0, 0, *RED])


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (saved(Image.new("1", (2, 1), 1), "PNG"), WHITE),
        (saved(Image.new("L", (2, 1), 77), "PNG"), (77, 77, 77)),
        (saved(Image.new("LA", (2, 1), (77, 9)), "PNG"), (77, 77, 77)),
        (saved(Image.new("RGBA", (2, 1), (*RED, 9)), "PNG"), RED),
        (saved(Image.new("RGBA", (2, 1), (*RED, 255)), "WEBP", lossless=True), RED),
        (saved(PALETTE, "PNG"), RED),
        (saved(PALETTE, "PNG", transparency=1), RED),
        (saved(PALETTE, "PNG", transparency=b"\x80\x40"), RED),
        (saved(PALETTE, "GIF"), RED),
        (saved(PALETTE, "GIF", transparency=1), RED),
        (saved(Image.new("RGB", (2, 1), RED), "PNG", transparency=RED), RED),
        (saved(Image.new("L", (2, 1), 77), "JPEG"), (77, 77, 77)),
        (saved(Image.new("CMYK", (2, 1), (0, 0, 0, 0)), "JPEG"), WHITE),
        (saved(Image.fromarray(np.full((1, 2), 0x8123, np.uint16)), "PNG"), (0x81, 0x81, 0x81)),
        (saved(Image.fromarray(np.full((1, 2), 0x00FF, np.uint16)), "PNG"), (0, 0, 0)),
        (saved(Image.fromarray(np.full((1, 2), 0xFFFF, np.uint16)), "PNG"), WHITE),
    ],
)
def test_modes_become_rgb(data: bytes, colour: tuple[int, int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = read(data)
    assert (pixels(source) == colour).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation(orientation: int, format: str) -> None:
    want = np.zeros((32, 48, 3), np.uint8)  # a different colour in each quarter
    want[:16, :24], want[:16, 24:], want[16:, :24], want[16:, 24:] = RED, GREEN, BLUE, WHITE
    # How a camera stores the upright picture `want` in each of the eight orientations.
    stored = {
        1: want,
        2: want[:, ::-1],
        3: want[::-1, ::-1],
        4: want[::-1],
        5: want.transpose(1, 0, 2),
        6: want.transpose(1, 0, 2)[::-1],
        7: want.transpose(1, 0, 2)[::-1, ::-1],
        8: want.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if format == "JPEG" else {"lossless": True}
    source = read(saved(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options))
    assert (source.width, source.height) == (48, 32)
    assert abs(pixels(source).astype(int) - want).max() <= 3


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png;base64," + b64(PNG),
        "DATA:Image/PNG;Base64," + b64(PNG),
        "data:image/png;charset=utf-8;base64," + b64(PNG),
        "data:image/jpeg;base64," + b64(PNG),  # the content decides
        base64.encodebytes(PNG).decode(),
        base64.encodebytes(PNG).decode().replace("\n", "\r\n"),
        " \n" + b64(PNG) + "\n",
        b64(PNG).rstrip("="),
        b64(PNG + b"x").rstrip("="),
        b64(PNG + b"xx").rstrip("="),
    ],
)
def test_ways_to_write_base64(text: str) -> None:
    assert (pixels(read(text)) == np.asarray(smooth())).all()
    assert read(text.encode()) == read(text)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (20, 10), c) for c in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    source = read(data)
    assert (source.width, source.height) == (20, 10)
    assert (pixels(source) == RED).all()


def test_limits_are_inclusive() -> None:
    for value in (PNG, b64(PNG), b64(PNG).rstrip("=")):
        assert read(value, max_bytes=len(PNG), max_pixels=48 * 32).width == 48
        assert "bytes" in refused(value, max_bytes=len(PNG) - 1)
        assert "48 x 32 is 1536 pixels" in refused(value, max_pixels=48 * 32 - 1)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "empty"),
        (b"", "empty"),
        (" \n", "empty"),
        ("data:image/png;base64,", "empty"),
        ("not base64!", "not base64"),
        ("A", "not base64"),
        ("AA=A", "not base64"),
        (b64(PNG).replace("+", "-").replace("/", "_"), "standard alphabet"),
        ("é" + b64(PNG), "not base64"),
        ("\ud800", "not base64"),
        ("\0", "not base64"),
        (b64(b"hello, this is text"), "no picture of a known format"),
        ("data:image/png," + b64(PNG), "does not begin with"),
        ("data:image/svg+xml;utf8,<svg/>", "does not begin with"),
        ("data:text/plain;base64," + b64(PNG), "does not begin with"),
        ("data:" + "x" * 1000, "does not begin with"),
        ("data:image/png;base64," + b64(PNG).replace("=", "%3D") + "%3D", "not base64"),
        ("http://example.com/cat.png", "not fetched"),
        ("HTTPS://example.com/" + "x" * 1000, "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("s3://bucket/cat.png", "not fetched"),
        ("C:\\cat.png", "not fetched"),
        ("/etc/passwd", "paths are not read"),
        ("../cat.png", "not base64"),
        ("cat.png", "not base64"),
        (b64(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'), "SVG"),
        ("<svg/>", "not base64"),
        (saved(smooth(), "BMP"), "BMP"),
        (b64(saved(smooth(), "BMP")), "BMP"),
        (saved(smooth(), "TIFF"), "TIFF"),
        (b64(saved(smooth(), "TIFF")), "TIFF"),
        (saved(smooth(), "AVIF"), "AVIF"),
        (saved(smooth(), "JPEG2000"), "JPEG 2000"),
        (saved(smooth(), "ICO"), "ICO"),
        (saved(smooth(), "PDF"), "PDF"),
        (saved(smooth(), "PPM"), "no picture of a known format"),
        (b"\x89PNG\r\n\x1a\n", "PNG file is damaged"),
        (b"\xff\xd8\xff", "JPEG file is damaged"),
        (b"RIFF\0\0\0\0WEBP", "WEBP file is damaged"),
        (b"RIFF\x1a\0\0\0WEBPVP8X" + b"\xff" * 18, "pixels"),
        (b"RIFF\x1a\0\0\0WEBPVP8L" + b"\xff" * 18, "pixels"),
        (b"RIFF\x1a\0\0\0WEBPVP8 " + b"\xff" * 18, "pixels"),
        (b"GIF89a", "GIF file is damaged"),
        (b"GIF89a" + b"\xff" * 30, "GIF file is damaged"),
        (7, "not a string"),
        (["x" * 1000], "not a string"),
        (None, "not a string"),
        (bytearray(PNG), "not a string"),
    ],
)
def test_refused(value: Any, says: str) -> None:
    assert says in refused(value)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("format", FILES)
def test_cut_off(format: str, share: float) -> None:
    data = saved(smooth(300, 200), format)
    assert len(data) > 1500  # what is cut off holds pixels, not only the end mark
    assert f"{format} file is damaged or cut off" in refused(data[: int(len(data) * share)])


def test_a_small_file_of_many_pixels_costs_nothing() -> None:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2501 * 100)) for _ in range(200)) + packer.flush()
    bomb = png_file(20_000, 20_000, png_chunk(b"IDAT", packed))
    assert len(bomb) < 60_000
    began = time.thread_time()  # not of those that the machine is shared with
    assert "20000 x 20000 is 400000000 pixels" in refused(bomb, max_pixels=40_000_000)
    assert time.thread_time() - began < 0.1


def test_limits_above_pillows_own() -> None:
    line = zlib.compress(bytes(1 + 100_000_000 // 8))  # 100 megapixels in one row is over Pillow's 89
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "damaged" in refused(
            png_file(100_000_000, 2, png_chunk(b"IDAT", line[: len(line) // 2])), max_pixels=2 * 10**8
        )
        assert "pixels" in refused(png_file(100_000_000, 1), max_pixels=10**8 - 1)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def with_text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    for i in range(70):
        info.add_text(f"k{i}", "x" * 2**20, zip=True)
    return saved(smooth(), "PNG", pnginfo=info)


def with_many_scans() -> bytes:
    data = saved(smooth(), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    return data[:scan] + data[scan:-2] * 200 + data[-2:]


@pytest.mark.parametrize(
    "data",
    [
        with_text_bomb(),
        with_many_scans(),
        JPEG[:2] + b"\xff\xe1\x00\x0aExif\0\0xx" * 1_000_000 + JPEG[2:],
        JPEG[:2] + b"\xff\xfe\x00\x02" * 3_000_000 + JPEG[2:],
        JPEG[:2] + bytes(10_000_000) + JPEG[2:],
        GIF[:13] + b"!\xfe\x00" * 3_000_000 + GIF[13:],
        GIF[:13] + b"!\xfe" + b"\x01x" * 5_000_000 + b"\0" + GIF[13:],
        PNG[:33] + png_chunk(b"prIv", b"") * 1_000_000 + PNG[33:],
        PNG[:33] + png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(10**8))) + PNG[33:],
    ],
    ids=["text", "scans", "exif", "comments", "junk", "extensions", "blocks", "chunks", "profile"],
)
def test_files_made_to_waste_time(data: bytes) -> None:
    began = time.thread_time()
    refused(data, max_bytes=2**26)
    assert time.thread_time() - began < 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest hides the filter that media.py sets for Pillow
@pytest.mark.parametrize("format", FILES)
def test_damaged_files_raise_nothing_else(format: str) -> None:
    rng = random.Random(format)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    data = FILES[format] if format == "GIF" else saved(smooth(), format, exif=exif)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            damaged[rng.randrange(6, rng.choice((60, len(damaged))))] = rng.randrange(256)
        try:
            source = read(bytes(damaged))
            assert len(source.rgb) == source.width * source.height * 3
            outcomes.add("read")
        except InvalidRequest as exc:
            assert str(exc).startswith("image: ") and len(str(exc)) < 400
            outcomes.add("refused")
    assert "refused" in outcomes


def test_the_server_half_loads_neither_av_nor_torch() -> None:
    code = "import runtime.media, sys; print({'av', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# Encoding


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1"])
def test_png_is_exact(mode: str) -> None:
    image = smooth().convert(mode)
    decoded = Image.open(io.BytesIO(encode_image(image, "png", None)))
    assert decoded.mode == mode
    assert decoded.tobytes() == image.tobytes()


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_pictures_are_repeatable_and_without_metadata(format: str) -> None:
    image = smooth(256, 192)
    data = encode_image(image, format, None)
    noted = image.copy()
    noted.info = {"icc_profile": b"p" * 200, "exif": b"Exif\0\0" + bytes(99), "comment": b"c" * 99, "dpi": (300, 300)}
    assert encode_image(noted, format, None) == data
    assert noted.info["dpi"] == (300, 300)
    decoded = Image.open(io.BytesIO(data))
    assert Image.MIME[decoded.format or ""] == CONTENT_TYPES[format]
    error = np.asarray(decoded.convert("RGB")).astype(float) - np.asarray(image)
    assert np.sqrt((error**2).mean()) < 3
    assert not {"exif", "icc_profile", "comment", "dpi"} & set(decoded.info)


@pytest.mark.parametrize(("format", "default"), [("jpeg", 95), ("webp", 90)])
def test_quality_of_pictures(format: str, default: int) -> None:
    sizes = [len(encode_image(smooth(256, 192), format, q)) for q in (1, 50, 100)]
    assert sizes == sorted(set(sizes))
    assert encode_image(smooth(), format, None) == encode_image(smooth(), format, default)


def test_jpeg_keeps_colour_at_full_resolution() -> None:
    decoded = Image.open(io.BytesIO(encode_image(smooth().convert("RGBA"), "jpeg", None)))
    assert [layer[1:3] for layer in decoded.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("image", "format", "quality"),
    [
        (smooth(), "gif", None),
        (smooth(), "PNG", None),
        (smooth(), "jpeg", 0),
        (smooth(), "webp", 101),
        (Image.new("L", (16_384, 1)), "webp", None),
        (Image.new("L", (1, 65_536)), "jpeg", None),
    ],
)
def test_pictures_that_cannot_be_encoded(image: Image.Image, format: str, quality: int | None) -> None:
    with pytest.raises(ValueError):
        encode_image(image, format, quality)


def clip(count: int = 12, width: int = 136, height: int = 104) -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(smooth(width, height, shift=2 * i)) for i in range(count)])


def decode(data: bytes) -> tuple[npt.NDArray[np.uint8], av.video.stream.VideoStream]:
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return np.stack(frames).astype(np.uint8), stream


def psnr(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean()))


@pytest.mark.parametrize(("count", "fps"), [(1, 16), (2, 1), (12, 24), (33, 60)])
def test_video(count: int, fps: int) -> None:
    frames = clip(count)
    data = encode_video(frames, fps, None)
    decoded, stream = decode(data)
    assert decoded.shape == frames.shape
    assert stream.frames == count
    assert stream.average_rate == Fraction(fps)
    assert stream.duration is not None and stream.time_base is not None
    assert float(stream.duration * stream.time_base) == pytest.approx(count / fps)
    codec = stream.codec_context
    assert (codec.name, codec.pix_fmt, codec.profile) == ("h264", "yuv420p", "High")
    assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
    assert psnr(decoded, frames) > 30


def test_video_plays_before_it_is_all_there() -> None:
    data = encode_video(clip(), 16, None)
    assert data[4:8] == b"ftyp"
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, WHITE, (200, 100, 50)])
def test_video_keeps_colours(colour: tuple[int, int, int]) -> None:
    decoded, _ = decode(encode_video(np.full((3, 32, 32, 3), colour, np.uint8), 16, 90))
    assert abs(decoded.astype(int) - colour).max() <= 4


def test_video_is_repeatable() -> None:
    noise = np.random.default_rng(0).normal(0, 12, (24, 240, 416, 3))
    frames = (clip(24, 416, 240) + noise).clip(0, 255).astype(np.uint8)
    want = encode_video(frames, 16, None)
    assert all(encode_video(frames, 16, None) == want for _ in range(4))
    assert encode_video(np.asfortranarray(frames), 16, None) == want
    # The creation time in the header, four bytes after its version, is left out.
    assert want[want.index(b"mvhd") + 8 :][:4] == bytes(4)


def test_quality_of_videos() -> None:
    frames = clip()
    files = [encode_video(frames, 16, q) for q in (1, 50, 75, 100)]
    assert [len(f) for f in files] == sorted({len(f) for f in files})
    assert psnr(decode(files[-1])[0], frames) > psnr(decode(files[0])[0], frames) + 5
    assert decode(files[-1])[1].codec_context.profile == "High"
    assert encode_video(frames, 16, None) == encode_video(frames, 16, 66)


@pytest.mark.parametrize(
    ("frames", "fps", "quality"),
    [
        (clip(1, 137, 104), 16, None),
        (clip(1, 136, 105), 16, None),
        (clip(1)[0], 16, None),
        (clip(1)[:0], 16, None),
        (clip(1).astype(np.float32), 16, None),
        (clip(1)[..., :2], 16, None),
        (clip(1), 0, None),
        (clip(1), 16, 0),
        (clip(1), 16, 101),
    ],
)
def test_videos_that_cannot_be_encoded(frames: Any, fps: int, quality: int | None) -> None:
    with pytest.raises(ValueError):
        encode_video(frames, fps, quality)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_frames_are_rounded_as_numpy_to_pil_does(dtype: Any) -> None:
    frames = np.linspace(0, 1, 2 * 30 * 40 * 3, dtype=dtype).reshape(2, 30, 40, 3)
    result = frames_to_uint8(frames)
    assert result.dtype == np.uint8
    assert (result == (frames * 255).round().astype("uint8")).all()
    pictures = [Image.fromarray(f) for f in result]
    assert (frames_to_uint8(pictures) == result).all()


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [smooth(8, 8), smooth(16, 8)],
        np.zeros((0, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((1, 8, 8, 4), np.float32),
        np.zeros((1, 8, 8, 3), np.int64),
        np.full((1, 8, 8, 3), 1.5, np.float32),
        np.full((1, 8, 8, 3), -0.1, np.float32),
        np.full((1, 8, 8, 3), np.nan, np.float32),
    ],
)
def test_frames_of_another_shape(frames: Any) -> None:
    with pytest.raises(ValueError):
        frames_to_uint8(frames)

"""Source pictures, whole and broken: InvalidRequest in few words, or a picture within the limits, soon."""

from __future__ import annotations

import base64
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import InvalidRequest
from runtime.media import read_image
from tests.fuzz.inputs import changes, checked, more, mutated, values
from tests.server.test_media import FILES, saved, smooth

# As in the server, which media.py tells it: Pillow's warnings about odd metadata are nothing for the log.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

MAX_BYTES, MAX_PIXELS = 2**16, 2**18
SECONDS = 5.0  # of a CPU, for a file of some kilobytes

exif = Image.Exif()
exif[0x0112] = 6  # orientation: a quarter turn
VARIANTS: dict[str, bytes] = {
    **FILES,
    "progressive": saved(smooth(), "JPEG", progressive=True),
    "grey JPEG": saved(smooth().convert("L"), "JPEG"),
    "CMYK": saved(smooth().convert("CMYK"), "JPEG"),
    "EXIF": saved(smooth(), "JPEG", exif=exif),
    "palette": saved(smooth().convert("P"), "PNG", transparency=3),
    "16 bit": saved(Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48)), "PNG"),
    "alpha": saved(smooth().convert("RGBA"), "PNG", exif=exif),
    "lossless WebP": saved(smooth().convert("RGBA"), "WEBP", lossless=True, exif=exif),
    "animated GIF": saved(smooth(), "GIF", save_all=True, append_images=[smooth(shift=5)], loop=0),
    "animated WebP": saved(smooth(), "WEBP", save_all=True, append_images=[smooth(shift=5)]),
    "animated PNG": saved(smooth(), "PNG", save_all=True, append_images=[smooth(shift=5)]),
}


def assert_read(value: Any) -> None:
    begun = time.thread_time()
    try:
        source = read_image(value, field="image", max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
    except InvalidRequest as error:
        assert checked(str(error)).startswith("image: ")
    else:
        assert 0 < source.width * source.height <= MAX_PIXELS
        assert len(source.rgb) == source.width * source.height * 3
    assert time.thread_time() - begun < SECONDS


@pytest.mark.parametrize("name", VARIANTS)
@more(1)
@given(changes=changes)
def test_broken_files(name: str, changes: list[tuple[int, int, bytes]]) -> None:
    assert_read(mutated(VARIANTS[name], changes))


@pytest.mark.parametrize("name", VARIANTS)
@more(1)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 60), st.just(1), st.binary(min_size=1, max_size=1)), min_size=1, max_size=3
    )
)
def test_broken_headers(name: str, changes: list[tuple[int, int, bytes]]) -> None:
    assert_read(mutated(VARIANTS[name], changes))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Name and content of a PNG file's chunks."""
    found, position = [], 8
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        found.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def png_of(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A file of these chunks with true lengths and checksums, so that the decoder looks inside them."""
    checked = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


@pytest.mark.parametrize("name", ["PNG", "palette", "16 bit", "alpha", "animated PNG"])
@more(2)
@given(data=st.data())
def test_png_chunks(name: str, data: st.DataObject) -> None:
    """Chunks changed, repeated, left out and in another order."""
    parts = chunks(VARIANTS[name])
    assert png_of(parts) == VARIANTS[name]
    order = data.draw(st.just(range(len(parts))) | st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=8))
    parts = [parts[i] for i in order]
    index = data.draw(st.integers(0, len(parts) - 1))
    title = data.draw(
        st.just(parts[index][0])
        | st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"fdAT", b"fcTL"])
    )
    parts[index] = (title, mutated(parts[index][1], data.draw(changes)))
    assert_read(png_of(parts))


@more(2)
@given(
    st.sampled_from(sorted(VARIANTS)),
    st.sampled_from([b"", b"data:image/png;base64,", b"DATA:image/x;base64,"]),
    changes,
    st.booleans(),
)
def test_base64(name: str, head: bytes, changes: list[tuple[int, int, bytes]], as_text: bool) -> None:
    data = mutated(head + base64.b64encode(VARIANTS[name]), changes)
    assert_read(data.decode("latin-1") if as_text else data)


@more(2)
@given(values | st.binary(max_size=80) | st.binary(max_size=80).map(lambda tail: b"RIFF0000WEBPVP8X" + tail))
def test_anything(value: Any) -> None:
    assert_read(value)

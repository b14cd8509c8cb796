"""Pictures in, pictures and videos out.

`read_image` runs in the server process on untrusted bytes, `thumbnail` there on our own; the encoders run in the
engine process.
"""

from __future__ import annotations

import binascii
import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Image.open would import every plugin there is to find this one.
from PIL import Image, ImageOps, PngImagePlugin, WebPImagePlugin  # noqa: F401

from runtime.errors import InvalidRequest, shown
from runtime.types import SourceImage

# `read_image` compares the header's size with its own limit before a pixel is decoded; Pillow's fixed limit
# would refuse pictures that the operator allows.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns about odd metadata in words that the sender chooses: nothing for the log.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

FITS = "send base64 or a data URI of a PNG, JPEG, WebP or GIF picture (paths are not read)"

# Pillow parses headers in Python, a read per part: this many reads take some 0.1 s, and real files need a few
# thousand at most.
MAX_READS = 50_000
# Each scan of a progressive JPEG passes over the whole picture, and an empty one costs the sender ten bytes.
# Real files have about ten.
MAX_JPEG_SCANS = 100
# Pillow joins the EXIF segments of a JPEG in quadratic time. Real files have one, or one per embedded picture.
MAX_JPEG_EXIF_SEGMENTS = 100

# x264's bytes depend on the number of threads, so it doesn't follow the machine. Four cost 1 % in size.
VIDEO_THREADS = 4

_OTHER_FORMATS = (
    (rb"BM", "BMP"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
    (rb"\s*<(svg|\?xml|!doctype|html)", "SVG or other markup"),
    (rb"....ftyp(avif|avis)", "AVIF"),
    (rb"....ftyp(heic|heix|hevc|mif1|msf1)", "HEIC"),
    (rb"....ftyp", "MP4"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\0\0\x01\0", "ICO"),
    (rb"%PDF", "PDF"),
)


def read_image(value: str | bytes, *, field: str, max_bytes: int, max_pixels: int) -> SourceImage:
    """The picture in `value`, upright and as 8-bit RGB.

    `value` is base64 text (standard alphabet; line breaks and missing padding are fine), a data URI with
    base64, or the bytes of a file. PNG, JPEG, WebP and GIF are read, told apart by their content; of an
    animation the first frame. `max_bytes` limits the file, `max_pixels` its width times height: both are
    checked before anything is decoded. As in `diffusers.utils.load_image`, EXIF orientation is applied and
    transparency is dropped; 16-bit greys keep their upper 8 bits.

    Raises InvalidRequest, starting with `field`, for everything that can't be read so.
    """
    data = _file_bytes(value, field, max_bytes)
    kind = _kind(data)
    if kind is None:
        raise InvalidRequest(f"{field}: {_describe(data)}; {FITS}")
    if kind == "WEBP":  # the one decoder that allocates the canvas as it opens the file
        _check_pixels(_webp_size(data), field, max_pixels)
    if kind == "JPEG" and (
        data.count(b"\xff\xda") > MAX_JPEG_SCANS or data.count(b"Exif\0\0") > MAX_JPEG_EXIF_SEGMENTS
    ):
        raise InvalidRequest(f"{field}: the JPEG file has too many parts; save it again without progressive scans")
    try:
        with Image.open(_BoundedReader(data), formats=[kind]) as image:
            _check_pixels(image.size, field, max_pixels)
            return _upright_rgb(image)
    except InvalidRequest:
        raise
    except Exception as exc:  # damaged files raise nearly everything: OSError, SyntaxError, struct.error, MemoryError …
        raise InvalidRequest(f"{field}: the {kind} file is damaged or cut off; {FITS}") from exc


def _upright_rgb(image: Image.Image) -> SourceImage:
    image.load()
    image.getexif()  # kept by Pillow; so the orientation is known although the rest of the metadata goes
    image.info.clear()  # odd EXIF would fail when exif_transpose writes it back, odd transparency when converting
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255
        grey = np.asarray(image).astype(np.int32) >> 8
        rgb = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    else:
        rgb = image.convert("RGB")
    return SourceImage(width=rgb.width, height=rgb.height, rgb=rgb.tobytes())


def _file_bytes(value: Any, field: str, max_bytes: int) -> bytes:
    """The file that `value` holds, of at most `max_bytes`."""
    if isinstance(value, bytes):
        if _kind(value) is not None:
            _check_bytes(len(value), field, max_bytes)
            return value
        if not value.isascii():
            raise InvalidRequest(f"{field}: {_describe(value)}; {FITS}")
        text = value
    elif isinstance(value, str):
        # Half more than base64 needs, for line breaks: so that the work below is limited as well.
        _check_bytes(len(value) // 2, field, max_bytes)
        if not value.isascii():
            raise InvalidRequest(f"{field}: {shown(value, 40)} is not base64; {FITS}")
        text = value.encode("ascii")
    else:
        raise InvalidRequest(f"{field}: {shown(value, 40)} is not a string; {FITS}")
    _check_bytes(len(text) // 2, field, max_bytes)

    text = text.lstrip()
    if text[:5].lower() == b"data:":
        comma = text.find(b",", 0, 256)
        head = text[: max(comma, 0)].lower()
        if not head.startswith(b"data:image/") or not head.endswith(b";base64"):
            raise InvalidRequest(
                f'{field}: {shown(text[:30].decode(), 40)} does not begin with "data:image/…;base64,"; {FITS}'
            )
        text = text[comma + 1 :]
    elif re.match(rb"[A-Za-z][A-Za-z0-9+.-]*:", text):
        raise InvalidRequest(f"{field}: {shown(text[:41].decode(), 40)} is not fetched; {FITS}")

    text = text.translate(None, b" \t\r\n\f\v")
    if not text:
        raise InvalidRequest(f"{field}: empty; {FITS}")
    text += b"=" * (-len(text) % 4)
    _check_bytes(len(text) // 4 * 3 - text[-2:].count(b"="), field, max_bytes)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as exc:
        quoted = shown(text[:41].decode(), 40)
        raise InvalidRequest(f"{field}: {quoted} is not base64 in the standard alphabet; {FITS}") from exc


def _check_bytes(size: int, field: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise InvalidRequest(f"{field}: the picture's file is larger than {max_bytes} bytes; a smaller one fits")


def _check_pixels(size: tuple[int, int], field: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequest(
            f"{field}: {width} x {height} is {width * height} pixels; a picture of at most {max_pixels} fits"
        )


def _kind(data: bytes) -> str | None:
    """Pillow's name of the format that `data` begins like, among those that are read."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return None


def _describe(data: bytes) -> str:
    """What a file is that is none of ours, for an error message."""
    for pattern, name in _OTHER_FORMATS:
        if re.match(pattern, data[:64], re.DOTALL | re.IGNORECASE):
            return f"the file is {name}, which is not read"
    return f"a file that begins with {shown(data[:8], 40)} is no picture of a known format"


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas width and height in the header; (0, 0) where it makes no sense, which the decoder refuses."""
    chunk, head = data[12:16], data[20:30].ljust(10, b"\0")
    if chunk == b"VP8X":
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    return 0, 0


class _BoundedReader(io.BytesIO):
    """Ends the parsing of files made of millions of tiny parts."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError("too many parts")
        return super().read(size)


def encode_image(
    image: Image.Image, format: str, quality: int | None, metadata: Mapping[str, str] | None = None
) -> bytes:
    """`image` as a file of `format` ("png", "jpeg" or "webp"), without metadata of its own.

    `quality` is 1 to 100; None means 95 for JPEG and 90 for WebP. PNG is lossless and has none. The same
    pixels give the same bytes. JPEG keeps colour at full resolution (4:4:4) and drops transparency.
    `metadata` becomes a text chunk of a PNG for each entry (tEXt, or iTXt beyond ASCII), before the pixels; JPEG and
    WebP have no such place and go without.

    Raises ValueError for another format or quality, and for a picture wider or higher than the format
    holds (JPEG 65,535 pixels, WebP 16,383).
    """
    _check_quality(quality)
    modes: tuple[str, ...]
    options: dict[str, Any]
    if format == "png":
        modes, options = ("1", "L", "LA", "RGB", "RGBA"), {"compress_level": 1}  # three times as fast as 6
    elif format == "jpeg":
        modes, options = ("L", "RGB"), {"quality": 95 if quality is None else quality, "subsampling": 0}
    elif format == "webp":
        modes, options = ("RGB", "RGBA"), {"quality": 90 if quality is None else quality, "method": 4}
    else:
        raise ValueError(f"{shown(format)} is not one of png, jpeg, webp")
    longest = {"png": 2**31 - 1, "jpeg": 65_535, "webp": 16_383}[format]
    if max(image.size) > longest:
        raise ValueError(f"{image.width} x {image.height} does not fit into {format}: at most {longest} a side")
    if metadata and format == "png":
        options["pnginfo"] = _text_chunks(metadata)
    plain = image.copy() if image.mode in modes else image.convert("RGB")
    plain.info.clear()  # Pillow would write it into the file
    file = io.BytesIO()
    plain.save(file, format.upper(), **options)
    return file.getvalue()


def _text_chunks(metadata: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for name, text in metadata.items():
        if text.isascii() and "\0" not in text:
            chunks.add_text(name, text)
        else:
            chunks.add_itxt(name, text.replace("\0", "\ufffd"))  # PNG knows no such character
    return chunks


def encode_video(
    frames: npt.NDArray[np.uint8], fps: int, quality: int | None, metadata: Mapping[str, str] | None = None
) -> bytes:
    """`frames` (frame, height, width, RGB; uint8) as an H.264 MP4 that begins to play before it is all there.

    8-bit 4:2:0, BT.709, limited range, High profile, preset veryfast. `fps` is in frames a second. `quality`
    1 to 100 maps onto x264's constant rate factor, CRF = 51 - round((quality - 1) * 50 / 99): 100 gives
    CRF 1 and 1 gives CRF 51; None means CRF 18, the same as 66. The same frames give the same bytes.
    `metadata` becomes the file's comment (©cmt), a JSON object.

    Raises ValueError for another shape or type, no frames, an odd width or height (4:2:0 halves them), an
    fps below 1 or another quality.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or frames.size == 0:
        raise ValueError(f"frames must be a filled uint8 array [F, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if width % 2 or height % 2:
        raise ValueError(f"{width} x {height}: width and height must be even")
    if fps < 1:
        raise ValueError(f"fps: {fps} is below 1")
    _check_quality(quality)

    import av  # here, since only the engine process encodes
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

    crf = 18 if quality is None else 51 - round((quality - 1) * 50 / 99)
    file = io.BytesIO()

    def reopen(url: str, flags: int, options: dict[str, str]) -> io.BytesIO:
        # Faststart reads the file again while it moves the index to its front; it reads ahead of where it writes.
        return io.BytesIO(file.getvalue())

    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(file, "w", format="mp4", options=options, io_open=reopen) as container:
        if metadata:
            container.metadata["comment"] = json.dumps(dict(metadata), ensure_ascii=False)
        stream = container.add_stream(
            "libx264",
            rate=fps,
            options={
                "preset": "veryfast",
                "crf": str(crf),
                "flags": "+bitexact",
                # x264's AVX-512 code gives other bytes from run to run (seen with core 165); without it the
                # encoding is as fast.
                "x264-params": "cpu-independent=1",
            },
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.thread_count = VIDEO_THREADS
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT,
                threads=1,
            )
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def thumbnail(video: bytes, longest: int = 512) -> bytes:
    """The first frame of an MP4 as WebP, its longer side at most `longest` pixels; it is never made larger.

    For files that `encode_video` made: it decodes what it is given, in the C code of FFmpeg. Takes tens of
    milliseconds, so not on the event loop. The same video gives the same bytes. Raises ValueError if it is no video.
    """
    import av  # here, since most servers never need it

    try:
        with av.open(io.BytesIO(video), format="mp4") as container:
            frame = next(container.decode(video=0)).to_image()
    except (av.FFmpegError, IndexError, StopIteration) as exc:
        raise ValueError("not an MP4 video with a frame in it") from exc
    frame.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return encode_image(frame, "webp", 80)


def frames_to_uint8(frames: npt.NDArray[Any] | Sequence[Image.Image]) -> npt.NDArray[np.uint8]:
    """The uint8 array [F, H, W, 3] of a float array [F, H, W, 3] in 0..1 or of PIL pictures of one size.

    Rounds to the nearest as `numpy_to_pil` of diffusers does, so that a frame equals the picture the
    pipeline would give; diffusers' `export_to_video` truncates, up to one level darker.

    Raises ValueError for another shape and for values outside 0..1; NaN, the mark of a broken model, is one.
    """
    if not isinstance(frames, np.ndarray):
        if not frames:
            raise ValueError("no frames")
        return np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.size == 0 or not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames must be a filled float array [F, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    result = np.empty(frames.shape, np.uint8)
    for index, frame in enumerate(frames):  # one at a time: the products need four times the result's memory
        if not (frame.min() >= 0 and frame.max() <= 1):  # false for NaN too
            raise ValueError(f"frame {index} has values outside 0..1, or NaN")
        result[index] = (frame * 255).round().astype("uint8")
    return result


def _check_quality(quality: int | None) -> None:
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality: {quality} is not from 1 to 100")

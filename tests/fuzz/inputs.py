"""Inputs as a careless client, a broken one and a hostile one would send them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from runtime.errors import InvalidRequest
from runtime.families.base import ALIASES, COMMON
from tests.server.test_media import FILES
from tests.server.test_requests import PICTURE

LONGEST_MESSAGE = 700

NAMES = [*COMMON, *ALIASES, "size", "clip_skip", "eta", "guidance_rescale", "prompt_2", "true_cfg_scale"]
names = st.sampled_from(NAMES) | st.text(max_size=8)

integers = (
    st.integers(-1, 70) | st.sampled_from([512, 1024, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64]) | st.integers()
)
numbers = integers | st.floats()
texts = st.sampled_from(["", "a dog", "64x64", "png", "jpeg", "64", "1e3", "nan", "true", PICTURE]) | st.text(
    max_size=40
)
scalars = st.none() | st.booleans() | numbers | texts
# What JSON can say, and a little more: Python's integers and NaN.
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
)
pictures = st.sampled_from([*FILES.values(), PICTURE, f"data:image/png;base64,{PICTURE}"])
# Values that the field of that name mostly takes; the rest of the space is `values`.
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.just("a dog"),
    "negative_prompt": st.just("fog"),
    "image": pictures | st.lists(pictures, max_size=5),
    "images": pictures | st.lists(pictures, max_size=5),
    "width": st.sampled_from([64, 64.0, 128, 256, 4096, 72]),
    "height": st.sampled_from([64, 128, 512, 4096]),
    "size": st.sampled_from(["64x64", "128X256", "32x32", "4096x4096"]),
    "seconds": st.sampled_from([1, 0, 0.5, 5.0625, 600]),
    "num_frames": st.sampled_from([1, 5, 17, 18, 257]),
    "output_format": st.sampled_from(["png", "JPEG", "webp", "mp4"]),
    "seed": st.sampled_from([0, 7, 2**63 - 1]),
}


@st.composite
def requests(draw: st.DrawFn, known: tuple[str, ...] = tuple(NAMES)) -> dict[str, Any]:
    """The fields of a request, most of them among `known`, most of their values near to what fits."""
    request: dict[str, Any] = {"prompt": "a dog"} if draw(st.booleans()) else {}
    for _ in range(draw(st.integers(0, 5))):
        name = draw(st.sampled_from(known) if mostly(draw) else names)
        good = GOOD.get(name, st.integers(1, 9) | st.sampled_from([1.5, 9.0, "a dog", None]))
        request[name] = draw(good if mostly(draw) else values)
    return request


def mostly(draw: st.DrawFn) -> bool:
    """False once in ten times, where something odd is to be drawn."""
    return draw(st.integers(0, 9)) < 9


# Bytes put in, taken out or written over somewhere: (place, bytes taken out, bytes put in).
changes = st.lists(
    st.tuples(
        st.integers(0, 2**16),
        st.sampled_from([0, 1, 1, 1, 2, 4, 40]),
        st.binary(max_size=4) | st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0", b'"', b"[" * 300]),
    ),
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, new in changes:
        start = place % (len(data) + 1)
        data = data[:start] + new + data[start + length :]
    return data


def more(factor: float) -> settings:
    """Settings with that many times the examples of the profile, where an example costs little or much."""
    profile = settings.get_profile(settings.get_current_profile_name())
    return settings(profile, max_examples=max(1, int(profile.max_examples * factor)))


def refusal(function: Callable[..., Any], *arguments: Any) -> str | None:
    """The message of the InvalidRequest that `function` raises, None where it raises none. All else passes."""
    try:
        function(*arguments)
    except InvalidRequest as error:
        return checked(str(error))
    return None


def checked(message: str) -> str:
    """`message`, one a person can read, whatever was sent."""
    assert 0 < len(message) < LONGEST_MESSAGE, f"{len(message)} characters: {message[:300]}"
    assert message.isprintable(), ascii(message)
    message.encode()
    return message


def to_json(value: Any) -> bytes:
    """`value` as JSON that says everything JSON can (and NaN, which it cannot); bytes as base64."""
    return json.dumps(value, default=lambda data: base64.b64encode(data).decode()).encode()

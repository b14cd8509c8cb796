"""RequestChecker on any values: InvalidRequest in few words, or a request that everything behind it can carry."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidRequest, StartupError
from runtime.families.requests import RequestChecker
from runtime.types import GenerationRequest
from tests.fuzz.inputs import checked, more, names, requests, values
from tests.server.test_requests import FACTS, checker, least

CHECKERS: dict[str, RequestChecker] = {model: checker(model) for model in FACTS}


def completed(model: str, raw: Any) -> GenerationRequest | None:
    """The request, None where it is refused."""
    given = CHECKERS[model]
    try:
        return given.complete(given.check(raw))
    except InvalidRequest as error:
        checked(str(error))
        return None


def assert_fits(model: str, request: GenerationRequest) -> None:
    """In range, and fit for the engine's channel, the log and the response."""
    schema = CHECKERS[model].schema.parameters
    told = {**dataclasses.asdict(request), **request.extra}
    for name in ("images", "extra"):
        told.pop(name)
    orjson.dumps(told)
    assert pickle.loads(pickle.dumps(request)) == request
    for name, value in told.items():
        if value is None or name not in schema:
            continue
        parameter = schema[name]
        assert parameter.minimum is None or value >= parameter.minimum, name
        assert parameter.maximum is None or value <= parameter.maximum, name
        if parameter.kind == "integer":
            assert type(value) is int and (value - parameter.offset) % parameter.multiple_of == 0, name
    assert request.width > 0 and request.height > 0
    assert request.seeds[-1] < 2**63
    for image in request.images:
        assert len(image.rgb) == image.width * image.height * 3


@pytest.mark.parametrize("model", FACTS)
@more(1.5)
@given(data=st.data())
def test_fields(model: str, data: st.DataObject) -> None:
    """Requests near to good ones. What fits is the same request when it is asked for again."""
    known = (*CHECKERS[model].schema.parameters, "images", "num_images_per_prompt", "size")
    raw = {**least(model), **data.draw(requests(known))}
    request = completed(model, raw)
    if request is not None:
        assert_fits(model, request)
        assert completed(model, {**raw, "seed": request.seed}) == request


@pytest.mark.parametrize("model", FACTS)
@more(0.5)
@given(raw=st.dictionaries(names | st.integers() | st.none(), values, max_size=5))
def test_anything(model: str, raw: dict[Any, Any]) -> None:
    request = completed(model, raw)
    if request is not None:
        assert_fits(model, request)


@pytest.mark.parametrize("model", ["t2v", "sd15"])
@more(1)
@given(
    defaults=st.dictionaries(names, values, max_size=3),
    limits=st.dictionaries(
        st.sampled_from(["max_pixels", "max_frames", "max_steps", "max_n", "max_prompt_length"]),
        st.sampled_from([1, 2, 17, 4096, 2**40]),
        max_size=3,
    ),
)
def test_a_folders_defaults_and_an_operators_limits(
    model: str, defaults: dict[str, Any], limits: dict[str, int]
) -> None:
    """StartupError in one line, or a checker that serves the least request."""
    try:
        made = checker(model, defaults, **limits)
    except StartupError as error:
        checked(str(error))
        return
    made.complete(made.check({**least(model), "prompt": "a"}))

"""How many deaths of the engine count before the server gives up."""

from __future__ import annotations

from itertools import accumulate

import pytest

from runtime.model import deaths_in_a_row


@pytest.mark.parametrize(
    ("served", "rows"),
    [
        ((0, 1, 59, 2), [1, 2, 3, 4]),
        ((3, 1, 61, 0, 59), [1, 2, 1, 2, 3]),
        ((61, 3600, 61), [1, 1, 1]),
    ],
)
def test_an_engine_that_served_a_minute_begins_a_new_row(served: tuple[int, ...], rows: list[int]) -> None:
    assert [*accumulate(served, deaths_in_a_row, initial=0)][1:] == rows

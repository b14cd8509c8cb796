"""Two profiles of Hypothesis: `quick`, the same few examples every time, and `long`, new ones for hours.

pytest tests/fuzz --hypothesis-profile=long
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# Servers are fixtures that outlive an example, and a first example pays for imports.
settings.register_profile(
    "quick",
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # of drawing: a busy machine is
)
settings.register_profile(
    "long",
    max_examples=20_000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("quick")

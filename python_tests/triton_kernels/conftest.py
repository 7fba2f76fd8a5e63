"""For which GPUs that are not here, and for which calls, Triton's kernels are compiled."""

from __future__ import annotations

import pytest

# The tests that count registers compile for sm_90.
TARGETS = ("hip:gfx942",)
FURTHER_TARGETS = ("cuda:80", "cuda:100", "hip:gfx1100")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        more = FURTHER_TARGETS if metafunc.config.getoption("--every-case") else ()
        metafunc.parametrize("target", TARGETS + more)


@pytest.fixture
def every_case(request: pytest.FixtureRequest) -> bool:
    """Whether kernels are compiled for more than one usual call."""
    return bool(request.config.getoption("--every-case"))

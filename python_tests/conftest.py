"""Options and settings of the whole test suite."""

from __future__ import annotations

import os

import pytest
import torch

from pelt_kernels.ops import BACKENDS
from pelt_kernels.ops import _native as native


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        default="",
        metavar="NAMES",
        help=(
            "backends that have to be there, with commas: where one cannot run, its tests fail"
            " instead of being skipped"
        ),
    )
    parser.addoption(
        "--cuda-module",
        metavar="FILE",
        help="a _C built with the CUDA kernels, whose machine code is to be checked",
    )
    parser.addoption(
        "--simulator-seeds",
        default=1,
        type=int,
        help="orders of threads under which cuda_sim has to give the same bits",
    )


def pytest_configure(config: pytest.Config) -> None:
    unknown = required_backends(config) - set(BACKENDS)
    if unknown:
        raise pytest.UsageError(
            f"--require-backend: expected some of {', '.join(BACKENDS)}, got {', '.join(unknown)}"
        )
    config.addinivalue_line("markers", "quick: the short list of parity, for sanitizers")
    # Workers of pytest-xdist share the processor; results do not depend on the number of threads.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def required_backends(config: pytest.Config) -> set[str]:
    return {name for name in config.getoption("--require-backend").split(",") if name}


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """Kernels get NaN where they have to write, so that an element left out shows."""
    native.set_poison(True)
    yield
    native.set_poison(False)


@pytest.fixture
def need(request: pytest.FixtureRequest):
    """need(backend, reason): without a reason goes on; skips, or fails if required."""

    def need(backend: str, reason: str) -> None:
        if reason and backend in required_backends(request.config):
            pytest.fail(f"backend {backend} is required: {reason}")
        if reason:
            pytest.skip(reason)

    return need

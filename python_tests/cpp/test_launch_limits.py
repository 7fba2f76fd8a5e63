"""The simulator refuses launches that a CUDA driver refuses, and says the limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from pelt_kernels.ops import _native as native

pytestmark = pytest.mark.backend("cuda_sim")
Launch = Callable[..., Tensor]


@pytest.mark.parametrize(
    ("device", "kernel", "how", "expected"),
    [
        (
            "H100",
            "store_one",
            {"shared_bytes": 300 * 1024},
            "kernel store_one: expected at most 232448 bytes of shared memory in a block of H100, got 307200",
        ),
        (
            "RTX 4090",
            "store_one",
            {"shared_bytes": 128 * 1024},
            "kernel store_one: expected at most 101376 bytes of shared memory in a block of RTX 4090, got 131072",
        ),
        (
            "H100",
            "store_one",
            {"shared_bytes": 50 * 1024, "granted_bytes": 48 * 1024},
            "kernel store_one: expected at most 49152 bytes of shared memory, which is all that comes"
            " without asking, got 51200",
        ),
        (
            "H100",
            "store_one",
            {"blocks": (1, 70000, 1)},
            "kernel store_one: expected 1 to 2147483647 x 65535 x 65535 blocks, got 1 x 70000 x 1",
        ),
        (
            "H100",
            "store_one",
            {"blocks": (4000, 1, 1), "is_cooperative": True},
            "kernel store_one: expected at most 3 blocks in a cooperative launch, the most that are"
            " resident at once, got 4000",
        ),
        (
            "H100",
            "store_with_64_threads",
            {"threads": 256},
            "kernel store_with_64_threads: expected at most 64 threads in a block, which its bounds"
            " promise, got 256",
        ),
        (
            "H100",
            "store_one",
            {"threads": 2048},
            "kernel store_one: expected 1 to 1024 threads in a block, got 2048",
        ),
        ("T4", "store_one", {}, "kernel store_one is made for sm_80, and T4 is sm_75"),
    ],
)
def test_launches_beyond_a_limit_are_refused(
    device: str, kernel: str, how: dict[str, object], expected: str, launch: Launch
) -> None:
    native.library("_C_sim").set_device(device)
    with pytest.raises(RuntimeError, match=f"^{expected}$"):
        launch("faults", kernel, **how)


@pytest.mark.parametrize(
    ("kernel", "how"),
    [
        ("store_one", {"shared_bytes": 227 * 1024}),
        ("store_one", {"shared_bytes": 48 * 1024, "granted_bytes": 48 * 1024}),
        ("store_one", {"blocks": (1, 200, 3), "threads": 32}),
        ("store_one", {"blocks": (3, 1, 1), "is_cooperative": True}),
        ("store_one", {"threads": 1024}),
        ("store_with_64_threads", {"threads": 64}),
    ],
)
def test_launches_at_a_limit_run(kernel: str, how: dict[str, object], launch: Launch) -> None:
    assert launch("faults", kernel, **how)[0] == 7

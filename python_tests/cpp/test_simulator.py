"""The simulator: sound kernels give the right numbers under every seed, and each planted fault is caught."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SEEDS = 12
Runner = Callable[..., list[str]]

SOUND = {
    "exchange": [3 * ((t + 32) % 128) for t in range(128)],
    "exchange_in_warp": [3 * (t ^ 1) for t in range(128)],
    "named_barriers": list(range(63, -1, -1)),
    "copy": [0 if t // 4 % 4 == 3 else 1000 + t for t in range(128)],
    "two_stages": [1000 + t for t in range(128)],
    "flags": [11 * i for i in range(7)] + [231] * 7,
    "last_block": [11 * i for i in range(7)] + [231],
    "shuffle_and_vote": [
        sum(range(t // 32 * 32, t // 32 * 32 + 32)) * 100000
        + sum(range(t // 4 * 4, t // 4 * 4 + 4)) * 100
        + 30
        + (t >= 32)
        for t in range(64)
    ],
    # 22 of the 64 threads are multiples of 3, 11 in each warp.
    "count_and_ballot": [
        sum(1 << i for i in range(32) if (t // 32 * 32 + i) % 3 == 0) % 1009 * 1000000
        + 11 * 10000
        + 2 * 22 * 100
        + 64
        for t in range(64)
    ],
    # ldmatrix of the matrix 16 i + j: (i, j), (i, j + 1) of lane 4 i + j / 2, and transposed; then of its lower right quarter.
    "ldmatrix_narrow": [
        (16 * i + j) | (16 * i + j + 1) << 16 for i in range(8) for j in range(0, 8, 2)
    ]
    + [(16 * j + i) | (16 * (j + 1) + i) << 16 for i in range(8) for j in range(0, 8, 2)]
    + [(16 * i + j) | (16 * i + j + 1) << 16 for i in range(8, 16) for j in range(8, 16, 2)]
    + [(16 * j + i) | (16 * (j + 1) + i) << 16 for i in range(8, 16) for j in range(8, 16, 2)],
}


@pytest.mark.parametrize("case", SOUND)
@pytest.mark.parametrize("build", ["plain", "sanitized", "portable"])
def test_sound_kernel(case: str, build: str, request: pytest.FixtureRequest) -> None:
    lines = request.getfixturevalue(build)(case, SEEDS)
    assert lines == [" ".join(map(str, SOUND[case])) + " "] * SEEDS


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_products_by_every_way_of_loading(dtype: str, sanitized: Runner) -> None:
    """mma on fragments from plain and transposed tiles equals three plain loops, bit by bit."""
    assert sanitized(f"products_{dtype}", 3) == ["1024 products equal"] * 3


@pytest.mark.parametrize("case", ["no_barrier", "no_warp_barrier", "no_wait"])
def test_missing_synchronisation_shows(case: str, plain: Runner) -> None:
    """Without the barrier or the wait, unwritten words (all bits set) are read, and seeds disagree."""
    lines = plain(case, SEEDS)
    assert sum("4294967295" in line for line in lines) == SEEDS
    assert len(set(lines)) > 1


FAULTS = {
    "write_past": r"kernel write_past, block \(0, 0, 0\): wrote outside its shared memory, at byte 512 of 512",
    "copy_past": r"warp 1, lane \d+: cp_async_16: expected 16 bytes inside the block's shared memory of 512 bytes, got offset \d+",
    "misaligned": r"warp 0, lane \d+: load_16: expected an address that is a multiple of 16, got 0x\w+, which is (4|8|12) too high",
    "return_early": r"deadlock; block \(0, 0, 0\), warp 1: 31 of 32 lanes wait at mma_m16n8k16, 1 returned \(lanes 5\)",
    "return_before_barrier": r"deadlock; block \(0, 0, 0\), warp 0: 32 of 32 lanes wait at sync_threads",
    "diverge": r"lane \d+ arrived at shfl(_xor)? while lanes [\d, ]+ are at shfl(_xor)?; a warp-wide instruction needs all 32 lanes",
    "wrong_count": r"named_barrier_sync: barrier 1 was entered for (64 threads, and now for 128|128 threads, and now for 64)",
    "flags_alone": r"1 of 32 lanes wait at wait_until_at_least.*the launch is not cooperative",
}


@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_reported(case: str, plain: Runner) -> None:
    for line in plain(case, 4):
        assert re.search(FAULTS[case], line), line


def test_sanitizer_sees_the_overrun(sanitized: Runner) -> None:
    text = "\n".join(sanitized("write_past", may_crash=True))
    assert "AddressSanitizer: use-after-poison" in text
    assert "write_past_the_tile" in text


@pytest.mark.parametrize("case", ["misaligned", "return_early", "diverge"])
def test_fault_is_reported_under_sanitizers(case: str, sanitized: Runner) -> None:
    """Abandoned threads leave no poison behind: the next launch on their stacks is clean."""
    for line in sanitized(case, 4):
        assert re.search(FAULTS[case], line), line


def test_philox_known_answers(plain: Runner) -> None:
    """The three vectors published with Random123 for philox4x32, 10 rounds."""
    assert plain("philox")[0].split() == (
        [
            "6627e8d5",
            "e169c58d",
            "bc57ac4c",
            "9b00dbd8",
            "408f276d",
            "41c83b0e",
            "a20bc7c6",
            "6d5451fd",
            "d16cfe09",
            "94fdcceb",
            "5001e420",
            "24126ea1",
        ]
    )


def test_conversions_round_to_nearest_even(plain: Runner) -> None:
    """All 65536 patterns survive a round trip; then limits, ties and subnormals, f16/bf16."""
    expected = "7bff/4780 7c00/4780 6800/4500 6802/4500 0001/3380 0000/3300 0001/3300 0000/3089 8000/8000 7fff/7fff"
    assert plain("conversions")[0].strip() == f"0 wrong; {expected}"


def test_activation_derivatives(plain: Runner) -> None:
    assert max(map(float, plain("activations")[0].split())) < 1e-3


def test_moments_far_from_zero(plain: Runner) -> None:
    """Mean and variance of 96 neighbouring values around 10047.5: a sum of squares would lose the variance."""
    mean, variance = map(float, plain("moments")[0].split()[:2])
    assert mean == pytest.approx(10047.5, abs=1e-3)
    assert variance == pytest.approx((96**2 - 1) / 12, rel=1e-4)


def test_first_fit(plain: Runner) -> None:
    assert plain("first_fit") == ["1 1 0"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_vocabulary_compiles_with_nvcc(arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH: the CUDA bodies cannot be compiled here")
    command = [
        nvcc,
        "-std=c++17",
        f"-arch={arch}",
        "-cubin",
        "-Xptxas=-v",
        f"-I{CSRC}",
        f"-I{HERE}",
        "--Werror=all-warnings",
    ]
    command += [str(HERE / "vocabulary.cu"), "-o", str(tmp_path / "out.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"[1-9]\d* bytes spill", result.stderr), result.stderr

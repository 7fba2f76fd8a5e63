"""The simulator lets sound kernels run: their numbers come out right under every order of warps and
blocks. test_faults.py has those that it must refuse.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

SEEDS = range(1, 13)
pytestmark = pytest.mark.backend("cuda_sim")
Launch = Callable[..., Tensor]


def _warp(t: int) -> range:
    return range(t // 32 * 32, t // 32 * 32 + 32)


def _met(t: int) -> int:
    """What a lane of diverge_and_meet holds before the exchange."""
    if t % 4 == 0:
        return sum(1000 + i for i in range(t % 32 + 1))
    return 2 * (1000 + t) if t % 4 == 1 else 0


# Each kernel's launch, and what it writes.
SOUND: dict[str, tuple[dict[str, object], list[int]]] = {
    "exchange": ({}, [3 * ((t + 32) % 128) for t in range(128)]),
    "exchange_in_warp": ({}, [3 * (t ^ 1) for t in range(128)]),
    "double_buffer": ({}, [4 * ((t + 32) % 128) + 6 for t in range(128)]),
    "named_barriers": ({"words": 64}, list(range(63, -1, -1))),
    "diverge_and_meet": ({}, [_met(t // 4 * 4 + 1) + _met(t ^ 1) for t in range(128)]),
    "copy_asynchronously": ({}, [0 if t // 4 % 4 == 3 else 1000 + t for t in range(128)]),
    "copy_in_two_stages": ({}, [1000 + t for t in range(128)]),
    "shuffle_and_vote": (
        {"threads": 64, "words": 64},
        [
            sum(_warp(t)) * 100000 + sum(range(t // 4 * 4, t // 4 * 4 + 4)) * 100 + 30 + (t >= 32)
            for t in range(64)
        ],
    ),
    # 22 of the 64 threads are multiples of 3, 11 in each warp.
    "count_and_ballot": (
        {"threads": 64, "words": 64},
        [
            sum(1 << i for i, lane in enumerate(_warp(t)) if lane % 3 == 0) % 1009 * 1000000
            + 11 * 10000
            + 2 * 22 * 100
            + 64
            for t in range(64)
        ],
    ),
    # (i, j), (i, j + 1) of lane 4 i + j / 2, and transposed; then of the lower right quarter.
    "ldmatrix_narrow": (
        {"threads": 32, "shared_bytes": 4096},
        [(16 * i + j) | (16 * i + j + 1) << 16 for i in range(8) for j in range(0, 8, 2)]
        + [(16 * j + i) | (16 * (j + 1) + i) << 16 for i in range(8) for j in range(0, 8, 2)]
        + [(16 * i + j) | (16 * i + j + 1) << 16 for i in range(8, 16) for j in range(8, 16, 2)]
        + [(16 * j + i) | (16 * (j + 1) + i) << 16 for i in range(8, 16) for j in range(8, 16, 2)],
    ),
    "gather_from_all_blocks": (
        {"threads": 64, "blocks": (3, 1, 1), "is_cooperative": True, "words": 6},
        [0, 11, 22, 33, 33, 33],
    ),
    "gather_from_all_threads": (
        {"threads": 64, "blocks": (3, 1, 1), "is_cooperative": True, "words": 384},
        list(range(192)) + [(i // 64 + 1) % 3 * 64 + (i % 64 ^ 33) for i in range(192)],
    ),
    # The flags are in the output: -1 at first, as every word of it.
    "flag_for_each_thread": (
        {
            "threads": 64,
            "blocks": (2, 1, 1),
            "is_cooperative": True,
            "words": 192,
            "is_output_written": True,
        },
        2 * [3 * t for t in range(64)] + [0] * 64,
    ),
    "last_block_reduces": (
        {"threads": 64, "blocks": (7, 1, 1), "words": 512},
        [11 * (i // 64) for i in range(448)] + [231] * 64,
    ),
}


@pytest.mark.parametrize("kernel", SOUND)
def test_sound_kernel(kernel: str, launch: Launch) -> None:
    how, expected = SOUND[kernel]
    for seed in SEEDS:
        assert launch("sound", kernel, seed, **how).tolist() == expected, seed


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_products_by_every_way_of_loading(dtype: str, launch: Launch) -> None:
    """mma on fragments from plain and transposed tiles, of small integers, whose sums are exact."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randint(-8, 9, (2, 16, 16), generator=generator).float()
    given = torch.stack([a, b]).view(torch.int32)
    for seed in SEEDS:
        found = launch(
            "sound", f"multiply_{dtype}", seed, given, 1024, threads=32, shared_bytes=4096
        )
        products = found.view(torch.float32).view(4, 16, 16)
        assert torch.equal(products, (a @ b.T).expand(4, 16, 16)), seed


def test_moments_far_from_zero(launch: Launch) -> None:
    """Of 96 neighbouring values around 10047.5: a sum of squares would lose their variance."""
    found = launch("sound", "moments", words=64, threads=32).view(torch.float32).view(32, 2)
    assert torch.equal(found, found[:1].expand(32, 2))
    assert found[0, 0].item() == pytest.approx(10047.5, abs=1e-3)
    assert found[0, 1].item() == pytest.approx((96**2 - 1) / 12, rel=1e-4)


def test_every_16_bit_number_survives_a_conversion_to_float_and_back(launch: Launch) -> None:
    how = {"words": 64, "threads": 1024, "blocks": (64, 1, 1)}
    assert launch("sound", "convert_back_and_forth", **how).tolist() == [0] * 64


def test_conversions_round_to_nearest_even(launch: Launch) -> None:
    """Limits, ties and subnormal numbers, to both types as torch converts them."""
    values = torch.tensor(
        [65519.0, 65520.0, 2049.0, 2051.0, 5.9604645e-8, 2.9802322e-8, 2.98024e-8, 1e-9, -0.0, torch.inf]
    )  # fmt: skip
    given = torch.cat([values, torch.zeros(32 - len(values))]).view(torch.int32)
    found = launch("sound", "round_floats", given=given, words=64, threads=32)
    expected = torch.stack([values.half(), values.bfloat16().view(torch.half)], dim=1)
    pairs = found.view(32, 2)[: len(values)].to(torch.int16)
    assert torch.equal(pairs, expected.view(torch.int16))


def test_philox_known_answers(launch: Launch) -> None:
    """The three vectors published with Random123 for philox4x32, 10 rounds."""
    ones = 0xFFFFFFFF
    digits_of_pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    given = torch.tensor([0] * 6 + [ones] * 6 + digits_of_pi).to(torch.int32)
    found = launch("sound", "draw_philox", given=given, words=12, threads=32)
    assert [f"{word & ones:08x}" for word in found.tolist()] == [
        *("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"),
        *("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"),
        *("d16cfe09", "94fdcceb", "5001e420", "24126ea1"),
    ]


def test_activation_derivatives(launch: Launch) -> None:
    """Against central differences, of all activations."""
    x, step = torch.linspace(-6.03, 5.97, 128), 1e-2
    at, after, before = (
        launch(
            "sound", "derive_activations", given=(x + by).view(torch.int32), words=1536,
            blocks=(6, 1, 1),
        ).view(torch.float32).view(6, 128, 2)
        for by in (0.0, step, -step)
    )  # fmt: skip
    slopes = (after[..., 0] - before[..., 0]) / (2 * step)
    assert (slopes - at[..., 1]).abs().max() < 1e-3


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_vocabulary_assembles_without_spills(
    arch: str, nvcc: Path, ptx_of: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "sound.ptx").write_text(ptx_of("sound"))
    command = [nvcc, f"-arch={arch}", "-cubin", "-Xptxas=-v", tmp_path / "sound.ptx"]
    result = subprocess.run(
        [*command, "-o", tmp_path / "sound.cubin"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not re.search(r"[1-9]\d* bytes spill", result.stderr), result.stderr

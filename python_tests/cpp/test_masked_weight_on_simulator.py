"""The CUDA kernels of masked_weight on the simulator: exact masks over several tiles, blocks and
bands, ties among them, under other orders of threads.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case
from parity import check_in_every_order

from pelt_kernels.ops import BackendError, masked_weight
from pelt_kernels.ops import _native as native
from pelt_kernels.ops.masked_weight.contract import highest, reference

pytestmark = pytest.mark.backend("cuda_sim")

# Two bands of rows, three column tiles: six blocks of the simulator's three work in turns.
ROWS, COLUMNS = 133, 259


def test_a_refusal_names_the_number():
    w = torch.empty(1, 1).expand(2**16, 2**15)
    u, v, row, col = (torch.empty(s) for s in ((2**16, 1), (1, 2**15), 2**16, 2**15))
    refusal = (
        "it counts entries in 32 bits, so Dout Din must be below 2147483648, and it is 2147483648"
    )
    with pytest.raises(BackendError, match=refusal):
        masked_weight(w, u, v, u, v, row, col, 1, backend="cuda_sim")


def _scores():
    random = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    with_nan = random.clone()
    with_nan[random > 1.5] = float("nan")
    with_nan[random < -1.5] = float("inf")
    return {
        "random": random,
        "equal": torch.full((ROWS, COLUMNS), 0.5),
        "few_values": (random * 4).round(),
        "nan_and_inf": with_nan,
    }


@pytest.mark.parametrize("keep", [0, 1, 17000, ROWS * COLUMNS - 1, ROWS * COLUMNS])
@pytest.mark.parametrize("name", _scores())
def test_the_mask_is_that_of_a_stable_sort(name, keep):
    scores = _scores()[name]
    nothing = [torch.zeros(s) for s in ((ROWS, 1), (1, COLUMNS), (ROWS, 1), (1, COLUMNS))]
    expected = torch.where(highest(scores.abs(), keep), scores, 0.0)
    for seed in (1, 2):
        native.library("_C_sim").set_seed(seed)
        y = masked_weight(
            scores,
            *nothing,
            torch.zeros(ROWS),
            torch.zeros(COLUMNS),
            keep,
            backend="cuda_sim",
        )
        assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_nearly_equal_scores_round_as_in_the_formula():
    """Coarse factors make many scores that differ by a rounding, and ranks of 1 products of one."""
    random = torch.Generator().manual_seed(0)
    shapes = ((ROWS, COLUMNS), *[(ROWS, 1), (1, COLUMNS)] * 2, (ROWS,), (COLUMNS,))
    inputs = [torch.randint(1, 9, shape, generator=random) / 10 for shape in shapes]
    w0, u, v, a, b, row, col = inputs
    scales = {"beta": 0.3, "alpha1": -0.7, "alpha2": 0.9}
    factors = {name: torch.tensor(scale) for name, scale in scales.items()}
    w = w0 + factors["beta"] * (u @ v)
    score = w.abs() + factors["alpha1"] * (a @ b)
    exact = (factors["alpha2"].double() * (row[:, None] + col).double() + score.double()).float()
    differ = 0
    for keep in range(1000, ROWS * COLUMNS, 1500):
        (expected,) = reference(*inputs, keep=keep, **scales)
        differ += int((expected != torch.where(highest(exact, keep), w, 0.0)).sum())
        for backend in ("cuda_sim", "eager"):
            assert torch.equal(masked_weight(*inputs, keep, backend=backend, **scales), expected)
    assert differ  # what a fused operation would make of the last sum


@pytest.mark.parametrize("ranks", [(8, 16), (1, 15), (35, 16)])
def test_several_bands_and_rank_chunks(ranks):
    """Against the reference, and the same bits under another order of threads."""
    sizes = {"Dout": ROWS, "Din": COLUMNS, "R": ranks[0], "R2": ranks[1]}
    attributes = {"keep": 9000, "beta": 0.7, "alpha1": 0.5, "alpha2": 2.0}
    case = Case(f"bands {ranks}", sizes, attributes=attributes)
    check_in_every_order("masked_weight", "cuda_sim", case, "float32")


def test_an_input_may_be_a_view_of_another():
    weight, ones = torch.randn(64, 64), torch.ones(64, 4)
    inputs = (weight, ones, ones.T, ones, ones.T, weight[0], weight[0], 100)
    found, expected = (masked_weight(*inputs, backend=name) for name in ("cuda_sim", "eager"))
    torch.testing.assert_close(found, expected)

"""The CUDA kernels of symmetric_kl on the simulator: rows around a warp's and a block's turn,
confident and nearly uniform models, and values that are no numbers.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case
from parity import check_in_every_order

from pelt_kernels.ops import BackendError, symmetric_kl

OPERATOR = "symmetric_kl"
pytestmark = pytest.mark.backend("cuda_sim")


def _agrees(case, draw=None):
    """Loss and gradients by the closeness rule; eager's errors are a second baseline, because a
    kept log-sum-exp has a rounding that the reference has not. The same bits under another order of
    threads.
    """
    check_in_every_order(OPERATOR, "cuda_sim", case, "float32", draw, second="eager")


def test_a_refusal_names_the_number():
    z = torch.empty(1, 1).expand(1, 2**30)
    refusal = (
        "it counts rows and columns in 32 bits, so T and C must be below 1073741824, and they are"
        " 1 and 1073741824"
    )
    with pytest.raises(BackendError, match=refusal):
        symmetric_kl(z, z, backend="cuda_sim")


@pytest.mark.parametrize("classes", [1, 8, 31, 33, 256, 1016, 1023, 1025, 2056, 4099])
def test_vocabularies_around_a_warps_and_a_blocks_turn(classes):
    _agrees(Case("width", {"T": 11, "C": classes}, "mask"))


@pytest.mark.parametrize("rows", [7, 8, 9, 201])
def test_rows_around_a_blocks_turn(rows):
    _agrees(Case("rows", {"T": rows, "C": 5}, "mask"))


def test_long_rows_that_a_block_takes_one_after_the_other():
    """A block has one row of this length at a time, and there are fewer blocks than rows: what it
    keeps of a row in shared memory has to be read before the next row's.
    """
    _agrees(Case("turns", {"T": 60, "C": 1030}, "mask"))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("classes", [300, 2000])
def test_logits_of_any_size(scale, classes):
    """From nearly uniform distributions to those of one class, maxima in later turns included."""

    def draw(n):
        generator = torch.Generator().manual_seed(1 + n)
        z = torch.randn(5, classes, generator=generator) * scale
        z[:, classes - 7] += 5 * scale
        return [z, z + 0.1 * scale * torch.randn(z.shape, generator=generator), None]

    _agrees(Case("given", {}), draw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("classes", [40, 1100])
def test_what_is_no_number_stays_in_its_row(value, classes):
    z1, z2 = torch.randn(3, classes, requires_grad=True), torch.randn(3, classes)
    with torch.no_grad():
        z1[1, 5] = value
    rest = torch.tensor([True, False, True])
    assert not symmetric_kl(z1, z2, backend="cuda_sim").isfinite()
    loss = symmetric_kl(z1, z2, rest, backend="cuda_sim")
    (dz1,) = torch.autograd.grad(loss, z1)
    assert torch.equal(loss, symmetric_kl(z1[rest], z2[rest], backend="cuda_sim"))
    assert not dz1[1].any() and dz1[rest].isfinite().all()

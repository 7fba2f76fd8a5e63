"""The CPU kernels of symmetric_kl: sizes around their blocks and logits of any size under every
instruction set that this processor runs, bits that do not depend on threads, values that are no
numbers, and rows that do not count.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case
from parity import check

from pelt_kernels.ops import _dispatch as dispatch
from pelt_kernels.ops import symmetric_kl

OPERATOR = "symmetric_kl"
pytestmark = pytest.mark.backend("cpu")


def _agrees(case, isa, draw=None):
    """Loss and gradients by the closeness rule; eager's errors are a second baseline, because a
    kept log-sum-exp has a rounding that the reference has not.
    """
    check(OPERATOR, f"cpu:{isa}", case, "float32", draw, second="eager")


def test_a_refusal_is_a_sentence():
    z = torch.zeros(2, 3, dtype=torch.float16)
    with pytest.raises(dispatch.BackendError, match="it takes float32 or bfloat16, and z1 is"):
        symmetric_kl(z, z, backend="cpu")


@pytest.mark.parametrize("classes", [1, 7, 8, 9, 16, 33, 1023, 1024, 1031, 2048, 30001])
def test_vocabularies_around_vectors_and_blocks(classes, isa):
    _agrees(Case("width", {"T": 3, "C": classes}, "mask"), isa)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_threads(precision, isa, same_bits):
    case = Case("large", {"T": 301, "C": 700}, "mask")
    same_bits(OPERATOR, f"cpu:{isa}", case, precision, (2, 5))


def test_logits_that_differ_by_a_shift_have_no_divergence():
    z = torch.randn(4, 3000)
    assert symmetric_kl(z, z, backend="cpu") == 0
    assert symmetric_kl(z, z + 1000.0, backend="cpu") < 1e-7


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1000.0])
def test_logits_of_any_size(scale, isa):
    """From nearly uniform distributions to those of one class, maxima in later blocks included."""

    def draw(n):
        generator = torch.Generator().manual_seed(1 + n)
        z = torch.randn(5, 4000, generator=generator) * scale
        z[:, 3500] += 5 * scale
        return [z, z + 0.1 * scale * torch.randn(z.shape, generator=generator), None]

    _agrees(Case("given", {}), isa, draw)


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(value, classes):
    z1, z2 = torch.randn(3, classes, requires_grad=True), torch.randn(3, classes)
    with torch.no_grad():
        z1[1, 2] = value
    rest = torch.tensor([True, False, True])
    assert not symmetric_kl(z1, z2, backend="cpu").isfinite()
    loss = symmetric_kl(z1, z2, rest, backend="cpu")
    (dz1,) = torch.autograd.grad(loss, z1)
    alone = symmetric_kl(z1[rest], z2[rest], backend="cpu")
    assert torch.equal(loss, alone)
    assert not dz1[1].any() and dz1[rest].isfinite().all()


@pytest.mark.parametrize("classes", [2, 67])
def test_rows_with_a_stride_are_read_where_they_are(classes):
    wide = torch.full((6, 100), float("nan"))
    wide[:, 3 : 3 + classes] = torch.randn(6, classes)
    view, other = wide[:, 3 : 3 + classes], torch.randn(6, classes)
    assert torch.equal(
        symmetric_kl(view, other, backend="cpu"),
        symmetric_kl(view.contiguous(), other, backend="cpu"),
    )

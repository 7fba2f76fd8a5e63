"""masked_weight and symmetric_kl against their papers' formulas, written out, and their bad input."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from pelt_kernels.ops import masked_weight, symmetric_kl
from pelt_kernels.ops.masked_weight import kept_entries

ROWS, COLUMNS, RANK = 12, 10, 3


def factors(dtype=torch.float64):
    torch.manual_seed(5)
    shapes = [
        (ROWS, COLUMNS), (ROWS, RANK), (RANK, COLUMNS), (ROWS, 2), (2, COLUMNS), (ROWS,), (COLUMNS,)
    ]  # fmt: skip
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_masked_weight_and_its_gradients_are_those_of_pst():
    w0, u, v, a, b, row, col = given = factors()
    keep = kept_entries(w0.numel(), 0.75)
    y = masked_weight(*given, keep, beta=0.5, alpha1=2.0, alpha2=0.25)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, given, g)
    with torch.no_grad():
        w = w0 + 0.5 * u @ v
        scores = w.abs() + 2.0 * a @ b + 0.25 * (row[:, None] + col[None, :])
        mask = torch.zeros(w.numel(), dtype=w.dtype)
        mask[scores.flatten().argsort()[int(w.numel() * 0.75) :]] = 1
        mask = mask.view_as(w)
        dscores, dw = g * w, g * (mask + w.abs())
        assert torch.equal(y != 0, mask.bool()) and int(mask.sum()) == keep
        assert_close(y, mask * w)
        expected = (
            dw, 0.5 * dw @ v.T, 0.5 * u.T @ dw, 2.0 * dscores @ b.T, 2.0 * a.T @ dscores,
            0.25 * dscores.sum(1), 0.25 * dscores.sum(0),
        )  # fmt: skip
    for value, wanted in zip(found, expected, strict=True):
        assert_close(value, wanted)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_density_is_exact_also_where_scores_are_equal(sparsity, dtype):
    w0 = torch.ones(ROWS, COLUMNS, dtype=dtype)
    w0[::2] = -1
    nothing = [torch.zeros_like(value) for value in factors(dtype)[1:]]
    keep = kept_entries(w0.numel(), sparsity)
    y = masked_weight(w0, *nothing, keep)
    assert int((y != 0).sum()) == keep == w0.numel() - int(w0.numel() * sparsity)
    # Of equal scores the first in row-major order stay.
    assert bool((y.flatten()[:keep] != 0).all())


def test_a_nan_score_is_kept_and_the_count_stays():
    given = [value.detach() for value in factors()]
    given[0][3, 4] = float("nan")
    y = masked_weight(*given, 7)
    assert bool(y[3, 4].isnan()) and int((y != 0).sum()) == 7


def test_at_the_start_the_update_has_no_gradient_in_u_and_a():
    w0, u, _, a, _, _, _ = given = factors()
    given = [w0, u, torch.zeros_like(given[2]), a, torch.zeros_like(given[4])]
    y = masked_weight(*given, torch.zeros(ROWS).double(), torch.zeros(COLUMNS).double(), w0.numel())
    assert torch.equal(y, w0)
    du, da = torch.autograd.grad(y.square().sum(), (u, a))
    assert not du.any() and not da.any()


def test_the_gradient_of_the_consistency_loss_is_half_the_difference_over_the_batch():
    torch.manual_seed(6)
    z1, z2 = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = symmetric_kl(z1, z2)
    p1, p2 = z1.detach().softmax(-1), z2.detach().softmax(-1)
    kl = torch.nn.functional.kl_div
    expected = 0.5 * (
        kl(p1.log(), p2, reduction="batchmean") + kl(p2.log(), p1, reduction="batchmean")
    )
    assert_close(loss.detach(), expected)
    dz1, dz2 = torch.autograd.grad(loss, (z1, z2))
    assert_close(dz1, 0.5 * (p1 - p2) / 5)
    assert torch.equal(dz2, -dz1)


def test_the_mean_is_over_the_tokens_that_count():
    torch.manual_seed(7)
    z1, z2 = (torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]]).bool()
    loss, alone = symmetric_kl(z1, z2, mask), symmetric_kl(z1[mask], z2[mask])
    assert_close(loss, alone)
    (dz1,) = torch.autograd.grad(loss, z1)
    assert not dz1[~mask].any() and bool(dz1[mask].any())


def test_one_logit_has_no_consistency():
    z1, z2 = (torch.randn(4, 1, requires_grad=True) for _ in range(2))
    loss = symmetric_kl(z1, z2)
    (dz1,) = torch.autograd.grad(loss, z1)
    assert loss.item() == 0 and not dz1.any()


def tensor(*shape):
    return torch.randn(shape)


def pruned(keep=5, **changed):
    given = dict(zip(("w0", "u", "v", "a", "b", "row", "col"), factors(torch.float32)))
    return masked_weight(**(given | changed), keep=keep)


BAD = [
    (lambda: pruned(-1), r"masked_weight: expected keep in \[0, 120\] .*, got -1"),
    (lambda: pruned(121), r"masked_weight: expected keep in \[0, 120\] .*, got 121"),
    (lambda: pruned(u=tensor(ROWS, 2)), r"masked_weight: expected v\[R, Din\] = \[2, 10\]"),
    (lambda: pruned(row=tensor(COLUMNS)), r"masked_weight: expected row\[Dout\] = \[12\]"),
    (lambda: kept_entries(100, 1.0), r"expected sparsity in \[0, 1\), got 1.0"),
    (lambda: kept_entries(100, -0.1), r"expected sparsity in \[0, 1\), got -0.1"),
    (
        lambda: symmetric_kl(tensor(3, 2), tensor(3, 4)),
        r"symmetric_kl: expected z2\[T, C\] = \[3, ",
    ),
    (
        lambda: symmetric_kl(tensor(3, 0), tensor(3, 0)),
        r"expected a size C of at least 1, got 0 \(from z1\)",
    ),
    (
        lambda: symmetric_kl(tensor(2, 3, 4), tensor(2, 3, 4), torch.ones(3).bool()),
        r"symmetric_kl: expected mask \[2, 3\] .*, got \[3\]",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)

"""The ruler itself: small rounding errors pass, and the mistakes that kernels make do not."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close

from pelt_kernels.ops._product import product

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _product(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(48, 48, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    return product(a, b), a.double() @ b.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_baseline_and_a_rounding_of_the_truth_pass(dtype):
    baseline, truth = _product(dtype)
    assert_close(baseline, baseline, truth, dtype, "baseline")
    assert_close(truth.to(dtype), baseline, truth, dtype, "rounded truth")


def _scaled(x):
    return x * 1.05


def _with_lost_row(x):
    x[-1] = 0
    return x


def _with_transposed_tile(x):
    x[:16, :16] = x[:16, :16].T.clone()
    return x


def _with_nan(x):
    x[3, 5] = float("nan")
    return x


def _with_infinity(x):
    x[3, 5] = float("inf")
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spoil", [_scaled, _with_lost_row, _with_transposed_tile, _with_nan, _with_infinity]
)
def test_a_mistake_is_rejected(spoil, dtype):
    baseline, truth = _product(dtype)
    with pytest.raises(AssertionError):
        assert_close(spoil(baseline.clone()), baseline, truth, dtype, "spoiled")


def test_one_percent_is_rejected_where_the_dtype_can_tell():
    for dtype in (torch.float32, torch.float16):
        baseline, truth = _product(dtype)
        with pytest.raises(AssertionError, match="error"):
            assert_close(baseline * 1.01, baseline, truth, dtype, "scaled")


def test_infinities_have_to_agree_in_sign_and_place():
    truth = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    baseline = truth.float()
    assert_close(baseline, baseline, truth, torch.float32, "lse")
    with pytest.raises(AssertionError, match="infinities"):
        assert_close(torch.tensor([1.0, float("inf")]), baseline, truth, torch.float32, "lse")
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0, 0.0]), baseline, truth, torch.float32, "lse")


def test_shape_and_dtype_have_to_agree():
    truth = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(3, 2), torch.zeros(2, 3), truth, torch.float32, "y")
    with pytest.raises(AssertionError, match="float32"):
        assert_close(torch.zeros(2, 3).half(), torch.zeros(2, 3), truth, torch.float32, "y")

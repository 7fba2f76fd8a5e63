"""The product of two tiles: the simulated one against the instruction's definition, and the
processor's own, where there is one, against the simulated one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pelt_kernels.ops import _native as native

HAS_SIMULATED = not native.why_not("_C_sim")
pytestmark = pytest.mark.skipif(not HAS_SIMULATED, reason="the test module _C_sim is not there")
TINY = float(np.finfo(np.float32).tiny)


def _product(library: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor | None:
    result = c.clone()
    pairs = b.view(16, 2, 16).transpose(1, 2).contiguous()
    done = native.library(library).tile_product(
        a=a.data_ptr(), b=pairs.data_ptr(), c=result.data_ptr()
    )
    return result if done else None


def _flushed(values: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zero."""
    return np.where(np.abs(values) < TINY, np.float32(0) * values, values).astype(np.float32)


def _by_definition(a: Tensor, b: Tensor, c: Tensor) -> np.ndarray:
    """Even and odd k have a sum each, rounded to float32 after every product."""
    left, right = (_flushed(t.float().numpy()) for t in (a, b))
    sums = np.zeros((2, 16, 16), dtype=np.float32)
    for k in range(32):
        product = left[:, k, None].astype(np.float64) * right[None, k]
        sums[k % 2] = _flushed((sums[k % 2] + product).astype(np.float32))
    both = _flushed(sums[0] + sums[1])
    return _flushed(_flushed(c.numpy()) + both)


def _operands(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    a, b, c = draw(16, 32).bfloat16(), draw(32, 16).bfloat16(), draw(16, 16)
    if kind == "small":
        a, b, c = a * 2.0**-100, b * 2.0**-26, c * 2.0**-126
    elif kind == "subnormal":
        a[3], c[5] = 2.0**-130, 2.0**-140
    elif kind == "large":
        a, b = a * 2.0**100, b * 2.0**27
    elif kind == "not finite":
        a[2, 7], b[9, 4], c[11, 1] = float("nan"), float("inf"), float("-inf")
    return a, b, c


KINDS = ["usual", "small", "subnormal", "large", "not finite"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_simulated_product_is_the_definition(kind: str) -> None:
    a, b, c = _operands(kind)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(_by_definition(a, b, c))
    found = _product("_C_sim", a, b, c)
    assert found is not None
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("kind", KINDS)
def test_the_processors_product_is_the_simulated_one(kind: str) -> None:
    a, b, c = _operands(kind)
    found, expected = _product("_C", a, b, c), _product("_C_sim", a, b, c)
    if found is None:
        pytest.skip("this processor has no tiles")
    assert expected is not None
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())

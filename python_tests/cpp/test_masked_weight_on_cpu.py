"""The CPU kernels of masked_weight: exact counts where a sample, ties or misleading scores decide,
every instruction set this processor runs, and bits that do not depend on threads.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case
from parity import check, run

from pelt_kernels.ops import _dispatch as dispatch
from pelt_kernels.ops import masked_weight
from pelt_kernels.ops.masked_weight.contract import highest

OPERATOR = "masked_weight"
pytestmark = pytest.mark.backend("cpu")

# More entries than are looked at without a sample; several bands and parts, no size a multiple.
ROWS, COLUMNS = 131, 403


def _large(sparsity, **sizes):
    sizes = {"Dout": ROWS, "Din": COLUMNS, "R": 5, "R2": 3, **sizes}
    entries = sizes["Dout"] * sizes["Din"]
    attributes = {"keep": entries - int(entries * sparsity), "beta": 0.7, "alpha1": 0.5}
    return Case("large", sizes, attributes=attributes)


def _by_scores(scores, keep, backend="cpu"):
    """What stays of a matrix whose scores are its own sizes: no factor adds anything."""
    rows, columns = scores.shape
    nothing = [torch.zeros(s) for s in ((rows, 1), (1, columns), (rows, 1), (1, columns))]
    return masked_weight(
        scores, *nothing, torch.zeros(rows), torch.zeros(columns), keep, backend=backend
    )


def test_refusals_are_sentences():
    w = torch.zeros(2, 2, dtype=torch.float16)
    with pytest.raises(dispatch.BackendError, match="it takes float32 or bfloat16, and w0 is"):
        masked_weight(w, w, w, w, w, w[0], w[0], 1, backend="cpu")
    w = torch.empty(1, 1).expand(2**16, 2**16)
    u, v, row = torch.empty(2**16, 1), torch.empty(1, 2**16), torch.empty(2**16)
    refusal = (
        "its entries have indices of 32 bits, so Dout Din must be below 4294967296, and it is"
        " 4294967296"
    )
    with pytest.raises(dispatch.BackendError, match=refusal):
        masked_weight(w, u, v, u, v, row, row, 1, backend="cpu")


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.9, 0.999, 0.99999])
def test_large_matrices_agree_with_the_reference(sparsity, isa):
    check(OPERATOR, f"cpu:{isa}", _large(sparsity), "float32")


@pytest.mark.parametrize("precision", ["float32", "bfloat16-master"])
@pytest.mark.parametrize("ranks", [(1, 1), (5, 3), (17, 33)])
def test_bits_do_not_depend_on_threads(precision, ranks, isa, same_bits):
    case = _large(0.9, R=ranks[0], R2=ranks[1])
    same_bits(OPERATOR, f"cpu:{isa}", case, precision, (2, 5))


def _hard_scores():
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(ROWS, COLUMNS, generator=generator)
    flat = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    with_nan = random.clone()
    with_nan[random > 1.5] = float("nan")
    with_nan[random < -1.5] = float("inf")
    return {
        "random": random,
        "equal": torch.full((ROWS, COLUMNS), 0.5),
        "two_values": (random > 0).float() + 1,
        "few_values": (random * 4).round(),
        "bfloat16": random.bfloat16().float(),
        "one_row_is_large": torch.where(torch.arange(ROWS)[:, None] == 77, random + 100, random),
        "descending": flat.flip(0, 1) + 1,
        "ascending": flat + 1,
        "huge_range": random.sign() * torch.exp(20 * random),
        "nan_and_inf": with_nan,
        "subnormal": random * 1e-41,
    }


@pytest.mark.parametrize("keep", [0, 1, 2, 1000, 26396, 26397, 52000, 52792, 52793])
@pytest.mark.parametrize("name", _hard_scores())
def test_the_mask_is_that_of_a_stable_sort(name, keep, isa, threads):
    threads(3)
    scores = _hard_scores()[name]
    y = _by_scores(scores, keep, f"cpu:{isa}")
    expected = torch.where(highest(scores.abs(), keep), scores, 0.0)
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_rows_with_a_stride_are_read_where_they_are():
    wide = torch.full((ROWS, COLUMNS + 9), float("nan"))
    wide[:, 4:-5] = _hard_scores()["random"]
    y = _by_scores(wide[:, 4:-5], 20000)
    assert torch.equal(y, _by_scores(wide[:, 4:-5].contiguous(), 20000))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_is_written_beside_results_and_workspace(precision, isa, threads, between_guards):
    threads(3)
    small = Case("small", {"Dout": 7, "Din": 9, "R": 2, "R2": 1}, attributes={"keep": 20})
    with between_guards(at_least=2 * (2 + 1 + 7 + 1)):
        for case in (_large(0.9), small):
            run(OPERATOR, f"cpu:{isa}", case, precision)

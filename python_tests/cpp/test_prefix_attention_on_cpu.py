"""The CPU kernels of prefix_attention: sizes around their blocks, columns in several blocks, bits that
do not depend on threads, and memory beside the results.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case
from cases.prefix_attention import UNIPELT, scaled
from parity import check, run

from pelt_kernels import Prefix, prefix_attention

OPERATOR = "prefix_attention"
ON_SIMULATED_TILES = True
pytestmark = pytest.mark.backend("cpu")


def _sized(s: int, n: int, e: int, p: int, inputs: str = UNIPELT, **attributes: float) -> Case:
    sizes = {"B": 2, "H": 2, "G": 2, "S": s, "N": n, "E": e, "P_i": (p,)}
    return scaled(f"S{s}-N{n}-E{e}-P{p}", sizes, inputs, attributes=attributes)


# Several blocks of queries and of columns, which no block divides; with what changes a score.
LARGE = {
    "unipelt": _sized(70, 300, 64, 30),
    "causal": _sized(300, 300, 64, 5, "gate per head", is_causal=True),
    "dropout": _sized(67, 280, 40, 3, dropout_p=0.2),
    "bias": _sized(40, 290, 64, 9, "bias shared by samples, key_mask"),
}


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 23, 24, 25, 31, 32, 33, 49])
def test_queries_around_blocks(rows, isa, served):
    case = _sized(rows, 20, 32, 3)
    check(OPERATOR, served(OPERATOR, isa, case, "bfloat16"), case, "bfloat16")


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 32, 33, 252, 253, 254])
def test_columns_around_blocks(columns, isa, served):
    case = _sized(9, columns, 64, 3)
    check(OPERATOR, served(OPERATOR, isa, case, "bfloat16"), case, "bfloat16")


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 32, 33, 48, 96, 128, 130])
@pytest.mark.parametrize("precision", ["float32", "bfloat16-master"])
def test_head_sizes_around_vectors_and_tiles(width, precision, isa, served):
    case = _sized(11, 19, width, 5)
    check(OPERATOR, served(OPERATOR, isa, case, precision), case, precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
def test_several_blocks_agree_with_the_reference(name, precision, isa, served):
    backend = served(OPERATOR, isa, LARGE[name], precision)
    check(OPERATOR, backend, LARGE[name], precision)


@pytest.mark.parametrize("name", LARGE)
def test_bits_depend_neither_on_threads_nor_on_the_run(name, isa, served, same_bits):
    backend = served(OPERATOR, isa, LARGE[name], "bfloat16")
    same_bits(OPERATOR, backend, LARGE[name], "bfloat16", (1, 3))


def test_a_nan_stays_in_its_row(isa, served):
    backend = served(OPERATOR, isa, _sized(40, 40, 32, 3), "bfloat16")
    q, k, v = (torch.randn(1, 2, 40, 32).bfloat16() for _ in range(3))
    q[0, 1, 33, 5] = float("nan")
    prefix = Prefix(torch.randn(3, 2, 32), torch.randn(3, 2, 32))
    out = prefix_attention(q, k, v, [prefix], backend=backend)
    assert out[0, 1, 33].isnan().all()
    out[0, 1, 33] = 0
    assert not out.isnan().any()


@pytest.mark.parametrize("width", [1, 30, 64])
@pytest.mark.parametrize("rows", [1, 33])
def test_nothing_is_written_beside_the_results(width, rows, isa, served, between_guards):
    case = _sized(rows, rows + 3, width, 5)
    backend = served(OPERATOR, isa, case, "bfloat16-master")
    with between_guards(at_least=6):
        run(OPERATOR, backend, case, "bfloat16-master")

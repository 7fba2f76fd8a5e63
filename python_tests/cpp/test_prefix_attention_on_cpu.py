"""The CPU kernels of prefix_attention: sizes around their blocks, columns in several blocks, bits that
do not depend on threads, and memory beside the results.
"""

from __future__ import annotations

import pytest
import torch
from parity import check, run, why_refused

from pelt_kernels import Prefix, prefix_attention
from pelt_kernels.ops import _native as native
from pelt_kernels.ops._cases import Case
from pelt_kernels.ops._dispatch import every_request
from pelt_kernels.ops.prefix_attention.contract import _case

OPERATOR = "prefix_attention"
HAS_KERNELS = not native.why_not("_C")
pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="the compiled module _C is not there")
# Each instruction set that the processor runs, and simulated tiles.
REQUESTS = every_request(OPERATOR, "cpu") if HAS_KERNELS else []
REQUESTS += ["cpu_sim"] if not native.why_not("_C_sim") else []
UNIPELT = "prefix_k:0 prefix_v:0 prefix_index:- gate key_mask"


def _sized(s: int, n: int, e: int, p: int, inputs: str = UNIPELT, **attributes: float) -> Case:
    sizes = {"B": 2, "H": 2, "G": 2, "S": s, "N": n, "E": e, "P_i": (p,)}
    return _case(f"S{s}-N{n}-E{e}-P{p}", sizes, inputs, attributes=attributes)


# Several blocks of queries and of columns, which no block divides; with what changes a score.
LARGE = {
    "unipelt": _sized(70, 300, 64, 30),
    "causal": _sized(
        300, 300, 64, 5, "prefix_k:0 prefix_v:0 prefix_index:- gate:1", is_causal=True
    ),
    "dropout": _sized(67, 280, 40, 3, dropout_p=0.2),
    "bias": _sized(40, 290, 64, 9, "prefix_k:0 prefix_v:0 prefix_index:- bias:1 key_mask"),
}


@pytest.fixture(params=REQUESTS)
def request_of_kernels(request):
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _unless_refused(backend: str, case: Case, precision: str) -> None:
    refusal = why_refused(OPERATOR, backend, case, precision)
    if refusal:
        pytest.skip(refusal)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 23, 24, 25, 31, 32, 33, 49])
def test_queries_around_blocks(rows, request_of_kernels):
    check(OPERATOR, request_of_kernels, _sized(rows, 20, 32, 3), "bfloat16")


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 32, 33, 252, 253, 254])
def test_columns_around_blocks(columns, request_of_kernels):
    check(OPERATOR, request_of_kernels, _sized(9, columns, 64, 3), "bfloat16")


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 32, 33, 48, 96, 128, 130])
@pytest.mark.parametrize("precision", ["float32", "bfloat16-master"])
def test_head_sizes_around_vectors_and_tiles(width, precision, request_of_kernels):
    case = _sized(11, 19, width, 5)
    _unless_refused(request_of_kernels, case, precision)
    check(OPERATOR, request_of_kernels, case, precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
def test_several_blocks_agree_with_the_reference(name, precision, request_of_kernels):
    _unless_refused(request_of_kernels, LARGE[name], precision)
    check(OPERATOR, request_of_kernels, LARGE[name], precision)


@pytest.mark.parametrize("name", LARGE)
def test_bits_depend_neither_on_threads_nor_on_the_run(name, request_of_kernels, threads):
    threads(1)
    alone = run(OPERATOR, request_of_kernels, LARGE[name], "bfloat16")
    for count in (1, 3):
        threads(count)
        for what, value in run(OPERATOR, request_of_kernels, LARGE[name], "bfloat16").items():
            assert torch.equal(value, alone[what]), f"{what} with {count} threads"


def test_a_nan_stays_in_its_row(request_of_kernels):
    q, k, v = (torch.randn(1, 2, 40, 32).bfloat16() for _ in range(3))
    q[0, 1, 33, 5] = float("nan")
    prefix = Prefix(torch.randn(3, 2, 32), torch.randn(3, 2, 32))
    out = prefix_attention(q, k, v, [prefix], backend=request_of_kernels)
    assert out[0, 1, 33].isnan().all()
    out[0, 1, 33] = 0
    assert not out.isnan().any()


@pytest.mark.parametrize("width", [1, 30, 64])
@pytest.mark.parametrize("rows", [1, 33])
def test_nothing_is_written_beside_the_results(width, rows, request_of_kernels, monkeypatch):
    """Each piece of memory that the kernels get lies between two stretches of a known value."""
    pieces = []

    def between_guards(shape, dtype, device):
        count = torch.Size(shape).numel()
        memory = torch.full((count + 128,), -777.0, dtype=dtype)
        pieces.append((memory, count))
        return memory[64 : 64 + count].view(shape)

    monkeypatch.setattr(native, "empty", between_guards)
    run(OPERATOR, request_of_kernels, _sized(rows, rows + 3, width, 5), "bfloat16-master")
    assert len(pieces) > 5
    for memory, count in pieces:
        beside = torch.cat([memory[:64], memory[64 + count :]])
        assert torch.equal(beside, torch.full((128,), -777.0, dtype=memory.dtype))

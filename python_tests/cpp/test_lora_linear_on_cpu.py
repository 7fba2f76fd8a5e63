"""The CPU kernels of lora_linear: what they refuse, sizes around their blocks, every instruction set
this processor runs and tiles that are simulated, and bits that do not depend on threads.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import make_attributes
from cases.lora_linear import BANKS, GATE, GATES, branched
from parity import PRECISIONS, check, contract_of, run

from pelt_kernels.ops import LearnedGate, LoraBranch, lora_linear
from pelt_kernels.ops import _native as native
from pelt_kernels.ops.lora_linear import native as kernels

OPERATOR = "lora_linear"
ON_SIMULATED_TILES = True
TILES = (native.TILES, "cpu_sim")
CONTRACT = contract_of(OPERATOR).CONTRACT
pytestmark = pytest.mark.backend("cpu")


def _sizes(b, s, d_in, ranks, d_out=None, size=None, **more):
    d_out = d_out or d_in
    sizes = {"B": b, "S": s, "Din": d_in, "Dout": d_out, "R_i": ranks, **more}
    return {**sizes, "size_i": (size or d_out,) * len(ranks)}


POOLED = {"offsets": [0, 64], "poolings": ["masked_mean", "token"], "extra_poolings": ["mean"]}
# Several tiles and chunks for each of several threads, rows that no tile divides, stretches that no
# width is a multiple of.
LARGE = {
    "gates": branched("gates", _sizes(3, 150, 270, (8, 5), 160, 96), GATES, [1.0, 2.0],
                   attributes=POOLED),
    "dropout": branched("dropout", _sizes(3, 90, 530, (8, 5), 160, 96), GATES, [1.0, 2.0],
                     attributes={**POOLED, "dropout_p": 0.2}),
    "banks": branched("banks", _sizes(5, 90, 64, (16,), M_i=(3,), N_i=(3,)),
                   f"{BANKS}, gate per row", [0.5]),
    "wide": branched("wide", _sizes(1, 200, 600, (17,)), "bias, gate", [0.5]),
}  # fmt: skip


def _call(dtype=torch.float32, branches=1, rows=3, rank=4, width=16):
    x, a, b = torch.zeros(1, rows, width), torch.zeros(rank, width), torch.zeros(16, rank)
    values = dict.fromkeys(CONTRACT.input_names)
    for row in CONTRACT.input_rows:
        if row.is_list:
            values[row.name] = [] if row.name.startswith("extra") else [None] * branches
    values.update(x=x.to(dtype), weight=torch.zeros(16, width, dtype=dtype))
    values.update(a=[a.to(dtype)] * branches, b=[b.to(dtype)] * branches)
    case = branched("call", {}, "", [1.0] * branches)
    return CONTRACT.bind(list(values.values()), make_attributes(CONTRACT, case))


def test_every_refusal_is_a_sentence(monkeypatch):
    def why_not(*args, **sizes):
        return kernels.supports(_call(*args, **sizes), "cpu", "")

    assert why_not() == ""
    assert why_not(torch.bfloat16) == ""
    assert why_not(torch.float16) == "it takes float32 or bfloat16, and x is float16"
    assert why_not(branches=17) == (
        "it takes at most 16 branches and 32 learned gates, and there are 17 and 0"
    )
    assert why_not(rows=2, rank=64, width=2048) == (
        "for 2 rows it would mostly copy factors of ΣR x Din = 131072 numbers"
    )
    assert why_not(rows=3, rank=64, width=2048) == ""
    monkeypatch.setattr(native, "library", lambda name: SimpleNamespace())
    assert why_not().startswith("the compiled module is older than this kernel")


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 17, 23, 25, 31, 33, 49, 63, 65, 129])
def test_rows_around_a_tile(rows, isa, threads, served):
    threads(2)
    case = branched("rows", _sizes(1, rows, 40, (8,)), "bias", [1.0])
    precision = "bfloat16" if isa in TILES else "float32"
    check(OPERATOR, served(OPERATOR, isa, case, precision), case, precision)


@pytest.mark.parametrize("width", [1, 3, 8, 15, 16, 17, 31, 33, 47, 255, 257, 511, 513, 520])
@pytest.mark.parametrize("precision", ["float32", "bfloat16-master"])
def test_widths_around_vectors_and_stretches(width, precision, isa, served):
    inputs = f"bias, {GATE}, mask"
    attributes = {"poolings": ["masked_mean"]}
    case = branched("width", _sizes(2, 7, width, (6,)), inputs, [1.0], attributes=attributes)
    check(OPERATOR, served(OPERATOR, isa, case, precision), case, precision)


@pytest.mark.parametrize("rank", [1, 2, 5, 7, 8, 9, 13, 16, 31, 33, 100, 189, 255])
def test_ranks_around_blocks(rank, isa, served):
    """In float32 to the 192 ranks in all that the kernels take; beyond, and on tiles, in bfloat16."""
    case = branched("rank", _sizes(1, 19, 40, (rank, 3), 56, 21), "bias", [1.0, 0.5],
                 attributes={"offsets": [3, 35]})  # fmt: skip
    precision = "float32" if rank + 3 <= 192 and isa not in TILES else "bfloat16"
    check(OPERATOR, served(OPERATOR, isa, case, precision), case, precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
def test_several_chunks_agree_with_the_reference(name, precision, isa, threads, served):
    threads(3)
    check(OPERATOR, served(OPERATOR, isa, LARGE[name], precision), LARGE[name], precision)


@pytest.mark.parametrize("name", LARGE)
def test_bits_depend_neither_on_threads_nor_on_the_run(name, isa, served, same_bits):
    """Of what the kernels compute: torch's product may take another order on more threads."""
    backend, of_torch = (
        served(OPERATOR, isa, LARGE[name], "bfloat16-master"),
        ("y", "dx", "dweight"),
    )
    same_bits(OPERATOR, backend, LARGE[name], "bfloat16-master", (1, 2, 5), but=of_torch)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_b_it_is_the_base_product_bit_for_bit(precision, isa, served):
    backend, dtype = served(OPERATOR, isa, LARGE["wide"], precision), PRECISIONS[precision][0]
    x, w, bias = (torch.randn(n, dtype=dtype) for n in ((2, 50, 72), (40, 72), (40,)))
    branch = LoraBranch(torch.randn(9, 72, dtype=dtype), torch.zeros(40, 9, dtype=dtype), 0, 2.0)
    y = lora_linear(x, w, bias, [branch], backend=backend)
    assert torch.equal(y, torch.nn.functional.linear(x, w, bias))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_nan_stays_in_its_row(precision, isa, served):
    backend, dtype = served(OPERATOR, isa, LARGE["wide"], precision), PRECISIONS[precision][0]
    x, w, a, b = (torch.randn(n, 32, dtype=dtype) for n in (70, 32, 8, 32))
    x[40, 3] = float("nan")
    x.requires_grad_()
    gate = LearnedGate(w[0], torch.zeros(1, dtype=dtype), "token")
    branch = LoraBranch(a, b[:, :8].contiguous(), gate=gate)
    y = lora_linear(x, w, None, [branch], backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for result in (y, dx):
        assert result[40].isnan().all()
        assert not result[:40].isnan().any()
        assert not result[41:].isnan().any()


def test_a_gate_keeps_the_digits_of_a_float32_weight(isa, served):
    """Where tiles multiply bfloat16, its value and its gradient are still 16 times closer than with
    one number of that type for a weight or for the gradient of a logit.
    """
    backend = served(OPERATOR, isa, LARGE["gates"], "bfloat16-master")
    x, w = torch.randn(1, 90, 256).bfloat16(), torch.randn(16, 256).bfloat16()
    weight, dgate = torch.randn(256) / 16, torch.randn(1, 90)
    gate = LearnedGate(weight.requires_grad_(), torch.zeros(1), "token")
    _, (found,) = lora_linear(x, w, extra_gates=[gate], backend=backend)
    (dweight,) = torch.autograd.grad(found, weight, dgate)

    def values(weight):
        return torch.sigmoid(x.double() @ weight.detach().double())

    def errors(found, one_number, truth):
        return ((t.double() - truth).abs().max() for t in (found, one_number))

    truth = values(weight)
    error, of_one_number = errors(found.detach(), values(weight.bfloat16()), truth)
    assert error < of_one_number / 16
    dlogit = dgate.double() * truth * (1 - truth)
    truth, one_number = ((d.double() @ x.double())[0, 0] for d in (dlogit, dlogit.bfloat16()))
    error, of_one_number = errors(dweight, one_number, truth)
    assert error < of_one_number / 16


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16-master"])
def test_an_infinity_opens_or_shuts_a_gate(precision, isa, served):
    backend = served(OPERATOR, isa, LARGE["gates"], precision)
    dtype, has_masters = PRECISIONS[precision]
    x, weight = torch.randn(40, 36, dtype=dtype), torch.randn(36)
    if not has_masters:
        weight = weight.to(dtype)
    x[5, 3], x[30, 7] = float("inf"), float("-inf")
    gate = LearnedGate(weight, torch.zeros(1, dtype=weight.dtype), "token")
    w = torch.randn(16, 36, dtype=dtype)
    _, (gates,), _ = lora_linear(x, w, extra_gates=[gate], return_gates=True, backend=backend)
    assert gates[0, 5] == float(weight[3] > 0)
    assert gates[0, 30] == float(weight[7] < 0)


@pytest.mark.parametrize("width", [1, 16, 130, 257])
@pytest.mark.parametrize("rank", [1, 9, 33])
def test_nothing_is_written_beside_results_and_workspace(
    width, rank, isa, threads, served, between_guards
):
    threads(3)
    attributes = {"poolings": ["masked_mean"], "extra_poolings": ["token"], "dropout_p": 0.1}
    sizes = _sizes(2, 80, width, (rank,))
    case = branched("guards", sizes, GATES, [1.0], attributes=attributes)
    backend = served(OPERATOR, isa, case, "bfloat16-master")
    with between_guards(at_least=10):
        run(OPERATOR, backend, case, "bfloat16-master")

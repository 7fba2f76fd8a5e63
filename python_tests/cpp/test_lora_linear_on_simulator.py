"""The CUDA kernels of lora_linear on the simulator, in both forms: what they refuse, sizes around
their tiles, more rows than one round of tiles takes, and the base product where B is zero.
"""

from __future__ import annotations

import pytest
import torch
from cases.lora_linear import BANKS, GATE, GATES, branched
from closeness import assert_close
from parity import check_in_every_order, contract_of

from pelt_kernels.ops import LoraBranch, lora_linear
from pelt_kernels.ops.lora_linear import native as kernels

OPERATOR = "lora_linear"
CONTRACT = contract_of(OPERATOR).CONTRACT
pytestmark = pytest.mark.backend("cuda_sim")

POOLED = {"poolings": ["masked_mean", "token"], "extra_poolings": ["mean"]}


def _sizes(b, s, d_in, ranks, d_out=None, size=None, **more):
    d_out = d_out or d_in
    sizes = {"B": b, "S": s, "Din": d_in, "Dout": d_out, "R_i": ranks, **more}
    return {**sizes, "size_i": (size or d_out,) * len(ranks)}


def _why_not(
    form="composed",
    dtype=torch.bfloat16,
    sizes=(2, 8, 64, 64),
    branches=((8, 64, 0, "none"),),
    extra=(),
):
    """Why the kernels refuse a call with these sizes; of each branch R, size, offset and pooling."""
    b, s, d_in, d_out = sizes

    def tensor(*shape):
        return torch.empty((), dtype=dtype).expand(shape)

    def gates(poolings, *shape):
        return [None if pooling == "none" else tensor(*shape) for pooling in poolings]

    ranks, widths, offsets, poolings = zip(*branches) if branches else ((), (), (), ())
    nothing = [None] * len(branches)
    values = {
        "x": tensor(b, s, d_in), "weight": tensor(d_out, d_in), "bias": None,
        "a": [tensor(rank, d_in) for rank in ranks],
        "b": [tensor(width, rank) for rank, width in zip(ranks, widths)],
        "a_index": nothing, "b_index": nothing, "gate": nothing,
        "gate_weight": gates(poolings, d_in), "gate_bias": gates(poolings, 1),
        "extra_weight": gates(extra, d_in), "extra_bias": gates(extra, 1), "mask": None,
    }  # fmt: skip
    attributes = {
        "transposed": False, "offsets": offsets, "scales": [1.0] * len(branches),
        "poolings": poolings, "extra_poolings": extra, "dropout_p": 0.0,
    }  # fmt: skip
    signature = CONTRACT.bind(
        [values[name] for name in CONTRACT.input_names],
        [attributes[name] for name in CONTRACT.attribute_names],
    )
    return kernels.supports(signature, "cuda_sim", form)


def test_every_refusal_names_its_numbers():
    assert _why_not() == ""
    assert "float32" in _why_not(dtype=torch.float32)
    assert _why_not(sizes=(2, 8, 36, 20), branches=()).endswith("and they are 36 and 20")
    assert _why_not(branches=[(8, 64, 0, "none")] * 9, extra=["mean"] * 17).endswith(
        "and there are 9 and 17"
    )
    assert str(2**31) in _why_not(sizes=(2**16, 2**15, 64, 64))


def test_the_single_launch_names_what_it_cannot_do():
    def why_not(branches=((8, 64, 0, "none"),), sizes=(2, 8, 64, 64), extra=()):
        return _why_not("single", sizes=sizes, branches=branches, extra=extra)

    assert why_not() == ""
    assert why_not([(48, 64, 0, "token")], extra=["token"] * 15) == ""
    assert "pooled" in why_not(extra=["mean"])
    assert why_not([(8, 16, 8, "none")]).endswith("from 8 to 24 of 64")
    assert why_not([(8, 8, 64, "none")], sizes=(2, 8, 64, 72)) == ""
    assert why_not([(65, 64, 0, "none")]).endswith("and needs 80")
    assert why_not([(57, 64, 0, "token")]).endswith("and needs 65")
    # Side by side in y, and yet together in backward.
    aside = [(16, 128, 128 * i, "none") for i in range(5)]
    assert why_not(aside, sizes=(1, 8, 64, 640)).endswith("and needs 80")
    assert str(2**37) in why_not(sizes=(2**15, 2**15, 2**21, 64))


# Ranks and gates around the 16 and the 64 columns of a block, gates that would straddle two blocks,
# and columns of y that no tile is a multiple of.
LARGE = {
    "one_block": branched("one_block", _sizes(2, 70, 72, (8, 5), 160, 96), GATES, [1.0, 2.0],
                       attributes={**POOLED, "offsets": [0, 64]}),
    "overlap": branched("overlap", _sizes(2, 70, 72, (8, 7), 160, 90), GATES, [1.0, 2.0],
                     attributes={**POOLED, "offsets": [3, 70]}),
    "straddling": branched("straddling", _sizes(3, 40, 64, (60, 3)), GATES, [1.0, 2.0],
                        attributes=POOLED),
    "three_blocks": branched("three_blocks", _sizes(1, 150, 136, (120, 30)), GATES, [1.0, 2.0],
                          attributes=POOLED),
    "dropout": branched("dropout", _sizes(2, 67, 72, (8, 5)), GATES, [1.0, 2.0],
                     attributes={**POOLED, "dropout_p": 0.2}),
    "banks": branched("banks", _sizes(4, 67, 64, (17,), M_i=(3,), N_i=(2,)),
                   f"{BANKS}, gate per row", [0.5]),
    "gates": branched("gates", {"B": 3, "S": 40, "Din": 72, "Dout": 8},
                   "5 extra_weight, 5 extra_bias, mask", [],
                   attributes={"extra_poolings": ["mean", "token", "masked_mean"] + ["mean"] * 2}),
}  # fmt: skip


# More rows, columns, ranks and chunks of the depth than a block of the single launch takes at once.
TOKENS = f"bias, {GATE}, extra_weight, extra_bias"
OF_TOKENS = {"poolings": ["token", "token"], "extra_poolings": ["token"]}
SINGLE = {
    "tiles": branched("tiles", _sizes(2, 70, 72, (8, 5), 160, 96), TOKENS, [1.0, 2.0],
                   attributes={**OF_TOKENS, "offsets": [0, 64]}),
    "slots": branched("slots", _sizes(2, 9, 72, (17, 12), 160, 96), TOKENS, [1.0, 2.0],
                   attributes={**OF_TOKENS, "offsets": [16, 64], "dropout_p": 0.3}),
    "qkv": branched("qkv", _sizes(1, 20, 136, (8, 16), 384, 128), "bias, gate[0], gate[1] per row, transposed weight", [0.5, 2.0],
                 attributes={"offsets": [0, 256], "transposed": True, "dropout_p": 0.2}),
    "chunks": branched("chunks", _sizes(1, 33, 328, (24,)), "", [1.0]),
    "wide_banks": branched("wide_banks", _sizes(6, 3, 256, (9,), M_i=(3,), N_i=(2,)),
                        f"{BANKS}, gate per row", [0.5],
                        attributes={"dropout_p": 0.1}),
    "wide_rows": branched("wide_rows", _sizes(1, 260, 264, (16,), 512), "bias, transposed weight", [1.0],
                       attributes={"transposed": True}),
}  # fmt: skip
FORMS = [
    (form, name) for form, names in (("composed", LARGE), ("single", SINGLE)) for name in names
]


@pytest.mark.parametrize("precision", ["bfloat16", "float16-master"])
@pytest.mark.parametrize(("form", "name"), FORMS)
def test_several_tiles_and_blocks(form, name, precision):
    """Against the reference, and the same bits under another order of threads."""
    case, backend = {**LARGE, **SINGLE}[name], f"cuda_sim:{form}"
    check_in_every_order(OPERATOR, backend, case, precision)


def test_without_b_it_is_the_base_product_bit_for_bit():
    x, w, bias = (torch.randn(n).bfloat16() for n in ((2, 50, 72), (40, 72), (40,)))
    branch = LoraBranch(torch.randn(9, 72).bfloat16(), torch.zeros(40, 9).bfloat16(), 0, 2.0)
    y = lora_linear(x, w, bias, [branch], backend="cuda_sim:composed")
    assert torch.equal(y, torch.nn.functional.linear(x, w, bias))
    single = lora_linear(x, w, bias, [branch], backend="cuda_sim:single")
    assert torch.equal(single, lora_linear(x, w, bias, backend="cuda_sim:single"))


def test_what_is_not_finite_stays_in_its_branch():
    """In the single launch two branches, and columns that neither reaches, are in one tile."""
    x, w = (torch.randn(n).bfloat16() for n in ((2, 9, 64), (64, 64)))
    factors = [(torch.randn(8, 64).bfloat16(), torch.randn(16, 8).bfloat16()) for _ in range(2)]
    factors[0][0][3] = float("inf")
    branches = [LoraBranch(a, b, offset) for (a, b), offset in zip(factors, (16, 48))]
    y = lora_linear(x, w, None, branches, backend="cuda_sim:single")
    finite = y.isfinite().all(dim=(0, 1))
    assert not finite[16:32].any()
    assert finite[:16].all() and finite[32:].all()


def test_frozen_factors_cost_no_sums():
    """Only x needs a gradient: no launch for the factors, and no workspace for their sums."""
    x = torch.randn(2, 40, 64).bfloat16().requires_grad_()
    a, b, w = (torch.randn(n).bfloat16() for n in ((8, 64), (64, 8), (64, 64)))

    def grad_of_x(backend):
        y = lora_linear(x, w, None, [LoraBranch(a, b)], backend=backend)
        return torch.autograd.grad(y.sum(), x)[0]

    ones = torch.ones(2, 40, 64, dtype=torch.float64)
    truth = ones @ w.double() + ones @ b.double() @ a.double()
    # Rounded once for each product and for the sum, as the reference in bfloat16 is.
    base, narrow = ((ones @ t.double()).bfloat16().double() for t in (w, b))
    baseline = (base + (narrow @ a.double()).bfloat16().double()).bfloat16()
    for form in ("composed", "single"):
        assert_close(grad_of_x(f"cuda_sim:{form}"), baseline, truth, torch.bfloat16, f"dx, {form}")

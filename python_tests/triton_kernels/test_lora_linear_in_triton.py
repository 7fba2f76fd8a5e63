"""What is particular to lora_linear in Triton: refusals, dropout's words, gates beside many ranks.

Parity, determinism and the rest are the general tests of python_tests/ops, under
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from closeness import assert_close
from parity import OTHER_DRAWS, contract_of, operator_of

from pelt_kernels import LearnedGate, LoraBranch, lora_linear
from pelt_kernels.ops import _philox
from pelt_kernels.ops.lora_linear import triton as backend


def refusal(ranks, dtype=torch.float32, gates=0, rows=(2, 3)):
    """Of a call with these ranks and extra gates; its tensors hold no memory."""

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    contract, n = contract_of("lora_linear").CONTRACT, len(ranks)
    a, b = [empty(rank, 8) for rank in ranks], [empty(8, rank) for rank in ranks]
    absent = [[None] * n] * 5
    extras = [[empty(8) for _ in range(gates)], [empty(1) for _ in range(gates)]]
    values = [empty(*rows, 8), empty(8, 8), None, a, b, *absent, *extras, None]
    attributes = [False, [0] * n, [1.0] * n, ["none"] * n, ["mean"] * gates, 0.0]
    return backend.supports(contract.bind(values, attributes), "triton", "")


def test_refusals_name_the_number():
    assert refusal((4,), torch.float64) == "it takes float32, float16 or bfloat16, and x is float64"
    assert refusal((200, 57)) == (
        "its registers hold ranks that add up to at most 256, and they are 257"
    )
    assert "at most 16 learned gates" in refusal((4,), gates=17)
    assert "2**31" in refusal((4,), rows=(2**16, 2**15))


@pytest.mark.backend("triton")
@pytest.mark.parametrize("seed", [1, 2**31, 2**63 + 7])
def test_dropout_keeps_exactly_the_words_of_the_contract(seed):
    """dx of a branch that copies one column shows what was kept; a width that is no multiple of 4."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, columns, p = 19, 37, 0.4
    x = torch.ones(1, rows, columns, device=device, requires_grad=True)
    weight = torch.zeros(5, columns, device=device)
    a, b = torch.ones(1, columns, device=device), torch.ones(5, 1, device=device)
    branch = ([a], [b], [None], [None], [None], [None], [None], [], [], None)
    attributes = (False, [0], [1.0], ["none"], [], p)
    y = operator_of("lora_linear")((x, weight, None, *branch), attributes, seed, "triton")[0]
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = _philox.keep_mask(rows, columns, p, seed, torch.device("cpu"))
    assert torch.equal(dx[0].cpu() != 0, expected)


@pytest.mark.backend("triton")
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("rank", [5, 16, 256])
def test_gates_in_and_beside_the_product_of_the_branches(rank, dropout_p):
    """Gates share the branches' product where that is free and have their own elsewhere."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @lru_cache
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(2, 9, 40), (24, 40), (rank, 40), (24, rank), *[(40,), (1,)] * 3]
        return [(0.2 * torch.randn(shape, generator=generator)).to(device) for shape in shapes]

    def run(name, dtype, seed=0):
        leaves = [t.to(dtype).requires_grad_() for t in drawn(seed)]
        x, weight, a, b, *pairs = leaves
        first, *others = [
            LearnedGate(pairs[2 * i], pairs[2 * i + 1], pooling)
            for i, pooling in enumerate(("mean", "token", "mean"))
        ]
        y, extras = lora_linear(
            x, weight, None, [LoraBranch(a, b, gate=first)], extra_gates=others,
            dropout_p=dropout_p, seed=3, backend=name,
        )  # fmt: skip
        loss = y.square().sum() + sum(extra.square().sum() for extra in extras)
        return y, *extras, *torch.autograd.grad(loss, leaves)

    @lru_cache
    def expected(seed):
        by_eager = [run("eager", dtype, seed) for dtype in (torch.float32, torch.float64)]
        return list(zip(*by_eager))

    for i, found in enumerate(run("triton", torch.float32)):
        others = (expected(seed)[i] for seed in range(1, 1 + OTHER_DRAWS))
        assert_close(found, *expected(0)[i], torch.float32, f"result {i}", others)


@pytest.mark.backend("triton")
@pytest.mark.parametrize("wanted", [*range(8), (0, 7), (1, 2), (2, 4), (5, 6)])
def test_each_gradient_alone(wanted):
    """What is not asked for has no memory, and changes no number of the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 24), (24, 24), (24,), (3, 24), (24, 3), (24,), (1,), (2,)]
    leaves = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    for leaf in leaves:
        leaf.requires_grad_()
    x, weight, bias, a, b, w, c, given = leaves
    branches = [LoraBranch(a, b, gate=LearnedGate(w, c, "mean")), LoraBranch(a, b, gate=given)]
    results = {}
    for name, only in (
        ("all", range(8)),
        ("some", wanted if isinstance(wanted, tuple) else [wanted]),
    ):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in only)
        y = lora_linear(x, weight, bias, branches, backend="triton")
        results[name] = dict(
            zip(only, torch.autograd.grad(y.square().sum(), [leaves[i] for i in only]))
        )
    for i, grad in results["some"].items():
        assert torch.equal(grad, results["all"][i]), i

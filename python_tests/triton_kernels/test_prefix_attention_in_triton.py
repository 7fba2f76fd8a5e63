"""What is particular to prefix_attention in Triton: refusals, several tiles, dropout's groups of four.

Parity, determinism and the rest are the general tests of python_tests/ops, under
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from closeness import assert_close
from parity import OTHER_DRAWS, contract_of

from pelt_kernels import Prefix, prefix_attention
from pelt_kernels.ops.prefix_attention import triton as backend


def refusal(dtype=torch.float32, **sizes):
    """Of a call of these sizes; its tensors hold no memory."""
    b, s, e = (sizes.get(letter, 16) for letter in "BSE")
    q, k, v = (torch.empty(b, 2, s, e, dtype=dtype, device="meta") for _ in range(3))
    values = [q, k, v, [], [], [], None, None, None, None]
    signature = contract_of("prefix_attention").CONTRACT.bind(values, [False, 1.0, 0.0])
    return backend.supports(signature, "triton", "")


def test_refusals_name_the_number():
    assert refusal(torch.float64) == "it takes float32, float16 or bfloat16, and q is float64"
    assert refusal(E=129) == "its registers hold heads of at most 128, and E is 129"
    assert "2**31" in refusal(B=2**16, S=2**15, E=1)


def results(leaves, backend, dtype, wanted, **more):
    """The output, and the gradients of the leaves with the numbers ``wanted``."""
    leaves = [leaf.to(dtype).requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
    q, k, v, table_k, table_v, shared_k, shared_v, gate = leaves
    index = torch.tensor([2, 0], device=q.device)
    prefixes = [Prefix(table_k, table_v, index), Prefix(shared_k, shared_v)]
    out = prefix_attention(q, k, v, prefixes, gate=gate, backend=backend, **more)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad(out, [leaves[i] for i in wanted], dout)


def drawn(s, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [(2, 4, s, 16), (2, 2, n, 16), (2, 2, n, 16)]
    shapes += [(3, 6, 2, 16)] * 2 + [(5, 2, 16)] * 2 + [(2, 4)]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


PADDED = torch.arange(150) < 100, torch.arange(150) >= 30  # on the right, and on the left
CALLS = {
    "padded": (33, 150, {"key_mask": torch.stack(PADDED)}),
    "causal": (66, 80, {"is_causal": True}),
    "causal_more_queries": (90, 24, {"is_causal": True}),
    "lengths": (33, 150, {"lengths": torch.tensor([150, 70])}),
    "dropout": (10, 70, {"dropout_p": 0.25, "seed": -(2**63) + 5, "is_causal": True}),
}


@pytest.mark.backend("triton")
@pytest.mark.parametrize("name", CALLS)
def test_tiles_that_all_see_and_tiles_that_some_see(name):
    """Several tiles of queries and keys, segments whose columns start inside of a group of four."""
    s, n, more = CALLS[name]
    every = range(8)
    device = drawn(1, 1)[0].device
    more = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in more.items()}

    @lru_cache
    def expected(seed):
        by_eager = [
            results(drawn(s, n, seed), "eager", dtype, every, **more)
            for dtype in (torch.float32, torch.float64)
        ]
        return list(zip(*by_eager))

    for i, found in enumerate(results(drawn(s, n), "triton", torch.float32, every, **more)):
        others = (expected(seed)[i] for seed in range(1, 1 + OTHER_DRAWS))
        assert_close(found, *expected(0)[i], torch.float32, f"result {i}", others)


@pytest.mark.backend("triton")
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3, 4), (5, 6), (7,)])
def test_some_gradients_alone(wanted):
    """What is not asked for changes no number of the others."""
    leaves = drawn(9, 11)
    everything = results(leaves, "triton", torch.float32, range(8))
    for i, grad in zip(wanted, results(leaves, "triton", torch.float32, wanted)[1:]):
        assert torch.equal(grad, everything[1 + i]), i

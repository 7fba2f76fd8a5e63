"""prefix_attention's eager form on torch's flash attention: what sends a call there, rows that see
nothing, what is not finite, and memory. Parity tests hold its numbers to the reference.
"""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from pelt_kernels.ops import Prefix, prefix_attention
from pelt_kernels.ops.prefix_attention import _flash_joined, eager
from pelt_kernels.ops.prefix_attention.contract import CONTRACT, reference

B, H, S, N, E, P = 2, 4, 9, 11, 16, 3
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(groups=H, p=P):
    """q, k, v and a prefix."""
    q, k, v = (
        draw(B, h, n, E, seed=i) for i, (h, n) in enumerate(((H, S), (groups, N), (groups, N)))
    )
    prefix = Prefix(draw(p, groups, E, seed=3), draw(p, groups, E, seed=4))
    return q, k, v, [prefix] if p else []


class Calls(TorchDispatchMode):
    """The operators that run, and the largest tensor one of them gives."""

    def __enter__(self):
        self.names, self.largest = set(), 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name().partition("::")[2])
        found = out if isinstance(out, (tuple, list)) else (out,)
        sizes = [t.numel() for t in found if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def call_of(q, k, v, prefixes, *, bias=None, key_mask=None, is_causal=False, dropout_p=0.0):
    prefix = [[p.k for p in prefixes], [p.v for p in prefixes], [None] * len(prefixes)]
    return CONTRACT.bind(
        (q, k, v, *prefix, None, key_mask, None, bias), (is_causal, 0.25, dropout_p)
    )


def test_flash_attention_serves_all_but_dropout_and_nothing():
    q, k, v, prefixes = inputs()
    mask = torch.zeros(B, N, dtype=torch.bool)
    for more in ({}, {"key_mask": mask}, {"bias": draw(1, H, S, N)}, {"is_causal": True}):
        assert _flash_joined.why_not(call_of(q, k, v, prefixes, **more)) == ""
    grouped = inputs(groups=2)
    assert _flash_joined.why_not(call_of(*grouped)) == ""
    assert "dropout" in _flash_joined.why_not(call_of(q, k, v, prefixes, dropout_p=0.1))
    assert "is 0" in _flash_joined.why_not(call_of(q[:0], k[:0], v[:0], prefixes))
    assert "is 0" in _flash_joined.why_not(call_of(q, k[:, :, :0], v[:, :, :0], []))
    on_meta = call_of(*(t.to("meta") for t in (q, k, v)), [])
    assert "no flash attention here" in _flash_joined.why_not(on_meta)


@pytest.mark.parametrize("groups", [H, 2])
def test_nothing_has_the_size_of_the_scores(groups):
    n, s = 300, 200
    q, k, v = draw(B, H, s, E), draw(B, groups, n, E), draw(B, groups, n, E)
    prefix_k, prefix_v, gate = draw(P, groups, E), draw(P, groups, E), draw(B).sigmoid()
    mask = torch.arange(n).expand(B, n) < 250
    given = (q, k, v, [prefix_k], [prefix_v], [None], gate, mask, None, None)
    call = CONTRACT.bind(given, (False, 0.25, 0.0))
    names = [row.name for row in CONTRACT.input_rows if row.is_differentiable]
    needs = {name: name in names and name != "bias" for name in CONTRACT.backward_names}
    inputs = dict(zip(CONTRACT.input_names, given))
    with Calls() as forward:
        out, lse = eager.forward(call, **inputs, seed=0)
    with Calls() as backward:
        eager.backward(call, needs, torch.ones_like(out), out, lse, **inputs, seed=0)
    for calls, name in ((forward, FLASH), (backward, f"{FLASH}_backward")):
        assert name in calls.names
        assert calls.largest <= B * H * (P + n) * E < B * H * s * n


@pytest.mark.parametrize("case", ["a_sample", "causal", "causal_and_mask", "minus_infinity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing(case, dtype):
    """They are 0 with a log-sum-exp of -inf and give nothing to a gradient; the others are as if
    alone. Without a prefix: its columns are always seen.
    """
    q, k, v, _ = inputs(p=0)
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    mask = torch.ones(B, N, dtype=torch.bool)
    more = {}
    if case == "a_sample":
        mask[1] = False
        more = {"key_mask": mask}
    elif case == "causal":
        more = {"is_causal": True}
        k, v = (t[:, :, :5].detach().requires_grad_() for t in (k, v))
    elif case == "causal_and_mask":
        mask[0, :5] = False
        more = {"is_causal": True, "key_mask": mask}
    else:
        bias = torch.zeros(1, 1, S, N, dtype=dtype)
        bias[:, :, 3] = -torch.inf
        more = {"bias": bias}
    out, lse = prefix_attention(q, k, v, return_lse=True, backend="eager", **more)
    dout = draw(B, H, S, E, seed=10).to(dtype)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    unseen = lse == -torch.inf
    assert 0 < unseen.sum() < unseen.numel()
    assert not out[unseen].any() and not grads[0][unseen].any()
    assert all(grad.isfinite().all() for grad in grads)
    if case == "minus_infinity":
        return  # the reference's own gradient is NaN there

    def by_reference(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        found, _ = reference(
            *leaves, [], [], [], None, more.get("key_mask"), None, None,
            is_causal=more.get("is_causal", False), scale=E**-0.5, dropout_p=0.0, seed=0,
        )  # fmt: skip
        return found, *torch.autograd.grad(found, leaves, dout.to(dtype))

    baseline, truth = by_reference(dtype), by_reference(torch.float64)
    for value, base, judge in zip((out, *grads), baseline, truth):
        assert_close(value, base, judge, dtype, case)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", range(5))
def test_what_is_not_finite_spreads_as_in_the_reference(where, bad):
    q, k, v, (prefix,) = inputs()
    tensors = [q, k, v, prefix.k, prefix.v]
    tensors[where].view(-1)[5] = bad
    q, k, v, prefix_k, prefix_v = tensors
    found = prefix_attention(
        q, k, v, [Prefix(prefix_k, prefix_v)], return_lse=True, backend="eager"
    )
    judge = reference(
        q, k, v, [prefix_k], [prefix_v], [None], None, None, None, None,
        is_causal=False, scale=E**-0.5, dropout_p=0.0, seed=0,
    )  # fmt: skip
    assert 0 < judge[0].isfinite().sum() < judge[0].numel()
    for value, expected in zip(found, judge):
        assert torch.equal(value.isfinite(), expected.isfinite())


@pytest.mark.parametrize("scale", [-0.5, 0.0, 30.0])
@pytest.mark.parametrize("kind", ["mask", "no_mask"])
def test_any_scale(scale, kind):
    q, k, v, prefixes = inputs()
    mask = None if kind == "no_mask" else torch.arange(N).expand(B, N) < 8
    found = prefix_attention(q, k, v, prefixes, scale=scale, key_mask=mask, backend="eager")
    given = [prefixes[0].k], [prefixes[0].v], [None], None, mask, None, None
    doubles = [t.double() for t in (q, k, v)], [[t.double() for t in given[i]] for i in (0, 1)]
    options = {"is_causal": False, "scale": scale, "dropout_p": 0.0, "seed": 0}
    baseline, _ = reference(q, k, v, *given, **options)
    truth, _ = reference(*doubles[0], *doubles[1], *given[2:], **options)
    assert_close(found, baseline, truth, torch.float32, f"scale {scale}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_without_a_gradient_is_a_mask_of_flash_attention(dtype):
    """Where one is needed, the composed form makes all gradients, from the same log-sum-exp: the
    parity test's cases. It is the baseline here.
    """
    q, k, v, prefixes = inputs()
    drawn = (q, k, v, *prefixes[0][:2], draw(1, H, S, N, seed=9))
    dout = draw(B, H, S, E, seed=10)

    def grads(dtype, with_bias):
        *leaves, bias = (t.to(dtype).requires_grad_() for t in drawn)
        bias = bias if with_bias else bias.detach()
        out = prefix_attention(*leaves[:3], [Prefix(*leaves[3:])], bias=bias, backend="eager")
        return torch.autograd.grad(out, [*leaves, bias] if with_bias else leaves, dout.to(dtype))

    baseline, truth = grads(dtype, True), grads(torch.float64, True)
    assert all(grad.abs().max() > 0 for grad in baseline)
    for value, base, judge in zip(grads(dtype, False), baseline, truth):
        assert_close(value, base, judge, dtype, "gradient")

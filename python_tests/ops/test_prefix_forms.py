"""prefix_attention's composed form: flash attention over own keys, merged with prefixes by our
kernels. Parity tests hold it to the reference; here it is held to the single kernel.
"""

from __future__ import annotations

import pytest
import torch
from cases import case_of
from closeness import assert_close
from parity import PRECISIONS, can_run, device_of, expected, run, why_unavailable
from torch._subclasses.fake_tensor import FakeTensorMode

from pelt_kernels import prefix_attention
from pelt_kernels.ops import BackendError, Prefix
from pelt_kernels.ops.prefix_attention import _flash
from pelt_kernels.ops.prefix_attention.contract import CONTRACT

OPERATOR = "prefix_attention"
BACKENDS = [backend for backend in ("cuda", "cuda_sim") if can_run(OPERATOR, backend)]


@pytest.fixture(params=BACKENDS)
def backend(request, need):
    need(request.param, why_unavailable(OPERATOR, request.param))
    return request.param


@pytest.mark.parametrize("precision", ("float16", "bfloat16-master"))
@pytest.mark.parametrize("case_id", ("prefix", "causal_grouped", "tables", "gate_zero"))
def test_merged_form_equals_the_single_kernel(backend, case_id, precision):
    """Outputs, log-sum-exp and every gradient: no farther from the truth than twice the single
    kernel, which is what two roundings of the output instead of one may cost.
    """
    case = case_of(OPERATOR, case_id)
    merged, single = (
        run(OPERATOR, f"{backend}:{form}", case, precision) for form in ("composed", "single")
    )
    _, truth = expected(OPERATOR, case, precision, device_of(backend))
    assert {"out", "lse", "dq", "dk", "dv", "dprefix_k[0]", "dprefix_v[0]"} <= merged.keys()
    for name, value in merged.items():
        assert_close(value, single[name], truth[name], PRECISIONS[precision][0], name)


def tensors(device, *, s=33, heads=2, head_size=32):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()

    q, k, v = (draw(2, heads, s, head_size) for _ in range(3))
    return q, k, v, Prefix(draw(5, heads, head_size), draw(5, heads, head_size))


def test_flash_attention_is_left_out_where_only_prefixes_learn(backend, monkeypatch):
    """The usual step of prefix tuning in the first layer: dq, dk and dv are not needed."""
    q, k, v, prefix = tensors(device_of(backend))
    whole = prefix_attention(q, k, v, [prefix], backend=f"{backend}:composed")
    wanted = torch.autograd.grad(whole.sum(), (prefix.k, prefix.v))
    monkeypatch.setattr(_flash, "backward", lambda *_: pytest.fail("not needed"))
    frozen = [t.detach() for t in (q, k, v)]
    out = prefix_attention(*frozen, [prefix], backend=f"{backend}:composed")
    assert torch.equal(out, whole)
    for found, value in zip(torch.autograd.grad(out.sum(), (prefix.k, prefix.v)), wanted):
        assert torch.equal(found, value)


def test_gradients_of_keys_alone_need_no_kernel_of_ours(backend):
    q, k, v, prefix = tensors(device_of(backend))
    out = prefix_attention(q, k, v, [prefix], backend=f"{backend}:composed")
    every = torch.autograd.grad(out.sum(), (k, v))
    fixed = Prefix(prefix.k.detach(), prefix.v.detach())
    out = prefix_attention(q.detach(), k, v, [fixed], backend=f"{backend}:composed")
    for found, value in zip(torch.autograd.grad(out.sum(), (k, v)), every):
        assert torch.equal(found, value)


def test_the_operators_of_a_gpu_take_what_they_are_given():
    """Without a GPU: their schemas and fakes, grouped keys and views [B, S, H, E] included."""
    with FakeTensorMode():
        shapes = [(2, 33, heads, 64) for heads in (4, 2, 2)]
        q, k, v = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for shape in shapes
        )
        call = CONTRACT.bind((q, k, v, [], [], [], None, None, None, None), (True, 0.5, 0.0))
        assert call.device.type == "cuda" and not call.attributes["dropout_p"]
        out, lse = _flash.forward(call, q, k, v)
        assert out.shape == q.shape and lse.shape == (2, 4, 33) and lse.dtype == torch.float32
        grads = _flash.backward(call, out, q, k, v, out, lse)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_gradients_have_the_inputs_layout_that_is_promised(backend):
    """Flash attention's own gradients lie as [B, S, H, E]; ours are contiguous, as the fake says."""
    q, k, v, prefix = tensors(device_of(backend))
    out = prefix_attention(q, k, v, [prefix], backend=f"{backend}:composed")
    for grad in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
        assert grad.is_contiguous()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"key_mask": torch.ones(2, 33, dtype=torch.bool)}, "no mask, and the call has a key mask"),
        ({"lengths": torch.tensor([33, 7])}, "no mask, and the call has lengths"),
        ({"bias": torch.zeros(1, 2, 33, 33)}, "no mask, and the call has an additive bias"),
        ({"dropout_p": 0.1}, "its own dropout mask, which prefixes do not share"),
        ({"prefixes": []}, "there is no prefix to merge"),
        ({"is_causal": True, "s": 7}, "for S = N only, and S=7, N=33"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_flash_attention_cannot_do_is_refused(backend, change, sentence):
    device = device_of(backend)
    q, k, v, prefix = tensors(device)
    change = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in change.items()}
    given = {"prefixes": [prefix], "backend": f"{backend}:composed"} | change
    q = q[:, :, : given.pop("s", 33)]
    with pytest.raises(BackendError, match=sentence):
        prefix_attention(q, k, v, **given)
    given["backend"] = backend
    prefix_attention(q, k, v, **given)

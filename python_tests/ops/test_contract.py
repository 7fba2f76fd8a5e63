"""Bad input gets one clear sentence, with the numbers and the way out, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from small import B, D, R, S, tensor

from pelt_kernels.ops import (
    LearnedGate,
    LoraBranch,
    Norm,
    Prefix,
    gated_adapter,
    lora_linear,
    masked_weight,
    prefix_attention,
)
from pelt_kernels.ops._contract import Contract


def adapter(x=None, w_down=None, w_up=None, **more):
    given = (tensor(B, S, D) if x is None else x, tensor(R, D) if w_down is None else w_down)
    return gated_adapter(*given, tensor(D, R) if w_up is None else w_up, **more)


def attention(q=None, k=None, v=None, prefixes=(), **more):
    like = tensor(B, 4, S, 8)
    return prefix_attention(
        like if q is None else q,
        like if k is None else k,
        like if v is None else v,
        prefixes,
        **more,
    )


def lora(x=None, weight=None, branches=(), **more):
    given = (tensor(B, S, D) if x is None else x, tensor(12, D) if weight is None else weight)
    return lora_linear(*given, None, branches, **more)


def pruned(keep, **more):
    factors = (tensor(6, 2), tensor(2, 8), tensor(6, 2), tensor(2, 8), tensor(6), tensor(8))
    return masked_weight(tensor(6, 8), *factors, keep, **more)


INDEX = torch.tensor([0, 7])
GATE = LearnedGate(tensor(D), tensor(1))
BRANCH = LoraBranch(tensor(R, D), tensor(12, R))

BAD = [
    # gated_adapter
    (lambda: adapter(w_up=tensor(R, D)), ValueError, r"gated_adapter: expected w_up\[D, R\] = \[16, 4\] \(D=16 from x, R=4 from w_down\), got \[4, 16\]"),
    (lambda: adapter(x=tensor(B, S, 15)), ValueError, r"expected w_down\[R, D\] = \[R, 15\] \(D=15 from x\), got \[4, 16\]"),
    (lambda: adapter(x=tensor(D)), ValueError, r"expected x\[B, S, D\] = \[B, S, D\], got \[16\]"),
    (lambda: adapter(b_down=tensor(R + 1)), ValueError, r"expected b_down\[R\] = \[4\]"),
    (lambda: adapter(x=tensor(B, S, D, dtype=torch.int64)), ValueError, "expected x in float32, float16 or bfloat16, got int64"),
    (lambda: adapter(w_up=tensor(D, R, dtype=torch.float16)), ValueError, r"expected w_up in float32 \(x is float32\), got float16"),
    (lambda: adapter(b_up=tensor(D).to("meta")), ValueError, r"expected b_up on cpu \(where x is\), got meta"),
    (lambda: adapter(w_down="w"), TypeError, "expected w_down as a torch.Tensor, got str"),
    (lambda: adapter(activation="softmax"), ValueError, "expected activation to be one of relu, gelu, gelu_tanh, silu, tanh, identity, got 'softmax'"),
    (lambda: adapter(gate=tensor(B + 1)), ValueError, r"expected gate\[B\] = \[2\] \(B=2 from x\), got \[3\]"),
    (lambda: adapter(gate=tensor(B, S, 1)), ValueError, r"expected gate\[B\] = \[2\] or \[B, S\] = \[2, 5\]"),
    (lambda: adapter(gate=GATE), ValueError, r"expected mask \[B, S\] beside a gate with pooling 'masked_mean', got None"),
    (lambda: adapter(gate=LearnedGate(tensor(D), tensor(1), "max")), ValueError, "pooling to be one of token, mean, masked_mean, got 'max'|expected pooling"),
    (lambda: adapter(gate=GATE, mask=tensor(B, S)), ValueError, "expected mask in bool"),
    (lambda: adapter(w_down=tensor(3, R, D)), ValueError, "expected down_index beside a bank w_down of 3 members, got None"),
    (lambda: adapter(w_down=tensor(3, R, D), bank_index=INDEX), ValueError, r"expected down_index in \[0, 3\) \(M=3 bank members\), got values from 0 to 7"),
    (lambda: adapter(w_down=tensor(3, R, D), bank_index=INDEX[:1].int()), ValueError, "expected down_index"),
    (lambda: adapter(bank_index=(INDEX, None)), ValueError, "expected a bank with a size M beside down_index, got none"),
    (lambda: adapter(w_down=tensor(3, R, D), b_down=tensor(R), bank_index=INDEX * 0), ValueError, "both as banks or both as single"),
    (lambda: adapter(bank_index=INDEX), ValueError, "^gated_adapter: expected a bank beside bank_index"),
    (lambda: adapter(bank_index="nonsense"), TypeError, "^gated_adapter: expected bank_index as a torch.Tensor or a pair, got str"),
    (lambda: adapter(pre_norm=(tensor(D), tensor(D))), TypeError, "^gated_adapter: expected pre_norm as a Norm, got tuple"),
    (lambda: adapter(backend=3), TypeError, "^gated_adapter: expected backend as a name or None, got int"),
    (lambda: adapter(activation=[]), TypeError, "^gated_adapter: expected activation as str, got list"),
    (lambda: adapter(seed=2**63), ValueError, "^gated_adapter: expected seed in"),
    (lambda: adapter(x=tensor(B, S, D).to_sparse()), TypeError, "^gated_adapter: expected x as a dense tensor, got torch.sparse_coo"),
    (lambda: adapter(pre_norm=Norm(tensor(D), None)), TypeError, r"expected pre_norm\.bias as a torch\.Tensor, got NoneType"),
    (lambda: adapter(pre_norm=Norm(tensor(3, D), tensor(3, D))), ValueError, r"expected w_down as a bank beside a bank pre_norm of 3 members, got w_down \[4, 16\]"),
    (lambda: adapter(post_norm=Norm(tensor(3, D), tensor(3, D))), ValueError, r"expected w_up as a bank beside a bank post_norm of 3 members, got w_up \[16, 4\]"),
    (lambda: adapter(w_down=tensor(3, R, D), bank_index=INDEX * 0, pre_norm=Norm(tensor(3, D), tensor(D))), ValueError, r"expected pre_norm's weight and bias both as banks or both as single, got weight \[3, 16\] and bias \[16\]"),
    (lambda: adapter(w_down=tensor(3, R, D), bank_index=INDEX * 0, pre_norm=Norm(tensor(2, D), tensor(2, D))), ValueError, r"expected pre_norm_weight\[M, D\] = \[3, 16\] \(M=3 from w_down, D=16 from x\), got \[2, 16\]"),
    (lambda: adapter(w_down=tensor(3, R, D), bank_index=INDEX * 0, post_norm=Norm(tensor(3, D), tensor(3, D))), ValueError, "expected w_up as a bank beside a bank post_norm"),
    (lambda: adapter(residual="output"), ValueError, "expected residual 'input', None or a tensor, got 'output'"),
    (lambda: adapter(residual=tensor(B, S, D + 1)), ValueError, r"expected residual\[B, S, D\] = \[2, 5, 16\]"),
    (lambda: adapter(dropout_p=1.0), ValueError, r"expected dropout_p in \[0, 1\), got 1.0"),
    (lambda: adapter(tensor(B, S, D).requires_grad_(), gate=tensor(B), skip_below=0.5), ValueError, "expected skip_below only without gradients"),
    # prefix_attention
    (lambda: attention(k=tensor(B, 3, S, 8), v=tensor(B, 3, S, 8)), ValueError, r"H to be a multiple of the key-value heads G, got H=4 \(from q\) and G=3 \(from k\)"),
    (lambda: attention(v=tensor(B, 4, S + 1, 8)), ValueError, r"expected v\[B, G, N, E\] = \[2, 4, 5, 8\]"),
    (lambda: attention(prefixes=[Prefix(tensor(3, 4, 8), tensor(2, 4, 8))]), ValueError, r"expected prefix_v\[0\]"),
    (lambda: attention(prefixes=[Prefix(tensor(3, 4, 8), tensor(3, 4, 8))] * 5), ValueError, "expected at most 4 prefixes, got 5"),
    (lambda: attention(prefixes=[Prefix(tensor(2, 3, 4, 8), tensor(2, 3, 4, 8))]), ValueError, r"expected an index \[B\] with a table"),
    (lambda: attention(prefixes=[Prefix(tensor(2, 3, 4, 8), tensor(2, 3, 4, 8), INDEX)]), ValueError, r"expected prefix_index\[0\] in \[0, 2\)"),
    (lambda: attention(key_mask=tensor(B, S, dtype=torch.bool), lengths=torch.tensor([1, 2])), ValueError, "expected key_mask or lengths, got both"),
    (lambda: attention(key_mask=tensor(B, S)), ValueError, "expected key_mask in bool"),
    (lambda: attention(bias=tensor(B, 4, S, S + 1)), ValueError, r"expected bias\[B, H, S, N\]"),
    (lambda: attention(gate=tensor(4)), ValueError, r"expected gate\[B\] = \[2\]"),
    (lambda: attention(lengths=torch.tensor([3.7, 2.0])), ValueError, "^prefix_attention: expected lengths in int64 .*, got float32"),
    (lambda: attention(lengths=torch.tensor([-1, 9])), ValueError, r"^prefix_attention: expected lengths in \[0, 5\] \(N=5\), got values from -1 to 9"),
    (lambda: attention(lengths=torch.tensor([2, 6], dtype=torch.int32)), ValueError, r"expected lengths in \[0, 5\] \(N=5\), got values from 2 to 6"),
    (lambda: attention(lengths=[3, 2]), TypeError, "^prefix_attention: expected lengths as a torch.Tensor, got list"),
    (lambda: attention(scale=float("nan")), ValueError, r"^prefix_attention: expected scale in \(-inf, inf\), got nan"),
    (lambda: attention(scale="1"), TypeError, "^prefix_attention: expected scale as a number, got str"),
    (lambda: attention(is_causal=1), TypeError, "^prefix_attention: expected is_causal as True or False, got int"),
    (lambda: attention(dropout_p=True), TypeError, "^prefix_attention: expected dropout_p as a number, got bool"),
    # masked_weight
    (lambda: pruned(2.5), TypeError, "^masked_weight: expected keep as an integer, got float"),
    (lambda: pruned(3, beta=float("inf")), ValueError, r"^masked_weight: expected beta in \(-inf, inf\), got inf"),
    # lora_linear
    (lambda: lora(weight=tensor(12, D + 1)), ValueError, "expected weight"),
    (lambda: lora(weight=tensor(D, 12), transposed=False), ValueError, r"lora_linear: expected weight\[Dout, Din\] = \[12, 16\] \(transposed=False\), got \[16, 12\]"),
    (lambda: lora(branches=[LoraBranch(tensor(R, D), tensor(12, R + 1))]), ValueError, r"expected b\[0\]"),
    (lambda: lora(branches=[BRANCH._replace(offset=1)]), ValueError, "expected branch 0 inside the output's 12 columns, got columns 1 to 13"),
    (lambda: lora(branches=[LoraBranch(tensor(300, D), tensor(12, 300))]), ValueError, r"expected the rank of branch 0 in \[1, 256\], got 300"),
    (lambda: lora(branches=[BRANCH._replace(a=tensor(2, R, D))]), ValueError, r"expected a_index\[0\] beside a bank a\[0\] of 2 members"),
    (lambda: lora(branches=[BRANCH._replace(gate=GATE)]), ValueError, "beside a gate with pooling 'masked_mean', got None"),
    (lambda: lora(extra_gates=[GATE]), ValueError, "beside a gate with pooling 'masked_mean', got None"),
    (lambda: lora(x=torch.zeros(D, dtype=torch.bool)), ValueError, "expected x in float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_in_one_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_numbers_pass_through(value):
    x = torch.randn(B, S, D)
    x[0, 0, 0] = value
    y = gated_adapter(x, torch.randn(R, D), torch.randn(D, R), activation="identity")
    assert not y[0, 0].isfinite().all() and y[1].isfinite().all() and y[0, 1:].isfinite().all()


def test_one_sequence_is_a_batch_of_one():
    x, w_down, w_up = torch.randn(S, D), torch.randn(R, D), torch.randn(D, R)
    assert torch.equal(gated_adapter(x, w_down, w_up), gated_adapter(x[None], w_down, w_up)[0])
    weight, a, b = torch.randn(12, D), torch.randn(R, D), torch.randn(12, R)
    y = lora_linear(x, weight, None, [LoraBranch(a, b)])
    assert torch.equal(y, lora_linear(x[None], weight, None, [LoraBranch(a, b)])[0])
    deep = lora_linear(x.reshape(1, 1, S, D), weight, None, [LoraBranch(a, b)])
    assert deep.shape == (1, 1, S, 12) and torch.equal(deep[0, 0], y)


def test_an_equal_call_is_bound_once():
    contract = Contract(
        name="twice", inputs="x activation [T, D]\n w parameter? [D]", attributes="scale float = 2.0",
        outputs="y activation differentiable", has_seed=False,
        output_shapes=lambda call: {"y": (call.sizes["T"], call.sizes["D"])},
    )  # fmt: skip
    first = contract.bind((tensor(3, 4), None), (2.0,))
    assert first.sizes == {"T": 3, "D": 4} and first.given == {"x"} and not first.masters
    assert contract.bind((torch.ones(3, 4), None), (2.0,)) is first
    assert contract.bind((tensor(3, 4), tensor(4)), (2.0,)) is not first
    assert contract.bind((tensor(3, 4), None), (3.0,)).attributes == {"scale": 3.0}
    assert contract.bind((tensor(3, 4, dtype=torch.bfloat16), tensor(4)), (2.0,)).masters == {"w"}

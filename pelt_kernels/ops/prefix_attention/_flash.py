"""torch's flash attention over the model's own keys, for the composed form of the CUDA backend: on
a GPU the one of CUDA, beside the simulator the one of CPUs.

Both give the log-sum-exp, and both take any output and log-sum-exp in backward: with those of the
whole row, prefixes included, ``P = exp(score - lse)`` and ``D = rowsum(dout · out)`` are what the
formula says for every column, so the gradients of q, k and v are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._contract import Signature

_aten = torch.ops.aten


def why_not(call: Signature) -> str:
    """Why flash attention cannot see a call's own keys; empty if it can."""
    for name, what in (
        ("bias", "an additive bias"), ("key_mask", "a key mask"), ("lengths", "lengths"),
    ):  # fmt: skip
        if name in call.given:
            return f"flash attention takes no mask, and the call has {what}"
    if call.attributes["dropout_p"]:
        return (
            "flash attention draws its own dropout mask, which prefixes do not share, and "
            f"dropout_p is {call.attributes['dropout_p']}"
        )
    s, n = call.sizes["S"], call.sizes["N"]
    if n == 0:
        return "there are no own keys for flash attention to see (N = 0)"
    if _is_causal(call) and s != n:
        return f"flash attention aligns a causal mask for S = N only, and S={s}, N={n}"
    if call.device.type == "cuda" and not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    return ""


def _is_causal(call: Signature) -> bool:
    """Whether the causal mask hides anything: a single query, as in decoding, sees every key."""
    return call.attributes["is_causal"] and call.sizes["S"] > 1


def forward(call: Signature, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, E] and log-sum-exp [B, H, S] of own columns alone."""
    causal, scale = _is_causal(call), call.attributes["scale"]
    if call.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    found = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def backward(
    call: Signature, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v by own columns, from the whole row's output and log-sum-exp."""
    causal, scale = _is_causal(call), call.attributes["scale"]
    if call.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    # Sequences of one length have no offsets, and without dropout the generator is not read.
    no_offsets, s, n = None, call.sizes["S"], call.sizes["N"]
    generator = torch.empty(2, dtype=torch.uint64, device=call.device)
    return _aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, no_offsets, no_offsets, s, n, 0.0, causal, generator, generator,
        scale=scale,
    )  # fmt: skip

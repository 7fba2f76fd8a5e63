"""torch's flash attention on a CPU over prefixes and own keys in one tensor, for the eager backend.

Gated prefix rows and keys are written side by side, [B, H, P + N, E], as people write it with
`torch.cat`, and one call sees them all: nothing has the size of the scores. The log-sum-exp it
gives is what backward needs, and its gradients of the joined tensors hold those of every part: own
keys are a slice, a shared prefix is the sum of its rows over the batch, and a gate's gradient is
their product with the prefix.

A NaN spreads as the formula says. An infinity in bfloat16 q may leave numbers where the formula has
NaN: that is torch's exponential.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._contract import Signature, Value
from .._gate import accumulator
from ._inputs import Inputs
from .contract import visible_keys

_aten = torch.ops.aten
# Without a mask torch 2.13 loses a row's NaN where there are fewer columns than a vector holds: the
# row becomes 0. So few of them get a mask that hides nothing.
_FEW = 64
_HAS_FLASH = hasattr(_aten, "_scaled_dot_product_flash_attention_for_cpu") and hasattr(
    _aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
)


def why_not(call: Signature) -> str:
    """Why flash attention cannot serve a call; empty if it can."""
    if call.device.type != "cpu" or not _HAS_FLASH:
        return "this torch has no flash attention here that takes a mask and gives the log-sum-exp"
    if call.attributes["dropout_p"]:
        return "flash attention draws its own dropout mask, not the seed's"
    sizes = call.sizes
    if not all(sizes[letter] for letter in "BHSE") or not _columns(call):
        return "flash attention divides by the sizes, and one of them is 0"
    return ""


def forward(call: Signature, x: Inputs) -> tuple[Tensor, Tensor]:
    """out [B, H, S, E] and log-sum-exp [B, H, S]."""
    keys = _join(call, x.k, prefix_rows(x.prefix_k, x.prefix_index), x.gate)
    values = _join(call, x.v, prefix_rows(x.prefix_v, x.prefix_index), x.gate)
    mask, unseen = _mask(call, x)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        _dense_rows(x.q), keys, values, 0.0, _is_causal_alone(call), attn_mask=mask,
        scale=call.attributes["scale"],
    )  # fmt: skip
    if unseen is not None:
        out.masked_fill_(unseen[..., None], 0.0)
        lse.masked_fill_(unseen, -math.inf)
    return out.contiguous(), lse.contiguous()


def backward(
    call: Signature,
    needs: dict[str, bool],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    x: Inputs,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name; the bias has none here."""
    gate = x.gate
    before_k, before_v = (prefix_rows(t, x.prefix_index) for t in (x.prefix_k, x.prefix_v))
    mask, unseen = _mask(call, x)
    if unseen is not None:
        # exp(score - inf) is 0: what a row that sees nothing gives to every gradient.
        lse = lse.masked_fill(unseen, math.inf)
    dq, dkeys, dvalues = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, _dense_rows(x.q), _join(call, x.k, before_k, gate), _join(call, x.v, before_v, gate),
        out, lse, 0.0, _is_causal_alone(call), attn_mask=mask, scale=call.attributes["scale"],
    )  # fmt: skip
    prefix, groups = dkeys.shape[2] - x.k.shape[2], call.sizes["G"]
    grads: dict[str, Value] = {
        "q": dq,
        "k": _over_group(dkeys[:, :, prefix:], 1, groups),
        "v": _over_group(dvalues[:, :, prefix:], 1, groups),
    }
    dgate: Tensor | float = 0.0
    for name, joined, before, prefixes in (
        ("prefix_k", dkeys, before_k, x.prefix_k), ("prefix_v", dvalues, before_v, x.prefix_v),
    ):  # fmt: skip
        # Sums over the batch are float32's; as [B, P, H, E] the rows lie as flash attention wrote
        # them, and as a prefix's own do.
        rows = joined[:, :, :prefix].transpose(1, 2).to(accumulator(call.dtype))
        if before is not None and needs["gate"]:
            dgate = dgate + _dgate(rows, _over_heads(call, before, 2), gate)
        if needs[name]:
            grads[name] = _split(rows, gate, prefixes, x.prefix_index, groups)
    if gate is not None and needs["gate"]:
        grads["gate"] = torch.zeros_like(gate) if isinstance(dgate, float) else dgate.to(gate.dtype)
    return {name: grads[name] for name, need in needs.items() if need}


def prefix_rows(prefixes: list[Tensor], indices: list[Tensor | None]) -> Tensor | None:
    """All segments in order, [1 or B, P, G, E]; expanded to the batch only beside a table."""
    if not prefixes:
        return None
    batch = next((len(index) for index in indices if index is not None), 1)
    parts = [
        prefix[None].expand(batch, -1, -1, -1) if index is None else prefix[index]
        for prefix, index in zip(prefixes, indices)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _columns(call: Signature) -> int:
    columns: int = call.sizes["N"] + sum(call.sizes.get("P_i", ()))
    return columns


def _is_causal_alone(call: Signature) -> bool:
    """Whether the causal mask is the one that torch has: of a square, and nothing beside it."""
    sizes, given = call.sizes, call.given
    return (
        call.attributes["is_causal"]
        and sizes["S"] == _columns(call) >= _FEW
        and not given & {"key_mask", "lengths", "bias"}
        and not sum(sizes.get("P_i", ()))
    )


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _over_heads(call: Signature, rows: Tensor, dim: int) -> Tensor:
    """G -> H: each key-value head once for every query head that shares it."""
    heads, groups = call.sizes["H"], call.sizes["G"]
    return rows if heads == groups else rows.repeat_interleave(heads // groups, dim)


def _over_group(rows: Tensor, dim: int, groups: int) -> Tensor:
    """H -> G: the sum over the query heads that share a key-value head."""
    return rows if rows.shape[dim] == groups else rows.unflatten(dim, (groups, -1)).sum(dim + 1)


def _join(call: Signature, own: Tensor, before: Tensor | None, gate: Tensor | None) -> Tensor:
    """[g · prefix ; own] [B, H, P + N, E]; own itself where it is alone."""
    own = _over_heads(call, own, 1)
    if before is None:
        return _dense_rows(own)
    batch, heads, n, e = own.shape
    prefix = before.shape[1]
    joined = own.new_empty(batch, heads, prefix + n, e)
    joined[:, :, prefix:] = own
    before, to = _over_heads(call, before, 2).transpose(1, 2), joined[:, :, :prefix]
    if gate is None:
        to.copy_(before)
    else:
        torch.mul(before, gate.view(*gate.shape, *(1,) * (4 - gate.ndim)), out=to)
    return joined


def _mask(call: Signature, x: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """What is added to scores, [B or 1, H or 1, S or 1, P + N], and which rows see nothing, [B or
    1, H or 1, S or 1]; None where there is none. Those rows get a mask that hides nothing.
    """
    sizes, bias = call.sizes, x.bias
    is_causal = call.attributes["is_causal"] and sizes["S"] > 1
    if _is_causal_alone(call):
        return None, None
    visible = visible_keys(sizes, x.key_mask, x.lengths, is_causal, call.device)
    if visible is None and bias is None:
        few = _columns(call) < _FEW
        return torch.zeros(1, 1, 1, _columns(call), dtype=call.dtype) if few else None, None
    given = [t for t in (visible, bias) if t is not None]
    prefix = _columns(call) - sizes["N"]
    shape = (*torch.broadcast_shapes(*(t.shape for t in given))[:3], prefix + sizes["N"])
    # A bias may be float32 beside 16-bit activations; it is not rounded to them.
    mask = torch.zeros(shape, dtype=call.dtype if bias is None else accumulator(call.dtype))
    own = mask[..., prefix:]
    if bias is not None:
        own.copy_(bias)
    if visible is not None:
        own.masked_fill_(~visible, -math.inf)
    if prefix:
        return mask, None
    unseen = mask.amax(-1) == -math.inf
    if not unseen.any():
        return mask, None
    return mask.masked_fill_(unseen[..., None], 0.0), unseen


def _dgate(rows: Tensor, before: Tensor, gate: Tensor | None) -> Tensor:
    """<gradient of g · prefix, prefix>, [B] or [B, H] as the gate is."""
    assert gate is not None
    return (rows * before).sum((1, 2, 3) if gate.ndim == 1 else (1, 3))


def _split(
    rows: Tensor, gate: Tensor | None, prefixes: list[Tensor], indices: list[Tensor | None],
    groups: int,
) -> list[Tensor]:  # fmt: skip
    """Each segment's gradient from that of its gated rows [B, P, H, E]: summed over the batch if
    shared, by index for a table.
    """
    gate = None if gate is None else gate.to(rows.dtype)
    grads: list[Tensor] = []
    lengths = [prefix.shape[-3] for prefix in prefixes]
    for prefix, index, part in zip(prefixes, indices, rows.split(lengths, dim=1)):
        if index is None:
            if gate is None:
                grad = part.sum(0)
            else:
                grad = torch.einsum(f"bphe,{'b' if gate.ndim == 1 else 'bh'}->phe", part, gate)
            grads.append(_over_group(grad, 1, groups).to(prefix.dtype).contiguous())
            continue
        if gate is not None:
            part = part * gate.view(len(gate), 1, -1, 1)
        each = _over_group(part, 2, groups).to(prefix.dtype)
        grads.append(torch.zeros_like(prefix).index_add_(0, index, each))
    return grads

"""masked_weight composed of PyTorch operations, with the closed form of its gradient.

The threshold comes from a selection (`torch.kthvalue`), not from a sort of the whole matrix.
Backward makes W again from the factors and keeps the mask, one byte an entry.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from .._contract import Chosen, Signature, Value
from .._gate import accumulator


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """PyTorch serves every signature."""
    return ""


def forward(chosen: Chosen, **inputs: Value) -> tuple[Tensor, Tensor]:
    """y [Dout, Din], and the mask [Dout, Din] for backward."""
    t = SimpleNamespace(**inputs)
    at, acc = chosen.attributes, accumulator(t.w0.dtype)
    w = _updated(chosen, t.w0, t.u, t.v)
    scores = _scaled_product(t.a, t.b, at["alpha1"], acc).add_(w.abs())
    scores += at["alpha2"] * (t.row.to(acc)[:, None] + t.col.to(acc)[None, :])
    mask = _highest(scores, at["keep"])
    return torch.where(mask, w, 0.0).to(t.w0.dtype), mask


def backward(
    chosen: Chosen, needs: dict[str, bool], dy: Tensor, mask: Tensor, **inputs: Value
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    t = SimpleNamespace(**inputs)
    at, acc = chosen.attributes, accumulator(t.w0.dtype)
    g, w = dy.to(acc), _updated(chosen, t.w0, t.u, t.v)
    dscores = g * w
    dw = w.abs_().add_(mask).mul_(g)
    formulas = {
        "w0": lambda: dw,
        "u": lambda: at["beta"] * (dw @ t.v.to(acc).T),
        "v": lambda: at["beta"] * (t.u.to(acc).T @ dw),
        "a": lambda: at["alpha1"] * (dscores @ t.b.to(acc).T),
        "b": lambda: at["alpha1"] * (t.a.to(acc).T @ dscores),
        "row": lambda: at["alpha2"] * dscores.sum(1),
        "col": lambda: at["alpha2"] * dscores.sum(0),
    }
    return {n: formulas[n]().to(inputs[n].dtype) for n, need in needs.items() if need}


def _updated(chosen: Chosen, w0: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """W = w0 + beta u v, always a new tensor."""
    acc = accumulator(w0.dtype)
    return _scaled_product(u, v, chosen.attributes["beta"], acc).add_(w0.to(acc))


def _scaled_product(left: Tensor, right: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """factor · left right, a new tensor. Rounded before it is added to anything, as in the formula:
    addmm rounds once, and where two scores are nearly equal makes another mask.
    """
    product = left.to(dtype) @ right.to(dtype)
    return product if factor == 1.0 else product.mul_(factor)


def _highest(scores: Tensor, keep: int) -> Tensor:
    """True at the ``keep`` highest scores: all above the keep-th, and of those equal to it the
    first ones.
    """
    if keep in (0, scores.numel()):
        return torch.full(scores.shape, keep > 0, device=scores.device)
    flat = scores.masked_fill_(scores.isnan(), torch.inf).flatten()
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    mask, ties = flat > threshold, flat == threshold
    room = keep - mask.sum()
    mask |= ties & (ties.cumsum(0) <= room)
    return mask.view(scores.shape)

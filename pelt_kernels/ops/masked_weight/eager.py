"""masked_weight composed of PyTorch operations, with the closed form of its gradient.

The threshold comes from a selection (`torch.kthvalue`), not from a sort of the whole matrix.
Backward makes W again from the factors and keeps the mask, one byte an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._contract import Chosen, Signature, Value
from .._gate import accumulator


def supports(signature: Signature, backend: str, form: str) -> str:
    """PyTorch serves every signature."""
    return ""


def forward(
    chosen: Chosen,
    w0: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    row: Tensor,
    col: Tensor,
) -> tuple[Tensor, Tensor]:
    """y [Dout, Din], and the mask [Dout, Din] for backward."""
    at, acc = chosen.attributes, accumulator(w0.dtype)
    w = _updated(chosen, w0, u, v)
    scores = w.abs().addmm_(a.to(acc), b.to(acc), alpha=at["alpha1"])
    scores += at["alpha2"] * (row.to(acc)[:, None] + col.to(acc)[None, :])
    mask = _highest(scores, at["keep"])
    return torch.where(mask, w, 0.0).to(w0.dtype), mask


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dy: Tensor,
    mask: Tensor,
    w0: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    row: Tensor,
    col: Tensor,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    at, acc = chosen.attributes, accumulator(w0.dtype)
    g, w = dy.to(acc), _updated(chosen, w0, u, v)
    dscores = g * w
    dw = w.abs_().add_(mask).mul_(g)
    grads: dict[str, Value] = {}
    if needs["w0"]:
        grads["w0"] = dw.to(w0.dtype)
    if needs["u"]:
        grads["u"] = (at["beta"] * (dw @ v.to(acc).T)).to(u.dtype)
    if needs["v"]:
        grads["v"] = (at["beta"] * (u.to(acc).T @ dw)).to(v.dtype)
    if needs["a"]:
        grads["a"] = (at["alpha1"] * (dscores @ b.to(acc).T)).to(a.dtype)
    if needs["b"]:
        grads["b"] = (at["alpha1"] * (a.to(acc).T @ dscores)).to(b.dtype)
    if needs["row"]:
        grads["row"] = (at["alpha2"] * dscores.sum(1)).to(row.dtype)
    if needs["col"]:
        grads["col"] = (at["alpha2"] * dscores.sum(0)).to(col.dtype)
    return grads


def _updated(chosen: Chosen, w0: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """W = w0 + beta u v, always a new tensor."""
    acc = accumulator(w0.dtype)
    return torch.addmm(w0.to(acc), u.to(acc), v.to(acc), beta=1.0, alpha=chosen.attributes["beta"])


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

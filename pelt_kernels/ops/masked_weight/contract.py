"""masked_weight: what it takes and gives, and its formula in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._contract import Contract, Signature, Value
from .._gate import accumulator


def kept_entries(entries: int, sparsity: float) -> int:
    """How many of a matrix's entries stay at a sparsity: all but int(entries · sparsity)."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"masked_weight: expected sparsity in [0, 1), got {sparsity}")
    return entries - int(entries * sparsity)


def rules(signature: Signature, values: dict[str, Value]) -> None:
    """What shapes cannot say: how many entries there are to keep."""
    sizes, keep = signature.sizes, signature.attributes["keep"]
    entries = sizes["Dout"] * sizes["Din"]
    if not 0 <= keep <= entries:
        raise ValueError(
            f"{signature.contract.name}: expected keep in [0, {entries}] (Dout={sizes['Dout']},"
            f" Din={sizes['Din']} from w0), got {keep}"
        )


def output_shapes(signature: Signature) -> dict[str, Any]:
    """The shapes of the outputs of a signature."""
    shape = (signature.sizes["Dout"], signature.sizes["Din"])
    return {"y": shape, "mask": shape}


CONTRACT = Contract(
    name="masked_weight",
    inputs="""
        w0   activation  [Dout, Din]  view
        u    parameter   [Dout, R]
        v    parameter   [R, Din]
        a    parameter   [Dout, R2]
        b    parameter   [R2, Din]
        row  parameter   [Dout]
        col  parameter   [Din]
    """,
    attributes="""
        keep    int = 0
        beta    float = 1.0  (-inf, inf)
        alpha1  float = 1.0  (-inf, inf)
        alpha2  float = 1.0  (-inf, inf)
    """,
    outputs="""
        y     activation  differentiable
        mask  bool        saved private
    """,
    has_seed=False,
    rules=rules,
    output_shapes=output_shapes,
)


def highest(scores: Tensor, keep: int) -> Tensor:
    """True at the ``keep`` highest scores; of equal ones the lowest flat index first, NaN above
    all.
    """
    flat = torch.where(scores.isnan(), torch.inf, scores).flatten()
    kept = flat.argsort(descending=True, stable=True)[:keep]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.scatter(0, kept, torch.ones_like(kept, dtype=torch.bool)).view(scores.shape)


def reference(
    w0: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    row: Tensor,
    col: Tensor,
    *,
    keep: int,
    beta: float,
    alpha1: float,
    alpha2: float,
) -> tuple[Tensor]:
    """mask ⊙ W by the formula, differentiable by autograd as if the mask were its scores."""
    acc = accumulator(w0.dtype)
    w = w0.to(acc)
    if beta:
        w = w + beta * (u.to(acc) @ v.to(acc))
    scores = w.abs()
    if alpha1:
        scores = scores + alpha1 * (a.to(acc) @ b.to(acc))
    if alpha2:
        scores = scores + alpha2 * (row.to(acc)[:, None] + col.to(acc)[None, :])
    kept = torch.where(highest(scores.detach(), keep), w, 0.0)
    # The mask's part of w · mask: no value, and the gradient of the scores. Of a score that is not
    # finite the difference is no 0, and it has no gradient.
    is_finite = scores.isfinite()
    w, scores = torch.where(is_finite, w, 0.0), torch.where(is_finite, scores, 0.0)
    return ((kept + w * (scores - scores.detach())).to(w0.dtype),)

"""masked_weight: what it takes and gives, its formula in plain PyTorch, and the cases it is tested
on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._cases import Case
from .._contract import Call, Contract, Value
from .._gate import accumulator

# The mask is a step function of its scores: its gradient is defined, not a limit of differences.
HAS_TRUE_GRADIENT = False


def kept_entries(entries: int, sparsity: float) -> int:
    """How many of a matrix's entries stay at a sparsity: all but int(entries · sparsity)."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"masked_weight: expected sparsity in [0, 1), got {sparsity}")
    return entries - int(entries * sparsity)


def rules(call: Call, values: dict[str, Value]) -> None:
    """What shapes cannot say: how many entries there are to keep."""
    keep, entries = call.attributes["keep"], call.sizes["Dout"] * call.sizes["Din"]
    if not 0 <= keep <= entries:
        raise ValueError(
            f"{call.contract.name}: expected keep in [0, {entries}] (Dout={call.sizes['Dout']},"
            f" Din={call.sizes['Din']} from w0), got {keep}"
        )


def output_shapes(call: Call) -> dict[str, Any]:
    """The shapes of the outputs of a call."""
    shape = (call.sizes["Dout"], call.sizes["Din"])
    return {"y": shape, "mask": shape}


CONTRACT = Contract(
    name="masked_weight",
    inputs="""
        w0   activation  [Dout, Din]
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

DRAWS: dict[str, Any] = {}


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


_ONE = {"Dout": 64, "Din": 48, "R": 8, "R2": 8}
_ODD = {"Dout": 37, "Din": 29, "R": 3, "R2": 5}
_START = {"v": 0.0, "b": 0.0, "row": 0.0, "col": 0.0}


def _case(id: str, sizes: dict[str, int], sparsity: float, **more: Any) -> Case:
    keep = kept_entries(sizes["Dout"] * sizes["Din"], sparsity)
    return Case(id, sizes, attributes={"keep": keep, **more.pop("attributes", {})}, **more)


CASES = [
    _case("pst", _ONE, 0.9, is_quick=True),
    _case("start", _ONE, 0.5, fill=_START, is_quick=True),
    _case("half", _ODD, 0.5, is_quick=True),
    _case("dense", _ONE, 0.0),
    _case("keep_one", _ONE, 0.0, attributes={"keep": 1}),
    _case("keep_none", _ONE, 0.0, attributes={"keep": 0}),
    _case("keep_all_but_one", _ODD, 0.0, attributes={"keep": 37 * 29 - 1}),
    _case("all_equal", _ODD, 0.7, fill={"w0": -1.0, **_START}, is_quick=True),
    _case("equal_in_rows", _ODD, 0.6, fill={"w0": 0.5, "v": 0.0, "b": 0.0, "col": 0.0}),
    _case("all_zero", _ODD, 0.25, fill={"w0": 0.0, **_START}),
    _case("factors", _ONE, 0.8, attributes={"beta": 0.5, "alpha1": 2.0, "alpha2": -0.25}),
    _case("rank_1", {**_ONE, "R": 1, "R2": 1}, 0.9),
    _case("rank_17", {**_ONE, "R": 17, "R2": 2}, 0.9),
    _case("one_entry", {**_ODD, "Dout": 1, "Din": 1}, 0.9),
    _case("one_row", {**_ONE, "Dout": 1, "Din": 129}, 0.75),
    _case("one_column", {**_ONE, "Dout": 129, "Din": 1}, 0.75),
    _case("wide", {**_ONE, "Dout": 33, "Din": 257}, 0.9),
    _case("no_rows", {**_ONE, "Dout": 0}, 0.9),
    _case("offset_view", _ONE, 0.9, layout="offset"),
    _case("strided_view", _ONE, 0.9, layout="strided"),
    _case("transposed_view", _ONE, 0.9, layout="transposed"),
]

"""What masked_weight is tested on."""

from __future__ import annotations

from typing import Any

from pelt_kernels.ops.masked_weight.contract import kept_entries

from . import Case

# The mask is a step function of its scores: its gradient is defined, not a limit of differences.
HAS_TRUE_GRADIENT = False

_ONE = {"Dout": 64, "Din": 48, "R": 8, "R2": 8}
_ODD = {"Dout": 37, "Din": 29, "R": 3, "R2": 5}
_START = {"v": 0.0, "b": 0.0, "row": 0.0, "col": 0.0}


def pruned(id: str, sizes: dict[str, int], sparsity: float, **more: Any) -> Case:
    """A case that keeps what a sparsity leaves."""
    keep = kept_entries(sizes["Dout"] * sizes["Din"], sparsity)
    return Case(id, sizes, attributes={"keep": keep, **more.pop("attributes", {})}, **more)


CASES = [
    pruned("pst", _ONE, 0.9, is_quick=True),
    pruned("start", _ONE, 0.5, fill=_START, is_quick=True),
    pruned("half", _ODD, 0.5, is_quick=True),
    pruned("dense", _ONE, 0.0),
    pruned("keep_one", _ONE, 0.0, attributes={"keep": 1}),
    pruned("keep_none", _ONE, 0.0, attributes={"keep": 0}),
    pruned("keep_all_but_one", _ODD, 0.0, attributes={"keep": 37 * 29 - 1}),
    pruned("all_equal", _ODD, 0.7, fill={"w0": -1.0, **_START}, is_quick=True),
    pruned("equal_in_rows", _ODD, 0.6, fill={"w0": 0.5, "v": 0.0, "b": 0.0, "col": 0.0}),
    pruned("all_zero", _ODD, 0.25, fill={"w0": 0.0, **_START}),
    pruned("factors", _ONE, 0.8, attributes={"beta": 0.5, "alpha1": 2.0, "alpha2": -0.25}),
    pruned("rank_1", {**_ONE, "R": 1, "R2": 1}, 0.9),
    pruned("rank_17", {**_ONE, "R": 17, "R2": 2}, 0.9),
    pruned("one_entry", {**_ODD, "Dout": 1, "Din": 1}, 0.9),
    pruned("one_row", {**_ONE, "Dout": 1, "Din": 129}, 0.75),
    pruned("one_column", {**_ONE, "Dout": 129, "Din": 1}, 0.75),
    pruned("wide", {**_ONE, "Dout": 33, "Din": 257}, 0.9),
    pruned("no_rows", {**_ONE, "Dout": 0}, 0.9),
    pruned("offset_view", _ONE, 0.9, layout="offset"),
    pruned("strided_view", _ONE, 0.9, layout="strided"),
    pruned("transposed_view", _ONE, 0.9, layout="transposed"),
]

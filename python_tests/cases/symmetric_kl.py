"""What symmetric_kl is tested on."""

from __future__ import annotations

from . import Case

# Each divergence's target is a constant for the gradient, so it is not a limit of differences.
HAS_TRUE_GRADIENT = False

_ONE = {"T": 16, "C": 2}

CASES = [
    Case("classes", _ONE, is_quick=True),
    Case("tokens", {"T": 13, "C": 131}, "mask", is_quick=True),
    Case("one_logit", {"T": 5, "C": 1}, is_quick=True),
    Case("one_row", {"T": 1, "C": 3}),
    Case("vocabulary", {"T": 9, "C": 5003}, "mask"),
    Case("tile_edge", {"T": 7, "C": 1024}),
    Case("past_tile_edge", {"T": 7, "C": 1025}, "mask"),
    Case("nothing_counts", {"T": 6, "C": 17}, "mask", fill={"mask": 0.0}),
    Case("everything_counts", {"T": 6, "C": 17}, "mask", fill={"mask": 1.0}),
    Case("equal", {"T": 6, "C": 17}, fill={"z1": 1.5, "z2": 1.5}),
    Case("no_rows", {"T": 0, "C": 4}),
    Case("offset_view", {"T": 11, "C": 64}, layout="offset"),
    Case("strided_view", {"T": 11, "C": 65}, layout="strided"),
    Case("transposed_view", {"T": 11, "C": 64}, layout="transposed"),
]

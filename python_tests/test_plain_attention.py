"""The benchmark of attention without a prefix: what it compares is the same, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import plain_attention
from benchmarks.plain_attention import SHAPES, WAYS, Shape
from pelt_kernels import explain
from pelt_kernels.models import sdpa
from pelt_kernels.ops import forget_choices
from pelt_kernels.ops.prefix_attention import without_prefix


def row(shape: str, ratio: float, chosen: bool, **changes: Any) -> dict[str, Any]:
    about = {"shape": shape, "padded": False, "way": "forward", "dtype": "float32", "threads": 1}
    about |= {"chosen": chosen, "ratio": {"median": ratio, "low": ratio, "high": ratio}}
    about |= {"commit": "0" * 40, "torch": "2", "hardware": {"cpu": "x", "kind": "AMD avx2"}}
    return about | changes


SMALL = [
    Shape(3, 4, 4, 9, 8, False),
    Shape(3, 4, 2, 9, 8, True),
    Shape(3, 4, 4, 9, 8, True, has_bias=True),
]


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("shape", SMALL)
def test_the_contenders_are_the_kernels_and_torch(
    shape: Shape, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result; below the threshold both would be torch."""
    found: list[torch.Tensor] = []

    def kept(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            out = function(*args, **options)
            found.append(out[0])
            return out

        return call

    for module, name in ((sdpa, "sdpa_forward"), (plain_attention, "sdpa_attention_forward")):
        monkeypatch.setattr(module, name, kept(getattr(module, name)))
    for name in ("PAYS_FROM", "PAYS_FROM_WITH_DROPOUT"):
        monkeypatch.setattr(without_prefix, name, 0)
    contenders = plain_attention.calls(shape, is_padded, WAYS[1], torch.float32)
    forget_choices()
    contenders["torch"]()
    assert not explain("prefix_attention")
    contenders["kernels"]()
    assert [choice.backend for choice in explain("prefix_attention")] == ["cpu"]
    torch.testing.assert_close(*found)


def test_shapes_stand_on_both_sides_of_the_thresholds() -> None:
    scores = [shape.scores for shape in SHAPES.values()]
    for threshold in (without_prefix.PAYS_FROM, without_prefix.PAYS_FROM_WITH_DROPOUT):
        assert min(scores) < threshold < max(scores)


def test_what_is_left_to_torch_stands_in_brackets() -> None:
    rows = [row("MiniLM", 0.8, True), row("one text of 32", 1.4, False)]
    table = plain_attention.table(rows)
    assert "| MiniLM | all | 3,145,728 | 0.80 (0.80 to 0.80) |" in table
    assert "| one text of 32 | all | 12,288 | [1.40 (1.40 to 1.40)] |" in table
    other = row("MiniLM", 0.8, True, hardware={"cpu": "y", "kind": "Intel avx512"})
    assert plain_attention.table([*rows, other]) == f"{table}\n{plain_attention.table([other])}"


def test_a_ratio_on_the_wrong_side_of_a_threshold_is_named() -> None:
    good = [row("MiniLM", 0.8, True), row("one text of 32", 1.4, False)]
    assert plain_attention.doubtful(good) == []
    bad = [row("MiniLM", 1.2, True, padded=True), row("one text of 32", 0.7, False)]
    assert plain_attention.doubtful(good + bad) == [
        "MiniLM, padded, forward, float32, 1 thread(s), chosen: 1.20 of PyTorch's time",
        "one text of 32, forward, float32, 1 thread(s), left to PyTorch: 0.70 of PyTorch's time",
    ]

"""Which form of a backend's kernels goes first, where it has several ways to serve a call.

Measurements decide, never a guess: `forms.json` holds what `python -m benchmarks.forms` took from a
run on a GPU, a row for each operator, GPU, dtype and sizes with the microseconds of each form,
forward and backward together. Where nothing near was measured on this GPU, a backend's own order
stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ._contract import Call

FILE = Path(__file__).with_name("forms.json")
FARTHEST = 3.0  # doublings, over all sizes, from which a measurement still tells


def ranked(call: Call, forms: Sequence[str]) -> list[tuple[str, str]]:
    """The forms in the order in which to try them, each with the reason for its place."""
    if len(forms) < 2:
        return [(form, "") for form in forms]
    hardware = _hardware(call.device)
    row = _nearest(call, hardware)
    if row is None:
        reason = f"is the usual form; nothing near was measured on {hardware}"
        return [(form, reason) for form in forms]
    us: dict[str, float] = row["us"]
    sizes = " ".join(f"{letter}={size}" for letter, size in row["sizes"].items())
    order = sorted(forms, key=lambda form: us.get(form, math.inf))
    reason = ", ".join(f"{form} {us[form]:.0f} us" for form in order if form in us)
    return [(form, f"by measurement at {sizes}: {reason}") for form in order]


def _nearest(call: Call, hardware: str) -> dict[str, Any] | None:
    dtype = str(call.dtype).removeprefix("torch.")
    rows = [
        row
        for row in table()
        if (row["op"], row["hardware"], row["dtype"]) == (call.contract.name, hardware, dtype)
    ]
    distance, row = min(
        ((_doublings(call.sizes, row["sizes"]), row) for row in rows),
        key=lambda found: found[0],
        default=(math.inf, None),
    )
    return row if distance <= FARTHEST else None


def _doublings(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How far apart sizes are; a list of sizes counts by its sum."""
    if one.keys() != other.keys():
        return math.inf
    return sum(abs(math.log2((1 + _sum(one[k])) / (1 + _sum(other[k])))) for k in one)


def _sum(size: Any) -> int:
    return size if isinstance(size, int) else sum(size)


@cache
def table() -> list[dict[str, Any]]:
    """The measured rows: op, hardware, dtype, sizes, us (form -> microseconds), commit."""
    return json.loads(FILE.read_text())


@cache
def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the simulator"

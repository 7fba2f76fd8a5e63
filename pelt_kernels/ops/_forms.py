"""What was measured of calls: which form of a backend's kernels is fastest, and where a backend is
slower than eager.

Only measurements decide: `forms.jsonl` holds what `python -m benchmarks.forms` took from
a run, a row for each operator, kind of hardware, dtype, direction, sizes and options, with the
microseconds of each request (``cuda:single``, ``cpu:avx512``, ``eager``). Where nothing near was
measured on this kind of hardware, the usual order holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import _native
from ._contract import Signature

FILE = Path(__file__).with_name("forms.jsonl")
FARTHEST = 3.0  # doublings, over all sizes, up to which a measurement counts
OPTION = 0.25  # doublings for each option that only one of two calls has
SLOWER = 1.03  # of eager's time: less than that is within what two runs differ by
# Operators whose CPU kernels compete with torch's matrix products: in bfloat16 they multiply in
# float32, and a processor that multiplies bfloat16 itself may be faster in torch.
MADE_OF_PRODUCTS = {"gated_adapter", "prefix_attention", "lora_linear"}
DIRECTIONS = {False: "forward", True: "forward+backward"}  # by whether gradients are asked for

Row = dict[str, Any]


def nearest(signature: Signature, requests: Sequence[str], needs_grad: bool) -> Row | None:
    """The nearest measured row that has one of the requests."""
    dtype = str(signature.dtype).removeprefix("torch.")
    key = (signature.contract.name, hardware(signature.device), dtype, DIRECTIONS[needs_grad])
    rows = [row for row in table().get(key, ()) if not row["us"].keys().isdisjoint(requests)]
    own = set(options(signature))
    distance, row = min(
        (
            (
                _doublings(signature.sizes, row["sizes"]) + OPTION * len(own ^ set(row["options"])),
                row,
            )
            for row in rows
        ),
        key=lambda pair: pair[0],
        default=(math.inf, None),
    )
    return row if distance <= FARTHEST else None


def ranked(signature: Signature, requests: Sequence[str], row: Row | None) -> list[tuple[str, str]]:
    """Requests for a backend's forms in the order in which to try them, each with the reason for
    its place; no reason where there is only one.
    """
    if len(requests) < 2:
        return [(request, "") for request in requests]
    if row is None:
        reason = f"is the usual form; nothing near was measured on {hardware(signature.device)}"
        return [(request, reason) for request in requests]
    us: dict[str, float] = row["us"]
    order = sorted(requests, key=lambda request: us.get(request, math.inf))
    told = (request for request in [*order, "eager"] if request in us)
    reason = ", ".join(f"{request} {us[request]:.0f} us" for request in told)
    return [(request, f"by measurement of {_where(row)}: {reason}") for request in order]


def why_slower(request: str, row: Row | None) -> str:
    """That eager was measured faster, in one sentence; empty if it was not."""
    us: dict[str, float] = {} if row is None else row["us"]
    if row is None or not {request, "eager"} <= us.keys() or us[request] <= SLOWER * us["eager"]:
        return ""
    return (
        f"eager took {us['eager']:.0f} us and {request} {us[request]:.0f} us for {_where(row)}, "
        f"measured on {row['hardware']}"
    )


def options(signature: Signature) -> list[str]:
    """On what a call's cost depends beside its sizes and dtype: the optional inputs that are there,
    switches and words other than the default, dropout, and master parameters.
    """
    contract, at = signature.contract, signature.attributes
    given = [
        row.name for row in contract.input_rows if row.is_optional and row.name in signature.given
    ]
    words = [
        f"{row.name}={value}"
        for row in contract.attribute_rows
        if row.type in ("bool", "str", "str[]")
        for value in dict.fromkeys(at[row.name] if row.type == "str[]" else [at[row.name]])
        if value not in (row.default, "none")
    ]
    more = {"dropout": at.get("dropout_p"), "master": signature.masters}
    return [*given, *words, *(name for name, is_there in more.items() if is_there)]


def why_unproven(backend: str, signature: Signature) -> str:
    """Why a backend is not taken without a measurement, in one sentence; empty if it is. These are
    the CPU kernels in bfloat16 on a processor that has instructions for it and on which nobody has
    measured them.
    """
    if (
        backend != "cpu"
        or signature.dtype != torch.bfloat16
        or signature.contract.name not in MADE_OF_PRODUCTS
        or not _native.has_bf16_products()
    ):
        return ""
    kind = hardware(signature.device)
    if any(key[:3] == (signature.contract.name, kind, "bfloat16") for key in table()):
        return ""
    return (
        f"nobody has measured it in bfloat16 on {kind}, which multiplies bfloat16 itself; "
        "backend='cpu' asks for it"
    )


def _where(row: Row) -> str:
    sizes = " ".join(f"{letter}={size}" for letter, size in row["sizes"].items())
    return f"{row['direction']} at {sizes}"


def _doublings(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How far apart sizes are; a list of sizes counts by its sum."""
    if one.keys() != other.keys():
        return math.inf
    return sum(abs(math.log2((1 + _sum(one[k])) / (1 + _sum(other[k])))) for k in one)


def _sum(size: Any) -> int:
    return size if isinstance(size, int) else sum(size)


@cache
def table() -> dict[tuple[str, ...], list[Row]]:
    """The measured rows by operator, hardware, dtype and direction; beside those a row has sizes,
    options, us (request -> microseconds) and commit.
    """
    rows: dict[tuple[str, ...], list[Row]] = {}
    for line in FILE.read_text().splitlines():
        row = json.loads(line)
        key = (row["op"], row["hardware"], row["dtype"], row["direction"])
        rows.setdefault(key, []).append(row)
    return rows


@cache
def hardware(device: torch.device) -> str:
    """The kind of hardware on which rows have to be measured to count for a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _native.processor()

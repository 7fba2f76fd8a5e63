"""The least time that a call can take on this machine: what it has to move over the fastest that
bytes move here, and what it has to multiply over the fastest that numbers are multiplied here.

    python -m benchmarks.roofline [--device cuda] [--dtypes float32,bfloat16]

It is a limit, not a goal, so whatever is in doubt makes it lower: of several ways to move bytes the
fastest counts, of all samples the shortest, bytes that fit into a cache move at its speed, and work
that the contract lets a kernel leave out is not counted. Data are random: some hardware is faster
on zeros.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pelt_kernels._hardware import hardware
from pelt_kernels.ops import _native
from pelt_kernels.ops._dispatch import contract_of
from pelt_kernels.ops._rows import Input

from . import shapes, timing
from .from_tests import Case, cases

# Bytes touched: from what one core's nearest caches hold to what no cache holds. On a GPU, whose
# cache is emptied before each sample, the last only.
WORKING_SETS = {"cpu": tuple(1 << n for n in range(16, 29)), "cuda": (1 << 31,)}
PRODUCTS = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (4096, 8192)}
SECONDS = 0.2  # for each product; where one takes longer, larger ones are left out
# bfloat16 products per float32 product that the instructions allow, whatever torch makes of them:
# vdpbf16ps multiplies two pairs in each float32 lane, a tile product 512 in one cycle beside the 32
# of two 16-lane FMA units.
BFLOAT16_PRODUCTS = {"avx512_bf16": 2, "amx": 16}


class Work(NamedTuple):
    """The least that forward does, and the least that backward adds: bytes, multiplications and
    additions.
    """

    bytes: tuple[int, int]
    flops: tuple[float, float]


# What was seen until now: device -> working set -> bytes per second; (device, dtype) -> products.
_bytes: dict[str, dict[int, float]] = {}
_products: dict[tuple[str, torch.dtype], float] = {}


def byte_rate(device: str, touched: int) -> float:
    """Bytes per second, read and written, where a call touches so many: that of the next smaller
    working set, in case the nearer cache keeps a part of them.
    """
    if device not in _bytes:
        _bytes[device] = _measured_bytes(device)
    rates = _bytes[device]
    return rates[max((size for size in rates if size <= touched), default=min(rates))]


def _measured_bytes(device: str) -> dict[int, float]:
    """For each working set the fastest of a copy, a sum and a dot product of that size or a larger
    one: small ones show what a call costs, not what a cache gives.
    """
    rates: dict[int, float] = {}
    fastest = 0.0
    for size in reversed(WORKING_SETS[device]):
        halves = torch.randn(2, size // 8, device=device)
        ways: dict[str, Callable[[], Any]] = {
            "copy": lambda halves=halves: halves[1].copy_(halves[0]),
            "sum": lambda halves=halves: halves.sum(),
            "dot": lambda halves=halves: torch.dot(halves[0], halves[1]),
        }
        samples = timing.interleaved(ways, device, 0.05)
        fastest = max(fastest, *(size / min(seconds) for seconds in samples.values()))
        rates[size] = fastest
    return rates


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Multiplications and additions per second: torch's fastest matrix product, of several sizes.

    On a CPU in bfloat16 also what float32 shows the instructions to be able to: torch may have no
    product that uses them, and where there are none kernels compute in float32.
    """
    if (device, dtype) not in _products:
        _products[device, dtype] = _measured_products(device, dtype)
    rate = _products[device, dtype]
    if device == "cpu" and dtype != torch.float32:
        newest = "".join(_native.instruction_sets()[:1])
        factor = BFLOAT16_PRODUCTS.get(newest, 1) if dtype == torch.bfloat16 else 1
        rate = max(rate, factor * product_rate(device, torch.float32))
    return rate


def _measured_products(device: str, dtype: torch.dtype) -> float:
    rate = 0.0
    for n in PRODUCTS[device]:
        a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        call = {"product": lambda a=a, b=b, c=c: torch.mm(a, b, out=c)}
        once = min(timing.interleaved(call, device, SECONDS)["product"])
        rate = max(rate, 2 * n**3 / once)
        if once > SECONDS:
            break
    return rate


def measure_again() -> None:
    """Measures again what was measured, and keeps what is faster: where something else had the
    machine at first, the limits were too high.
    """
    for device, rates in _bytes.items():
        again = _measured_bytes(device)
        rates.update({size: max(rate, again[size]) for size, rate in rates.items()})
    for (device, dtype), rate in _products.items():
        _products[device, dtype] = max(rate, _measured_products(device, dtype))


@cache
def work(operator: str, case: Case, dtype: torch.dtype, device: str = "cpu") -> Work:
    """Each input read once, each result written once, and the operator's own products.

    Backward reads what forward read, the gradients of its outputs and what forward saved for it,
    and writes the gradients of the inputs that are trained. Of a bank only the members that are
    picked count, of rows behind a mask only those it lets through, and a gradient that is the
    output's gradient itself is nothing to write. ``device`` is where the inputs are drawn.
    """
    contract = contract_of(operator).CONTRACT
    values = cases.make_inputs(contract, case, dtype, device, drawn_on=device)
    inputs = dict(zip(contract.input_names, values))
    call = contract.bind(values, cases.make_attributes(contract, case))
    item = dtype.itemsize
    outputs = {name: _entries(shape) for name, shape in contract.output_shapes(call).items()}
    results, saved = (
        sum(outputs[row.name] * (4 if row.kind == "float32" else item) for row in rows)
        for rows in (contract.public_rows, contract.saved_rows)
    )
    seen, behind_mask = _seen(operator, inputs)
    read = {
        row.name: sum(_picked_bytes(row, i, t, contract.input_rows, inputs) for i, t in
                      _tensors(inputs[row.name])) * (seen if row.name in behind_mask else 1)
        for row in contract.input_rows
    }  # fmt: skip
    trained = sum(
        t.nbytes
        for row in contract.input_rows
        for _, t in _tensors(inputs[row.name])
        if row.name not in shapes.FROZEN.get(operator, ())
        and t.is_floating_point()
        and not row.grad_is_dy
    )
    again = sum(read[name] for name in contract.backward_names)
    forward, backward = shapes.flops(operator, case, seen)
    return Work(
        (round(sum(read.values()) + results), round(again + saved + results + trained)),
        (forward, backward),
    )


def _seen(operator: str, inputs: dict[str, Any]) -> tuple[float, tuple[str, ...]]:
    """The share that a mask lets through, and of which inputs."""
    mask, names = shapes.BEHIND_MASK.get(operator, ("", ()))
    values = inputs.get(mask)
    return (1.0, ()) if values is None else (values.float().mean().item(), names)


def _picked_bytes(
    row: Input, i: int, tensor: Tensor, rows: list[Input], inputs: dict[str, Any]
) -> float:
    """The tensor's bytes, of a bank those of the members that its index names."""
    letters = next(shape for shape in row.shapes if len(shape) == tensor.ndim)
    for index in rows:
        if row.kind == "parameter" and index.bound and letters[:1] == (index.bound,):
            chosen = inputs[index.name][i] if index.is_list else inputs[index.name]
            members = 1 if chosen is None else chosen.unique().numel()
            return tensor.nbytes * members / max(tensor.shape[0], 1)
    return tensor.nbytes


def _tensors(value: Any) -> list[tuple[int, Tensor]]:
    """Those that are there, with their places in the list."""
    return [
        (i, t) for i, t in enumerate(value if isinstance(value, list) else [value]) if t is not None
    ]


def _entries(shape: Any) -> int:
    if isinstance(shape, list):
        return sum(_entries(s) for s in shape)
    return torch.Size(shape).numel()


def least_seconds(least: Work, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """The floor of forward, and of forward and backward."""
    product = product_rate(device, dtype)
    forward, backward = (
        max(moved / byte_rate(device, moved), flops / product)
        for moved, flops in zip(least.bytes, least.flops)
    )
    return forward, forward + backward


def main() -> None:
    """Prints this machine's limits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    machine = hardware()
    print(machine["gpu" if options.device == "cuda" else "cpu"], f"{machine['threads']} thread(s)")
    for size in WORKING_SETS[options.device]:
        rate = byte_rate(options.device, size)
        print(f"{size >> 10:>8} KiB touched {rate / 1e9:8,.1f} GB/s")
    for name in options.dtypes.split(","):
        rate = product_rate(options.device, getattr(torch, name))
        print(f"product {name} {rate / 1e9:,.0f} GFLOP/s")


if __name__ == "__main__":
    main()

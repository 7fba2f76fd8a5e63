"""The two limits of a machine, measured where the contenders run: how fast it copies, and how fast
it multiplies.

    python -m benchmarks.roofline [--device cuda] [--dtypes float32,bfloat16]

A call cannot take less than its least bytes over the one and its products over the other. Data are
random: some hardware is faster on zeros.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pelt_kernels.ops._cases import Case, make_attributes, make_inputs

from . import shapes, timing


@cache
def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    size = (1 << 30) if device == "cuda" else (256 << 20)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    samples = timing.interleaved({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"]
    return 2 * size / timing.median(samples)


@cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of torch's own matrix product.

    On a CPU of float32 if that is faster: where bfloat16 has no instructions of its own, kernels
    compute in float32.
    """
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    samples = timing.interleaved({"product": lambda: a @ b}, device, 0.5)["product"]
    rate = 2 * n**3 / timing.median(samples)
    if device == "cpu" and dtype != torch.float32:
        rate = max(rate, product_rate(device, torch.float32))
    return rate


@cache
def least_bytes(operator: str, case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Of forward, and of forward and backward: each input read once, each result written once.

    Backward reads what forward read, the gradients of its outputs and what forward saved for it,
    and writes the gradients of the inputs that are trained.
    """
    module = shapes.contract_of(operator)
    contract = module.CONTRACT
    values = make_inputs(contract, case, dtype, draws=module.DRAWS)
    inputs = dict(zip(contract.input_names, values))
    call = contract.bind(values, make_attributes(contract, case))
    item = dtype.itemsize
    outputs = {name: _entries(shape) for name, shape in contract.output_shapes(call).items()}
    results, saved = (
        sum(outputs[row.name] * (4 if row.kind == "float32" else item) for row in rows)
        for rows in (contract.public_rows, contract.saved_rows)
    )
    given = {name: sum(t.nbytes for t in _tensors(value)) for name, value in inputs.items()}
    trained = sum(
        t.nbytes
        for name, value in inputs.items()
        for t in _tensors(value)
        if name not in shapes.FROZEN.get(operator, ()) and t.is_floating_point()
    )
    read_again = sum(given[name] for name in contract.backward_names)
    forward = sum(given.values()) + results
    return forward, forward + read_again + saved + results + trained


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in (value if isinstance(value, list) else [value]) if t is not None]


def _entries(shape: Any) -> int:
    if isinstance(shape, list):
        return sum(_entries(s) for s in shape)
    return torch.Size(shape).numel()


def least_seconds(
    operator: str, case: Case, dtype: torch.dtype, device: str
) -> tuple[float, float]:
    """The floor of forward, and of forward and backward."""
    forward, both = least_bytes(operator, case, dtype)
    work, work_backward = shapes.flops(operator, case)
    copy, product = copy_rate(device), product_rate(device, dtype)
    floor = max(forward / copy, work / product)
    return floor, floor + max((both - forward) / copy, work_backward / product)


def main() -> None:
    """Prints this machine's two limits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    print(f"copy {copy_rate(options.device) / 1e9:,.0f} GB/s")
    for name in options.dtypes.split(","):
        rate = product_rate(options.device, getattr(torch, name))
        print(f"product {name} {rate / 1e9:,.0f} GFLOP/s")


if __name__ == "__main__":
    main()

"""What the host side of every Triton backend shares: whether it can run here, tiles, and launches
that fit.

Nothing here reads a tensor, and importing it imports no Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from itertools import zip_longest
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import _dispatch
from ._contract import Chosen, Signature, Value

_ON = ("1", "true", "on", "yes", "y")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FORWARD = ("forward", "shrink", "expand")  # the kernels of forward; others are backward's


class Config(NamedTuple):
    """Tile sizes and how Triton schedules them."""

    block_t: int
    block_d: int
    warps: int
    stages: int


def kernels_of(package: str) -> Callable[[str], ModuleType]:
    """What imports an operator's ``_triton_<name>``, and Triton with it, when a call is served."""
    return cache(lambda name: importlib.import_module(f"{package}._triton_{name}"))


def dense(value: Value) -> Any:
    """An input as kernels take it: contiguous, and a list as a tuple."""
    if isinstance(value, (list, tuple)):
        return tuple(dense(v) for v in value)
    return None if value is None else value.contiguous()


def within_bounds(chosen: Chosen, inputs: dict[str, Value]) -> dict[str, Value]:
    """The inputs with indices clamped to their banks, and lengths to what they count: on a GPU
    nobody can refuse what is outside without waiting for it, and a kernel would read beside the
    bank. The CUDA kernels clamp where they read.
    """
    if not chosen.has_index or chosen.device.type == "cpu":  # where they were checked
        return inputs
    return inputs | {
        row.name: _clamped(inputs[row.name], chosen.sizes[row.bound], row.includes_bound)
        for row in chosen.contract.input_rows
        if row.bound in chosen.sizes
    }


def _clamped(index: Value, bound: Any, includes_bound: bool) -> Value:
    if isinstance(index, (list, tuple)):  # the sizes end with the last branch that has a bank
        return [_clamped(i, b, includes_bound) for i, b in zip_longest(index, bound)]
    return None if index is None else index.clamp(0, bound - 1 + includes_bound)


def why_not(signature: Signature, *limits: tuple[bool, str]) -> str:
    """Why a call's kernels cannot serve it: its dtype, the first of their limits that holds, or
    that no call can be served here; empty if they can.
    """
    if signature.dtype not in _DTYPES:
        first, dtype = signature.contract.input_names[0], signature.dtype
        return (
            "it takes float32, float16 or bfloat16, and "
            f"{first} is {str(dtype).removeprefix('torch.')}"
        )
    found = next((sentence for is_beyond, sentence in limits if is_beyond), "")
    return found or unavailable(signature.device)


def unavailable(device: torch.device | str) -> str:
    """Why no call can be served here at all; empty if some can."""
    device = torch.device(device)
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # a folder of that name is not the package
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "").lower() not in _ON:
            return (
                "on CPU tensors Triton's kernels run only in its interpreter; set "
                "TRITON_INTERPRET=1 before Python starts"
            )
        from . import _triton

        if not _triton.is_interpreted():
            return "TRITON_INTERPRET was set after Triton was imported; set it before Python starts"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"Triton serves compute capability 8.0 and above, and this GPU has {major}.{minor}"
    return ""


def options_of(config: Config) -> dict[str, int]:
    """A launch's options. Multiplications and additions may be fused, as in every other backend;
    Triton's own default changes between its versions.
    """
    return {
        "enable_fp_fusion": True,
        "BLOCK_T": config.block_t,
        "BLOCK_D": config.block_d,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def launch_fitting(
    configs: dict[str, Config], kernel: str, launch: Callable[[Config], None]
) -> None:
    """Launches with the first config that the GPU can hold, and remembers it."""
    from ._triton import OutOfResources

    while True:
        config = configs[kernel]
        try:
            launch(config)
            return
        except OutOfResources:
            configs[kernel] = _smaller(config)
            if configs[kernel] == config:
                raise


def tune(
    chosen: Chosen, measure: Callable[[Callable[[], object]], float], **inputs: Value
) -> dict[str, Config]:
    """Times every candidate of an operator's file on inputs of a call, keeps the fastest for this
    process, and returns them by kernel.

    ``measure`` takes a function and returns its time, such as `triton.testing.do_bench`. Nothing
    calls this by itself: a choice by time would make the order of sums, and so their last bits,
    depend on the run. The seed of dropout changes no time, so it is 0.
    """
    contract, configs = chosen.contract, chosen.plan.configs
    backend: Any = _dispatch.implementation(contract.name, chosen.backend)
    outputs = backend.forward(chosen, seed=0, **inputs)
    named = {row.name: output for row, output in zip(contract.output_rows, outputs)}
    given = {f"d{row.name}": named[row.name] for row in contract.differentiable_rows}
    given |= {row.name: named[row.name] for row in contract.saved_rows}
    rows = {row.name: row for row in contract.input_rows}
    needs = {
        name: rows[name].is_differentiable and bool(_there(inputs[name]))
        for name in contract.backward_names
    }

    def run(kernel: str) -> object:
        if kernel in _FORWARD:
            return backend.forward(chosen, seed=0, **inputs)
        return backend.backward(chosen, needs, **given, seed=0, **inputs)

    for kernel in configs:
        times: dict[Config, float] = {}
        for candidate in (configs[kernel], *backend.CANDIDATES):
            configs[kernel] = candidate
            time = measure(partial(run, kernel))
            times.setdefault(configs[kernel], time)  # a smaller one if that did not fit
        configs[kernel] = min(times, key=lambda config: times[config])
    return dict(configs)


def _there(value: Value) -> list[Any]:
    """The tensors of an input that are there."""
    return [v for v in (value if isinstance(value, (list, tuple)) else (value,)) if v is not None]


def _smaller(config: Config) -> Config:
    """Fewer stages first, then half the larger side of the tile, down to the matrix units' 16."""
    if config.stages > 1:
        return config._replace(stages=1)
    if config.block_d >= config.block_t:
        return config._replace(block_d=max(16, config.block_d // 2))
    return config._replace(block_t=max(16, config.block_t // 2))


@cache
def processors(device: torch.device) -> int:
    """How many programs run at once, at least; 4 for the interpreter, so that tests see several
    shares of a sum.
    """
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def candidates(*sides: tuple[int, int]) -> tuple[Config, ...]:
    """What `tune` tries: tiles of these sides, with each of the usual schedules."""
    return tuple(
        Config(block_t, block_d, warps, stages)
        for block_t, block_d in sides
        for warps in (4, 8)
        for stages in (2, 3)
    )


def with_fewer_rows(
    config: Config, rows: int, programs: Callable[[Config], int], least: int
) -> Config:
    """The config with half the rows, and so on down to 16, where that many are not there, or where
    it leaves less than so many programs.
    """
    while config.block_t > 16 and (config.block_t >= 2 * rows or programs(config) < least):
        config = config._replace(block_t=config.block_t // 2)
    return config


def shares_of(
    rows: int, config: Config, owners: int, per_processor: int, device: torch.device
) -> tuple[int, int]:
    """Into how many shares the rows of a group are cut, and how many rows each has: enough programs
    for so many on each processor, with ``owners`` of them on a share, and no share smaller than a
    tile.
    """
    tiles = -(-rows // config.block_t)
    wanted = -(-per_processor * processors(device) // owners)
    tiles_per_share = -(-tiles // min(tiles, wanted))
    return -(-tiles // tiles_per_share), tiles_per_share * config.block_t


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def signed(bits: int) -> tuple[int, int]:
    """The low and the high half of 64 bits as signed integers: an argument of one kind compiles
    once.
    """
    low, high = bits & 0xFFFFFFFF, bits >> 32 & 0xFFFFFFFF
    return (low ^ 0x80000000) - 0x80000000, (high ^ 0x80000000) - 0x80000000

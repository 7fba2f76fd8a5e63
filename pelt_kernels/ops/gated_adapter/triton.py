"""gated_adapter by Triton kernels, for GPUs without the hand-written ones (other architectures, AMD).

See _triton_fwd.py and _triton_bwd.py for the schedules. Tensors that are not contiguous are copied
first. Gradients are summed in a fixed order: two runs give the same bits. Triton is imported when
the first call is served, never before. On CPU tensors the kernels run in Triton's interpreter,
which is for tests: it needs TRITON_INTERPRET=1 before Triton is first imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value
from .._philox import threshold
from .contract import CONTRACT, NEVER_SKIP
from .eager import backward as backward

_MAX_RANK = 512
_RESIDUAL, _GATE_WEIGHT, _GATE_BIAS = (
    CONTRACT.input_names.index(name) for name in ("residual", "gate_weight", "gate_bias")
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ON = ("1", "true", "on", "yes", "y")


def unavailable(device: torch.device | str) -> str:
    """Why no call can be served here at all; empty if some can."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "").lower() not in _ON:
            return (
                "on CPU tensors Triton's kernels run only in its interpreter; set"
                " TRITON_INTERPRET=1 before Python starts"
            )
        if not _device_functions().is_interpreted():
            return "TRITON_INTERPRET was set after Triton was imported; set it before Python starts"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"Triton serves compute capability 8.0 and above, and this GPU has {major}.{minor}"
    return ""


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    if call.dtype not in _DTYPES:
        return (
            "it takes float32, float16 or bfloat16, and x is"
            f" {str(call.dtype).removeprefix('torch.')}"
        )
    if call.sizes["R"] > _MAX_RANK:
        return f"its tiles hold a bottleneck of at most {_MAX_RANK}, and R is {call.sizes['R']}"
    if call.sizes["B"] * call.sizes["S"] >= 2**31:
        return "it counts rows in 32 bits, and there are 2**31 or more"
    return unavailable(call.device)


@cache
def _kernels(direction: str) -> ModuleType:
    return importlib.import_module(f"{__package__}._triton_{direction}")


class Config(NamedTuple):
    """Tile sizes and how Triton schedules them."""

    block_t: int
    block_d: int
    warps: int
    stages: int


# For each bottleneck up to the number: 16-bit forward and backward, float32 forward and backward.
# Chosen so that registers hold the accumulators and shared memory stays below 64 KiB, which every
# GPU that Triton serves has; not measured. A config that a GPU cannot hold is halved.
_DEFAULTS = {
    64: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 2)),
    128: (Config(64, 64, 8, 2), Config(32, 64, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    256: (Config(32, 32, 8, 2), Config(32, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    512: (Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}


def forward(call: Call, seed: int, **inputs: Value) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, S, D], the learned gate's value (or [0]), and h [B, S, R] for backward."""
    shapes = CONTRACT.output_shapes(call)
    y = _native.empty(shapes["y"], call.dtype, call.device)
    gate_value = _native.empty(shapes["gate_value"], torch.float32, call.device)
    h = _native.empty(shapes["h"], call.dtype, call.device)
    if y.numel() == 0:
        return y, gate_value.zero_(), h
    plan = _plan_of(call, inputs)
    given = [_contiguous(inputs[name]) for name in CONTRACT.input_names]
    if call.attributes["residual_from"] == "input":
        given[_RESIDUAL] = given[0]
    ungated = given.copy()  # for a launch that finds the rows' gates in memory
    ungated[_GATE_WEIGHT] = ungated[_GATE_BIAS] = None
    row_gate = gate_value
    if plan.is_pooled:
        row_gate = _native.empty(shapes["y"][:2], torch.float32, call.device)
    with _native.on(call.device):
        for part, reads_gates in plan.parts:
            tensors = (*(ungated if reads_gates else given), y, gate_value, h, row_gate)
            plan.forward.launch(
                _kernels("fwd")._gated_adapter_fwd_kernel, tensors, (*_signed(seed), *plan.dropout),
                PART=part, READS_GATES=reads_gates, HAS_SKIP=plan.has_skip and part != "gates",
            )  # fmt: skip
    return y, gate_value, h


class _Grid:
    """Launches one kernel with the first config that the GPU can hold."""

    def __init__(
        self, config: Config, groups: int, rows: int, scalars: tuple[Any, ...], constants: Any
    ) -> None:
        self.config, self.groups, self.rows = config, groups, rows
        self.scalars, self.constants = scalars, constants

    def launch(self, kernel: Any, tensors: Sequence[Any], last: Sequence[Any], **more: Any) -> None:
        """``tensors``, the grid's numbers, the call's scalars and ``last`` are the arguments in
        order.
        """
        while True:
            config = self.config
            tiles = -(-self.rows // config.block_t)
            try:
                kernel[(self.groups * tiles,)](
                    *tensors, self.rows, self.scalars[0], tiles, *self.scalars[1:], *last,
                    BLOCK_T=config.block_t, BLOCK_D=config.block_d,
                    num_warps=config.warps, num_stages=config.stages, **self.constants, **more,
                )  # fmt: skip
                return
            except _device_functions().OutOfResources:
                self.config = _smaller(config)
                if self.config == config:
                    raise


def _smaller(config: Config) -> Config:
    """Fewer stages first, then half the larger side of the tile, down to the matrix units' 16."""
    if config.stages > 1:
        return config._replace(stages=1)
    if config.block_d >= config.block_t:
        return config._replace(block_d=max(16, config.block_d // 2))
    return config._replace(block_t=config.block_t // 2)


class _Plan:
    """What is the same for every call with these shapes: constants, tiles and launches."""

    def __init__(self, call: Call, inputs: dict[str, Value]) -> None:
        at, (b, s, d, r) = call.attributes, (call.sizes[letter] for letter in "BSDR")
        p = at["dropout_p"]
        self.is_learned = "gate_weight" in call.given
        self.is_pooled = self.is_learned and at["pooling"] != "token"
        self.has_skip = at["skip_below"] > NEVER_SKIP and (self.is_learned or "gate" in call.given)
        self.dropout = (_signed(threshold(p))[0] if p else 0, 1.0 / (1.0 - p))
        if self.is_learned and self.has_skip:
            self.parts: list[tuple[str, bool]] = [("gates", False), ("all", True)]
        elif self.is_pooled:
            self.parts = [("down", False), ("up", True)]
        else:
            self.parts = [("all", False)]
        down_per_sample, up_per_sample = (
            inputs[name] is not None and inputs[name].ndim == 1
            for name in ("down_index", "up_index")
        )
        is_per_sample = down_per_sample or up_per_sample
        constants = {
            "D": d,
            "R": r,
            "ACTIVATION": at["activation"],
            "POOLING": at["pooling"],
            "GATE_PER_ROW": inputs["gate"] is not None and inputs["gate"].ndim == 2,
            "HAS_DROPOUT": p > 0,
            "DOWN_PER_SAMPLE": down_per_sample,
            "UP_PER_SAMPLE": up_per_sample,
            "BLOCK_R": max(16, 1 << (r - 1).bit_length()),
        }
        scalars = (
            s, at["scale_value"], at["pre_norm_eps"], at["post_norm_eps"], at["skip_below"],
        )  # fmt: skip
        groups, rows = (b, s) if is_per_sample or self.is_pooled else (1, b * s)
        self.forward = _Grid(_config(call, 0, groups, rows), groups, rows, scalars, constants)


def _config(call: Call, direction: int, groups: int, rows: int) -> Config:
    """The default tile, with fewer rows where there are too few tiles for the processors."""
    wide = 2 if call.dtype == torch.float32 else 0
    config = next(c[direction + wide] for limit, c in _DEFAULTS.items() if call.sizes["R"] <= limit)
    if call.device.type == "cpu":  # the interpreter pays for each program and operation
        return config._replace(block_t=64, block_d=64 if call.sizes["D"] < 512 else 256)
    while config.block_t > 16 and (
        config.block_t >= 2 * rows or groups * -(-rows // config.block_t) < _processors(call.device)
    ):
        config = config._replace(block_t=config.block_t // 2)
    return config


@cache
def _processors(device: torch.device) -> int:
    """How many programs run at once, at least; 4 for the interpreter, so that tests see several
    parts of a sum.
    """
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


_plans: dict[int, tuple[Call, _Plan]] = {}


def _plan_of(call: Call, inputs: dict[str, Value]) -> _Plan:
    found = _plans.get(id(call))
    if found is None or found[0] is not call:
        if len(_plans) >= 4096:  # as many as the contract keeps calls
            _plans.clear()
        found = _plans[id(call)] = (call, _Plan(call, inputs))
    return found[1]


def _contiguous(value: Value) -> Value:
    return value if value is None else value.contiguous()


def _signed(bits: int) -> tuple[int, int]:
    """The low and the high half of 64 bits as signed integers: an argument of one kind compiles
    once.
    """
    low, high = bits & 0xFFFFFFFF, bits >> 32 & 0xFFFFFFFF
    return (low ^ 0x80000000) - 0x80000000, (high ^ 0x80000000) - 0x80000000


def _device_functions() -> ModuleType:
    from .. import _triton

    return _triton


@cache
def _kernels(direction: str) -> ModuleType:
    return importlib.import_module(f"{__package__}._triton_{direction}")

"""gated_adapter by Triton kernels, for GPUs that the hand-written ones do not serve.

See _triton_fwd.py and _triton_bwd.py for the schedules. Tensors that are not contiguous are copied
first. Gradients are summed in a fixed order: two runs give the same bits. Triton is imported when
the first call is served, never before. On CPU tensors the kernels run in Triton's interpreter,
which is for tests: it needs TRITON_INTERPRET=1 before Triton is first imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value
from .._philox import threshold
from .contract import CONTRACT, NEVER_SKIP

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


class Config(NamedTuple):
    """Tile sizes and how Triton schedules them."""

    block_t: int
    block_d: int
    warps: int
    stages: int


# For each kernel and each bottleneck up to the number: 16-bit and float32 activations. Chosen so
# that the accumulators fit in registers and a tile's operands in 64 KiB of shared memory, which
# every GPU that Triton serves has; not measured. What a GPU cannot hold is made smaller.
_ROWS = {
    64: (Config(64, 64, 4, 2), Config(32, 32, 4, 2)),
    128: (Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    256: (Config(32, 32, 8, 2), Config(16, 16, 8, 1)),
    512: (Config(16, 32, 8, 1), Config(16, 16, 8, 1)),
}
_COLUMNS = {
    64: (Config(32, 64, 4, 2), Config(32, 32, 4, 1)),
    128: (Config(32, 64, 8, 2), Config(16, 32, 8, 1)),
    256: (Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
    512: (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}
_DEFAULTS = {"forward": _ROWS, "rows": _ROWS, "columns": _COLUMNS}


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
    kernel = _kernels("fwd")._gated_adapter_fwd_kernel
    with _native.on(call.device):
        for part, reads_gates in plan.parts:
            tensors = (*(ungated if reads_gates else given), y, gate_value, h, row_gate)
            more = {
                "POOLING": call.attributes["pooling"],
                "GATE_PER_ROW": plan.has_gate_per_row,
                "PART": part,
                "READS_GATES": reads_gates,
                "HAS_SKIP": plan.has_skip and part != "gates",
                **plan.constants,
            }

            def launch(config: Config, tensors: Any = tensors, more: Any = more) -> None:
                tiles = -(-plan.rows // config.block_t)
                kernel[(plan.groups * tiles,)](
                    *tensors, plan.rows, call.sizes["S"], tiles, *plan.numbers,
                    *_signed(seed), *plan.dropout, **more, **_options(config),
                )  # fmt: skip

            plan.launch("forward", launch)
    return y, gate_value, h


def backward(
    call: Call,
    needs: dict[str, bool],
    dy: Tensor,
    gate_value: Tensor,
    h: Tensor,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    grads: dict[str, Value] = {}
    for name, need in needs.items():
        if need:
            like = inputs[name]
            grads[name] = _native.empty(like.shape, like.dtype, like.device)
    if dy.numel() == 0:
        return {name: grad.zero_() for name, grad in grads.items()}
    with _native.on(call.device):
        _Backward(call, inputs, grads, dy.contiguous(), gate_value, h.contiguous(), seed).run()
    return grads


class _Backward:
    """One backward: its tensors, and its launches in order."""

    def __init__(
        self,
        call: Call,
        inputs: dict[str, Value],
        grads: dict[str, Value],
        dy: Tensor,
        gate_value: Tensor,
        h: Tensor,
        seed: int,
    ) -> None:
        self.call, self.plan, self.grads = call, _plan_of(call, inputs), grads
        self.given = {name: _contiguous(inputs[name]) for name in CONTRACT.input_names}
        self.gate = gate_value if self.plan.is_learned else self.given["gate"]
        self.dy, self.h = dy, h
        self.dropout = (*_signed(seed), *self.plan.dropout)
        rows = call.sizes["B"] * call.sizes["S"]
        self.dh = _native.empty(h.shape, call.dtype, call.device)
        fields = _kernels("bwd_rows").FIELDS
        self.fields = _native.empty((fields, rows), torch.float32, call.device)
        self.pool = None
        if self.plan.is_pooled:
            self.pool = _native.empty((call.sizes["B"],), torch.float32, call.device)

    def run(self) -> None:
        self.plan.launch("rows", self._rows)
        if self.pool is not None or ("gate" in self.grads and not self.plan.has_gate_per_row):
            self._pool()
        wanted = {name for name in self.grads if name in _PARTS}
        if wanted or "x" in self.grads:
            self.plan.launch("columns", self._columns)
        if wanted:
            self._sum()

    def _rows(self, config: Config) -> None:
        plan, given, sizes = self.plan, self.given, self.call.sizes
        tiles = -(-plan.shared_rows // config.block_t)
        dgate = self.grads.get("gate") if plan.has_gate_per_row else None
        _kernels("bwd_rows")._gated_adapter_bwd_rows_kernel[(plan.shared_groups * tiles,)](
            *(given[name] for name in _ROWS_INPUTS), self.gate,
            given["gate_weight"], given["gate_bias"], given["mask"],
            self.dy, self.h, self.dh, self.fields, dgate,
            plan.shared_rows, sizes["S"], tiles, *plan.numbers, self.fields.shape[1],
            *self.dropout, POOLING=self.call.attributes["pooling"],
            GATE_PER_ROW=plan.has_value_per_row, HAS_SKIP=plan.has_skip,
            **plan.constants, **_options(config),
        )  # fmt: skip

    def _pool(self) -> None:
        sizes, at = self.call.sizes, self.call.attributes
        dgate = None if self.plan.is_learned else self.grads["gate"]
        _kernels("bwd_rows")._gated_adapter_bwd_pool_kernel[(sizes["B"],)](
            self.fields, self.given["mask"], self.given["scale"], dgate, self.pool,
            sizes["S"], at["scale_value"], POOLING=at["pooling"],
            BLOCK=min(1024, max(32, _power_of_two(sizes["S"]))),
        )  # fmt: skip

    def _columns(self, config: Config) -> None:
        plan, given, call = self.plan, self.given, self.call
        chunks = -(-call.sizes["D"] // config.block_d)
        self.shares, rows_per_share = _shares(call, plan, config, chunks)
        self.layout = _layout(call, self.grads)
        part_count = plan.shared_groups * self.shares
        self.parts = _native.empty(
            (part_count, self.layout["PART_SIZE"]), torch.float32, call.device
        )
        at = call.attributes
        _kernels("bwd_columns")._gated_adapter_bwd_columns_kernel[(chunks * part_count,)](
            *(given[name] for name in _COLUMNS_INPUTS), self.gate, given["gate_weight"],
            self.dy, self.h, self.dh, self.fields, self.pool, self.grads.get("x"), self.parts,
            plan.shared_rows, call.sizes["S"], self.shares, at["scale_value"], at["skip_below"],
            self.fields.shape[1], rows_per_share, *self.dropout, RESIDUAL=at["residual_from"],
            GATE_PER_ROW=plan.has_value_per_row, HAS_SKIP=plan.has_skip,
            **self.layout, **plan.constants, **_options(config),
        )  # fmt: skip

    def _sum(self) -> None:
        plan, call, sizes = self.plan, self.call, self.call.sizes
        members = {"w_down": sizes.get("M", 1), "w_up": sizes.get("M_up", 1)}
        members |= {"b_down": members["w_down"], "b_up": members["w_up"]}
        block = 4096 if call.device.type == "cpu" else 256
        part_sizes = _part_sizes(call)
        blocks = sum(
            -(-part_sizes[name] // block) * members.get(name, 1)
            for name in _PARTS
            if name in self.grads
        )
        own = ("D", "R", "DOWN_PER_SAMPLE", "UP_PER_SAMPLE")
        _kernels("bwd_columns")._gated_adapter_bwd_sum_kernel[(blocks,)](
            self.parts, self.given["down_index"], self.given["up_index"],
            *(self.grads.get(name) for name in _PARTS),
            plan.shared_groups, self.shares, members["w_down"], members["w_up"],
            **self.layout, **{name: plan.constants[name] for name in own}, BLOCK=block,
        )  # fmt: skip


# The gradients that are summed over rows, in the order in which they lie in a part.
_PARTS = {
    "w_down": "W_DOWN",
    "w_up": "W_UP",
    "b_down": "B_DOWN",
    "b_up": "B_UP",
    "pre_norm_weight": "PRE_WEIGHT",
    "pre_norm_bias": "PRE_BIAS",
    "post_norm_weight": "POST_WEIGHT",
    "post_norm_bias": "POST_BIAS",
    "gate_weight": "GATE_WEIGHT",
    "scale": "SCALE",
    "gate_bias": "GATE_BIAS",
}
_ROWS_INPUTS = CONTRACT.input_names[: CONTRACT.input_names.index("gate")]
_COLUMNS_INPUTS = tuple(name for name in _ROWS_INPUTS if name not in ("b_down", "post_norm_bias"))


def _part_sizes(call: Call) -> dict[str, int]:
    d, r = call.sizes["D"], call.sizes["R"]
    sizes = dict.fromkeys(_PARTS, d)
    return {**sizes, "w_down": r * d, "w_up": d * r, "b_down": r, "scale": 1, "gate_bias": 1}


def _layout(call: Call, grads: dict[str, Value]) -> dict[str, int]:
    """Where each wanted gradient lies in a part, -1 for the others, and the size of a part. Starts
    are multiples of 16 bytes.
    """
    layout, end = {}, 0
    for name, size in _part_sizes(call).items():
        layout[_PARTS[name]] = end if name in grads else -1
        end += -(-size // 4) * 4 if name in grads else 0
    return {**layout, "PART_SIZE": end}


def _shares(call: Call, plan: _Plan, config: Config, chunks: int) -> tuple[int, int]:
    """Into how many shares the rows of a group are cut, and how many rows each has: enough programs
    for two on each processor, and no share smaller than a tile.
    """
    tiles = -(-plan.shared_rows // config.block_t)
    wanted = -(-2 * _processors(call.device) // (chunks * plan.shared_groups))
    tiles_per_share = -(-tiles // min(tiles, wanted))
    return -(-tiles // tiles_per_share), tiles_per_share * config.block_t


class _Plan:
    """What is the same for every call with these shapes: constants, and tiles that fit."""

    def __init__(self, call: Call, inputs: dict[str, Value]) -> None:
        at, (b, s, d, r) = call.attributes, (call.sizes[letter] for letter in "BSDR")
        p = at["dropout_p"]
        self.is_learned = "gate_weight" in call.given
        self.is_pooled = self.is_learned and at["pooling"] != "token"
        self.has_gate_per_row = inputs["gate"] is not None and inputs["gate"].ndim == 2
        self.has_value_per_row = self.has_gate_per_row or at["pooling"] == "token"
        self.has_skip = at["skip_below"] > NEVER_SKIP and (self.is_learned or "gate" in call.given)
        self.dropout = (_signed(threshold(p))[0] if p else 0, 1.0 / (1.0 - p))
        self.numbers = tuple(
            at[name] for name in ("scale_value", "pre_norm_eps", "post_norm_eps", "skip_below")
        )
        self.parts = [("all", False)]  # of forward, and whether each reads row gates from memory
        if self.is_learned and self.has_skip:
            self.parts = [("gates", False), ("all", True)]
        elif self.is_pooled:
            self.parts = [("down", False), ("up", True)]
        down_per_sample, up_per_sample = (
            inputs[name] is not None and inputs[name].ndim == 1
            for name in ("down_index", "up_index")
        )
        self.constants = {
            "D": d,
            "R": r,
            "ACTIVATION": at["activation"],
            "HAS_DROPOUT": p > 0,
            "DOWN_PER_SAMPLE": down_per_sample,
            "UP_PER_SAMPLE": up_per_sample,
            "BLOCK_R": max(16, _power_of_two(r)),
        }
        # Rows whose tiles share weights; forward's tiles of a pooled gate share a sentence as well.
        is_per_sample = down_per_sample or up_per_sample
        self.shared_groups: int = b if is_per_sample else 1
        self.shared_rows: int = s if is_per_sample else b * s
        self.groups, self.rows = (
            (b, s) if self.is_pooled else (self.shared_groups, self.shared_rows)
        )
        self.configs = {
            "forward": _config(call, "forward", self.groups, self.rows),
            "rows": _config(call, "rows", self.shared_groups, self.shared_rows),
            "columns": _config(call, "columns", self.shared_groups, self.shared_rows),
        }

    def launch(self, kernel: str, launch: Callable[[Config], None]) -> None:
        """Launches with the first config that the GPU can hold, and remembers it."""
        while True:
            config = self.configs[kernel]
            try:
                launch(config)
                return
            except _device_functions().OutOfResources:
                self.configs[kernel] = _smaller(config)
                if self.configs[kernel] == config:
                    raise


def _options(config: Config) -> dict[str, int]:
    return {
        "BLOCK_T": config.block_t,
        "BLOCK_D": config.block_d,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _config(call: Call, kernel: str, groups: int, rows: int) -> Config:
    """The default tile; with fewer rows where that many are not there, or where tiles of rows are
    too few for the processors.
    """
    is_wide, r = call.dtype == torch.float32, call.sizes["R"]
    config = next(c[is_wide] for limit, c in _DEFAULTS[kernel].items() if r <= limit)
    if call.device.type == "cpu":  # the interpreter pays for each program and operation
        return config._replace(block_t=64, block_d=64 if call.sizes["D"] < 512 else 256)
    while config.block_t > 16 and (
        config.block_t >= 2 * rows
        or (kernel != "columns" and groups * -(-rows // config.block_t) < _processors(call.device))
    ):
        config = config._replace(block_t=config.block_t // 2)
    return config


def _smaller(config: Config) -> Config:
    """Fewer stages first, then half the larger side of the tile, down to the matrix units' 16."""
    if config.stages > 1:
        return config._replace(stages=1)
    if config.block_d >= config.block_t:
        return config._replace(block_d=max(16, config.block_d // 2))
    return config._replace(block_t=max(16, config.block_t // 2))


@cache
def _processors(device: torch.device) -> int:
    """How many programs run at once, at least; 4 for the interpreter, so that tests see several
    shares of a sum.
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


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


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
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}._triton_{name}")

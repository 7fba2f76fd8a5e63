"""What lora_linear's Triton kernels are launched with: tiles, shares of rows, constants.

Nothing here reads a tensor, and importing it imports no Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import _triton_host
from .._contract import Signature
from .._philox import threshold
from .._triton_host import (
    Config,
    candidates,
    options_of,
    power_of_two,
    shares_of,
    signed,
    with_fewer_rows,
)

# For each kernel and each padded width of all ranks up to the number: 16-bit and float32
# activations. Not timed: chosen for the most bytes in flight whose accumulators stay in registers
# and whose operands fit in 64 KiB of shared memory, which every GPU has that Triton serves.
# `tune` times the candidates on the GPU that is there.
_ROWS = {
    32: (Config(32, 128, 4, 3), Config(32, 64, 4, 2)),
    64: (Config(64, 64, 4, 3), Config(32, 32, 4, 2)),
    128: (Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    256: (Config(32, 64, 8, 1), Config(16, 16, 8, 1)),
}
_EXPAND = {
    64: (Config(64, 128, 4, 1), Config(32, 64, 4, 1)),
    128: (Config(64, 64, 4, 1), Config(32, 32, 4, 1)),
    256: (Config(32, 64, 4, 1), Config(16, 16, 8, 1)),
}
_COLUMNS = {
    64: (Config(32, 64, 4, 2), Config(32, 32, 4, 1)),
    128: (Config(32, 64, 8, 2), Config(16, 32, 8, 1)),
    256: (Config(16, 32, 8, 1), Config(16, 16, 16, 1)),
}
_DEFAULTS = {
    "shrink": _ROWS,
    "expand": _EXPAND,
    "rows": _ROWS,
    "columns_in": _COLUMNS,
    "columns_out": _COLUMNS,
}
CANDIDATES = candidates((16, 64), (32, 32), (32, 64), (64, 64), (32, 128), (64, 128))
MAX_WIDTH = 256  # of all ranks: above, the accumulators of the parameters' gradients spill


class Learned(NamedTuple):
    """A learned gate: its pooling, and the branch or the extra gate it is."""

    pooling: str
    branch: int
    extra: int

    @property
    def is_token(self) -> bool:
        return self.pooling == "token"


class Plan:
    """What is the same for every call with these shapes: constants, and tiles that fit."""

    def __init__(self, signature: Signature) -> None:
        at, sizes, p = signature.attributes, signature.sizes, signature.attributes["dropout_p"]
        self.signature = signature
        self.branches: int = len(at["offsets"])
        self.ranks: tuple[int, ...] = sizes.get("R_i", ())[: self.branches]
        self.begins = (0, *itertools.accumulate(self.ranks))[: self.branches]
        self.width = sum(self.ranks)
        self.sizes: tuple[int, ...] = sizes.get("size_i", ())[: self.branches]
        self.offsets = tuple(at["offsets"])
        self.scales = tuple(at["scales"])
        branches = range(self.branches)
        self.a_per_sample, self.b_per_sample = (
            tuple(signature.dimensions(index, i) == 1 for i in branches)
            for index in ("a_index", "b_index")
        )
        self.learned = [
            Learned(at["poolings"][i], i, -1)
            for i in branches
            if signature.dimensions("gate_weight", i) > 0
        ]
        self.learned += [Learned(p, -1, i) for i, p in enumerate(at["extra_poolings"])]
        self.is_masked = tuple(gate.pooling == "masked_mean" for gate in self.learned)
        token_gates = {gate.branch for gate in self.learned if gate.is_token}
        self.gate_per_row = tuple(
            i in token_gates or signature.dimensions("gate", i) == 2 for i in branches
        )
        self.dropout = (signed(threshold(p))[0] if p else 0, 1.0 / (1.0 - p))
        self.has_dropout = p > 0 and self.branches > 0
        self.block_w = max(16, power_of_two(self.width))
        joint = max(16, power_of_two(self.width + len(self.learned)))
        self.gates_apart = self.has_dropout or joint > self.block_w or not self.branches
        self.rows_total: int = sizes["B"] * sizes["S"]
        per_sample = any(self.a_per_sample) or any(self.b_per_sample)
        self.groups: int = sizes["B"] if per_sample else 1
        self.rows: int = sizes["S"] if per_sample else self.rows_total
        self.first_column = min(self.offsets, default=0)
        self.last_column = max((o + n for o, n in zip(self.offsets, self.sizes)), default=0)
        self.is_apart = len({*zip(self.offsets, self.sizes)}) > 1
        self.configs = {kernel: self._config(kernel) for kernel in _DEFAULTS}
        self.slots = {
            "BEGINS": self.begins,
            "RANKS": self.ranks,
            "W": self.width,
            "BLOCK_W": self.block_w,
        }
        self.inner = {
            **self.slots,
            "D": sizes["Din"],
            "HAS_DROPOUT": self.has_dropout,
            "A_PER_SAMPLE": self.a_per_sample,
        }
        self._made: dict[Any, Any] = {}

    def _config(self, kernel: str) -> Config:
        """The default tile; with fewer rows where that many are not there, or where tiles of rows
        are too few for the processors.
        """
        signature = self.signature
        is_wide = signature.dtype == torch.float32
        limits = _DEFAULTS[kernel].items()
        config = next(c[is_wide] for limit, c in limits if self.block_w <= limit)
        if signature.device.type == "cpu":  # the interpreter pays for each program and operation
            return config._replace(block_t=64, block_d=64 if signature.sizes["Din"] < 512 else 256)
        if self.branches > 1:  # each one's parameters take memory in every stage
            config = config._replace(stages=2 if self.branches == 2 else 1)
        is_split = kernel not in ("shrink", "rows")  # has more programs than tiles of rows
        least = 0 if is_split else _triton_host.processors(signature.device)
        return with_fewer_rows(config, self.rows, lambda c: self.groups * self.tiles(c), least)

    def members(self, name: str, place: int) -> int:
        """How many members the bank of a branch's factor has; 1 for what is no bank."""
        letter = {"a": "M_i", "b": "N_i"}.get(name, "")
        sizes = self.signature.sizes.get(letter, ())
        found: int | None = sizes[place] if place < len(sizes) else None
        return found or 1

    def is_per_sample(self, part: Part) -> bool:
        flags = {"a": self.a_per_sample, "b": self.b_per_sample}.get(part.name)
        return flags is not None and flags[part.place]

    def tiles(self, config: Config) -> int:
        """Tiles of rows in a group."""
        return -(-self.rows // config.block_t)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when this key was first seen: constants cost more to put together
        than to pass.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def shrink(self, config: Config, has_branches: bool) -> dict[str, Any]:
        """The constants of the first kernel, with the branches or for gates alone."""

        def make() -> dict[str, Any]:
            if has_branches:
                return {**self.inner, "GATES_APART": self.gates_apart, **options_of(config)}
            none = {"BEGINS": (), "RANKS": (), "A_PER_SAMPLE": (), "W": 0, "BLOCK_W": 16}
            alone = {**none, "HAS_DROPOUT": False, "GATES_APART": True}
            return {**self.inner, **alone, **options_of(config)}

        has_branches = has_branches and self.branches > 0
        return self.once(("shrink", config, has_branches), make)

    def outer(self, config: Config) -> dict[str, Any]:
        """The constants of a kernel that goes over the columns that some branch reaches."""
        return self.once(
            ("outer", config),
            lambda: {
                **self.slots,
                "DOUT": self.signature.sizes["Dout"],
                "FIRST": self.first_column,
                "CHUNKS": -(-(self.last_column - self.first_column) // config.block_d),
                "OFFSETS": self.offsets,
                "SIZES": self.sizes,
                "GATE_PER_ROW": self.gate_per_row,
                **options_of(config),
            },
        )

    def shares(self, config: Config, chunks: int) -> tuple[int, int]:
        """How the rows of a group are cut, for four programs on each processor."""
        return shares_of(self.rows, config, chunks * self.groups, 4, self.signature.device)


class Part(NamedTuple):
    """A gradient that is summed from parts: which one, and where it lies."""

    name: str
    place: int
    is_out: bool  # among the parts of "columns_out"
    at: int
    size: int  # of one member


class Layout:
    """Where each wanted gradient lies in a part. Starts are multiples of 16 bytes."""

    def __init__(self, plan: Plan, needs: dict[str, bool]) -> None:
        d_in = plan.signature.sizes["Din"]
        self.parts: list[Part] = []
        self.sizes = {False: 0, True: 0}  # of the parts of columns_in, of columns_out
        branches = range(plan.branches)
        ranks, sizes = plan.ranks, plan.sizes
        self.a = tuple(self._add(needs["a"], "a", i, False, ranks[i] * d_in) for i in branches)
        self.b = tuple(self._add(needs["b"], "b", i, True, sizes[i] * ranks[i]) for i in branches)
        weights, biases = [], []
        for gate in plan.learned:
            prefix, i = ("gate", gate.branch) if gate.extra < 0 else ("extra", gate.extra)
            name = f"{prefix}_weight"
            weights.append(self._add(needs[name], name, i, False, d_in))
            name = f"{prefix}_bias"
            biases.append(self._add(needs[name], name, i, False, 1))
        self.gates = {"WEIGHT_AT": tuple(weights), "BIAS_AT": tuple(biases)}
        self.has_inner = needs["x"] or self.sizes[False] > 0
        block = 4096 if plan.signature.device.type == "cpu" else 256
        members = tuple(plan.members(part.name, part.place) for part in self.parts)
        self.sum_blocks = sum(-(-part.size // block) * n for part, n in zip(self.parts, members))
        self.sum = {
            "IS_OUT": tuple(part.is_out for part in self.parts),
            "AT": tuple(part.at for part in self.parts),
            "SIZE": tuple(part.size for part in self.parts),
            "MEMBERS": members,
            "IS_PER_SAMPLE": tuple(plan.is_per_sample(part) for part in self.parts),
            "SIZE_IN": self.sizes[False],
            "SIZE_OUT": self.sizes[True],
            "BLOCK": block,
        }

    def inner(self, plan: Plan, config: Config) -> dict[str, Any]:
        """The constants of columns_in."""
        return {
            **plan.inner,
            "PART_SIZE": self.sizes[False],
            "A_AT": self.a,
            **self.gates,
            "BLOCK_G": power_of_two(max(1, len(plan.learned))),
            **options_of(config),
        }

    def _add(self, is_wanted: bool, name: str, place: int, is_out: bool, size: int) -> int:
        if not is_wanted:
            return -1
        at = self.sizes[is_out]
        self.parts.append(Part(name, place, is_out, at, size))
        self.sizes[is_out] += -(-size // 4) * 4
        return at

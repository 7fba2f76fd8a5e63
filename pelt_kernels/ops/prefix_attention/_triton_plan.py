"""What prefix_attention's Triton kernels are launched with: tiles, shares of queries, constants.

Nothing here reads a tensor, and importing it imports no Triton.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch

from .. import _triton_host
from .._contract import Signature
from .._philox import threshold
from .._triton_host import Config, candidates, power_of_two, signed

MAX_HEAD = 128
# For each kernel and each padded head size up to the number: 16-bit activations, those with a bias
# or dropout, whose tiles take registers too, and float32. ``block_t`` are queries, ``block_d``
# keys. Not timed: chosen for the largest tiles whose accumulators ptxas keeps in registers on sm_90
# and whose operands fit in the shared memory of an A100, or in the 64 KiB of an AMD GPU.
# `tune` times the candidates on the GPU that is there.
_FORWARD = {
    64: (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(32, 32, 8, 1)),
    128: (Config(128, 64, 8, 2), Config(64, 32, 4, 2), Config(16, 16, 8, 1)),
}
_ROWS = {
    64: (Config(64, 64, 4, 2), Config(64, 64, 4, 1), Config(32, 32, 8, 1)),
    128: (Config(64, 32, 4, 2), Config(64, 32, 8, 1), Config(16, 16, 8, 1)),
}
_COLUMNS = {
    64: (Config(64, 64, 4, 2), Config(32, 64, 4, 2), Config(32, 32, 8, 1)),
    128: (Config(32, 64, 8, 2), Config(32, 32, 4, 1), Config(16, 16, 8, 1)),
}
_DEFAULTS = {
    "forward": _FORWARD,
    "dq": _ROWS,
    "bias": _ROWS,
    "dkv": _COLUMNS,
    "prefix": _COLUMNS,
}
CANDIDATES = candidates((32, 64), (64, 32), (64, 64), (128, 32), (128, 64), (128, 128))
# Of a tile: prefixes are short, and a tile's padding is computed too. Products of float32 take
# ordinary registers for their operands.
_MOST_PREFIX_ROWS, _MOST_WIDE_PREFIX_ROWS = 64, 16


class Segment(NamedTuple):
    """A prefix segment: its first column, its length, and how many members its table has."""

    begin: int
    length: int
    members: int


class Plan:
    """What is the same for every call with these shapes: constants, and tiles that fit."""

    def __init__(self, signature: Signature) -> None:
        at, sizes, p = signature.attributes, signature.sizes, signature.attributes["dropout_p"]
        self.signature = signature
        self.b, self.h, self.g, self.s, self.n, self.e = (sizes[letter] for letter in "BHGSNE")
        shapes = [
            (name, shape) for (name, _), (shape, _) in zip(signature.flat_names, signature.tensors)
        ]  # of the tensors that are there
        prefixes = [shape for name, shape in shapes if name == "prefix_k"]
        lengths = tuple(shape[-3] for shape in prefixes)
        begins = (0, *itertools.accumulate(lengths))
        self.columns = begins[-1]  # of all prefixes
        self.segments = [
            Segment(begin, shape[-3], shape[0] if len(shape) == 4 else 1)
            for begin, shape in zip(begins, prefixes)
        ]
        self.has_dropout = p > 0
        self.dropout = (signed(threshold(p))[0] if p else 0, 1.0 / (1.0 - p))
        # Dropout's words lie in groups of four columns: the keys' tiles start at a group's border.
        self.shift = self.columns % 4 if self.has_dropout else 0
        self.block_e = max(16, power_of_two(self.e))
        heads = {"H": self.h, "G": self.g, "E": self.e, "BLOCK_E": self.block_e}
        gated = {"GATE_PER_HEAD": any(name == "gate" and len(shape) == 2 for name, shape in shapes)}
        dropped = {"HAS_DROPOUT": self.has_dropout}
        keys = {"P": self.columns, "IS_CAUSAL": at["is_causal"], "SHIFT": self.shift}
        keys |= {**heads, **dropped}
        block_p = self.block_p(self.columns)
        rows = {**keys, **gated, "BEGINS": begins[:-1], "LENGTHS": lengths, "BLOCK_P": block_p}
        unit = 1.0 if signature.dtype == torch.float32 else math.log2(math.e)
        self._own = {
            "forward": {**rows, "UNIT": unit},
            "dq": rows,
            "dkv": keys,
            "bias": keys,
            "prefix": {**heads, **gated, **dropped},
        }
        self._constants: dict[tuple[str, Config], dict[str, Any]] = {}
        self.configs = {kernel: self._config(kernel) for kernel in _DEFAULTS}

    def block_p(self, columns: int) -> int:
        is_wide = self.signature.dtype == torch.float32 and self.signature.device.type != "cpu"
        most = _MOST_WIDE_PREFIX_ROWS if is_wide else _MOST_PREFIX_ROWS
        return min(most, max(16, power_of_two(max(1, columns))))

    def _config(self, kernel: str) -> Config:
        """The default tile; smaller where that many queries or keys are not there, or where tiles
        of queries are too few for the processors.
        """
        signature = self.signature
        if signature.device.type == "cpu":  # the interpreter pays for each program and operation
            return Config(64, 64, 4, 1)
        has_more = self.has_dropout or "bias" in signature.given
        column = 2 if signature.dtype == torch.float32 else int(has_more)
        config = next(c[column] for limit, c in _DEFAULTS[kernel].items() if self.block_e <= limit)
        queries, keys = (max(16, power_of_two(max(1, n))) for n in (self.s, self.n))
        config = config._replace(
            block_t=min(config.block_t, queries), block_d=min(config.block_d, keys)
        )
        programs = self.b * self.h * self.query_tiles(config)
        if config.block_t == 128 and programs < 2 * _triton_host.processors(signature.device):
            config = config._replace(block_t=64)
        if kernel == "forward" and config.block_t <= 64 and column < 2:
            config = config._replace(warps=4)
        return config

    def query_tiles(self, config: Config) -> int:
        return -(-self.s // config.block_t)

    def key_tiles(self, config: Config) -> int:
        return -(-(self.n + self.shift) // config.block_d)

    def constants(self, kernel: str, config: Config) -> dict[str, Any]:
        """What a kernel is compiled for with these tiles, its options included; put together once.

        Multiplications and additions may be fused, as in every other backend; Triton's own default
        changes between its versions.
        """
        found = self._constants.get((kernel, config))
        if found is None:
            found = {
                **self._own[kernel],
                "enable_fp_fusion": True,
                "BLOCK_S": config.block_t,
                "num_warps": config.warps,
                "num_stages": config.stages,
            }
            if kernel != "prefix":
                found["BLOCK_N"] = config.block_d
            self._constants[kernel, config] = found
        return found

    def shares(self, config: Config, tiles: int, members: int) -> tuple[int, int, int, int]:
        """How a segment's queries are cut: shares, units of work in each, units in a sample and the
        queries of a unit. Enough programs for two on each processor, and no unit smaller than a
        tile.
        """
        wanted = -(
            -2 * _triton_host.processors(self.signature.device) // (tiles * self.g * members)
        )
        spans = min(self.query_tiles(config), -(-wanted // self.b))
        span = -(-self.query_tiles(config) // spans) * config.block_t
        spans = -(-self.s // span)
        units_per_share = -(-self.b * spans // min(wanted, self.b * spans))
        return -(-self.b * spans // units_per_share), units_per_share, spans, span

"""What gated_adapter's Triton kernels are launched with: tiles, shares of rows, constants.

Nothing here reads a tensor, and importing it imports no Triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _triton_host
from .._contract import Signature, Value
from .._philox import threshold
from .._triton_host import (
    Config,
    candidates,
    launch_fitting,
    power_of_two,
    signed,
    with_fewer_rows,
)
from .contract import NEVER_SKIP

# For each kernel and each bottleneck up to the number: 16-bit and float32 activations. Not timed:
# chosen for the most rows in flight whose accumulators ptxas keeps in registers (on sm_80, sm_90
# and sm_100) and whose operands fit in 64 KiB of shared memory, which every GPU has that Triton
# serves. `tune` times the candidates on the GPU that is there.
_ROWS = {
    64: (Config(64, 64, 4, 2), Config(32, 32, 4, 2)),
    128: (Config(64, 64, 8, 2), Config(32, 32, 8, 1)),
    256: (Config(32, 32, 8, 2), Config(16, 16, 8, 1)),
}
_COLUMNS = {
    64: (Config(32, 64, 4, 2), Config(32, 32, 4, 1)),
    128: (Config(32, 64, 8, 2), Config(16, 32, 8, 1)),
    256: (Config(16, 32, 8, 1), Config(16, 16, 16, 1)),
}
# Ranks of a block: of a larger bottleneck ptxas would spill the weights' gradients.
_MOST_RANKS, _BLOCK_OF_RANKS = 256, 128
CANDIDATES = candidates((16, 64), (32, 32), (32, 64), (64, 64), (32, 128), (128, 64))
_DEFAULTS = {"forward": _ROWS, "rows": _ROWS, "columns": _COLUMNS}


# The gradients that are summed over rows, in the order in which they lie in a part.
PARTS = {
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


def layout_of(part_sizes: dict[str, int], grads: dict[str, Value]) -> dict[str, int]:
    """Where each wanted gradient lies in a part, -1 for the others, and the size of a part. Starts
    are multiples of 16 bytes.
    """
    layout, end = {}, 0
    for name, size in part_sizes.items():
        layout[PARTS[name]] = end if name in grads else -1
        end += -(-size // 4) * 4 if name in grads else 0
    return {**layout, "PART_SIZE": end}


class Plan:
    """What is the same for every call with these shapes: constants, and tiles that fit."""

    def __init__(self, signature: Signature) -> None:
        at, (b, s, d, r) = signature.attributes, (signature.sizes[letter] for letter in "BSDR")
        p = at["dropout_p"]
        given = signature.given
        self.is_learned = "gate_weight" in given
        self.is_pooled = self.is_learned and at["pooling"] != "token"
        self.has_gate_per_row = signature.dimensions("gate") == 2
        self.has_value_per_row = self.has_gate_per_row or at["pooling"] == "token"
        self.has_skip = at["skip_below"] > NEVER_SKIP and (
            self.is_learned or "gate" in signature.given
        )
        self.norm_banks = {
            norm
            for norm in ("pre_norm", "post_norm")
            if signature.dimensions(f"{norm}_weight") == 2
        }
        self.dropout = (signed(threshold(p))[0] if p else 0, 1.0 / (1.0 - p))
        self.numbers = tuple(
            at[name] for name in ("scale_value", "pre_norm_eps", "post_norm_eps", "skip_below")
        )
        self.parts = [("all", False)]  # of forward, and whether each reads row gates from memory
        if self.is_learned and self.has_skip:
            self.parts = [("gates", False), ("all", True)]
        elif self.is_pooled:
            self.parts = [("down", False), ("up", True)]
        down_per_sample, up_per_sample = (
            signature.dimensions(name) == 1 for name in ("down_index", "up_index")
        )
        self.constants = {
            "D": d,
            "R": r,
            "ACTIVATION": at["activation"],
            "HAS_DROPOUT": p > 0,
            "DOWN_PER_SAMPLE": down_per_sample,
            "UP_PER_SAMPLE": up_per_sample,
            "PRE_NORM_STEP": d if "pre_norm" in self.norm_banks else 0,
            "POST_NORM_STEP": d if "post_norm" in self.norm_banks else 0,
            "BLOCK_R": _block_of_ranks(r),
        }
        # A bottleneck of 0 has one, of nothing: b_up, the norms and the gate still have gradients.
        self.rank_blocks = max(1, -(-r // _block_of_ranks(r)))
        self.part_sizes = {
            **dict.fromkeys(PARTS, d),
            "w_down": r * d, "w_up": d * r, "b_down": r, "scale": 1, "gate_bias": 1,
        }  # fmt: skip
        # Rows whose tiles share weights; forward's tiles of a pooled gate share a sentence as well.
        is_per_sample = down_per_sample or up_per_sample
        self.shared_groups: int = b if is_per_sample else 1
        self.shared_rows: int = s if is_per_sample else b * s
        self.groups, self.rows = (
            (b, s) if self.is_pooled else (self.shared_groups, self.shared_rows)
        )
        self.layouts: dict[tuple[str, ...], dict[str, int]] = {}  # by the gradients wanted
        self.configs = {
            "forward": _config(signature, "forward", self.groups, self.rows),
            "rows": _config(signature, "rows", self.shared_groups, self.shared_rows),
            "columns": _config(signature, "columns", self.shared_groups, self.shared_rows),
        }

    def launch(self, kernel: str, launch: Callable[[Config], None]) -> None:
        """Launches with the first config that the GPU can hold, and remembers it."""
        launch_fitting(self.configs, kernel, launch)


def _block_of_ranks(r: int) -> int:
    return max(16, power_of_two(r)) if r <= _MOST_RANKS else _BLOCK_OF_RANKS


def _config(signature: Signature, kernel: str, groups: int, rows: int) -> Config:
    """The default tile; with fewer rows where that many are not there, or where tiles of rows are
    too few for the processors.
    """
    is_wide, r = signature.dtype == torch.float32, _block_of_ranks(signature.sizes["R"])
    config = next(c[is_wide] for limit, c in _DEFAULTS[kernel].items() if r <= limit)
    if signature.device.type == "cpu":  # the interpreter pays for each program and operation
        return config._replace(block_t=64, block_d=64 if signature.sizes["D"] < 512 else 256)
    # The columns' kernel has more programs than tiles of rows.
    least = 0 if kernel == "columns" else _triton_host.processors(signature.device)
    return with_fewer_rows(config, rows, lambda c: groups * -(-rows // c.block_t), least)

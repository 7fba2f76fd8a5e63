"""masked_weight in Triton: see _triton_fwd.py and _triton_bwd.py for the schedules.

Tensors that are not contiguous are copied first. Two runs give the same bits. Triton is imported
when the first call is served, never before. On CPU tensors the kernels run in Triton's interpreter,
which is for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton_host
from .._contract import Chosen, Signature, Value
from .._triton_host import (
    Config,
    kernels_of,
    options_of,
    power_of_two,
    unavailable,
    why_not,
)

__all__ = ["backward", "forward", "supports", "unavailable"]

MAX_RANK = 32
_TILE = Config(32, 64, 4, 1)
_DIGITS, _BINS = 3, 2048
_FUSED = {"enable_fp_fusion": True}  # as options_of says
# Of scores: rounded as the formula has it, or nearly equal ones would make another mask.
_NOT_FUSED = {"enable_fp_fusion": False}
_FACTORS = ("u", "v", "a", "b", "row", "col")


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    sizes = signature.sizes
    r, r2, entries = sizes["R"], sizes["R2"], sizes["Dout"] * sizes["Din"]
    ranks = (
        f"its registers hold factors of at most {MAX_RANK} ranks, and they have R={r} and R2={r2}"
    )
    large = f"it counts entries in 32 bits, so Dout Din must be below 2**31, and it is {entries}"
    return why_not(signature, (max(r, r2) > MAX_RANK, ranks), (entries >= 2**31, large))


def forward(chosen: Chosen, **inputs: Value) -> tuple[Tensor, Tensor]:
    """y [Dout, Din], and the mask [Dout, Din] for backward."""
    rows, columns, at = chosen.sizes["Dout"], chosen.sizes["Din"], chosen.attributes
    y = _native.empty((rows, columns), chosen.dtype, chosen.device)
    mask = _native.empty((rows, columns), torch.bool, chosen.device)
    entries, keep = rows * columns, at["keep"]
    if not entries:
        return y, mask
    given = {name: value.contiguous() for name, value in inputs.items()}
    block = _block(chosen)
    blocks = -(-entries // block)
    keys = _native.empty((entries,), torch.int32, chosen.device)
    equal = _native.empty((blocks,), torch.int32, chosen.device)
    kernels = _kernels("fwd")
    with _native.on(chosen.device):
        counts = torch.zeros(_DIGITS * _BINS, dtype=torch.int32, device=chosen.device)
        kernels._masked_weight_score_kernel[(_tiles(rows, columns),)](
            *given.values(), y, keys, counts,
            rows, columns, at["beta"], at["alpha1"], at["alpha2"],
            **{**_options(chosen), **_NOT_FUSED},
        )  # fmt: skip
        for digit in range(1, _DIGITS):
            kernels._masked_weight_count_kernel[(blocks,)](
                keys, counts, entries, keep, DIGIT=digit, BLOCK=block, **_FUSED
            )
        kernels._masked_weight_equal_kernel[(blocks,)](
            keys, counts, equal, entries, keep, BLOCK=block, **_FUSED
        )
        kernels._masked_weight_write_kernel[(blocks,)](
            keys, counts, equal, y, mask, entries, keep, BLOCK=block, **_FUSED
        )
    return y, mask


def backward(
    chosen: Chosen, needs: dict[str, bool], dy: Tensor, mask: Tensor, **inputs: Value
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    grads = {name: _native.empty_like(inputs[name]) for name, need in needs.items() if need}
    rows, columns, at = chosen.sizes["Dout"], chosen.sizes["Din"], chosen.attributes
    if not dy.numel():
        return {name: grad.zero_() for name, grad in grads.items()}
    given = {name: value.contiguous() for name, value in inputs.items()}
    w0, u, v = given["w0"], given["u"], given["v"]
    bands, across = -(-rows // _TILE.block_t), -(-columns // _TILE.block_d)
    row_shares, column_shares = _shares(chosen, bands, across), _shares(chosen, across, bands)
    ranks = chosen.sizes["R"] + chosen.sizes["R2"] + 1
    row_parts = _native.empty((row_shares, rows * ranks), torch.float32, chosen.device)
    column_parts = _native.empty((column_shares, columns * ranks), torch.float32, chosen.device)
    beta, options = at["beta"], _options(chosen)
    with _native.on(chosen.device):
        _kernels("bwd")._masked_weight_bwd_rows_kernel[(bands * row_shares,)](
            w0, u, v, given["b"], dy, mask, grads.get("w0"), row_parts,
            rows, columns, row_shares, beta, **options,
        )  # fmt: skip
        _kernels("bwd")._masked_weight_bwd_columns_kernel[(across * column_shares,)](
            w0, u, v, given["a"], dy, mask, column_parts,
            rows, columns, column_shares, beta, **options,
        )  # fmt: skip
        _add(chosen, grads, row_parts, column_parts)
    return grads


def _add(chosen: Chosen, grads: dict[str, Value], row_parts: Tensor, column_parts: Tensor) -> None:
    """The factors' gradients from the shares' parts."""
    at, sizes = chosen.attributes, chosen.sizes
    starts, lengths = [], []
    for width in (sizes["Dout"], sizes["Din"]):
        starts.append((0, width * sizes["R"], width * (sizes["R"] + sizes["R2"])))
        lengths.append((width * sizes["R"], width * sizes["R2"], width))
    outs = tuple(grads.get(name) for name in _FACTORS)
    # In the order of the factors: u and v, a and b, row and col.
    flat = [tuple(x for pair in zip(*table) for x in pair) for table in (starts, lengths)]
    block = 1024
    blocks = sum(-(-n // block) for out, n in zip(outs, flat[1]) if out is not None)
    if not blocks:
        return
    _kernels("bwd")._masked_weight_bwd_sum_kernel[(blocks,)](
        row_parts, column_parts, outs,
        (at["beta"],) * 2 + (at["alpha1"],) * 2 + (at["alpha2"],) * 2,
        IS_COLUMN=(False, True) * 3, STARTS=flat[0], SIZES=flat[1],
        ROW_SHARES=row_parts.shape[0], ROW_SIZE=row_parts.shape[1],
        COLUMN_SHARES=column_parts.shape[0], COLUMN_SIZE=column_parts.shape[1], BLOCK=block,
        **_FUSED,
    )  # fmt: skip


def _shares(chosen: Chosen, owners: int, tiles: int) -> int:
    """Into how many parts a sum is cut, so that there are two programs for each processor."""
    wanted = -(-2 * _triton_host.processors(chosen.device) // owners)
    return max(1, min(wanted, tiles))


def _options(chosen: Chosen) -> dict[str, Any]:
    """R and R2, what they are padded to (the least side of a product is 16), and the tile: with
    more ranks four warps' registers would spill.
    """
    r, r2 = chosen.sizes["R"], chosen.sizes["R2"]
    padded = [max(16, power_of_two(max(1, n))) for n in (r, r2)]
    config = _TILE if max(padded) == 16 else _TILE._replace(warps=8)
    return {
        "R": r, "R2": r2, "BLOCK_R": padded[0], "BLOCK_R2": padded[1], **options_of(config)
    }  # fmt: skip


def _tiles(rows: int, columns: int) -> int:
    return -(-rows // _TILE.block_t) * -(-columns // _TILE.block_d)


def _block(chosen: Chosen) -> int:
    """Keys of a program; few for the interpreter, so that tests see several."""
    return 1024 if chosen.device.type == "cpu" else 2048


_kernels = kernels_of(__package__)

"""symmetric_kl in Triton: see _triton_fwd.py and _triton_bwd.py for the kernels.

Tensors that are not contiguous are copied first. Two runs give the same bits. Triton is imported
when the first call is served, never before. On CPU tensors the kernels run in Triton's interpreter,
which is for tests.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .. import _native
from .._contract import Chosen, Signature, Value
from .._triton_host import DTYPES, Config, options_of, power_of_two, unavailable

__all__ = ["backward", "forward", "supports", "unavailable"]


def supports(signature: Signature, backend: str, form: str) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    if signature.dtype not in DTYPES:
        return (
            "it takes float32, float16 or bfloat16, and z1 is"
            f" {str(signature.dtype).removeprefix('torch.')}"
        )
    if signature.sizes["T"] >= 2**30 or signature.sizes["C"] >= 2**30:
        return (
            "it counts rows and columns in 32 bits, so T and C must be below 2**30, and they are"
            f" {signature.sizes['T']} and {signature.sizes['C']}"
        )
    return unavailable(signature.device)


def forward(chosen: Chosen, z1: Tensor, z2: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss [], and both log-sum-exps [2, T] for backward (0 where a row does not count)."""
    t, c = chosen.sizes["T"], chosen.sizes["C"]
    loss = _native.empty((), torch.float32, chosen.device)
    lse = _native.empty((2, t), torch.float32, chosen.device)
    if not t:
        return loss.zero_(), lse
    z1, z2, mask = z1.contiguous(), z2.contiguous(), _dense(mask)
    values = _native.empty((t,), torch.float32, chosen.device)
    count = _native.empty((), torch.float32, chosen.device)
    config = _config(c)
    with _native.on(chosen.device):
        _kernels("fwd")._symmetric_kl_fwd_kernel[(-(-t // config.block_t),)](
            z1, z2, mask, values, lse, t, c, **options_of(config)
        )
        _kernels("fwd")._symmetric_kl_mean_kernel[(1,)](values, mask, loss, count, t, **_whole(t))
    return loss, lse


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dloss: Tensor,
    lse: Tensor,
    z1: Tensor,
    z2: Tensor,
    mask: Tensor | None,
) -> dict[str, Value]:
    """The gradients that ``needs`` names: ±0.5 (p1 - p2) / count."""
    t, c = chosen.sizes["T"], chosen.sizes["C"]
    grads: dict[str, Value] = {
        name: _native.empty(z1.shape, chosen.dtype, chosen.device)
        for name in ("z1", "z2")
        if needs[name]
    }
    if not t:
        return grads
    z1, z2, mask = z1.contiguous(), z2.contiguous(), _dense(mask)
    count = _native.empty((), torch.float32, chosen.device)
    config = _config(c)
    tiles = -(-t // config.block_t) * -(-c // config.block_d)
    with _native.on(chosen.device):
        _kernels("fwd")._symmetric_kl_mean_kernel[(1,)](None, mask, None, count, t, **_whole(t))
        _kernels("bwd")._symmetric_kl_bwd_kernel[(tiles,)](
            z1, z2, mask, lse, dloss, count, grads.get("z1"), grads.get("z2"), t, c,
            **options_of(config),
        )  # fmt: skip
    return grads


def _config(columns: int) -> Config:
    """Tiles of about 2048 elements: one long row, or several short ones."""
    block_d = min(2048, max(16, power_of_two(columns)))
    return Config(max(1, min(64, 2048 // block_d)), block_d, 4, 1)


def _whole(rows: int) -> dict[str, int]:
    """The options of the program that adds up all rows."""
    return {"BLOCK": min(1024, max(32, power_of_two(rows))), "enable_fp_fusion": True}


def _dense(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}._triton_{name}")

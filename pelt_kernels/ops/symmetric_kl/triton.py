"""symmetric_kl in Triton: see _triton_fwd.py and _triton_bwd.py for the kernels.

Tensors that are not contiguous are copied first. Two runs give the same bits. Triton is imported
when the first call is served, never before. On CPU tensors the kernels run in Triton's interpreter,
which is for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._contract import Chosen, Signature, Value
from .._triton_host import (
    Config,
    dense,
    kernels_of,
    options_of,
    power_of_two,
    unavailable,
    why_not,
)

__all__ = ["backward", "forward", "supports", "unavailable"]


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    t, c = signature.sizes["T"], signature.sizes["C"]
    large = (
        "it counts rows and columns in 32 bits, so T and C must be below 2**30, and they are "
        f"{t} and {c}"
    )
    return why_not(signature, (max(t, c) >= 2**30, large))


def forward(chosen: Chosen, z1: Tensor, z2: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss [], and both log-sum-exps [2, T] for backward (0 where a row does not count)."""
    t, c = chosen.sizes["T"], chosen.sizes["C"]
    loss = _native.empty((), torch.float32, chosen.device)
    lse = _native.empty((2, t), torch.float32, chosen.device)
    if not t:
        return loss.zero_(), lse
    z1, z2, mask = dense((z1, z2, mask))
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
    likes = {"z1": z1, "z2": z2}
    grads = {name: _native.empty_like(like) for name, like in likes.items() if needs[name]}
    if not t:
        return grads
    z1, z2, mask = dense((z1, z2, mask))
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


_kernels = kernels_of(__package__)

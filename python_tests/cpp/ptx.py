"""Kernels in PTX, written by tests and run on the simulator, on memory of numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pelt_kernels.ops import _native as native

LANES = 32
# Where csrc/sim/program.h puts a block's shared memory among the generic addresses.
SHARED_WINDOW = 1 << 62


def simulator() -> Any:
    return native.library("_C_sim")


def kernel(body: str, addresses: int = 2, threads: int = LANES, more_bytes: int = 0) -> str:
    """A module with the kernel `test`, whose parameter is a struct of addresses and more bytes
    behind them. %q0, %q1 and so on hold the addresses, %r0 the thread's index.
    """
    loads = "\n".join(f"ld.param.u64 %q{n}, [given+{8 * n}];" for n in range(addresses))
    return f"""
.version 7.8
.target sm_90
.address_size 64

.visible .entry test(
.param .align 16 .b8 given[{8 * addresses + more_bytes}]
)
.maxntid {threads}, 1, 1
{{
.reg .pred %p<32>;
.reg .b16 %h<32>;
.reg .b32 %r<64>;
.reg .b64 %q<32>;
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


def run(
    ptx: str,
    arrays: Sequence[np.ndarray],
    shared_bytes: int = 0,
    more: bytes = b"",
    **launch: Any,
) -> None:
    """Runs `test` on arrays, whose addresses are what it is given; each may be written."""
    params = b"".join(a.ctypes.data.to_bytes(8, "little") for a in arrays) + more
    memory = [(a.ctypes.data, a.nbytes, True) for a in arrays]
    simulator().run_ptx(
        ptx, "test", shared_bytes=shared_bytes, params=params, memory=memory, **launch
    )

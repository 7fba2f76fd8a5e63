"""The only door to the compiled modules: `_C` (CPU and CUDA kernels) and `_C_sim` (CUDA kernels on
the host).

Everything here works, and says what is missing, when neither was built.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_poison = False


@cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"pelt_kernels.{name}"), ""
    except ImportError as error:
        return None, str(error)


def why_not(name: str) -> str:
    """Why a compiled module cannot be used; empty if it can."""
    module, error = _load(name)
    return (
        ""
        if module is not None
        else f"the compiled module {name} is not there ({error}); build it with `make build`"
    )


def library(name: str) -> ModuleType:
    """The compiled module. Raises ImportError with the way out."""
    module, _ = _load(name)
    if module is None:
        raise ImportError(f"pelt_kernels: {why_not(name)}")
    return module


def build_info() -> dict[str, Any]:
    """Compiler, flags and architectures of `_C`; empty if it was not built."""
    module, _ = _load("_C")
    return dict(module.build_info()) if module is not None else {}


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(shape: tuple[int, ...] | list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a kernel to fill; full of NaN under test, so that an unwritten
    element shows.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if _poison and out.is_floating_point():
        out.fill_(float("nan"))
    return out


def set_poison(enabled: bool) -> None:
    """Switches the NaN filling of `empty`; tests turn it on."""
    global _poison
    _poison = enabled


def dense(value: Any) -> Any:
    """The tensor as kernels read it: contiguous, starting at a 16-byte border; copied if it is not.
    None stays None.
    """
    if not isinstance(value, Tensor):
        return value
    value = value.contiguous()
    return value if value.data_ptr() % 16 == 0 else value.clone()


def workspace(size: int, device: torch.device) -> Tensor | None:
    """Device memory for a kernel's intermediate results; None where it needs none. Poisoned under
    test, like `empty`.
    """
    return empty(((size + 3) // 4,), torch.float32, device) if size else None


@contextmanager
def on(device: torch.device) -> Iterator[int]:
    """Makes a GPU the current one and gives its current stream, as the address that launchers take;
    0 on a CPU.
    """
    if device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def can_fill_dropout(device: torch.device) -> bool:
    """Can `fill_dropout` write tensors made here and now: `_C` is there, and no tracer or mode has
    to see the work.
    """
    if (
        device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    module, _ = _load("_C")
    return module is not None and hasattr(module, "fill_dropout")


def fill_dropout(
    out: Tensor, kept_bits: int, threshold: int, seed: int, first_group: int = 0
) -> None:
    """Writes ``kept_bits`` where dropout keeps an element of ``out`` [rows, columns], 0 elsewhere.

    The bits do not depend on the number of threads. ``first_group`` is the counter of the first
    four elements.
    """
    library("_C").fill_dropout(
        out=out.data_ptr(), rows=out.shape[0], columns=out.shape[1],
        element_bytes=out.element_size(),
        kept_bits=kept_bits, threshold=threshold, seed=seed & 0xFFFFFFFFFFFFFFFF,
        first_group=first_group,
        threads=torch.get_num_threads(),
    )  # fmt: skip

"""The only door to the compiled modules: `_C` (CPU and CUDA kernels) and `_C_sim` (CUDA kernels'
PTX on the host).

Everything here works, and says what is missing, when neither was built.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("pelt_kernels")
TILES = "amx"  # the instruction set that multiplies tiles, and bfloat16 only
SMALL_WORKSPACE = 1 << 20  # bytes; there are as many as calls have run at once
_CPU = torch.device("cpu")
_workspaces: list[Tensor] = []  # that no call uses now
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
        else f"the compiled module {name} is not there ({error}); build it with "
        f"`make build{name.removeprefix('_C').replace('_', '-')}`"
    )


def library(name: str) -> ModuleType:
    """The compiled module. Raises ImportError with the way out."""
    module, _ = _load(name)
    if module is None:
        raise ImportError(f"pelt_kernels: {why_not(name)}")
    return module


def library_of(backend: str) -> ModuleType:
    """The compiled module of a backend: `_C_sim` of those that simulate, else `_C`."""
    return library("_C_sim" if backend.endswith("_sim") else "_C")


def build_info() -> dict[str, Any]:
    """Compiler, flags and architectures of `_C`; empty if it was not built."""
    module, _ = _load("_C")
    return dict(module.build_info()) if module is not None else {}


@cache
def why_no_gpu() -> str:
    """Why no tensor can be on a GPU here; empty if one can. No driver is asked: a process that has
    asked one cannot be forked any more.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):
        return "this machine has no driver of NVIDIA's: neither /dev/nvidiactl nor /dev/dxg"
    return ""


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those for which `_C` holds CPU kernels and that this processor runs, the newest first; none
    without `_C`. What the processor lists and the system refuses is said once at INFO.
    """
    module, _ = _load("_C")
    if module is None or not hasattr(module, "best_cpu_isa"):
        return ()
    for note in getattr(module, "cpu_isa_notes", list)():
        logger.info("cpu: %s", note)
    return tuple(reversed(module.cpu_isas()))


def cpu_forms(has_tiles: bool = False) -> tuple[str, ...]:
    """The instruction sets as forms of an operator's CPU kernels, the best first.

    Tiles come last, so that they serve on request and where they were measured to be faster: no
    test of theirs has run on a processor that has them.
    """
    found = instruction_sets()
    vectors = tuple(isa for isa in found if isa != TILES)
    return (*vectors, TILES) if has_tiles and TILES in found else vectors


@cache
def processor() -> str:
    """The kind of this processor, for measurements that hold for others of its kind: who made it
    and the newest of its `instruction_sets`, as "Intel amx" or "AMD avx2".
    """
    names = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}
    vendor = cpu_info("vendor_id")
    return " ".join([names.get(vendor, vendor) or platform.machine(), *instruction_sets()[:1]])


def has_bf16_products() -> bool:
    """Does this processor multiply bfloat16, so that torch's products need not convert?"""
    return "avx512_bf16" in instruction_sets()


def cpu_info(field: str) -> str:
    """A field of the first processor in Linux's list; empty where there is none."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


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


def shaped(shape: tuple[int, ...] | list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that has a shape and one element, for `fresh`."""
    return torch.empty((), dtype=dtype, device=device).expand(shape)


def fresh(like: Tensor) -> Tensor:
    """`empty` in the shape of a tensor, in less of the host's time: torch takes 5 us, where it
    takes 7 to 10 us to read a shape, a dtype and a device from Python (EPYC Zen 1, torch 2.13).
    """
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if _poison and out.is_floating_point():
        out.fill_(float("nan"))
    return out


def empty_like(value: Any) -> Any:
    """Memory for a gradient, or for each of a list; None stays None."""
    if isinstance(value, (list, tuple)):
        return [empty_like(v) for v in value]
    return None if value is None else fresh(value)


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


def readable_rows(tensor: Tensor) -> Tensor:
    """The tensor as CUDA kernels read it through its strides: the last one is 1, and rows start at
    16-byte borders. Copied if they do not. Of a dimension of size 1 kernels get the stride 0
    (`row_strides`), so that it may be any number.
    """
    *steps, last = tensor.stride()
    vector = 16 // tensor.element_size()
    if last == 1 and tensor.data_ptr() % 16 == 0:
        for step, size in zip(steps, tensor.shape):
            if step % vector and size > 1:
                break
        else:
            return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def row_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides through which CUDA kernels read a tensor of `readable_rows`. A kernel names the
    address of the row behind the last one without reading it, and that has to be aligned, too: so a
    stride that leads nowhere, which a view may have set to any number, becomes 0.
    """
    strides = tensor.stride()
    if 1 not in tensor.shape:
        return strides
    return tuple(0 if size == 1 else step for step, size in zip(strides, tensor.shape))


def workspace(size: int, device: torch.device) -> Tensor | None:
    """Device memory for a kernel's intermediate results; None where it needs none. Poisoned under
    test, like `empty`.
    """
    return empty(((size + 3) // 4,), torch.float32, device) if size else None


def lent_workspace(size: int) -> Tensor:
    """`workspace` on a CPU, until it is given back: a small one is that of an earlier call, which
    is in the cache still. Calls that run at once have one each; under test it is new and poisoned.
    """
    if size > SMALL_WORKSPACE or _poison:
        return empty(((size + 3) // 4,), torch.float32, _CPU)
    try:
        return _workspaces.pop()
    except IndexError:
        return torch.empty(SMALL_WORKSPACE, dtype=torch.uint8, device=_CPU)


def give_back(lent: Tensor) -> None:
    """Keeps a `lent_workspace` for a later call, if it is a small one."""
    if lent.dtype == torch.uint8:
        _workspaces.append(lent)


def on_lent_memory(
    run: Callable[..., None], written: Iterable[Tensor | None], unwritten: Iterable[Tensor | None]
) -> Callable[..., None]:
    """The function such that the simulator's kernels may touch these tensors while it runs, and no
    other memory: what is ``written`` they may read at once, the rest where they have written it.
    """
    spans: dict[int, tuple[int, int, bool]] = {}
    for is_written, tensors in ((False, unwritten), (True, written)):
        for address, size in map(_span, tensors):
            # A tensor and a view of its beginning are one span.
            size = max(size, spans.get(address, (0, 0))[1])
            spans[address] = (address, size, is_written)
    simulator = library("_C_sim")

    def run_on_lent_memory(*arguments: Any) -> None:
        try:
            simulator.give_memory([span for span in spans.values() if span[1]])
            run(*arguments)
        finally:
            simulator.take_back_memory()

    return run_on_lent_memory


def _span(tensor: Tensor | None) -> tuple[int, int]:
    """The address and the bytes from a tensor's first element to its last."""
    if tensor is None or tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


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
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    ):
        return False
    return bool(instruction_sets())


def fill_dropout(
    out: Tensor, kept_bits: int, threshold: int, seed: int, first_group: int = 0, isa: str = ""
) -> None:
    """Writes ``kept_bits`` where dropout keeps an element of ``out`` [rows, columns], 0 elsewhere.

    The bits do not depend on the number of threads. ``first_group`` is the counter of the first
    four elements; ``isa`` asks for an instruction set, by default the best.
    """
    library("_C").fill_dropout(
        out=out.data_ptr(), rows=out.shape[0], columns=out.shape[1],
        element_bytes=out.element_size(),
        kept_bits=kept_bits, threshold=threshold, seed=seed & 0xFFFFFFFFFFFFFFFF,
        first_group=first_group,
        threads=torch.get_num_threads(), isa=isa,
    )  # fmt: skip

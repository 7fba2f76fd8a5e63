"""What a request has to fit, and what a number depends on: the device, the variables of this
process, versions, and the backends that served it.
"""

from __future__ import annotations

import os
import platform

import torch
import transformers

from .._version import __version__
from ..ops import BACKENDS, explain
from ..ops._dispatch import backend_of
from .errors import UsageError, check_choice

DEVICES = ("auto", "cpu", "cuda")


def computing_device(device: str) -> str:
    """``cpu`` or ``cuda`` for one of `DEVICES`. Raises UsageError."""
    check_choice("device", device, DEVICES)
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UsageError("device: cuda was asked for, but torch sees no GPU here")
    return "cuda" if has_gpu and device != "cpu" else "cpu"


def check_environment() -> None:
    """Raises UsageError where PELT_KERNELS_BACKEND names no backend."""
    requested = os.environ.get("PELT_KERNELS_BACKEND")
    if requested:
        check_choice("PELT_KERNELS_BACKEND", backend_of(requested), tuple(BACKENDS))


def versions() -> dict[str, str]:
    """The versions a number depends on."""
    return {
        "pelt_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def backends_used() -> dict[str, str]:
    """The backends that served each operator since `forget_choices`, as a request names them: with
    the form, on a CPU the instruction set.
    """
    used: dict[str, dict[str, None]] = {}
    for choice in explain():
        used.setdefault(choice.operator, {})[choice.served] = None
    return {operator: ", ".join(names) for operator, names in used.items()}

"""The machine that figures are of."""

from __future__ import annotations

import os
import platform
import re
from typing import Any

import torch

from .ops import _native


def hardware() -> dict[str, Any]:
    """The processor, its kind (figures of one kind may be compared), the instruction sets for which
    there are kernels and that it runs (the newest first; none without the compiled module), the
    number of threads that compute, and the GPU if there is one.
    """
    return {
        "cpu": f"{_processor_name()} x {os.cpu_count()}",
        "kind": _native.processor(),
        "instruction_sets": list(_native.instruction_sets()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor_name() -> str:
    """The processor's name with family and model: many differ in nothing else from each other, as
    cloud machines call theirs "Intel(R) Xeon(R) Processor".
    """
    name = re.sub(r"\((R|TM|r|tm)\)", "", _native.cpu_info("model name"))
    name = " ".join(name.split()) or platform.processor() or platform.machine()
    words = list(_native.instruction_sets()[:1])
    for field in ("cpu family", "model"):
        if value := _native.cpu_info(field):
            words.append(f"{field.split()[-1]} {value}")
    return f"{name} ({', '.join(words)})" if words else name

"""`metrics.json`: what a run reached, at what cost, and on what machine."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from .. import __version__
from ..ops import explain
from .config import TrainConfig
from .metrics import NAMES, summarise
from .tasks import Task

# The widest first, each with the flags by which Linux names what it needs.
INSTRUCTION_SETS = {
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c"},
}


def backends_used() -> dict[str, str]:
    """The backends that served each operator since `forget_choices`."""
    used: dict[str, list[str]] = {}
    for choice in explain():
        names = used.setdefault(choice.operator, [])
        if choice.backend not in names:
            names.append(choice.backend)
    return {operator: ", ".join(names) for operator, names in used.items()}


def peak_memory() -> int:
    """Bytes at the peak: of the GPU's allocator where one is used, else resident in the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seconds_per_step(history: Iterable[dict[str, Any]]) -> float | None:
    """The median over the log entries; None where no step was timed."""
    laps = [entry["seconds_per_step"] for entry in history if entry.get("seconds_per_step")]
    return median(laps) if laps else None


def hardware() -> dict[str, Any]:
    """The processor, its kind, how many threads compute, and the GPU if there is one."""
    return {
        "cpu": f"{_described(_processor())} x {os.cpu_count()}",
        "kind": _kind(_processor()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """The versions a number depends on."""
    return {
        "pelt_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def metrics(
    config: TrainConfig, task: Task, lr: float, tried: dict[str, float], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of `metrics.json`; figures of several seeds are means, spread in `summary`."""
    summary = {name: summarise([run[name] for run in runs]) for name in NAMES}
    timed = [run["seconds_per_step"] for run in runs if run["seconds_per_step"] is not None]
    used: dict[str, str] = {}
    for run in runs:
        used |= run["backends"]
    sizes = {"train": runs[0]["train_examples"], "dev": len(task.dev), "test": len(task.test)}
    return {
        **{name: summary[name]["mean"] for name in NAMES},
        "summary": summary,
        "seconds_per_step": median(timed) if timed else None,
        "trainable_parameters": runs[0]["trainable_parameters"],
        "total_parameters": runs[0]["total_parameters"],
        "backends": used,
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "method": config.method,
        "method_config": config.method_config().to_dict(),
        "model": config.model,
        "learning_rate": lr,
        "learning_rates_tried_on_dev": tried,
        "seeds": runs,
        "task": {
            "name": task.name,
            "labels": list(task.labels),
            "fingerprint": task.fingerprint,
            "examples": sizes,
            "sources": task.sources,
        },
        "hardware": hardware(),
        "versions": versions(),
        "torch": torch.__version__,
        "config": asdict(config),
    }


def instruction_set() -> str:
    """The widest one that this processor has and the kernels could use."""
    return _instruction_set(_processor())


@cache
def _processor() -> dict[str, str]:
    """What the system says of the first processor; empty where it has no such file."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return {}
    lines = info.read_text().partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _instruction_set(processor: dict[str, str]) -> str:
    has = set(processor.get("flags", "").split())
    found = (name for name, needed in INSTRUCTION_SETS.items() if needed <= has)
    return next(found, platform.machine())


def _kind(processor: dict[str, str]) -> str:
    """Maker and widest instruction set: what makes figures of two processors alike."""
    maker = processor.get("vendor_id", "")
    maker = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}.get(maker, maker)
    return f"{maker} {_instruction_set(processor)}".strip()


def _described(processor: dict[str, str]) -> str:
    """A cloud's processors are often all "Intel(R) Xeon(R) Processor": family and model tell them
    apart.
    """
    name = re.sub(r"\((R|TM|r|tm)\)", "", processor.get("model name", ""))
    name = " ".join(name.split()) or platform.processor() or platform.machine()
    words = [_instruction_set(processor)]
    words += [f"{key.split()[-1]} {processor[key]}" for key in ("cpu family", "model")
              if key in processor]  # fmt: skip
    return f"{name} ({', '.join(words)})"

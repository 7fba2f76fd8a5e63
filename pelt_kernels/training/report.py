"""`metrics.json`: the scores of an experiment, their cost, and the machine."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from .._hardware import hardware
from . import processes
from .config import TrainConfig
from .machine import versions
from .metrics import summarise
from .problems import PROBLEMS
from .tasks import Task


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


def metrics(
    config: TrainConfig, task: Task, lr: float, tried: dict[str, float], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of `metrics.json`; figures of several seeds are means, spread in `summary`."""
    names = PROBLEMS[task.problem].metrics
    summary = {name: summarise([run[name] for run in runs]) for name in names}
    timed = [run["seconds_per_step"] for run in runs if run["seconds_per_step"] is not None]
    # A run from before it was counted does not say it; all of one experiment have the same.
    stored = [run["stored_parameters"] for run in runs if "stored_parameters" in run]
    used: dict[str, str] = {}
    for run in runs:
        used |= run["backends"]
    sizes = {"train": runs[0]["train_examples"], "dev": len(task.dev), "test": len(task.test)}
    return {
        **{name: summary[name]["mean"] for name in names},
        "summary": summary,
        "seconds_per_step": median(timed) if timed else None,
        "trainable_parameters": runs[0]["trainable_parameters"],
        "stored_parameters": stored[0] if stored else None,
        "total_parameters": runs[0]["total_parameters"],
        "backends": used,
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "method": config.method,
        "method_config": config.method_for(task.conditions).to_dict(),
        "model": config.model,
        "learning_rate": lr,
        "learning_rates_tried_on_dev": tried,
        "seeds": runs,
        "task": {
            "name": task.name,
            "problem": task.problem,
            "labels": list(task.labels),
            "attributes": {name: list(labels) for name, labels in task.conditions.attributes},
            "tasks": list(task.conditions.tasks),
            "fingerprint": task.fingerprint,
            "examples": sizes,
            "sources": task.sources,
        },
        "hardware": hardware(),
        "processes": processes.count(),
        "versions": versions(),
        "torch": torch.__version__,
        "config": asdict(config),
    }

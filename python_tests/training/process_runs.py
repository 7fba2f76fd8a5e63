"""Experiments that two processes run together, for test_processes.py:

accelerate launch --multi_gpu --num_processes 2 process_runs.py MODEL TRAIN TEST FOLDER
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from pelt_kernels.training import (
    Interrupted,
    TrainConfig,
    UsageError,
    Watchers,
    experiment_run,
    processes,
    train,
)
from pelt_kernels.training.stopping import Stop

# 44 examples in batches of 8: the last one has 4, and an epoch 6 steps.
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lr": (1e-3, 1e-2), "class_weights": "balanced"},
    "unipelt": {"method": "unipelt", "seeds": (0, 1)},
    "adamix": {"method": "adamix", "epochs": 1},
}
STOPPED = "unipelt"  # the run that is also stopped after so many steps, and resumed
STOP_AFTER = 8


def config_of(name: str, model: Path, train_file: Path, test_file: Path) -> TrainConfig:
    """The experiment of a name."""
    common: dict[str, Any] = {
        "epochs": 2,
        "train_examples": 44,
        "batch_size": 8,
        "max_length": 16,
        "device": "cpu",
    }
    files = {"task": str(train_file), "eval": str(test_file), "model": str(model)}
    return TrainConfig(**(common | files | RUNS[name]))


class StopTheOther(Stop):
    """Only the second process gets a signal."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if processes.index() == 1 and state.global_step == STOP_AFTER and self.number is None:
            self.request(signal.SIGTERM)
        super().on_step_end(args, state, control, **more)


def main() -> None:
    model, train_file, test_file, folder = map(Path, sys.argv[1:])
    experiment_run.LEAST_STEPS_BETWEEN_EVALUATIONS = 1
    seen: dict[str, Any] = {}

    def config(name: str) -> TrainConfig:
        return config_of(name, model, train_file, test_file)

    for name in RUNS:
        seen[name] = train(config(name), folder / name)
    said: list[str] = []
    try:
        watchers = Watchers(say=said.append, stop=StopTheOther())
        train(config(STOPPED), folder / "stopped", watchers=watchers)
    except Interrupted as stopped:
        seen["interrupted"] = stopped.number
    seen["resumed"] = train(config(STOPPED), folder / "stopped", resume=True)
    seen["said"] = said
    odd = TrainConfig(**{**vars(config("lora")), "batch_size": 9})
    try:
        train(odd, folder / "odd")
    except UsageError as error:
        seen["refused"] = str(error)
    (folder / f"seen-{processes.index()}.json").write_text(json.dumps(seen))
    processes.leave()


if __name__ == "__main__":
    main()

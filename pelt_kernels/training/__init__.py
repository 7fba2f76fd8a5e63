"""Training on tasks, and using what it wrote, on top of transformers.Trainer.

One experiment (`experiment`) is one config: it chooses a learning rate, does a run for each seed
and writes `metrics.json` (`report`). One run (`experiment_run`) is one learning rate and one seed;
its training loop with checkpoints is `run_trainer`. What is learned, classes, scores or sets of
labels, is a problem (`problems`). Afterwards `predictor` answers texts with the adapter, and
`adapter_export` writes it as a plain model.

Names below load on first use: a command that only answers, or refuses, loads no Trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import on_first_use

if TYPE_CHECKING:
    from .adapter_export import Exported, export
    from .config import TrainConfig
    from .errors import Interrupted, RunError, UsageError
    from .experiment import is_run, train
    from .experiment_run import Watchers
    from .predictor import Predictor
    from .problems import LabelSet, Prediction, Score
    from .stopping import Stop, stoppable
    from .tasks import Example, Task, load_task

__all__ = [
    "Example",
    "Exported",
    "Interrupted",
    "LabelSet",
    "Prediction",
    "Predictor",
    "RunError",
    "Score",
    "Stop",
    "Task",
    "TrainConfig",
    "UsageError",
    "Watchers",
    "export",
    "is_run",
    "load_task",
    "stoppable",
    "train",
]

_MODULES = (
    "errors", "config", "tasks", "problems", "predictor", "adapter_export", "stopping",
    "experiment_run", "experiment",
)  # fmt: skip
__getattr__, __dir__ = on_first_use(globals(), _MODULES)

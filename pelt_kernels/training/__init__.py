"""Tasks, runs and what they leave behind, on top of transformers.Trainer."""

from .config import TrainConfig
from .errors import Interrupted, RunError, UsageError
from .experiment import is_run, train
from .exporting import Exported, export
from .predictor import Prediction, Predictor
from .run import Watchers
from .stopping import Stop, stoppable
from .tasks import Example, Task, load_task

__all__ = [
    "Example",
    "Exported",
    "Interrupted",
    "Prediction",
    "Predictor",
    "RunError",
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

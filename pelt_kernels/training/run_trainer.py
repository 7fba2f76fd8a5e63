"""The training loop of a run: transformers.Trainer with checkpoints of the trained parameters only,
gate telemetry and a clock."""

from __future__ import annotations

import math
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..methods import parts_of
from ..models import PeltModel
from ..models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, files_in
from ..models.callbacks import LastStep
from . import processes
from .encode import Encoded, LengthGroups, Shares
from .errors import DivergedError, RunError, reason
from .metrics import ANSWERS
from .records import mismatch, read_record
from .stopping import IS_PRUNING, best_evaluation
from .storage import replacing
from .texts import NO_LOSS

STATE_FILE = "trainer_state.json"
BESIDE = ("optimizer.pt", "scheduler.pt", STATE_FILE)
RANDOM_STATE_FILE = "rng_state.pth"  # of several processes rng_state_<number>.pth
FILES = (CONFIG_FILE, WEIGHTS_FILE, *BESIDE, RANDOM_STATE_FILE)
# What json, safetensors, torch and zip raise for a truncated or foreign file.
_UNREADABLE = (
    ValueError,
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    EOFError,
    pickle.UnpicklingError,
)


# Types in an entry of a run's history; every other value is a number.
_ENTRY: dict[str, Any] = {
    "step": int,
    "gates": dict[str, float],
    IS_PRUNING: bool,
    "seconds_per_step": float | None,
}
GATE = re.compile("[0-9]{1,6}[.].+")
_STATE: dict[str, Any] = {
    "global_step": int,
    "max_steps": int,
    "num_train_epochs": int,
    "epoch": float | None,
    "best_metric": float | None,
    "best_global_step": int | None,
    "log_history": list[dict[str, Any]],
}


class StepClock(TrainerCallback):
    """Wall time per step, from one log entry to the next, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.start: float | None = None
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.start is None:
            self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._restart()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._restart()

    def lap(self) -> float | None:
        """Seconds per step since the last lap; None where no step was timed."""
        start, steps = self.start, self.steps
        self._restart()
        return (time.perf_counter() - start) / steps if start is not None and steps else None


class PeltTrainer(Trainer):
    """Trains a `PeltModel`; plots and `metrics.json` are made from its history.

    Each log entry of a training step also holds ``gates`` (the mean over the last batch, by
    ``<layer>.<kind>``) and ``seconds_per_step``. A checkpoint appears whole or not at all; the best
    on dev and the latest are kept. Several processes share each batch and take the steps that one
    would take.

    Raises RunError for a loss that is not a number, a checkpoint that cannot be written, and one
    that cannot be read.
    """

    def __init__(
        self,
        model: PeltModel,
        arguments: TrainingArguments,
        train: Encoded,
        dev: Encoded,
        *,
        order_seed: int,
        class_weights: Sequence[float] | None = None,
        score_texts: Callable[[], dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, arguments, train_dataset=train, eval_dataset=dev, **kwargs)
        self.pelt = model
        self._train = train
        batch_size = self.args.train_batch_size * processes.count()
        self._order = LengthGroups(train.lengths, batch_size, order_seed)
        self.remove_callback(PrinterCallback)
        # A loss over classes takes no number of items, though BERT's forward accepts anything.
        self.model_accepts_loss_kwargs = False
        self._class_weights = None if class_weights is None else torch.tensor(class_weights)
        self._score_texts = score_texts
        self._clock = StepClock()
        self.add_callback(self._clock)
        self.add_callback(LastStep())
        for callback in model.callbacks():
            self.add_callback(callback)
        model.record_gates(True)

    @property
    def metric(self) -> str:
        """The score that orders evaluations: one of the problem's metrics."""
        return str(self.args.metric_for_best_model)

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return Path(self.args.output_dir or ".")

    def load_best(self) -> None:
        """Gives the model the weights that were best on dev."""
        checkpoint = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        with _reading(checkpoint):
            self.pelt.load_adapter(checkpoint)
        self.pelt.set_progress(1.0)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = best_evaluation(self.state.log_history, self.metric)
        if best is None or best["step"] != self.state.global_step:
            return False
        self.state.best_metric = best[f"eval_{self.metric}"]
        self.state.best_global_step = best["step"]
        return True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own loss. With class weights ``sum(w_i l_i) / sum(w_i)``, w_i the weight of
        the example's class, replaces its cross-entropy ``mean(l_i)``; other terms of the model's
        loss (AdaMix's consistency) stay. Several processes' losses have the loss of the whole batch
        as their mean.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        labels = inputs["labels"]
        is_shared = model.training and processes.count() > 1
        share: Any = 1
        if is_shared:
            share = self._share(labels.ne(NO_LOSS).sum())
            loss = loss * share
        if self._class_weights is not None:
            logits = outputs["logits"].float()
            weights = self._class_weights.to(logits.device)
            plain, weighted = cross_entropy(logits, labels), cross_entropy(logits, labels, weights)
            weighted_share = self._share(weights[labels].sum()) if is_shared else 1
            loss = loss + (weighted * weighted_share - plain * share)
        return (loss, outputs) if return_outputs else loss

    def _share(self, items: torch.Tensor) -> torch.Tensor:
        """What part of a batch's items this process has, times the number of processes: of their
        gradients torch takes the plain mean.
        """
        return items * processes.count() / self.accelerator.reduce(items, "sum")

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Without the rows by which accelerate makes the processes' last batches equally long: they
        are in no loss, and what stands for their answers is dropped again.
        """
        rows, loader = len(inputs["input_ids"]), self.accelerator.gradient_state
        if not (loader.end_of_dataloader and loader.remainder > 0):
            return super().prediction_step(model, inputs, *args, **kwargs)
        own = min(max(loader.remainder - processes.index() * rows, 1), rows)
        inputs = recursively_apply(lambda tensor: tensor[:own], inputs)
        loss, *answers = super().prediction_step(model, inputs, *args, **kwargs)
        filled = torch.arange(rows).clamp(max=own - 1)
        return loss, *recursively_apply(lambda tensor: tensor[filled], answers)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss and the scores of answers, or of texts that the model writes."""
        output: Any = super().evaluation_loop(*args, **kwargs)
        if self._score_texts is not None:
            scores = {f"eval_{name}": value for name, value in self._score_texts().items()}
            output.metrics.update(scores)
        output.metrics.update(processes.of_main(lambda: output.metrics))  # equal to the last bit
        return output

    def _is_pruning(self) -> bool:
        pruning, state = parts_of(self.pelt.method_config).pruning, self.state
        if pruning is None or not state.max_steps:
            return False
        return pruning.sparsity_at(state.global_step / state.max_steps) < pruning.sparsity

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        more: dict[str, Any] = {}
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise DivergedError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; a smaller --lr "
                    "may help"
                )
            more = {"gates": self._mean_gates(), "seconds_per_step": self._clock.lap()}
        if f"eval_{self.metric}" in logs and self._is_pruning():
            more = {IS_PRUNING: True}
        # Trackers take numbers, each by a name of its own.
        gates = {f"gates/{name}": mean for name, mean in more.get("gates", {}).items()}
        numbers = {name: value for name, value in more.items() if isinstance(value, float)}
        super().log(logs | gates | numbers, start_time)
        entry = self.state.log_history[-1]
        kept = {name: value for name, value in entry.items() if name not in gates}
        self.state.log_history[-1] = kept | more

    def _mean_gates(self) -> dict[str, float]:
        gates = self.pelt.gate_values()
        if not gates:
            return {}
        # One copy from the device for all of them.
        means = torch.stack([value.float().mean() for value in gates.values()])
        means = self.accelerator.reduce(means, "mean").tolist()
        return {f"{layer}.{kind}": mean for (layer, kind), mean in zip(gates, means, strict=True)}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The process's share of each batch. accelerate's own shares are equal: it fills the last
        batch up with rows of the first one, which then count twice.
        """
        batches = Shares(self._order, self._order.batch_size, processes.index(), processes.count())
        loader: Any = DataLoader(
            self._train,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, put_on_device=True
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        random_states = processes.gathered(self._random_state())
        processes.of_main(lambda: self._write_checkpoint(random_states))

    def _random_state(self) -> tuple[str, bytes]:
        """The file with this process's random state: its name, as the Trainer's, and content."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            (path,) = Path(folder).iterdir()
            return path.name, path.read_bytes()

    def _write_checkpoint(self, random_states: Sequence[tuple[str, bytes]]) -> None:
        checkpoint = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with replacing(checkpoint) as partial:
                partial.mkdir()
                self.pelt.save_pretrained(partial)
                self._save_optimizer_and_scheduler(str(partial))
                self._save_scaler(str(partial))
                for name, content in random_states:
                    (partial / name).write_bytes(content)
                self.state.save_to_json(str(partial / STATE_FILE))
        # torch.save reports a failed write as RuntimeError, which RunError is too; weights that are
        # not finite are a ValueError.
        except (RuntimeError, ValueError) as error:
            kind = DivergedError if isinstance(error, ValueError) else RunError
            raise kind(
                f"checkpoint {checkpoint} cannot be written ({reason(error)}); earlier checkpoints "
                "are intact"
            ) from error
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        for old in checkpoints(self.folder):
            if old.name not in (checkpoint.name, best):
                shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _reading(Path(resume_from_checkpoint)):
            self.pelt.load_adapter(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _reading(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _reading(Path(checkpoint)):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _reading(Path(checkpoint)):
                super()._load_rng_state(checkpoint)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    folders = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step_of(path)]
    return sorted(folders, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    """0 for a name that no checkpoint has."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if re.fullmatch("[1-9][0-9]{,15}", number) else 0


def read_state(checkpoint: Path, metrics: Sequence[str]) -> TrainerState:
    """The trainer's state in a checkpoint, all of whose files are there, of a run that evaluates
    these metrics. Raises RunError.
    """
    with _reading(checkpoint):
        expected = (*files_in(checkpoint), *(checkpoint / name for name in BESIDE))
        missing = [path.name for path in expected if not path.is_file()]
        missing += [] if processes_of(checkpoint) else [RANDOM_STATE_FILE]
        if missing:
            raise FileNotFoundError(f"{', '.join(missing)} missing")
        path = checkpoint / STATE_FILE
        check_history(path, read_record(path, _STATE, "state")["log_history"], metrics)
        return TrainerState.load_from_json(str(path))


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote it."""
    return sum(1 for _ in checkpoint.glob("rng_state*.pth"))


def check_history(path: Path, history: list[dict[str, Any]], metrics: Sequence[str]) -> None:
    """Raises RunError where an entry of a run's history, read from `path`, holds another type, or
    an evaluation lacks one of the metrics.
    """
    evaluation = [f"eval_{name}" for name in (*metrics, "loss", ANSWERS)]
    for index, entry in enumerate(history):
        wrong = [
            mismatch(value, _ENTRY.get(key, float), f"history.{index}.{key}")
            for key, value in entry.items()
        ]
        is_evaluation = any(key.startswith("eval_") for key in entry)
        expected = ("step", *evaluation) if is_evaluation else ("step",)
        wrong += [f"history.{index}.{key} is missing" for key in expected if key not in entry]
        if not any(wrong) and not all(map(GATE.fullmatch, entry.get("gates", {}))):
            wrong.append(f"expected gates as <layer>.<kind> in history.{index}")
        if any(wrong):
            raise RunError(f"{path} is damaged ({next(filter(None, wrong))})")


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:  # RunError of a record among them
        raise _damaged(checkpoint, error) from error


def _damaged(checkpoint: Path, error: Exception) -> RunError:
    return RunError(
        f"checkpoint {checkpoint} cannot be read ({reason(error)}); remove that folder to go on "
        "from an earlier one or from the start"
    )

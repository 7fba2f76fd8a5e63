"""One run of an experiment: one learning rate, one seed, one folder, one trained model."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy

from ..models import PeltModel, get_pelt_model
from ..ops import forget_choices
from . import processes
from .config import TrainConfig
from .encode import Encoded, Form
from .errors import Interrupted, RunError, UsageError
from .machine import backends_used
from .metrics import balanced_weights
from .predictor import Card
from .problems import PROBLEMS, Generation, HeadProblem, Problem
from .records import read_record
from .report import peak_memory, seconds_per_step
from .run_trainer import PeltTrainer, check_history, checkpoints, processes_of, read_state
from .stopping import (
    EarlyStopping,
    Stop,
    best_evaluation,
    evaluations_without_gain,
    is_constant,
)
from .storage import clear_partial, replacing, require_writable, write_json
from .tasks import CLASSIFICATION, Task
from .texts import TextWriter

RESULT_FILE = "result.json"
# The keys that it must hold, with their types, beside ``dev_<metric>`` for each of the problem's.
# Files from before STORED was counted have none.
STORED = "stored_parameters"
RESULT: dict[str, Any] = {
    "seed": int,
    "learning_rate": float,
    "dev_loss": float,
    "best_step": int,
    "steps": int,
    "seconds_per_step": float | None,
    "trainable_parameters": int,
    STORED: int,
    "total_parameters": int,
    "train_examples": int,
    "backends": dict[str, str],
    "peak_memory_bytes": int,
    "notes": list[str],
    "history": list[dict[str, Any]],
}
LOG_ENTRIES = 100  # of the training loss in a whole run
# An evaluation on 500 examples costs as much as ten to twenty steps; in small training sets an
# epoch is shorter than that.
LEAST_STEPS_BETWEEN_EVALUATIONS = 25


@dataclass
class Watchers:
    """Where a run sends sentences and progress, and the means to stop it."""

    say: Callable[[str], None] = lambda sentence: None
    progress: Callable[[str], Sequence[TrainerCallback]] = lambda title: ()
    stop: Stop = field(default_factory=Stop)
    _said: set[str] = field(default_factory=set)

    def say_once(self, topic: str, sentence: str) -> None:
        """Says a sentence, the first time for each topic only."""
        if topic not in self._said:
            self._said.add(topic)
            self.say(sentence)


@dataclass(frozen=True)
class Run:
    """A learning rate and a seed of an experiment, and the folder of their run."""

    config: TrainConfig
    task: Task
    tokenizer: Any
    output: Path
    lr: float
    seed: int

    @property
    def problem(self) -> Problem:
        return PROBLEMS[self.task.problem]

    @property
    def metric(self) -> str:
        """What decides on dev."""
        assert self.config.metric is not None  # set by the experiment
        return self.config.metric

    @property
    def title(self) -> str:
        return f"{self.config.method}, lr {rate_name(self.lr)}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.output / f"lr-{rate_name(self.lr)}-seed-{self.seed}"

    @property
    def max_length(self) -> int:
        assert self.config.max_length is not None  # set by the experiment
        return self.config.max_length

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def result(self, watchers: Watchers) -> dict[str, Any]:
        """What the run reached: read if it is finished, else trained."""
        finished = processes.of_main(self._read_result)
        return self._trained(watchers) if finished is None else finished

    def _read_result(self) -> dict[str, Any] | None:
        """None: the run is not finished."""
        path = self.folder / RESULT_FILE
        if not path.is_file():
            return None
        try:
            metrics = self.problem.metrics
            types = RESULT | {f"dev_{name}": float for name in metrics}
            result = read_record(path, types, "resume", optional=(STORED,))
            check_history(path, result["history"], metrics)
            if (result["seed"], result["learning_rate"]) != (self.seed, self.lr):
                raise RunError(f"resume: {path} is of another run")
            return result
        except RunError as error:
            raise RunError(f"{error}; remove {self.folder} to train again") from error

    def _trained(self, watchers: Watchers) -> dict[str, Any]:
        forget_choices()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        set_seed(self.seed)
        model = self._model()
        trainable, _ = model.get_nb_trainable_parameters()
        processes.of_main(lambda: self._make_folder(trainable))
        examples = self.task.draw_train(self.config.train_examples, self.seed)
        form = self._form(is_causal=not model.config.is_encoder_decoder)
        train = self.problem.encoded(examples, form)
        dev = self.problem.encoded(self.task.dev, form)
        dev.rows.sort(key=lambda row: len(row["input_ids"]))
        self._note_truncated(watchers, train, dev)
        trainer = self._trainer(model, form, train, dev, watchers)
        try:
            self._fit(trainer, watchers)
        except Interrupted as stopped:
            raise Interrupted(stopped.number, self._how_to_continue(stopped)) from stopped
        peak = processes.largest(peak_memory())
        return processes.of_main(lambda: self._kept(trainer, peak))

    def _make_folder(self, trainable: int) -> None:
        # In float32: weights and two Adam moments for two checkpoints and for a third while it is
        # written, and the weights of the adapter.
        require_writable(self.folder, needed_bytes=trainable * 4 * (3 * 3 + 1) + 2**24)
        clear_partial(self.folder)

    def _kept(self, trainer: PeltTrainer, peak_memory_bytes: int) -> dict[str, Any]:
        """Writes the best weights and the result, which it returns."""
        trainer.load_best()
        with replacing(self.adapter) as partial:
            partial.mkdir()
            trainer.pelt.save_pretrained(partial)
            self._card().save(partial)
        history = trainer.state.log_history
        best = best_evaluation(history, self.metric)
        assert best is not None  # the last step was evaluated
        trainable, total = trainer.pelt.get_nb_trainable_parameters()
        result = {
            "seed": self.seed,
            "learning_rate": self.lr,
            **{f"dev_{name}": best[f"eval_{name}"] for name in (*self.problem.metrics, "loss")},
            "best_step": trainer.state.best_global_step,
            "steps": trainer.state.global_step,
            "seconds_per_step": seconds_per_step(history),
            "trainable_parameters": trainable,
            STORED: trainer.pelt.get_nb_stored_parameters(),
            "total_parameters": total,
            "train_examples": self.config.train_examples or len(self.task.train),
            "backends": backends_used(),
            "peak_memory_bytes": peak_memory_bytes,
            "notes": [self._constant_answer(len(self.task.dev))] if is_constant(best) else [],
            "history": history,
        }
        write_json(self.folder / RESULT_FILE, result)
        for checkpoint in checkpoints(self.folder):
            shutil.rmtree(checkpoint)  # no longer needed: the adapter is saved
        return result

    def _model(self) -> PeltModel:
        base = self.problem.load(self.config.model, self.task.labels)
        if self.config.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            return get_pelt_model(base, self.config.method_for(self.task.conditions))
        except ValueError as error:
            raise UsageError(f"method {self.config.method}: {error}") from error

    def _card(self) -> Card:
        folder = Path(self.config.model)
        model = str(folder.resolve()) if folder.is_dir() else self.config.model
        task, columns = self.task, self.config.columns
        return Card(
            task.name,
            model,
            task.labels,
            task.has_pairs,
            self.max_length,
            task.problem,
            task.label_separator,
            dict(task.conditions.attributes),
            dict(columns.attributes),
            task.conditions.tasks,
            columns.task,
            self.config.max_target_length or 0,
            self.config.beams,
        )

    def _form(self, is_causal: bool) -> Form:
        return self._card().form(self.tokenizer, self.max_length, is_causal)

    def _trainer(
        self, model: PeltModel, form: Form, train: Encoded, dev: Encoded, watchers: Watchers
    ) -> PeltTrainer:
        assert self.config.batch_size is not None and self.config.epochs is not None
        step = self.config.batch_size * self.config.gradient_accumulation
        weights = None
        if self.config.class_weights == "balanced":
            numbers = [row["labels"] for row in train.rows]
            weights = balanced_weights(numbers, len(self.task.labels))
        problem = self.problem
        score_texts = None
        if isinstance(problem, Generation):
            writer = TextWriter(model, form, self.config.beams, form.max_target_length)
            score_texts = partial(problem.dev_scores, writer, self.task.dev)
        return PeltTrainer(
            model,
            self._arguments(math.ceil(len(train) / step)),
            train,
            dev,
            data_collator=problem.collator(form),
            compute_metrics=problem.score_logits if isinstance(problem, HeadProblem) else None,
            score_texts=score_texts,
            callbacks=[
                *watchers.progress(self.title),
                EarlyStopping(self.metric, self.config.patience),
                watchers.stop,
            ],
            order_seed=self.seed,
            class_weights=weights,
        )

    def _arguments(self, steps_per_epoch: int) -> TrainingArguments:
        config = self.config
        assert config.batch_size is not None and config.epochs is not None
        eval_every = config.eval_every
        if steps_per_epoch < LEAST_STEPS_BETWEEN_EVALUATIONS:
            eval_every = eval_every or LEAST_STEPS_BETWEEN_EVALUATIONS
        strategy = IntervalStrategy.STEPS if eval_every else IntervalStrategy.EPOCH
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            seed=self.seed,
            learning_rate=self.lr,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size // processes.count(),
            per_device_eval_batch_size=max(32, config.batch_size),
            gradient_accumulation_steps=config.gradient_accumulation,
            torch_compile=config.compile,
            warmup_steps=config.warmup,
            weight_decay=config.weight_decay,
            eval_strategy=strategy,
            eval_steps=eval_every or None,
            save_strategy=strategy,
            save_steps=eval_every or 500,
            metric_for_best_model=self.metric,
            greater_is_better=True,
            logging_steps=max(1, steps_per_epoch * config.epochs // LOG_ENTRIES),
            logging_nan_inf_filter=False,
            bf16=config.precision == "bf16",
            fp16=config.precision == "fp16",
            use_cpu=config.device == "cpu",
            label_names=["labels"],
            remove_unused_columns=False,
            dataloader_pin_memory=config.device != "cpu" and torch.cuda.is_available(),
            report_to=list(config.report_to) or "none",
            run_name=self.title,
            disable_tqdm=True,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # DataParallel would copy the model and lose the gates' telemetry
        return arguments

    def _fit(self, trainer: PeltTrainer, watchers: Watchers) -> None:
        if processes.index() > 0:
            # Other draws than the main process, which has those of a run of one.
            set_seed(random.Random(f"process {processes.index()} of {self.seed}").getrandbits(32))
        found = processes.of_main(self._latest)
        if found is None:
            trainer.train()
            return
        checkpoint, state, writers = found
        watchers.say(f"{self.title}: going on from {checkpoint}")
        if writers != processes.count():
            watchers.say(
                f"{self.title}: {checkpoint.name} was written in {writers} processes, and here are "
                f"{processes.count()}: dropout and other draws differ from those of a run without "
                "a break"
            )
        without_gain = evaluations_without_gain(state.log_history, self.metric)
        is_stopped = without_gain >= self.config.patience
        if state.global_step >= state.max_steps or is_stopped:
            trainer.state = state
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint))

    def _latest(self) -> tuple[Path, TrainerState, int] | None:
        """The last checkpoint, its state, and how many processes wrote it."""
        saved = checkpoints(self.folder)
        if not saved:
            return None
        return saved[-1], read_state(saved[-1], self.problem.metrics), processes_of(saved[-1])

    def _constant_answer(self, examples: int) -> str:
        in_use = (self.metric, self.config.class_weights)
        remedies = {"matthews": "--metric matthews", "balanced": "--class-weights balanced"}
        if self.task.problem != CLASSIFICATION:
            remedies = {}
        untried = [option for value, option in remedies.items() if value not in in_use]
        return (
            f"{self.title}: the model that is kept, the best on dev by {self.metric}, gives "
            f"all {examples} dev examples the same answer; "
            f"{', '.join([*untried, 'more --epochs'])} or another --lr may help"
        )

    def _note_truncated(self, watchers: Watchers, *parts: Encoded) -> None:
        cut = sum(part.truncated for part in parts)
        if cut:
            watchers.say_once(
                "length",
                f"{cut} of {sum(map(len, parts))} texts are longer than {self.max_length} tokens "
                "and were cut (--max-length)",
            )

        cut = sum(part.cut_targets for part in parts)
        if cut:
            watchers.say_once(
                "target length",
                f"{cut} of {sum(map(len, parts))} targets are longer than "
                f"{self.config.max_target_length} tokens and were cut (--max-target-length)",
            )

    def _how_to_continue(self, stopped: Interrupted) -> str:
        saved = checkpoints(self.folder)
        if not saved:
            return f"{stopped} before the first checkpoint"
        return f"{stopped}; {saved[-1]} is kept, continue with --resume --output {self.output}"


def rate_name(lr: float) -> str:
    """A learning rate as people write it; different rates have different names."""
    short = f"{lr:g}"
    return short if float(short) == lr else repr(lr)

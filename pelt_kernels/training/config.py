"""The options of an experiment, as they are written to and read from `run.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from ..methods import MethodConfig, config_from_options
from ..ops import BACKENDS
from .base_model import EMBEDDED
from .conditioned import conditioned
from .errors import UsageError, check_choice, reason
from .machine import DEVICES
from .problems import PROBLEMS
from .recipes import recipe
from .records import read_record
from .storage import write_json
from .tasks import CLASSIFICATION, GENERATION, NO_CONDITIONS, SEPARATOR, Columns, Conditions
from .text_metrics import load_scorers

FILE = "run.json"
PRECISIONS = ("fp32", "bf16", "fp16")
CLASS_WEIGHTS = ("none", "balanced")
# numpy's generator takes no larger seed; the other is far above any count of a run.
LARGEST_SEED, LARGEST_COUNT = 2**32 - 1, 2**31 - 1


@dataclass(frozen=True)
class TrainConfig:
    """One experiment: a task, a method on a model, and how to train.

    Attributes:
        task: ``docstring-match``, a CSV, TSV, JSONL or Parquet file, or the name of a data set such
            as ``glue/sst2``.
        eval: a file with the test part; None takes the task's own or holds one out.
        model: a hub id, a folder, or the embedded default.
        method: a name out of `recipes.RECIPES`.
        options: fields of the method's config as text, such as ``r=4`` or ``adapter.bottleneck=16``
            for a part's.
        method_config: fields of it as values, a part's as a dictionary of its own, as in
            `MethodConfig.to_dict`; `options` hold where both name a field.
        train_examples: how many training examples each seed draws; None takes all.
        seeds: one run for each; the result is their mean and standard deviation.
        lr: learning rates; of several, the best on dev with the first seed serves all seeds. Empty:
            the recipe's.
        epochs: None takes the recipe's for the number of training examples.
        batch_size: examples of one backward pass; None takes the recipe's.
        gradient_accumulation: backward passes of one step.
        max_length: tokens after which a text is cut; None takes 128, or what the model reads.
        problem: what the labels are, one of `problems.PROBLEMS`; None finds out, and asks where
            they may be either.
        label_separator: what stands between the labels of a row, in CSV and TSV.
        metric: what decides on dev: the best weights, when to stop, the learning rate; one of the
            problem's metrics, None its first. Between equal values the lower loss decides.
        class_weights: ``balanced`` weighs each class's examples by ``n / (C n_c)`` in the loss, n_c
            of the n training examples having one of the C classes; ``none`` leaves the model's loss
            as it is.
        patience: evaluations on dev without a gain after which training stops.
        eval_every: steps between evaluations and checkpoints; 0 means once an epoch, or every 25
            where an epoch is shorter.
        warmup: share of the steps in which the learning rate rises; it then falls linearly to 0.
        source_column, target_column: what is read and what is written; naming one makes the problem
            ``generation``.
        attribute_columns: columns with the labels of attributes, as ``name=column`` or their name
            alone.
        task_column: the column with the names of tasks.
        more_tasks, more_evals: further files, each a task of its own, and their test files.
        max_target_length: tokens of a target with its end; None takes the longest, which the model
            has to be able to write; longer ones are cut to a number.
        beams: with which texts are written on dev and test.
        no_header: the files have no line of names; columns are called 1, 2, 3 and so on.
        backend: the backend every operator must use; None chooses by itself.
        gradient_checkpointing: activations are computed again in the backward pass, not kept.
        compile: the training steps run under `torch.compile`.
        report_to: trackers by transformers' names, such as ``tensorboard``; they get every log
            entry.
    """

    task: str = "docstring-match"
    eval: str | None = None
    model: str = EMBEDDED
    method: str = "unipelt"
    options: tuple[str, ...] = ()
    method_config: dict[str, Any] | None = None
    train_examples: int | None = None
    seeds: tuple[int, ...] = (0,)
    lr: tuple[float, ...] = ()
    epochs: int | None = None
    batch_size: int | None = None
    gradient_accumulation: int = 1
    max_length: int | None = None
    problem: str | None = None
    label_separator: str = SEPARATOR
    metric: str | None = None
    class_weights: str = "none"
    patience: int = 3
    eval_every: int = 0
    warmup: float = 0.06
    weight_decay: float = 0.0
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    attribute_columns: tuple[str, ...] = ()
    task_column: str | None = None
    more_tasks: tuple[str, ...] = ()
    more_evals: tuple[str, ...] = ()
    max_target_length: int | None = None
    beams: int = 1
    no_header: bool = False
    backend: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    report_to: tuple[str, ...] = ()

    @property
    def columns(self) -> Columns:
        is_generation = self.source_column is not None or self.target_column is not None
        pairs = (text.partition("=") for text in self.attribute_columns)
        return Columns(
            self.source_column or self.text_column,
            self.pair_column,
            self.target_column or self.label_column,
            not self.no_header,
            GENERATION if is_generation else self.problem,
            tuple((name, column or name) for name, _, column in pairs),
            self.task_column,
        )

    @property
    def more(self) -> tuple[tuple[str, str | None], ...]:
        """The further files with their test files."""
        evals = self.more_evals or (None,) * len(self.more_tasks)
        return tuple(zip(self.more_tasks, evals, strict=True))

    def method_for(self, conditions: Conditions = NO_CONDITIONS) -> MethodConfig:
        """The method with the options in it, for a task's attributes and tasks. Raises
        UsageError.
        """
        return conditioned(self._plain_method_config(), conditions)

    def _plain_method_config(self) -> MethodConfig:
        values: dict[str, Any] = {}
        for option in self.options:
            field, equals, text = option.partition("=")
            if not field.strip() or not equals:
                raise UsageError(f"set: expected field=value such as r=8, got '{option}'")
            if field.strip() in values:
                raise UsageError(f"set: {field.strip()} is given twice")
            values[field.strip()] = text.strip()
        try:
            return config_from_options(self.method, {**(self.method_config or {}), **values})
        except ValueError as error:
            given = {"set": values, "method_config": self.method_config}
            who = next((name for name, value in given.items() if value), f"method {self.method}")
            is_empty = self.method == "composite" and not any(given.values())
            example = ", such as --set lora.r=8" if is_empty else ""
            raise UsageError(f"{who}: {reason(error)}{example}") from error

    def resolved(self) -> TrainConfig:
        """The config with the recipe's values for what is not set, checked. Raises UsageError."""
        defaults = recipe(self.method)
        config = replace(
            self,
            lr=tuple(self.lr) or (defaults.lr,),
            batch_size=defaults.batch_size if self.batch_size is None else self.batch_size,
            seeds=tuple(self.seeds),
            options=tuple(self.options),
        )
        config.method_for()
        config._check()
        return config

    def _check(self) -> None:
        counts = ("epochs", "batch_size", "max_length", "patience", "train_examples", "beams")
        for name in (*counts, "max_target_length", "gradient_accumulation"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST_COUNT:
                most = f"at most {LARGEST_COUNT}" if value > 1 else "at least 1"
                raise UsageError(f"{_option(name)}: expected {most}, got {_shown(value)}")
        is_different = self.seeds and len(set(self.seeds)) == len(self.seeds)
        if not is_different or not 0 <= min(self.seeds) <= max(self.seeds) <= LARGEST_SEED:
            raise UsageError(
                f"seeds: expected different numbers from 0 to {LARGEST_SEED}, got "
                f"{_shown(self.seeds)}"
            )
        if not all(0 < lr < float("inf") for lr in self.lr) or len(set(self.lr)) < len(self.lr):
            raise UsageError(f"lr: expected different positive numbers, got {list(self.lr)}")
        if not 0 <= self.eval_every <= LARGEST_COUNT:
            raise UsageError(
                "eval-every: expected 0 (once an epoch) or a number of steps up to "
                f"{LARGEST_COUNT}, got {_shown(self.eval_every)}"
            )
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup: expected a share in [0, 1), got {self.warmup}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"weight-decay: expected 0 or more, got {self.weight_decay}")
        if not self.label_separator.strip():
            raise UsageError(
                f"label-separator: expected a mark such as ',', got {self.label_separator!r}"
            )
        self._check_columns()
        for name, known in (
            ("problem", tuple(PROBLEMS)),
            ("metric", _metrics(self.problem)),
            ("class_weights", CLASS_WEIGHTS),
            ("backend", tuple(BACKENDS)),
            ("device", DEVICES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) is not None:
                check_choice(_option(name), getattr(self, name), known)

    def _check_columns(self) -> None:
        """Raises UsageError for columns and files that do not go together."""
        names = [text.partition("=")[0] for text in self.attribute_columns]
        if not all(names) or len(set(names)) < len(names):
            raise UsageError(
                "attribute-column: expected different names such as source or source=column, got "
                f"{_shown(self.attribute_columns)}"
            )
        is_named = self.source_column is not None or self.target_column is not None
        if is_named and self.problem not in (None, GENERATION):
            raise UsageError(
                f"problem: expected {GENERATION} with a source or a target column, got "
                f"'{self.problem}'"
            )
        if self.more_evals and len(self.more_evals) != len(self.more_tasks):
            raise UsageError(
                "eval: expected a test file for each --task, in their order, or none, got "
                f"{1 + len(self.more_evals)} for {1 + len(self.more_tasks)}"
            )


def _metrics(problem: str | None) -> tuple[str, ...]:
    """Those of a problem, or of all where it is not known or there is none of this name."""
    known = [PROBLEMS[problem]] if problem in PROBLEMS else PROBLEMS.values()
    return tuple(dict.fromkeys(name for each in known for name in each.metrics))


def for_problem(config: TrainConfig, problem: str) -> TrainConfig:
    """The config for a problem that the data has shown. Raises UsageError for options that do not
    go with it.
    """
    if config.class_weights != "none" and problem != CLASSIFICATION:
        raise UsageError(
            f"class-weights: expected none for a {problem}, got '{config.class_weights}'"
        )
    if problem == GENERATION:
        load_scorers()
    metrics = PROBLEMS[problem].metrics
    metric = metrics[0] if config.metric is None else config.metric
    check_choice("metric", metric, metrics)
    return replace(config, problem=problem, metric=metric)


def numbers(option: str, text: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """Numbers with commas between them. Raises UsageError."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option}: expected numbers such as 0,1,2, got '{text}'") from error


def save_config(config: TrainConfig, folder: Path) -> None:
    """Writes `run.json`."""
    write_json(folder / FILE, asdict(config))


def load_config(folder: Path) -> TrainConfig:
    """Reads `run.json`. Raises UsageError where there is none, RunError where it is damaged."""
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"resume: {folder} holds no run ({FILE} is missing)")
    values = read_record(path, get_type_hints(TrainConfig), "resume", has_defaults=True)
    return TrainConfig(**with_tuples(values))


def with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The values with tuples in the place of lists, which JSON and YAML have."""
    return {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}


def continued(folder: Path, options: dict[str, Any]) -> TrainConfig:
    """The config of the run in `folder`, for resuming it with `options`.

    Raises UsageError where an option contradicts the run: a resumed run has the options it was
    started with.
    """
    stored = load_config(folder)
    _check_same_options(folder, stored, options.pop("options", ()))
    values = options.pop("method_config", None)
    before = stored.method_for()
    if values is not None and replace(stored, method_config=values).method_for() != before:
        raise UsageError(
            f"method_config: the run in {folder} was begun with another; leave it out to resume, "
            "or name another --output"
        )
    for name, value in options.items():
        before = getattr(stored, name)
        if (tuple(value) if isinstance(before, tuple) else value) != before:
            raise UsageError(
                f"{_option(name)}: the run in {folder} was begun with {_shown(before)}, not "
                f"{_shown(value)}; leave the option out to resume, or name another --output"
            )
    return stored


def _check_same_options(folder: Path, stored: TrainConfig, options: Sequence[str]) -> None:
    """Raises UsageError where an option would change the method of the run."""
    before = stored.method_for()
    for option in options:
        if replace(stored, options=with_options(stored.options, [option])).method_for() != before:
            own = [old for old in stored.options if _field(old) == _field(option)]
            raise UsageError(
                f"set: the run in {folder} was begun with "
                f"{own[0] if own else f'the default of {_field(option)}'}, not {option}; leave the "
                "option out to resume, or name another --output"
            )


def with_options(before: Sequence[str], later: Sequence[str]) -> tuple[str, ...]:
    """Fields of a method as text, in which the later ones hold."""
    named = {_field(option) for option in later}
    return (*(option for option in before if _field(option) not in named), *later)


def _field(option: str) -> str:
    return option.partition("=")[0].strip()


def option_names() -> list[str]:
    """The fields of a config, in order."""
    return [field.name for field in fields(TrainConfig)]


def _option(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: Any) -> str:
    words = value if isinstance(value, list | tuple) else [value]
    return ",".join(map(str, words)) if words else "none"

"""What a report on gates is about: an adapter, its run where there is one, and labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import FILE as CONFIG_FILE
from ..config import TrainConfig, load_config
from ..errors import UsageError
from ..experiment import ADAPTER_FOLDER, METRICS_FILE, TASK_FILE
from ..experiment_run import RESULT_FILE, rate_name
from ..predictor import FILE as CARD_FILE
from ..predictor import Card
from ..problems import PROBLEMS, HeadProblem
from ..records import read_record
from ..run_trainer import check_history
from ..tasks import Columns, Example, load_task, read_examples
from ..tasks.labels import labelled

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """An adapter with gates.

    Attributes:
        folder: as it was given.
        adapter: the folder of the adapter.
        config: of the run that trained it; None for an adapter alone.
        history: the run's log entries; empty for an adapter alone.
        metric: the score of a report: what decided on dev in the run, else the problem's first.
    """

    folder: Path
    adapter: Path
    card: Card
    config: TrainConfig | None
    history: Sequence[dict[str, Any]]
    metric: str

    @property
    def problem(self) -> HeadProblem:
        problem = PROBLEMS[self.card.problem]
        assert isinstance(problem, HeadProblem)  # `of` has refused the others
        return problem

    @classmethod
    def of(cls, folder: Path) -> Source:
        """The source in the folder of a finished run, or of an adapter. Raises UsageError where
        there is neither, RunError where a file is damaged.
        """
        if not folder.is_dir():
            raise UsageError(f"gates: there is no folder {folder}")
        is_adapter = (folder / CARD_FILE).is_file()
        adapter = folder if is_adapter else folder / ADAPTER_FOLDER
        if not is_adapter and not (folder / CONFIG_FILE).is_file():
            raise UsageError(
                f"gates: expected the folder of a run or an adapter, got {folder}, which holds "
                f"neither {CONFIG_FILE} nor {CARD_FILE}"
            )
        if not (adapter / CARD_FILE).is_file() or not (is_adapter or _is_finished(folder)):
            raise UsageError(
                f"gates: the run in {folder} is not finished; `pelt-kernels train --resume "
                f"--output {folder}` goes on with it"
            )
        card = Card.load(adapter)
        problem = PROBLEMS[card.problem]
        if not isinstance(problem, HeadProblem):
            raise UsageError(
                f"gates: expected an adapter that labels or scores texts, got {adapter}, which is "
                f"for {card.problem}"
            )
        if is_adapter:
            return cls(folder, adapter, card, None, (), problem.metrics[0])
        config = load_config(folder)
        metric = config.metric or problem.metrics[0]
        return cls(folder, adapter, card, config, _history(folder, problem.metrics), metric)

    def rows(self, files: Sequence[Path], columns: Columns, say: Say) -> dict[str, list[Example]]:
        """The labelled rows of each file, or of the run's test part, by the names of their tasks.

        Raises UsageError for a file that cannot be read, rows without a label or with one that the
        adapter does not know, an adapter alone without a file, and data that has changed since the
        run.
        """
        if not files:
            return self._test_part(say)
        names = [file.stem for file in files]
        if len(set(names)) < len(names):
            names = [str(file) for file in files]
        if len(set(names)) < len(names):
            raise UsageError(f"task: expected different files, got {', '.join(names)}")
        columns = replace(columns, problem=self.card.problem)
        found = {}
        for name, file in zip(names, files, strict=True):
            examples = read_examples(file, columns, needs_label=True, say=say)
            self._check_pairs(examples, file)
            kept = labelled(examples, self.card, str(file), say)
            found[name] = list(self.card.conditions.checked(kept))
        return found

    def _check_pairs(self, examples: Iterable[Example], file: Path) -> None:
        if any((example.pair is not None) != self.card.has_pairs for example in examples):
            count = "two texts" if self.card.has_pairs else "one text"
            raise UsageError(f"{file}: the adapter reads {count} a row")

    def _test_part(self, say: Say) -> dict[str, list[Example]]:
        config = self.config
        if config is None:
            raise UsageError(
                f"gates: {self.adapter} is an adapter without its run, so its test part is not "
                "known; name a file with labelled rows as --task"
            )
        try:
            task = load_task(
                config.task, config.eval, config.columns, say, config.label_separator, config.more
            )
        except UsageError as error:
            raise UsageError(
                f"gates: the test part of the run cannot be read ({error}); name a file with "
                "labelled rows as --task"
            ) from error
        types = {"fingerprint": str}
        if read_record(self.folder / TASK_FILE, types, "gates")["fingerprint"] != task.fingerprint:
            raise UsageError(
                f"gates: the data of {task.name} has changed since the run in {self.folder}; name "
                "a file with labelled rows as --task"
            )
        parts: dict[str, list[Example]] = {}
        for example in task.test:
            parts.setdefault(example.task or f"{task.name}, test part", []).append(example)
        return parts


def _is_finished(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file()


def _history(folder: Path, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The log entries of the run whose adapter was kept. Raises RunError."""
    types = {"adapter_seed": int, "learning_rate": float}
    summary = read_record(folder / METRICS_FILE, types, "gates")
    name = f"lr-{rate_name(summary['learning_rate'])}-seed-{summary['adapter_seed']}"
    path = folder / name / RESULT_FILE
    history: list[dict[str, Any]] = read_record(path, {"history": list[dict[str, Any]]}, "gates")[
        "history"
    ]
    check_history(path, history, metrics)
    return history

"""Where the data of a run comes from: files, data sets by name, and the embedded task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from . import docstring_match, hub
from .conditions import ATTRIBUTES, NO_CONDITIONS, TASKS, Conditions, conditions_of
from .example import Example
from .examples import (
    LARGEST_DEV,
    LARGEST_TEST,
    Task,
    held_out_size,
    hold_out,
    shortened,
)
from .files import Columns, iterate_examples, read_examples, readable, shows_generation
from .labels import (
    CLASSIFICATION,
    GENERATION,
    MULTI_LABEL,
    PROBLEMS,
    REGRESSION,
    SEPARATOR,
    label_order,
    labelled,
    labels_in,
    problem_of,
    strata,
    vocabulary,
    with_known_labels,
)

__all__ = [
    "ATTRIBUTES",
    "CLASSIFICATION",
    "GENERATION",
    "MULTI_LABEL",
    "NO_CONDITIONS",
    "PROBLEMS",
    "REGRESSION",
    "SEPARATOR",
    "TASKS",
    "Columns",
    "Conditions",
    "Example",
    "Task",
    "iterate_examples",
    "labels_in",
    "load_task",
    "read_examples",
    "readable",
    "with_known_labels",
]

FEWEST_EXAMPLES = 8


def load_task(
    name: str,
    test_file: str | None = None,
    columns: Columns | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    separator: str = SEPARATOR,
    more: Sequence[tuple[str, str | None]] = (),
) -> Task:
    """The task called `name`: ``docstring-match``, a CSV, TSV or JSONL file, or a data set such as
    ``glue/sst2``. With `more` files, each with its test file or None, each file is a task of its
    own, called by its name, and they are learned together.

    The dev part is always held out of the training rows. The test part is `test_file`, or the data
    set's validation split, or another held-out part. Which rows are held out depends on nothing but
    the rows; each class is in them by its share, and none is held out whole. `say` gets a
    sentence for each thing that a person should know of the data. ``columns.problem`` says what the
    labels are; without it the labels show it. `separator` stands between the labels of one row.

    Raises UsageError for what cannot be read, for labels that may be classes or scores, for a label
    of the test part that training never shows, for a class without a row for training, and for
    fewer than two labels; RunError where a data set cannot be loaded.
    """
    columns = columns or Columns()
    for option, value in (("task", name), ("eval", test_file or "")):
        if "://" in value:
            raise UsageError(
                f"{option}: {value} is an address; download the file and give its name here, or "
                "give the name of a data set such as glue/sst2"
            )
    if name == docstring_match.NAME:
        _check_embedded(name, test_file, columns, more)
        return docstring_match.load()
    if _is_file_name(name) and shows_generation(Path(name), columns):
        columns = replace(columns, problem=GENERATION)
    if more:
        title, pool, test = _read_several([(name, test_file), *more], columns, say)
        test_source = ", ".join(str(file) for _, file in [(name, test_file), *more])
    else:
        title, pool, test, test_source = _read_one(name, test_file, columns, say)
    problem = problem_of(pool, columns.problem, title, say)
    kind = _Kind(problem, vocabulary(pool, problem, separator, title), separator)
    task = _assemble(title, kind, pool, test, test_source, say)
    _say_absent(task, say)
    return task


def _check_embedded(name: str, test_file: str | None, columns: Columns, more: object) -> None:
    if test_file is not None:
        raise UsageError(f"eval: {name} brings its own test part; --eval goes with a file")
    if columns.problem not in (None, CLASSIFICATION):
        raise UsageError(f"problem: {name} is a {CLASSIFICATION}, not a {columns.problem}")
    if more or columns.task or columns.attributes:
        raise UsageError(f"task: {name} stands alone, without other tasks and attributes")


def _read_one(
    name: str, test_file: str | None, columns: Columns, say: Callable[[str], None]
) -> tuple[str, list[Example], list[Example] | None, str]:
    """A title, the training rows, the test part where there is one, and where that is from."""
    test: list[Example] | None = None
    if _is_file_name(name):
        pool = read_examples(Path(name), columns, needs_label=True, say=say)
        title, test_source = Path(name).name, ""
    else:
        splits = hub.read_splits(name, columns)
        if "train" not in splits:
            raise UsageError(
                f"task '{name}': expected a split 'train', got {', '.join(splits) or 'none'}"
            )
        pool, title = splits["train"], name
        test_source = next(
            (split for split in ("validation", "validation_matched", "test") if split in splits), ""
        )
        test = splits.get(test_source)
    if test_file is not None:
        test = read_examples(Path(test_file), columns, needs_label=True, say=say)
        test_source = test_file
    return title, pool, test, test_source


def _read_several(
    files: Sequence[tuple[str, str | None]], columns: Columns, say: Callable[[str], None]
) -> tuple[str, list[Example], list[Example] | None]:
    """The rows of several files, each with its file's name as its task."""
    if columns.task is not None:
        raise UsageError("task-column: expected one --task with such a column, or several without")
    if len({test is None for _, test in files}) > 1:
        raise UsageError("eval: expected a test file for each --task, in their order, or none")
    names = _names([Path(name) for name, _ in files])
    pool: list[Example] = []
    test: list[Example] = []
    for task, (name, test_file) in zip(names, files, strict=True):
        for rows, file in ((pool, name), (test, test_file)):
            if file is not None:
                found = read_examples(Path(file), columns, needs_label=True, say=say)
                rows += [replace(example, task=task) for example in found]
    return "+".join(names), pool, test or None


def _names(paths: list[Path]) -> list[str]:
    """A name for each file: its own without the suffix, else its folder's."""
    for names in ([path.stem for path in paths], [path.resolve().parent.name for path in paths]):
        if len(set(names)) == len(names):
            return names
    raise UsageError(
        f"task: expected files of different names, or in folders of different names, got "
        f"{', '.join(map(str, paths))}"
    )


def _is_file_name(name: str) -> bool:
    path = Path(name)
    return path.exists() or path.is_absolute() or bool(path.suffix) or name.startswith(".")


@dataclass(frozen=True)
class _Kind:
    """The labels of a task that is not assembled yet."""

    problem: str
    labels: tuple[str, ...]
    label_separator: str


def _assemble(
    title: str,
    kind: _Kind,
    pool: list[Example],
    test: list[Example] | None,
    test_source: str,
    say: Callable[[str], None],
) -> Task:
    pool = labelled(pool, kind, title, say)
    conditions = conditions_of(pool, label_order)
    if len(pool) < FEWEST_EXAMPLES:
        raise UsageError(f"{title}: expected at least {FEWEST_EXAMPLES} rows, got {len(pool)}")
    if test is None:
        test, rest = _hold_out(pool, kind.problem, LARGEST_TEST, "test")
        test_source = f"held out of {title}"
    else:
        test = list(conditions.checked(labelled(test, kind, test_source, say)))
        if (test[0].pair is None) != (pool[0].pair is None):
            raise UsageError(
                f"{test_source}: expected the same columns as {title}, got another number of texts"
            )
        tested = {example.content for example in test}
        rest = [example for example in pool if example.content not in tested]
    dev, train = _hold_out(rest, kind.problem, LARGEST_DEV, "dev")
    trained = labels_in(train)
    for label in kind.labels:
        if label not in trained:
            raise UsageError(
                f"{title}: no row of class '{label}' is left for training; its texts stand in the "
                f"test part too ({test_source})"
            )
    if not train or not dev or not test:
        if kind.problem != CLASSIFICATION:
            raise UsageError(
                f"{title}: expected three different texts or more that are not in the test part, "
                f"so that one can be held out, got {len({example.content for example in rest})}"
            )
        raise UsageError(
            f"{title}: expected a class with two texts or more, so that one can be held out, got "
            f"one text for each of {len(kind.labels)} classes"
        )
    sources = {"train": title, "dev": f"held out of {title}", "test": test_source}
    parts = tuple(train), tuple(dev), tuple(test)
    return Task(title, kind.labels, *parts, sources, kind.problem, kind.label_separator, conditions)


def _hold_out(
    examples: list[Example], problem: str, largest: int, salt: str
) -> tuple[list[Example], list[Example]]:
    size = held_out_size(len(examples), largest)
    # A source can have many targets.
    is_generation = problem == GENERATION
    classes = strata(examples, problem)
    return hold_out(examples, classes, size, salt=salt, whole_texts=is_generation)


def _say_absent(task: Task, say: Callable[[str], None]) -> None:
    """Names the classes with too few rows to be in a part: its scores do not count them."""
    for part, examples in (("dev", task.dev), ("test", task.test)):
        present = labels_in(examples)
        absent = [label for label in task.labels if label not in present]
        if absent:
            say(
                f"{task.name}: {len(absent)} of {len(task.labels)} classes have no row in {part}, "
                f"so that its figures do not speak of them: {shortened(absent)}"
            )

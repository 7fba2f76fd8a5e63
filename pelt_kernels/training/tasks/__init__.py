"""Where the data of a run comes from: files, data sets by name, and the embedded task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from . import docstring_match, hub
from .examples import LARGEST_DEV, LARGEST_TEST, Example, Task, held_out_size, hold_out, label_order
from .files import Columns, read_examples

__all__ = ["Columns", "Example", "Task", "check_labels", "load_task", "read_examples"]

FEWEST_EXAMPLES = 8


def load_task(name: str, test_file: str | None = None, columns: Columns | None = None) -> Task:
    """The task called `name`: ``docstring-match``, a CSV, TSV or JSONL file, or a data set such as
    ``glue/sst2``.

    The dev part is always held out of the training rows. The test part is `test_file`, or the data
    set's validation split, or another held-out part. Which rows are held out depends on nothing but
    the rows.

    Raises UsageError for what cannot be read, for a label of the test part that training never
    shows, and for fewer than two labels; RunError where a data set cannot be loaded.
    """
    columns = columns or Columns()
    if name == docstring_match.NAME:
        if test_file is not None:
            raise UsageError(f"eval: {name} brings its own test part; --eval goes with a file")
        return docstring_match.load()
    test: list[Example] | None = None
    if _is_file_name(name):
        pool = read_examples(Path(name), columns, needs_label=True)
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
        test, test_source = read_examples(Path(test_file), columns, needs_label=True), test_file
    return _assemble(title, pool, test, test_source)


def check_labels(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Raises UsageError at the first label that is not among `labels`."""
    for example in examples:
        if example.label is not None and example.label not in labels:
            raise UsageError(
                f"{example.origin}: label '{example.label}' is not one of {', '.join(labels)}"
            )


def _is_file_name(name: str) -> bool:
    path = Path(name)
    return path.exists() or path.is_absolute() or bool(path.suffix) or name.startswith(".")


def _assemble(
    title: str, pool: list[Example], test: list[Example] | None, test_source: str
) -> Task:
    labels = label_order({example.label for example in pool if example.label is not None})
    if len(labels) < 2:
        raise UsageError(f"{title}: expected at least two labels, got only '{labels[0]}'")
    if len(pool) < FEWEST_EXAMPLES:
        raise UsageError(f"{title}: expected at least {FEWEST_EXAMPLES} rows, got {len(pool)}")
    if test is None:
        test, rest = hold_out(pool, held_out_size(len(pool), LARGEST_TEST), salt="test")
        test_source = f"held out of {title}"
    else:
        check_labels(test, labels)
        if (test[0].pair is None) != (pool[0].pair is None):
            raise UsageError(
                f"{test_source}: expected the same columns as {title}, got another number of texts"
            )
        tested = {example.content for example in test}
        rest = [example for example in pool if example.content not in tested]
    dev, train = hold_out(rest, held_out_size(len(rest), LARGEST_DEV), salt="dev")
    if not train:
        raise UsageError(
            f"{title}: no row is left for training after {len(dev)} for dev, {len(test)} for test"
        )
    sources = {"train": title, "dev": f"held out of {title}", "test": test_source}
    return Task(title, labels, tuple(train), tuple(dev), tuple(test), sources)

"""Tasks by the name of a data set, such as ``glue/sst2``, from the package `datasets`; they need
that package and a network.
"""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import RunError, reason
from .dataset_rows import installed_datasets, named_rows
from .example import Example
from .files import Columns, example_from_row, resolve_columns

# Collections whose second word is a subset; elsewhere a slash separates owner and name, and a colon
# the subset.
COLLECTIONS = ("glue", "super_glue")


def read_splits(name: str, columns: Columns) -> dict[str, list[Example]]:
    """The labelled splits of a data set by their names there.

    `name` is ``glue/<subset>``, ``<owner>/<name>`` or ``<owner>/<name>:<subset>``. Raises
    UsageError without the package, RunError where the data set cannot be loaded.
    """
    datasets = installed_datasets(
        f"task '{name}' is neither a file nor docstring-match; to read it as the name of a data set"
    )
    path, subset = split_name(name)
    # Versions before datasets 4 run a data set's script unless it is forbidden.
    runs_scripts = "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters
    try:
        loaded = datasets.load_dataset(
            path, subset, **({"trust_remote_code": False} if runs_scripts else {})
        )
    except Exception as error:  # its own, the network's and the file system's errors, of many types
        raise RunError(f"task '{name}': the data set cannot be loaded ({reason(error)})") from error
    splits = {
        split: _examples(f"{split} of {name}", rows, columns) for split, rows in loaded.items()
    }
    return {split: examples for split, examples in splits.items() if examples}


def split_name(name: str) -> tuple[str, str | None]:
    """Path and subset of a data set's name."""
    collection, _, subset = name.partition("/")
    if collection in COLLECTIONS and subset:
        return collection, subset
    path, _, subset = name.partition(":")
    return path, subset or None


def _examples(where: str, rows: Any, columns: Columns) -> list[Example]:
    resolved = resolve_columns(where, list(rows.column_names), columns, needs_label=True)
    assert resolved.label is not None  # it was needed
    return [
        example_from_row(row, resolved, f"row {number} of {where}", needs_label=True)
        for number, row in enumerate(named_rows(rows))
        if row[resolved.label] is not None
    ]

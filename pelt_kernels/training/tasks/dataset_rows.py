"""Rows from the package `datasets`: of a data set by name, and of a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError, reason


def installed_datasets(why: str) -> Any:
    """The package. Raises UsageError, with what it is needed for, where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{why}, install the package datasets (pip install datasets)") from error
    return datasets


def named_rows(rows: Any) -> Iterator[dict[str, Any]]:
    """The rows with the names of classes in the place of their numbers. None stands for a class
    below 0, as test parts have it, and for what is no number.
    """
    names: dict[str, Any] = {}
    for column, feature in (rows.features or {}).items():
        # A ClassLabel numbers its classes; where a row has several, they are a sequence of it.
        inner = getattr(feature, "feature", None)
        names[column] = getattr(feature, "names", None) or getattr(inner, "names", None)
    for row in rows:
        yield {column: _named(value, names.get(column)) for column, value in row.items()}


def _named(value: Any, names: Any) -> Any:
    if value is None or value != value:  # NaN is what pandas writes where there is nothing
        return None
    if not names:
        return value
    if isinstance(value, list):
        return [names[number] for number in value]
    return names[value] if value >= 0 else None


def read_parquet(path: Path, has_header: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file by their numbers, from 1. Raises UsageError."""
    if not has_header:
        raise UsageError(f"no-header: expected a CSV or TSV file, got {path}, whose rows name all")
    datasets = installed_datasets(f"to read {path}")
    try:
        # Streamed, because a table that is loaded whole is first copied into the user's home.
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from enumerate(named_rows(rows), start=1)
    except Exception as error:  # its own, pyarrow's and the file system's errors, of many types
        raise UsageError(f"{path}: cannot be read as Parquet ({reason(error)})") from error

"""Tasks from files: CSV, TSV and JSON Lines with text, pair and label columns."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .examples import Example

# Tried in this order; the first whose columns are all there is taken.
TEXT_COLUMNS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text", None),
    ("sentence", None),
)
LABEL_COLUMNS = ("label", "labels", "class")
SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None means the first default that is there."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


def read_examples(
    path: Path, columns: Columns, *, needs_label: bool, allows_empty: bool = False
) -> list[Example]:
    """The rows of a file. Raises UsageError as `iterate_examples`."""
    return list(iterate_examples(path, columns, needs_label=needs_label, allows_empty=allows_empty))


def iterate_examples(
    path: Path, columns: Columns, *, needs_label: bool, allows_empty: bool = False
) -> Iterator[Example]:
    """The rows of a file one by one, so that it may be larger than the memory.

    Raises UsageError in one sentence for a missing or empty file, an unknown suffix, an absent
    column, a row with too few fields, an empty text (unless allowed) or, where it is needed, an
    empty label.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    read = {".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_json_lines}.get(
        path.suffix.lower()
    )
    if read is None:
        raise UsageError(
            f"{path}: expected a name ending in {', '.join(SUFFIXES)}, got '{path.suffix}'"
        )
    resolved = None
    try:
        for number, row in read(path):
            resolved = resolved or resolve_columns(
                str(path), list(row), columns, needs_label=needs_label
            )
            yield example_from_row(
                row,
                resolved,
                f"line {number} of {path}",
                needs_label=needs_label,
                allows_empty=allows_empty,
            )
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: expected UTF-8, got byte {error.object[error.start]:#04x}"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if resolved is None:
        raise UsageError(f"{path}: the file holds no rows")


def example_from_row(
    row: dict[str, str],
    columns: Columns,
    origin: str,
    *,
    needs_label: bool,
    allows_empty: bool = False,
) -> Example:
    """One example from a row by the names that `resolve_columns` found. Raises UsageError, naming
    the row.
    """
    names = (columns.text, columns.pair, columns.label)
    for name in names:
        if name is not None and name not in row:
            raise UsageError(f"{origin}: column '{name}' is missing here")
    text, pair, label = (None if name is None else row[name] for name in names)
    assert text is not None  # resolve_columns always names a text column
    if not allows_empty and (not text.strip() or (pair is not None and not pair.strip())):
        raise UsageError(f"{origin}: the text is empty")
    if needs_label and not (label or "").strip():
        raise UsageError(f"{origin}: the label is empty")
    return Example(text, pair, label.strip() if label is not None else None, origin)


def resolve_columns(where: str, found: list[str], asked: Columns, *, needs_label: bool) -> Columns:
    """The columns to read among those found: the ones asked for, else the defaults. Raises
    UsageError.
    """
    for name in (asked.text, asked.pair, asked.label):
        if name is not None and name not in found:
            raise UsageError(
                f"{where}: there is no column '{name}'; its columns are {', '.join(found)}"
            )
    text, pair = asked.text, asked.pair
    if text is None:
        pairs = (
            names for names in TEXT_COLUMNS if all(name is None or name in found for name in names)
        )
        text, default_pair = next(pairs, (None, None))
        if text is None:
            known = ", ".join(dict.fromkeys(name for name, _ in TEXT_COLUMNS))
            raise UsageError(
                f"{where}: no text column ({known}) among {', '.join(found)}; "
                "name it with --text-column"
            )
        pair = pair or default_pair
    label = asked.label or next((name for name in LABEL_COLUMNS if name in found), None)
    if label is None and needs_label:
        raise UsageError(
            f"{where}: there is no column 'label' among {', '.join(found)}; "
            "name it with --label-column"
        )
    return Columns(text, pair, label)


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    # A document may be longer than the 128 KiB that the csv module allows a field by default.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            for row in reader:
                if row:
                    yield reader.line_num, _named(path, reader.line_num, header, row)
        except csv.Error as error:
            raise UsageError(f"line {reader.line_num} of {path}: not CSV ({error})") from error


def _read_tsv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Fields between tabs as they stand: quotation marks are text, as in the GLUE files."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        header = file.readline().rstrip("\r\n").split("\t")
        for number, line in enumerate(file, start=2):
            line = line.rstrip("\r\n")
            if line:
                yield number, _named(path, number, header, line.split("\t"))


def _named(path: Path, number: int, header: list[str], row: list[str]) -> dict[str, str]:
    if len(row) != len(header):
        raise UsageError(f"line {number} of {path}: expected {len(header)} fields, got {len(row)}")
    return dict(zip(header, row, strict=True))


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"line {number} of {path}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise UsageError(
                    f"line {number} of {path}: expected an object, got {type(row).__name__}"
                )
            yield number, {name: "" if value is None else str(value) for name, value in row.items()}

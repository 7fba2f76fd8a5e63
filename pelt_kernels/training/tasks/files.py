"""Tasks from files: CSV, TSV, JSON Lines and Parquet with text, pair and label columns."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from ..errors import UsageError, reason
from .dataset_rows import read_parquet
from .example import Example, Label
from .labels import GENERATION, MULTI_LABEL

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
SOURCE_COLUMN, TARGET_COLUMN = "source", "target"  # where texts are written
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_GZIP = ".gz"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None means the first default that is there. Without a header
    a CSV or TSV file's columns are called 1, 2, 3 and so on. `problem` is what the labels are known
    to be: where a row may have several it may have none; where texts are written, `text` is the
    source and `label` the target. `attributes` are pairs of an attribute's name and its column,
    `task` is the column with the names of tasks.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    has_header: bool = True
    problem: str | None = None
    attributes: tuple[tuple[str, str], ...] = ()
    task: str | None = None


def read_examples(
    path: Path,
    columns: Columns,
    *,
    needs_label: bool,
    say: Callable[[str], None] = lambda sentence: None,
) -> list[Example]:
    """The rows of a file. Raises UsageError as `iterate_examples`."""
    return list(readable(iterate_examples(path, columns, needs_label=needs_label), say))


def iterate_examples(
    path: Path, columns: Columns, *, needs_label: bool, allows_empty: bool = False
) -> Iterator[Example]:
    """The rows of a file one by one, so that it may be larger than the memory.

    Raises UsageError in one sentence for a missing or empty file, an unknown suffix, an absent
    column, a row with too few fields, a value that is no text or label, an empty text (unless
    allowed) or, where it is needed, an empty label; elsewhere an empty label is None.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    kind = kind_of(path)
    read = _READERS.get(kind)
    if read is None:
        raise UsageError(
            f"{path}: expected a name ending in {', '.join(SUFFIXES)}, got '{path.suffix}'"
        )
    place = "row" if kind == ".parquet" else "line"
    names: dict[str, None] = {}  # of columns, in the order in which they appear
    resolved = None
    try:
        for number, row in read(path, columns.has_header):
            origin = f"{place} {number} of {path}"
            if resolved is None or not row.keys() <= names.keys():
                names |= dict.fromkeys(row)
                now = resolve_columns(str(path), list(names), columns, needs_label=needs_label)
                if resolved and (now.text, now.pair) != (resolved.text, resolved.pair):
                    raise UsageError(
                        f"{origin}: expected the columns of the rows before, got a further one for "
                        f"the texts: {', '.join(row)}; write it into every row, or name the "
                        "columns with --text-column and --pair-column"
                    )
                resolved = now
            yield example_from_row(
                row, resolved, origin, needs_label=needs_label, allows_empty=allows_empty
            )
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: expected UTF-8, got byte {error.object[error.start]:#04x}"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise UsageError(f"{path}: cannot be read ({why})") from error
    if resolved is None:
        raise UsageError(f"{path}: the file holds no rows")


def example_from_row(
    row: dict[str, Any],
    columns: Columns,
    origin: str,
    *,
    needs_label: bool,
    allows_empty: bool = False,
) -> Example:
    """One example from a row by the names that `resolve_columns` found. Raises UsageError, naming
    the row.
    """
    for name in (columns.text, columns.pair, columns.label if needs_label else None):
        if name is not None and name not in row:
            raise UsageError(f"{origin}: column '{name}' is missing here")
    assert columns.text is not None  # resolve_columns always names a text column
    text = _plain(row, columns.text, origin)
    pair = None if columns.pair is None else _plain(row, columns.pair, origin)
    label: Label = ""
    if columns.label is not None:
        is_text = columns.problem == GENERATION
        label = (
            _target(row, columns.label, origin) if is_text else _label(row, columns.label, origin)
        )
    if needs_label and label == "" and columns.problem == MULTI_LABEL:
        label = ()
    if not allows_empty and (not text.strip() or (pair is not None and not pair.strip())):
        raise UsageError(f"{origin}: the text is empty")
    if needs_label and label == "":
        what = "target" if columns.problem == GENERATION else "label"
        raise UsageError(f"{origin}: the {what} is empty")
    attributes = [(name, _condition(row, column, origin)) for name, column in columns.attributes]
    task = None if columns.task is None else _condition(row, columns.task, origin)
    return Example(text, pair, None if label == "" else label, origin, tuple(attributes), task)


def readable(examples: Iterable[Example], say: Callable[[str], None]) -> Iterator[Example]:
    """The examples with U+FFFD for what is no character: half of a pair of surrogates in JSON, a
    byte of an argument that is not UTF-8. Reports where the first one is.
    """
    is_said = False
    for example in examples:
        parts = (*example.content, example.label if isinstance(example.label, str) else None)
        texts = [part and _LONE_SURROGATE.sub("\ufffd", part) for part in parts]
        if tuple(texts) != parts:
            if not is_said:
                say(
                    f"{example.origin}: what is no character (half of a surrogate pair, or a byte "
                    "that is not UTF-8) is read as U+FFFD, here and wherever it stands"
                )
            is_said = True
            label = example.label if texts[2] is None else texts[2]
            example = replace(example, text=texts[0] or "", pair=texts[1], label=label)
        yield example


def _plain(row: dict[str, Any], name: str, origin: str) -> str:
    value = row[name]
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise UsageError(f"{origin}: expected text in '{name}', got {kind}")
    return "" if value is None else str(value)


def _target(row: dict[str, Any], name: str, origin: str) -> str:
    return _plain(row, name, origin).strip() if name in row else ""


def _condition(row: dict[str, Any], column: str, origin: str) -> str:
    """The label of an attribute or a task, which every row has."""
    if column not in row:
        raise UsageError(f"{origin}: column '{column}' is missing here")
    label = _label_text(row[column], column, origin)
    if not label:
        raise UsageError(f"{origin}: '{column}' is empty")
    return label


def _label(row: dict[str, Any], name: str, origin: str) -> Label:
    value = row.get(name)
    if isinstance(value, list):
        return tuple(dict.fromkeys(_label_text(member, name, origin) for member in value))
    return _label_text(value, name, origin)


def _label_text(value: Any, name: str, origin: str) -> str:
    if isinstance(value, list | dict):
        raise UsageError(
            f"{origin}: expected a label or a list of labels in '{name}', got {value!r:.60}"
        )
    label = "" if value is None else str(value).strip()
    if _LONE_SURROGATE.search(label):
        raise UsageError(f"{origin}: label {label!a} holds what is no character (a lone surrogate)")
    return label


def resolve_columns(
    where: str, present: list[str], chosen: Columns, *, needs_label: bool
) -> Columns:
    """The columns to read among those present: the chosen ones, else the defaults. Raises
    UsageError.
    """
    conditions = (*(column for _, column in chosen.attributes), chosen.task)
    for name in (chosen.text, chosen.pair, chosen.label, *conditions):
        if name is not None and name not in present:
            raise UsageError(
                f"{where}: there is no column '{name}'; its columns are {', '.join(present)}"
            )
    if chosen.problem == GENERATION:
        return _generation_columns(where, present, chosen, needs_label=needs_label)
    text, pair = chosen.text, chosen.pair
    if text is None:
        pairs = (
            names
            for names in TEXT_COLUMNS
            if all(name is None or name in present for name in names)
        )
        text, default_pair = next(pairs, (None, None))
        if text is None:
            known = ", ".join(dict.fromkeys(name for name, _ in TEXT_COLUMNS))
            raise UsageError(
                f"{where}: no text column ({known}) among {', '.join(present)}; name it with "
                "--text-column"
            )
        pair = pair or default_pair
    label = chosen.label or next((name for name in LABEL_COLUMNS if name in present), None)
    if label is None and needs_label:
        raise UsageError(
            f"{where}: there is no column 'label' among {', '.join(present)}; name it with "
            "--label-column"
        )
    return replace(chosen, text=text, pair=pair, label=label)


def shows_generation(path: Path, columns: Columns) -> bool:
    """Whether the file has a source and a target in its first row, and nothing that was asked for
    or is there by its usual name says that it is to be labelled.
    """
    read = _READERS.get(kind_of(path))
    if columns.problem or columns.text or columns.label or read is None or not path.is_file():
        return False
    try:
        present = next((set(row) for _, row in read(path, columns.has_header)), set[str]())
    except (UsageError, OSError, EOFError, zlib.error, UnicodeDecodeError):
        return False  # reading it whole says what is wrong
    named = {name for names in TEXT_COLUMNS for name in names} | {*LABEL_COLUMNS}
    return {SOURCE_COLUMN, TARGET_COLUMN} <= present and not named & present


def _generation_columns(
    where: str, present: list[str], chosen: Columns, *, needs_label: bool
) -> Columns:
    """The columns of a source and, where it is needed or there, of a target."""
    if chosen.pair is not None:
        raise UsageError(
            f"{where}: expected one source for each target, got a second text ('{chosen.pair}')"
        )
    text = chosen.text or (SOURCE_COLUMN if SOURCE_COLUMN in present else None)
    label = chosen.label or (TARGET_COLUMN if TARGET_COLUMN in present else None)
    for name, default in ((text, SOURCE_COLUMN), (label if needs_label else "", TARGET_COLUMN)):
        if name is None:
            raise UsageError(
                f"{where}: there is no column '{default}' among {', '.join(present)}; name it with "
                f"--{default}-column"
            )
    return replace(chosen, text=text, label=label)


def kind_of(path: Path) -> str:
    """The suffix that says how the file is laid out, without that of a compressed one."""
    name = path.with_suffix("") if path.suffix.lower() == _GZIP else path
    return name.suffix.lower()


def _opened(path: Path, newline: str | None = None) -> TextIO:
    if path.suffix.lower() == _GZIP:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _read_csv(path: Path, has_header: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    # A document may be longer than the 128 KiB that the csv module allows a field by default.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _opened(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            lines = ((reader.line_num, row) for row in reader if row)
            yield from _named(path, lines, has_header)
        except csv.Error as error:
            raise UsageError(f"line {reader.line_num} of {path}: not CSV ({error})") from error


def _read_tsv(path: Path, has_header: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Fields between tabs as they stand: quotation marks are text, as in the GLUE files."""
    with _opened(path, newline="\n") as file:
        lines = ((number, line.rstrip("\r\n")) for number, line in enumerate(file, start=1))
        fields = ((number, line.split("\t")) for number, line in lines if line)
        yield from _named(path, fields, has_header)


def _named(
    path: Path, lines: Iterator[tuple[int, list[str]]], has_header: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by the names in the first line, or by their positions."""
    number, first = next(lines, (0, []))
    if any("\r" in field for field in first):
        raise UsageError(
            f"line {number} of {path}: expected lines to end in LF or CR LF, got CR alone"
        )
    header = first if has_header else [str(place) for place in range(1, len(first) + 1)]
    if first and not has_header:
        lines = chain([(number, first)], lines)
    for number, row in lines:
        if len(row) != len(header):
            raise UsageError(
                f"line {number} of {path}: expected {len(header)} fields, got {len(row)}"
            )
        yield number, dict(zip(header, row, strict=True))


def _read_json_lines(path: Path, has_header: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    if not has_header:
        raise UsageError(f"no-header: expected a CSV or TSV file, got {path}, whose rows name all")
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # Numbers stay as they are written, whatever their length; NaN is what pandas
                # writes where there is nothing.
                row = json.loads(
                    line, parse_int=str, parse_float=str, parse_constant=lambda name: None
                )
            except json.JSONDecodeError as error:
                raise UsageError(f"line {number} of {path}: not JSON ({error.msg})") from error
            except RecursionError as error:
                raise UsageError(f"line {number} of {path}: nested too deeply") from error
            if not isinstance(row, dict):
                raise UsageError(
                    f"line {number} of {path}: expected an object, got {type(row).__name__}"
                )
            yield number, row


_READERS = dict(zip(SUFFIXES, (_read_csv, _read_tsv, _read_json_lines, read_parquet)))

"""The results of finished runs, one JSON object a line, whole at every moment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError, reason
from ..records import mismatch
from ..storage import replacing
from .protocol import Job

FILE = "results.jsonl"
Row = dict[str, Any]
Key = tuple[Any, ...]
_TYPES: dict[str, Any] = {
    "task": str,
    "train_examples": int | None,
    "method": str,
    "lr": float,
    "seed": int,
    "is_tested": bool,
    "metric": str,
    "error": str | None,
    "dev": dict[str, float] | None,
    "test": dict[str, float] | None,
    "processor_seconds": float,
}


def key_of(row: Row) -> Key:
    """What tells a run from another, as `Job.key`."""
    return tuple(row[name] for name in Job._fields[:5])


def read_rows(folder: Path) -> dict[Key, Row]:
    """The rows of a comparison by their keys; none where none is finished. Raises RunError."""
    path = folder / FILE
    if not path.is_file():
        return {}
    rows = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            missing = [name for name in _TYPES if name not in row]
            wrong = [f"{missing[0]} is missing"] if missing else []
            wrong += [mismatch(row.get(name), kind, name) for name, kind in _TYPES.items()]
            if any(wrong):
                raise ValueError(f"line {number}: {next(filter(None, wrong))}")
            rows[key_of(row)] = row
    except (ValueError, OSError, TypeError) as error:
        raise RunError(f"output: {path} is damaged ({reason(error)})") from error
    return rows


def write_rows(folder: Path, rows: Mapping[Key, Row], order: Iterable[Sequence[Any]]) -> None:
    """Replaces the file. Rows stand in the order of their tasks, sizes and methods, then by seed
    and rate, whichever run ended first. Raises RunError.
    """
    places = {tuple(cell): place for place, cell in enumerate(order)}
    ordered = sorted(
        rows.values(),
        key=lambda row: (places.get(key_of(row)[:3], len(places)), row["seed"], row["lr"]),
    )
    with replacing(folder / FILE) as partial:
        partial.write_text("".join(f"{json.dumps(row)}\n" for row in ordered), encoding="utf-8")

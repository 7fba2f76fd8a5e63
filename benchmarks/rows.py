"""What was measured, in files: one row a line, each a JSON object, so that a difference between two
commits shows the rows that changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows into a file, all or none."""
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(f"{json.dumps(row, separators=(',', ':'))}\n" for row in rows))
    temporary.replace(path)


def once(words: Iterable[str]) -> list[str]:
    """Words in their order, each once."""
    return list(dict.fromkeys(words))


def by_processor(rows: Sequence[dict[str, Any]]) -> list[Rows]:
    """The rows of each kind of processor, in their order."""
    kinds = once(row["hardware"]["kind"] for row in rows)
    return [[row for row in rows if row["hardware"]["kind"] == kind] for kind in kinds]


def kept(path: Path | None, kind: str, resume: bool) -> Rows:
    """The rows that a file keeps when this kind of processor is measured: those of others, and its
    own where it goes on.
    """
    rows = read(path) if path is not None and path.is_file() else []
    return [row for row in rows if resume or row["hardware"]["kind"] != kind]


def processor_order(row: dict[str, Any]) -> tuple[bool, str]:
    """Of a row in a file that holds those of several kinds of processors: AVX-512 first."""
    kind = row["hardware"]["kind"]
    return "avx512" not in kind, kind


def commits(rows: Sequence[dict[str, Any]]) -> str:
    """The commits that rows were measured at."""
    return ", ".join(once(row["commit"][:10] for row in rows))


def measured_by(rows: Sequence[dict[str, Any]]) -> str:
    """The end of the sentence below a table: processors with their threads, versions of torch,
    commits.
    """
    machines = once(
        f"{hardware.get('gpu') or hardware['cpu']}, "
        f"{row.get('threads') or hardware['threads']} thread(s)"
        for row in rows
        for hardware in (row["hardware"],)
    )
    torch = once(row.get("torch") or row["versions"]["torch"] for row in rows)
    return f"{'; '.join(machines)}; torch {', '.join(torch)}; commit {commits(rows)}"


def stored_title(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The title of a column of the parameters that are stored after training, where a row says it:
    those from before it was counted do not, nor do other libraries'.
    """
    return ["stored"] if any(row.get("stored_parameters") for row in rows) else []


def stored_cell(rows: Sequence[dict[str, Any]]) -> str:
    """That column's cell: the most of some rows, which differ by their heads."""
    counts = [count for row in rows if (count := row.get("stored_parameters"))]
    return f"{max(counts):,}" if counts else "–"

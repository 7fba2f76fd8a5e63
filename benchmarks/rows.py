"""What was measured, in files: one row a line, each a JSON object, so that a difference between two
commits shows the rows that changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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

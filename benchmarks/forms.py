"""Takes what `benchmarks.run` measured of the forms of the GPU's kernels into the table by which
the dispatch chooses.

    python -m benchmarks.run --device cuda --cases full --json FILE
    python -m benchmarks.forms FILE

Rows of the same operator, GPU, dtype and sizes are replaced, others stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pelt_kernels.ops._forms import FILE

from .run import write

DIRECTION = "forward+backward"
Rows = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 where the file has no forms to choose between."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("rows", type=Path, help="what benchmarks.run wrote with --json")
    options = parser.parse_args(arguments)
    measured = forms_in(json.loads(options.rows.read_text()))
    if not measured:
        print(
            f"benchmarks.forms: expected rows of backends with forms (cuda:single) in"
            f" {options.rows}, found none; measure with --device cuda",
            file=sys.stderr,
        )
        return 2
    write(FILE, merged(json.loads(FILE.read_text()), measured))
    for row in measured:
        print(row["op"], row["dtype"], row["sizes"], row["us"])
    return 0


def forms_in(rows: Rows) -> Rows:
    """A row for each case that was measured in several forms: their microseconds."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        backend, _, form = row["backend"].partition(":")
        if backend != "cuda" or not form or row["direction"] != DIRECTION:
            continue
        key = (row["op"], row["hardware"], row["dtype"], row["case"])
        if key not in found:
            found[key] = {
                "op": row["op"], "hardware": row["hardware"], "dtype": row["dtype"],
                "sizes": row["sizes"], "us": {}, "commit": row["commit"],
            }  # fmt: skip
        found[key]["us"][form] = round(row["us"], 2)
    return [row for row in found.values() if len(row["us"]) > 1]


def merged(old: Rows, new: Rows) -> Rows:
    """All rows, the new ones in the place of old ones for the same thing."""

    def key(row: dict[str, Any]) -> str:
        return json.dumps([row[name] for name in ("op", "hardware", "dtype", "sizes")])

    rows = {key(row): row for row in old}
    rows |= {key(row): row for row in new}
    return [rows[name] for name in sorted(rows)]


if __name__ == "__main__":
    sys.exit(main())

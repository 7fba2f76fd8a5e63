"""Enters what `benchmarks.run` measured of backends, their forms and eager into the table by which
the dispatch chooses.

    python -m benchmarks.run --device cuda --cases full --json FILE
    python -m benchmarks.forms FILE [--table FILE]

Rows of the same operator, hardware, dtype, direction, sizes and options are replaced, others stay.
A GPU goes by its name. A processor goes by its kind, which is known only on it: rows of the CPU are
taken on the machine that measured them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pelt_kernels.ops import BACKENDS
from pelt_kernels.ops import _dispatch as dispatch
from pelt_kernels.ops._forms import FILE, options

from . import shapes
from .from_tests import parity
from .rows import Rows, read, write


class RowsError(ValueError):
    """Rows that cannot be used here; one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 where the file has nothing to choose between or cannot be used here."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("rows", type=Path, help="what benchmarks.run wrote with --json")
    parser.add_argument("--table", type=Path, help="instead of the package's, which it starts from")
    options = parser.parse_args(arguments)
    try:
        measured = forms_in(read(options.rows))
    except RowsError as error:
        print(f"benchmarks.forms: {error}", file=sys.stderr)
        return 2
    if not measured:
        print(
            "benchmarks.forms: expected rows of backends with forms (cuda:single), or of a backend "
            f"and eager, in {options.rows}, found none",
            file=sys.stderr,
        )
        return 2
    write(options.table or FILE, merged(read(FILE), measured))
    for row in measured:
        print(row["op"], row["dtype"], row["direction"], row["sizes"], row["us"])
    return 0


def forms_in(rows: Rows) -> Rows:
    """A row for each case and direction that was measured in several ways: their microseconds."""
    by_case: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        measured = {row["backend"]: row["us"], row["baseline"]: row["baseline_us"]}
        us = {
            request: round(taken, 2)
            for request, taken in measured.items()
            if _is_way(row["op"], request)
        }
        key = tuple(row[name] for name in ("op", "kind", "dtype", "direction", "case"))
        if key not in by_case:
            by_case[key] = {
                **{name: row[name] for name in ("op", "dtype", "direction", "sizes")},
                "hardware": row["kind"], "us": {}, "commit": row["commit"],
            }  # fmt: skip
        by_case[key]["us"].update(us)
    several = {key: row for key, row in by_case.items() if len(row["us"]) > 1}
    for (operator, _, dtype, _, case), row in several.items():
        row["options"] = _options(operator, case, dtype)
        row["dtype"] = str(parity.PRECISIONS[dtype][0]).removeprefix("torch.")
    return list(several.values())


def _is_way(operator: str, request: str) -> bool:
    """Is a contender one of the ways between which the dispatch chooses, and not a peer, or a
    backend in whichever of its forms?
    """
    backend = dispatch.backend_of(request)
    if backend not in BACKENDS or not BACKENDS[backend].is_automatic:
        return False
    return request != backend or dispatch.every_request(operator, backend) == [backend]


def _options(operator: str, name: str, dtype: str) -> list[str]:
    """The options of a case, which only its name tells apart from others of its sizes. Raises
    RowsError.
    """
    cases = {case.id: case for case in shapes.cases_of(operator, "cuda")}
    if name not in cases:
        raise RowsError(f"expected cases of benchmarks/shapes.py, got {operator}'s {name}")
    with torch._subclasses.FakeTensorMode():  # draws nothing
        return options(parity.call_of(operator, cases[name], dtype, "cpu"))


def merged(old: Rows, new: Rows) -> Rows:
    """All rows; a new one replaces an old one for the same thing."""

    def key(row: dict[str, Any]) -> str:
        names = ("op", "hardware", "dtype", "direction", "sizes", "options")
        return json.dumps([row[name] for name in names])

    rows = {key(row): row for row in old}
    rows |= {key(row): row for row in new}
    return [rows[name] for name in sorted(rows)]


if __name__ == "__main__":
    sys.exit(main())

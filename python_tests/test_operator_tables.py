"""The tables of the operators' speed: which rows they hold and which they leave out."""

from __future__ import annotations

import pytest

from benchmarks import operator_tables, readme
from pelt_kernels.ops import OPERATORS

GEOMETRIC = 1.41  # of 1 and 2


def row(speedup=2.0, **more):
    return {
        "op": "gated_adapter", "dtype": "float32", "direction": "forward", "backend": "cpu",
        "is_default": True, "baseline": "plain", "speedup": speedup, "peak_bytes": 1,
        "baseline_peak_bytes": 2, "kind": "one", "hardware": "One x 2", "torch": "2",
        "commit": "0123456789ab", **more,
    }  # fmt: skip


def lines_of(table):
    return [line for line in table.splitlines() if line.startswith("| `")]


def test_a_cell_is_the_mean_of_its_cases_with_the_least_and_the_most():
    table = operator_tables.headline([row(1.0), row(2.0), row(1.5, direction="forward+backward")])
    (line,) = lines_of(table)
    assert line == (f"| `gated_adapter` | plain | one | **{GEOMETRIC}x** (1.00–2.00) | **1.50x** |")
    assert "| float32 forward | float32 forward+backward |" in table
    assert "one: One x 2; torch 2; commit 0123456789." in table


def test_processors_stand_beside_each_other_and_are_never_mixed():
    rows = [row(1.0), row(3.0, kind="two", hardware="Two x 2", dtype="bfloat16")]
    assert lines_of(operator_tables.headline(rows)) == [
        "| `gated_adapter` | plain | one | **1.00x** | – |",
        "| `gated_adapter` | plain | two | – | **3.00x** |",
    ]
    assert len(lines_of(operator_tables.full(rows))) == 2


def test_the_headline_has_what_users_get_against_what_others_use():
    rows = [row(), row(9.0, is_default=False), row(9.0, baseline="reference"),
            row(9.0, baseline="eager", backend="cpu")]  # fmt: skip
    assert "9.00" not in operator_tables.headline(rows)
    assert operator_tables.full(rows).count("| **") == 3  # is_default is no column of its own


def test_the_headline_is_short_and_plain_stays():
    rows = [
        row(op=operator, kind=kind, baseline=baseline)
        for operator in OPERATORS
        for kind in ("one", "two", "three")
        for baseline in ("PEFT", "plain")
    ]
    lines = lines_of(operator_tables.headline(rows))
    assert len(lines) == operator_tables.MOST_LINES
    assert all("| plain |" in line for line in lines)
    assert len(lines_of(operator_tables.full(rows))) == len(rows)


def test_a_call_that_allocates_nothing():
    (line,) = lines_of(operator_tables.full([row(peak_bytes=0)]))
    assert line.endswith("| 0 |")


@pytest.mark.checkout
def test_every_row_that_is_kept_has_what_the_tables_need():
    rows = readme.operator_rows()
    assert rows
    for found in rows:
        assert row().keys() - {"is_default"} <= found.keys()
    assert len(lines_of(operator_tables.headline(rows))) <= operator_tables.MOST_LINES

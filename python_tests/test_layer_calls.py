"""What a layer calls: counts that belong to one layer, and rows that take each other's place."""

from __future__ import annotations

import pytest

from benchmarks import layer_calls
from benchmarks.rows import Rows


@pytest.fixture(scope="module")
def rows() -> Rows:
    return layer_calls.measure(["frozen", "lora"], rounds=1, device="cpu")


def test_the_calls_of_a_layer_are_counted(rows: Rows) -> None:
    frozen, lora = rows
    assert not any(frozen[part]["own"] for part in layer_calls.PARTS)
    assert lora["forward"]["own"] == {"lora_linear_fwd": 2}  # query and value
    assert lora["backward"]["own"] == {"lora_linear_bwd": 2}
    # Each stands for the product of a frozen Linear.
    assert lora["inference"]["calls"] == frozen["inference"]["calls"]


def test_a_row_replaces_one_of_the_same_method_commit_and_processor(rows: Rows) -> None:
    frozen, lora = rows
    newer, other = lora | {"commit": "0" * 40}, lora | {"backends": {}}
    assert layer_calls.joined(rows, [newer]) == [frozen, lora, newer]
    assert layer_calls.joined(rows, [other]) == [frozen, other]


def test_a_cell_has_calls_own_calls_and_time(rows: Rows) -> None:
    table = layer_calls.table([rows[1] | {"commit": "0" * 40}])
    found = rows[1]["backward"]
    assert f"| 0000000000 | `lora` | {rows[1]['inference']['calls']} (2), " in table
    assert f"| {found['calls']} (2), {found['us']:,.0f} us |\n" in table

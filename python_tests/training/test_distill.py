"""Files with the targets that a model writes: whole or not at all, and taken up where broken off."""

from __future__ import annotations

import csv
import json

import pytest

from pelt_kernels.training import RunError, UsageError
from pelt_kernels.training.distill import distill

ROWS = [{"id": n, "source": f"text {n}", "target": f"gold {n}", "more": [n]} for n in range(7)]


def write_json(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_json(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def upper(texts):
    return [text.upper() for text in texts]


class Breaks:
    """Writes some batches and breaks off."""

    def __init__(self, after):
        self.left, self.seen = after, []

    def __call__(self, texts):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += texts
        return upper(texts)


def test_targets_are_replaced_and_nothing_else(tmp_path):
    source, output = write_json(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"
    assert distill(source, output, upper, batch_size=3) == 7
    assert read_json(output) == [row | {"target": row["source"].upper()} for row in ROWS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_keep_their_columns(tmp_path, suffix):
    source, output = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    delimiter = "," if suffix == "csv" else "\t"
    rows = [["n", "in", "out"], ["1", 'say "a"', "x"], ["2", "b", "y"]]
    text = "".join(delimiter.join(row) + "\n" for row in rows)
    if suffix == "csv":
        text = text.replace('say "a"', '"say ""a"""')
    source.write_text(text)
    columns = {"text_column": "in", "target_column": "out"}
    distill(source, output, lambda texts: [f"{text}\tand\n{text}," for text in texts], **columns)
    options = {} if suffix == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with output.open(newline="") as file:
        found = list(csv.reader(file, **options))
    space = "\t{}\n" if suffix == "csv" else " {} "
    expected = [[n, x, f"{x}{space.format('and')}{x},"] for n, x in (("1", 'say "a"'), ("2", "b"))]
    assert found == [rows[0], *expected]


def test_a_call_that_was_broken_off_is_taken_up(tmp_path):
    source, output = write_json(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"
    first = Breaks(2)
    with pytest.raises(KeyboardInterrupt):
        distill(source, output, first, batch_size=2, settings={"model": "m"})
    assert not output.exists()
    part = tmp_path / "b.jsonl.partial" / "targets.jsonl"
    with part.open("a") as file:
        file.write('"cut sho')  # as a crash leaves it
    second, counts = Breaks(9), []
    distill(source, output, second, batch_size=2, settings={"model": "m"}, advance=counts.append)
    assert first.seen + second.seen == [row["source"] for row in ROWS]
    assert counts == [4, 2, 1]
    assert [row["target"] for row in read_json(output)] == [f"TEXT {n}" for n in range(7)]
    assert not part.parent.exists()


@pytest.mark.parametrize("change", ["settings", "source", "column"])
def test_other_targets_are_not_taken_up(tmp_path, change):
    source, output = write_json(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"
    with pytest.raises(KeyboardInterrupt):
        distill(source, output, Breaks(2), batch_size=2, settings={"model": "m"})
    settings, columns = {"model": "m"}, {}
    if change == "settings":
        settings = {"model": "n"}
    elif change == "source":
        write_json(source, ROWS[::-1])
    else:
        columns = {"target_column": "id"}
    again = Breaks(9)
    distill(source, output, again, batch_size=2, settings=settings, **columns)
    assert len(again.seen) == 7


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path):
    source, output = write_json(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"

    def write(texts):
        if texts == ["text 6"]:
            write_json(source, ROWS[:5])
        return upper(texts)

    with pytest.raises(RunError, match="expected 7 rows as at the start, got 5"):
        distill(source, output, write, batch_size=2)
    assert not output.exists()


MISTAKES = {
    "there is no such file": None,
    "holds no rows": "",
    "line 2 of .*: not JSON": '{"source": "a", "target": "b"}\n{"source"\n',
    "line 1 of .*: expected an object": "[1]\n",
    "line 1 of .*: there is no column 'target' among source": '{"source": "a"}\n',
    "line 2 of .*: expected text in 'source'": (
        '{"source": "a", "target": "b"}\n{"source": " ", "target": "b"}\n'
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_in_a_file_are_told_before_anything_is_written(tmp_path, words):
    source = tmp_path / "a.jsonl"
    if MISTAKES[words] is not None:
        source.write_text(MISTAKES[words])
    with pytest.raises(UsageError, match=words):
        distill(source, tmp_path / "b.jsonl", Breaks(0))
    assert not (tmp_path / "b.jsonl.partial").exists()


def test_an_output_has_the_kind_of_its_source_and_is_new(tmp_path):
    source = write_json(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="a name ending in .jsonl as"):
        distill(source, tmp_path / "b.csv", upper)
    with pytest.raises(UsageError, match="a name ending in .csv, .tsv, .jsonl"):
        distill(source.rename(tmp_path / "a.txt"), tmp_path / "b.txt", upper)
    (tmp_path / "a.txt").rename(source)
    with pytest.raises(UsageError, match="is there already"):
        distill(source, source, upper)

"""Tasks from files and data sets: columns, splits, and one sentence for what is wrong."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import rows, write_csv, write_tsv

from pelt_kernels.training import RunError, Task, UsageError, load_task
from pelt_kernels.training.tasks import Columns, read_examples
from pelt_kernels.training.tasks.labels import label_order

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def contents(part: Any) -> set[Any]:
    return {example.content for example in part}


def assert_disjoint(task: Task) -> None:
    train, dev, test = contents(task.train), contents(task.dev), contents(task.test)
    assert train and dev and test
    assert not train & dev and not train & test and not dev & test


def test_csv_tsv_and_json_lines_give_the_same_examples(tmp_path: Path) -> None:
    table = rows(20, seed=3)
    paths = [
        write_tsv(tmp_path / "a.tsv", table),
        write_csv(tmp_path / "a.csv", table, ("text", "label")),
        tmp_path / "a.jsonl",
    ]
    lines = (json.dumps({"label": int(label), "text": text}) for text, label in table)
    paths[2].write_text("\n".join(lines) + "\n")
    read = [
        [(e.text, e.pair, e.label) for e in read_examples(path, Columns(), needs_label=True)]
        for path in paths
    ]
    assert read[0] == read[1] == read[2] == [(text, None, label) for text, label in table]


def test_quotes_belong_to_the_text_in_tsv_and_to_the_format_in_csv(tmp_path: Path) -> None:
    tsv = write_tsv(tmp_path / "a.tsv", [('"so" he said', "x")])
    csv = write_csv(tmp_path / "a.csv", [['one, "two"\nthree', "x"]], ["text", "label"])
    assert read_examples(tsv, Columns(), needs_label=True)[0].text == '"so" he said'
    assert read_examples(csv, Columns(), needs_label=True)[0].text == 'one, "two"\nthree'


def test_a_text_may_be_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["word " * 50_000, "x"]], ["text", "label"])
    assert len(read_examples(path, Columns(), needs_label=True)[0].text) == 250_000


@pytest.mark.parametrize(
    ("header", "asked", "expected"),
    [
        ("sentence\tlabel", Columns(), ("A", None)),
        ("sentence1\tsentence2\tlabel", Columns(), ("A", "B")),
        ("question\tsentence\tlabel", Columns(), ("A", "B")),
        ("text\tsentence\tlabel", Columns(), ("A", None)),
        ("left\tright\tlabel", Columns(text="right"), ("B", None)),
        ("left\tright\tlabel", Columns(text="right", pair="left"), ("B", "A")),
        ("text\tkind\tclass", Columns(label="kind"), ("A", None)),
    ],
)
def test_columns_are_found_by_their_usual_names_or_as_told(
    tmp_path: Path, header: str, asked: Columns, expected: tuple[str, str | None]
) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(header + "\n" + "\t".join("ABC"[: header.count("\t") + 1]) + "\n")
    assert read_examples(path, asked, needs_label=True)[0].content == expected


WRONG_FILES = {
    "missing": ("nothing.tsv", None, "there is no such file"),
    "suffix": ("a.xlsx", b"x", "expected a name ending in .csv, .tsv, .jsonl"),
    "empty": ("a.tsv", b"", "holds no rows"),
    "header only": ("a.tsv", b"text\tlabel\n", "holds no rows"),
    "no text column": ("a.tsv", b"words\tlabel\nx\t1\n", "no text column"),
    "no label column": ("a.tsv", b"text\tmark\nx\t1\n", "no column 'label' among text, mark"),
    "short row": ("a.tsv", b"text\tlabel\nx\t1\ny\n", "line 3 of .*expected 2 fields, got 1"),
    "empty text": ("a.tsv", b"text\tlabel\nx\t1\n \t1\n", "line 3 of .*the text is empty"),
    "empty label": ("a.tsv", b"text\tlabel\nx\t1\ny\t\n", "line 3 of .*the label is empty"),
    "not UTF-8": ("a.tsv", b"text\tlabel\n\xff\xfe\t1\n", "expected UTF-8, got byte 0xff"),
    "open quote": ("a.csv", b'text,label\n"x,1\n', "not CSV"),
    "not JSON": ("a.jsonl", b'{"text": "x", "label": 1}\n{"text"\n', "line 2 of .*not JSON"),
    "not an object": ("a.jsonl", b"[1]\n", "expected an object, got list"),
    "key missing": ("a.jsonl", b'{"text": "x", "label": 1}\n{"label": 1}\n', "'text' is missing"),
    "labels in a list of lists": (
        "a.jsonl",
        b'{"text": "x", "labels": [["joy"], "anger"]}\n',
        r"line 1 of .*expected a label or a list of labels in 'labels', got \['joy'\]",
    ),
    "a label that is an object": (
        "a.jsonl",
        b'{"text": "x", "label": {"a": 1}}\n',
        "a label or a list of",
    ),
    "a label that is not a number": (
        "a.jsonl",
        b'{"text": "x", "label": 1}\n{"text": "x", "label": NaN}\n',
        "line 2 of .*the label is empty",
    ),
    "a text that is an object": (
        "a.jsonl",
        b'{"text": {"en": "x"}, "label": 1}\n',
        "expected text in 'text', got an object",
    ),
    "a text that is a list": (
        "a.jsonl",
        b'{"text": ["x"], "label": 1}\n',
        "expected text in 'text', got a list",
    ),
    "no second text": (
        "a.jsonl",
        b'{"text": "x", "text_pair": null, "label": 1}\n',
        "the text is empty",
    ),
    "half a character in a label": (
        "a.jsonl",
        b'{"text": "x", "label": "\\ud83d"}\n',
        r"line 1 of .*label '\\ud83d' holds what is no character",
    ),
    "deep nesting": (
        "a.jsonl",
        b'{"text": "x", "label": 1, "id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "line 1 of .*nested too deeply",
    ),
    "a column that comes later": (
        "a.jsonl",
        b'{"text": "x", "label": 1}\n{"text": "x", "text_pair": "y", "label": 1}\n',
        "line 2 of .*a further one for the texts: text, text_pair, label",
    ),
    "a column that goes": (
        "a.jsonl",
        b'{"text": "x", "text_pair": "y", "label": 1}\n{"text": "x", "label": 1}\n',
        "line 2 of .*column 'text_pair' is missing",
    ),
    "ends of lines": ("a.tsv", b"text\tlabel\rx\t1\ry\t0\r", "to end in LF or CR LF, got CR alone"),
    "numbers that may be classes or scores": (
        "a.tsv",
        b"text\tlabel\n" + b"".join(b"x%d\t%d\n" % (n, n % 30) for n in range(90)),
        "a.tsv: expected classes or scores as labels, got 30 different numbers such as 9, which .*"
        "--problem classification or --problem regression",
    ),
    "one number in two forms": (
        "a.jsonl",
        b'{"text": "x", "label": 1}\n{"text": "y", "label": 1.0}\n' * 5,
        "line 2 of .*label 1.0 is the number 1, which is a label too",
    ),
    "no label at all": (
        "a.tsv",
        b"text\tlabel\n" + b"x\t-1\n" * 20,
        "at least two labels, got none",
    ),
    "one label": ("a.tsv", b"text\tlabel\n" + b"x\t1\n" * 20, "at least two labels, got only '1'"),
    "few rows": ("a.tsv", b"text\tlabel\nx\t1\ny\t0\n", "at least 8 rows, got 2"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    name, content, sentence = WRONG_FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence) as error:
        load_task(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_field_that_nobody_reads_may_be_any_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": 5, "label": 1.50, "id": ' + "9" * 5000 + ', "x": Infinity}\n')
    (read,) = read_examples(path, Columns(), needs_label=True)
    assert (read.text, read.label, read.origin) == ("5", "1.50", f"line 2 of {path}")


def test_half_of_a_surrogate_pair_is_read_as_no_character_with_one_note(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "good \\ud83d\\ude00", "text_pair": "a", "label": 1}']
    lines += ['{"text": "cut \\ud83d", "text_pair": "\\ude00 b", "label": 1}'] * 2
    path.write_text("\n".join(lines))
    told: list[str] = []
    read = read_examples(path, Columns(), needs_label=True, say=told.append)
    assert [example.content for example in read] == [
        ("good \U0001f600", "a"), *[("cut \ufffd", "\ufffd b")] * 2,
    ]  # fmt: skip
    assert len(told) == 1 and told[0].startswith(f"line 2 of {path}") and "U+FFFD" in told[0]


@pytest.mark.parametrize(("name", "mark"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_columns_without_names_are_called_by_their_places(
    tmp_path: Path, name: str, mark: str
) -> None:
    table = [(label, "0", "*", text) for text, label in rows(30, seed=2)]
    path = tmp_path / name
    path.write_text("\n" + "".join(mark.join(row) + "\n" for row in table))
    columns = Columns(text="4", label="1", has_header=False)
    read = read_examples(path, columns, needs_label=True)
    assert [(e.text, e.label) for e in read] == [(row[3], row[0]) for row in table]
    assert read[0].origin == f"line 2 of {path}"
    assert len(load_task(str(path), columns=columns).train) > 20
    with pytest.raises(UsageError, match="no text column .* among 1, 2, 3, 4; name it with"):
        load_task(str(path), columns=Columns(has_header=False))
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "x", "label": 1}\n')
    with pytest.raises(UsageError, match="no-header: expected a CSV or TSV file, got .*a.jsonl"):
        load_task(str(lines), columns=Columns(has_header=False))


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_blank_lines_before_the_names_are_blank_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    mark = "\t" if name == "a.tsv" else ","
    path.write_text(f"\n\ntext{mark}label\n\nx{mark}1\n")
    (read,) = read_examples(path, Columns(), needs_label=True)
    assert read.content == ("x", None) and read.origin == f"line 5 of {path}"


def test_rows_of_minus_one_are_no_class_beside_whole_numbers(tmp_path: Path) -> None:
    table = rows(60, seed=1)
    path = write_tsv(tmp_path / "a.tsv", [*table, ("a song", "-1"), ("a book", "-1")])
    test = write_tsv(tmp_path / "test.tsv", [*rows(9, seed=2), ("a film", "-1")])
    told: list[str] = []
    task = load_task(str(path), str(test), say=told.append)
    assert task.labels == ("0", "1") and len(task.test) == 9
    assert [sentence.split(" are left out")[0] for sentence in told] == [
        "a.tsv: 2 of 62 rows", f"{test}: 1 of 10 rows",
    ]  # fmt: skip
    none = write_tsv(tmp_path / "none.tsv", [("a film", "-1")])
    with pytest.raises(UsageError, match=r"none.tsv: expected labels, got none or -1 in every row"):
        load_task(str(path), str(none))


def test_minus_one_is_a_class_where_it_can_be_one(tmp_path: Path) -> None:
    for others in (["1"], ["neg", "pos"], ["-2", "0"]):
        labels = ["-1", *others]
        table = [(f"text {n}", labels[n % len(labels)]) for n in range(60)]
        # Beside 1 alone it would be the only other class.
        path = write_tsv(tmp_path / "a.tsv", table)
        assert set(load_task(str(path)).labels) == set(labels)


def test_a_column_that_was_named_must_be_there(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", rows(20, seed=0))
    with pytest.raises(UsageError, match="no column 'body'; its columns are text, label"):
        load_task(str(path), columns=Columns(text="body"))


def test_parts_share_no_text_even_where_rows_repeat(tmp_path: Path) -> None:
    table = rows(60, seed=4)
    task = load_task(str(write_tsv(tmp_path / "a.tsv", table * 5)))
    assert_disjoint(task)
    test = write_tsv(tmp_path / "test.tsv", table[:20])
    task = load_task(str(write_tsv(tmp_path / "b.tsv", table * 2)), str(test))
    assert_disjoint(task)
    assert [e.text for e in task.test] == [text for text, _ in table[:20]]
    assert task.sources["test"] == str(test) and "held out" in task.sources["dev"]


def test_labels_have_a_fixed_order_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    table = [(f"text {number}", str(number % 11)) for number in range(110)]
    path = write_tsv(tmp_path / "a.tsv", table)
    assert load_task(str(path)).labels == tuple(map(str, range(11)))
    words = write_tsv(
        tmp_path / "b.tsv", [(text, "yes" if "1" in text else "no") for text, _ in table]
    )
    assert load_task(str(words)).labels == ("no", "yes")
    test = write_tsv(tmp_path / "test.tsv", [("text", "yes"), ("text", "maybe")])
    with pytest.raises(UsageError, match="line 3 of .*label 'maybe' is not one of no, yes"):
        load_task(str(words), str(test))


def test_labels_that_are_equal_numbers_have_an_order_too() -> None:
    """A set's own order changes from process to process."""
    for labels in (("-0", "0"), ("0", "00", "01", "1"), ("--5", "2"), ("10", "9", "x"), ("2", "²")):
        for given in permutations(labels):
            # The order of a dict is that in which it was filled, as a set's is by the hash seed.
            assert label_order(dict.fromkeys(given).keys()) == labels


@pytest.mark.parametrize("duplicates", [1, 3])
def test_each_class_is_held_out_by_its_share_and_none_whole(
    tmp_path: Path, duplicates: int
) -> None:
    classes = {"a": 300, "b": 90, "c": 10, "one": 1, "two": 2}
    table = [(f"{label} {n}", label) for label, size in classes.items() for n in range(size)]
    told: list[str] = []
    path = write_tsv(tmp_path / "a.tsv", table * duplicates)
    task = load_task(str(path), say=told.append)
    counts = {
        part: Counter(example.label for example in getattr(task, part))
        for part in ("train", "dev", "test")
    }
    assert set(counts["train"]) == set(classes)
    assert_disjoint(task)
    if duplicates == 1:
        assert counts["test"] == {"a": 30, "b": 9, "c": 1}
        assert counts["dev"] == {"a": 27, "b": 8, "c": 1}
        assert [sentence.split(" classes ")[0] for sentence in told] == ["a.tsv: 2 of 5"] * 2
        assert all(sentence.endswith("one, two") for sentence in told)
    again = load_task(str(path))
    assert again.fingerprint == task.fingerprint


def test_a_text_with_two_labels_takes_neither_class_away(tmp_path: Path) -> None:
    table = [(f"text {n}", "ab"[n % 2]) for n in range(60)]
    for n in range(60):
        rare = [*table, (f"text {n}", "rare")]
        task = load_task(str(write_tsv(tmp_path / "a.tsv", rare)))
        assert {example.label for example in task.train} == {"a", "b", "rare"}
        assert_disjoint(task)


def test_a_class_whose_texts_are_all_tested_is_refused(tmp_path: Path) -> None:
    table = rows(60, seed=4)
    path = write_tsv(tmp_path / "a.tsv", [*table, ("one of a kind", "rare")])
    test = write_tsv(tmp_path / "test.tsv", [("one of a kind", "rare"), *table[:5]])
    with pytest.raises(UsageError, match="no row of class 'rare' is left for training"):
        load_task(str(path), str(test))
    lone = write_tsv(tmp_path / "lone.tsv", [(f"text {n}", str(n)) for n in range(20)])
    with pytest.raises(UsageError, match="expected a class with two texts or more"):
        load_task(str(lone))


def test_equal_rows_under_another_order_of_labels_are_another_task(tmp_path: Path) -> None:
    task = load_task(str(write_tsv(tmp_path / "a.tsv", rows(50, seed=0))))
    assert replace(task, labels=task.labels[::-1]).fingerprint != task.fingerprint


def test_more_examples_than_there_are_is_refused(tmp_path: Path) -> None:
    task = load_task(str(write_tsv(tmp_path / "a.tsv", rows(50, seed=0))))
    with pytest.raises(UsageError, match=r"100 were asked for but a.tsv leaves \d+"):
        task.draw_train(100, seed=0)


class FakeRows(list[dict[str, Any]]):
    """As much of a data set's split as is read."""

    def __init__(self, table: list[dict[str, Any]], names: list[str]):
        super().__init__(table)
        self.column_names = list(table[0])
        self.features = {"label": types.SimpleNamespace(names=names), "sentence": None, "idx": None}


def install_fake_datasets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    names = ["negative", "positive"]
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, subset: str | None) -> dict[str, FakeRows]:
        asked.append((path, subset))
        if path != "glue":
            raise ConnectionError(f"cannot reach {path}\nsecond line")
        made = [
            {"idx": i, "sentence": text, "label": int(label)}
            for i, (text, label) in enumerate(rows(50, seed=5))
        ]
        return {
            "train": FakeRows(made[:40], names),
            "validation": FakeRows(made[40:], names),
            "test": FakeRows([row | {"label": -1} for row in made], names),
        }

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_data_set_by_name_uses_its_labelled_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = install_fake_datasets(monkeypatch)
    task = load_task("glue/sst2")
    assert asked == [("glue", "sst2")]
    assert task.labels == ("negative", "positive") and task.sources["test"] == "validation"
    assert len(task.test) == 10 and {e.label for e in task.test} <= set(task.labels)
    assert_disjoint(task)
    with pytest.raises(RunError, match=r"cannot be loaded \(cannot reach someone/texts\)$"):
        load_task("someone/texts:small")
    assert asked[-1] == ("someone/texts", "small")


def test_a_data_set_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        load_task("glue/sst2")


def test_sst2_is_read_as_it_is() -> None:
    if not (DATA / "sst2").is_dir():
        pytest.skip(f"the data of SST-2 is not in {DATA}")
    task = load_task(str(DATA / "sst2" / "train.tsv"), str(DATA / "sst2" / "dev.tsv"))
    assert task.labels == ("0", "1") and len(task.test) == 872 and len(task.train) > 6000
    assert_disjoint(task)

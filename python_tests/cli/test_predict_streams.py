"""`predict` on more than fits at once, on consoles of few characters, and when it is stopped."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import Run
from rich.console import Console
from tiny_encoder import rows, write_tsv

from pelt_kernels.cli import main
from pelt_kernels.cli.progress import counting
from pelt_kernels.training import tasks
from pelt_kernels.training.predictor import POOL, Predictor
from pelt_kernels.training.tasks import Example

TEXT = "a good film \N{GRINNING FACE} \N{EURO SIGN} é"


def examples(count: int) -> Iterator[Example]:
    for number, (text, label) in enumerate(rows(count, seed=3)):
        yield Example(text, None, label, f"row {number}")


def test_a_stream_is_read_as_it_is_asked_for_and_in_order(trained: Path) -> None:
    predictor = Predictor(trained / "adapter")
    read: list[str] = []

    def source() -> Iterator[Example]:
        for example in examples(5 * POOL):
            read.append(example.text)
            yield example

    done: list[int] = []
    parts = predictor.stream(source(), batch_size=2, advance=done.append)
    first = next(parts)
    assert len(read) == 2 * POOL and sum(done) == 2 * POOL, "it reads ahead"
    found = [first, *parts]
    assert [len(part.rows) for part in found] == [2 * POOL, 2 * POOL, POOL]
    assert sum(done) == len(read) == 5 * POOL
    whole = predictor(examples(5 * POOL), batch_size=2)
    assert whole.rows == [row for part in found for row in part.rows]
    assert [example.text for example in whole.examples] == read
    alone = [predictor([example]).rows[0].label for example in examples(POOL)]
    assert alone == [row.label for row in whole.rows[:POOL]]
    assert predictor([]).rows == []


def test_rows_of_a_part_are_sorted_by_length(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(trained / "adapter")
    lengths: list[int] = []
    compute = predictor._logits

    def note(batch: dict[str, object]) -> torch.Tensor:
        lengths.append(batch["input_ids"].shape[1])  # type: ignore[attr-defined]
        return compute(batch)

    monkeypatch.setattr(predictor, "_logits", note)
    predictor(examples(64), batch_size=4)
    assert lengths == sorted(lengths) and len(set(lengths)) > 4


@pytest.mark.parametrize("suffix", [".tsv", ".txt"])
def test_a_mistake_in_the_last_line_of_a_file_is_found_first(
    run: Run, trained: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predictor, "__init__", lambda *_: pytest.fail("the model was loaded"))
    path = write_tsv(tmp_path / f"texts{suffix}", [*rows(2000, seed=1), ("bad", "maybe")])
    if suffix == ".txt":
        path.write_bytes(path.read_bytes() + b"\xff\n")
    done = run("predict", "--adapter", trained / "adapter", "--file", path)
    expected = "line 2002 of" if suffix == ".tsv" else "cannot be read as UTF-8 text"
    assert expected in done.refused(2) and done.out == ""


def test_standard_input_is_read_as_it_comes(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines before one that cannot be read have their labels."""
    lines = b"a good film\n" * (2 * POOL) + b"\xff\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))
    done = run("predict", "--adapter", trained / "adapter", "--batch-size", 2)
    assert "standard input: cannot be read as ascii text" in done.refused(2)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = run("predict", "--adapter", trained / "adapter")
    assert "no text: the input is empty" in done.refused(2)


def test_what_is_interrupted_has_said_what_it_knows(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def lines() -> Iterator[str]:
        yield from ("a good film",) * (2 * POOL)
        os.kill(os.getpid(), signal.SIGINT)
        yield "never labelled"

    source = io.StringIO()
    monkeypatch.setattr("sys.stdin", source)
    monkeypatch.setattr("pelt_kernels.cli.predict._standard_input", lines)
    done = run("predict", "--adapter", trained / "adapter", "--batch-size", 2)
    assert done.refused(130) == "pelt-kernels: stopped by SIGINT"
    assert done.out.count("\ta good film\n") == 2 * POOL == done.out.count("\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("form", ["plain", "json"])
def test_what_a_console_lacks_is_escaped(
    trained: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, form: str
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    more = ["--json"] if form == "json" else []
    assert main(["predict", "--adapter", str(trained / "adapter"), TEXT, *more]) == 0
    out.flush()
    said = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    if form == "json":
        assert json.loads(said)["text"] == TEXT
    else:
        expected = TEXT.encode(encoding, "backslashreplace").decode(encoding)
        assert said.endswith(f"\t{expected}\n")


def test_tables_and_names_are_escaped_too(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    folder = tmp_path / "Übung \N{GRINNING FACE}"
    folder.symlink_to(trained / "adapter", target_is_directory=True)
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    assert main(["info", "--adapter", str(folder)]) == 0
    assert main(["predict", "x", "--adapter", str(folder / "é")]) == 2
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
    assert "\\xdcbung" in out and "\\xe9" in err


def test_a_bar_is_shown_in_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (True, False):
        shown = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        with counting(shown, "texts", 5) as advance:
            advance(5)
        assert ("5/5" in shown.file.getvalue()) == is_terminal  # type: ignore[attr-defined]


def test_unlabelled_rows_are_left_out_of_the_accuracy(
    run: Run, trained: Path, toy_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:

    iterate = tasks.iterate_examples

    def some(*arguments: object, **options: object) -> Iterator[Example]:
        for number, example in enumerate(iterate(*arguments, **options)):  # type: ignore[arg-type]
            yield example if number < 20 else replace(example, label=None)

    monkeypatch.setattr(tasks, "iterate_examples", some)
    done = run("predict", "--adapter", trained / "adapter", "--file", toy_files[1])
    assert done.code == 0
    assert "on 20 labelled texts; 40 are without a label" in done.err

"""`pelt-kernels predict`"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import predict_options as given
from .conditions import Same, check_writing
from .console import Debug, errors_in_one_line, notes

if TYPE_CHECKING:
    from ..training import Example
    from ..training.predictor import Card, Predictions
    from ..training.problems import Tally
    from ..training.tasks import Columns


def predict(
    texts: given.Texts = None,
    adapter: given.Adapter = Path("adapter"),
    pair: given.Pair = None,
    file: given.File = None,
    text_column: given.TextColumn = None,
    pair_column: given.PairColumn = None,
    label_column: given.LabelColumn = None,
    source_column: given.SourceColumn = None,
    target_column: given.TargetColumn = None,
    attributes: given.Attributes = None,
    task: given.Task = None,
    task_column: given.TaskColumn = None,
    beams: given.Beams = None,
    max_new_tokens: given.MaxNewTokens = None,
    no_header: given.NoHeader = False,
    as_json: given.AsJson = False,
    model: given.Model = None,
    batch_size: given.BatchSize = 32,
    backend: given.Backend = None,
    device: given.Device = "auto",
    debug: Debug = False,
) -> None:
    """Label texts with a trained adapter: label, probability and text, separated by tabs.

    Scores (regression) are a number and the text; several labels are separated by commas; where
    texts are written, what is written stands before its source. The two texts of a pair stand in
    one line, separated by a tab.
    """
    with errors_in_one_line(debug):
        from ..ops import use_backend
        from ..training import Predictor
        from ..training.machine import computing_device
        from ..training.predictor import Card
        from ..training.problems import PROBLEMS
        from ..training.tasks import Columns
        from .progress import counting

        card = Card.load(adapter)
        check_writing(card, (beams, max_new_tokens), source_column or target_column)
        columns = Columns(
            source_column or text_column,
            pair_column,
            target_column or label_column,
            not no_header,
            card.problem,
        )
        same = Same.of(card, attributes or (), task)
        columns = same.columns(card, columns, task_column)
        console, counts = notes(), _Counts(PROBLEMS[card.problem].tally(card.labels))

        def say(sentence: str) -> None:
            console.print(sentence, markup=False, soft_wrap=True)

        examples, total = _examples(texts, pair, file, columns, card, same, say)
        computing = computing_device(device)
        with use_backend(backend) if backend else nullcontext():
            predictor = Predictor(
                adapter, model, computing, beams=beams, max_new_tokens=max_new_tokens
            )
            with counting(console, "texts", total) as advance:
                for part in predictor.stream(examples, batch_size, advance):
                    sys.stdout.write("".join(_lines_of(part, as_json)))
                    sys.stdout.flush()  # so that Ctrl-C loses no finished batch
                    counts.add(part)
        for sentence in counts.remarks(predictor.max_length):
            console.print(sentence)


def _examples(
    texts: list[str] | None,
    pairs: list[str] | None,
    file: Path | None,
    columns: Columns,
    card: Card,
    same: Same,
    say: Callable[[str], None],
) -> tuple[Iterable[Example], int | None]:
    """The examples to label, and how many there are. A file is read twice, so that a mistake in its
    last line is reported before the first is labelled; standard input is read once.
    """
    from ..training import UsageError
    from ..training.tasks import iterate_examples, readable, with_known_labels
    from ..training.tasks.files import SUFFIXES, kind_of

    if texts and file:
        raise UsageError("give texts or --file, not both")
    if pairs and not texts:
        raise UsageError("--pair goes with texts on the command line")
    if texts:
        if pairs and len(texts) != len(pairs):
            raise UsageError(
                f"expected one --pair for each of {len(texts)} texts, got {len(pairs)}"
            )
        lines = (
            [f"{text}\t{pair}" for text, pair in zip(texts, pairs, strict=True)] if pairs else texts
        )
        given = readable(_split(lines, "argument", card.has_pairs), say)
        return list(same.checked(card, given)), len(texts)
    if file is None:
        if sys.stdin.isatty():
            raise UsageError("no text: give texts, --file, or lines on standard input")
        read_lines = readable(_split(_standard_input(), "line", card.has_pairs), say)
        return _not_empty(same.checked(card, read_lines)), None

    def read(say: Callable[[str], None] = lambda sentence: None) -> Iterator[Example]:
        assert file is not None
        if kind_of(file) in SUFFIXES:
            rows = iterate_examples(file, columns, needs_label=False, allows_empty=True)
            return same.checked(card, with_known_labels(readable(rows, say), card))
        return same.checked(card, _split(_lines(file), f"line of {file}", card.has_pairs))

    total = 0
    for example in read(say):
        total += 1
        if (example.pair is not None) != card.has_pairs:
            raise UsageError(f"{file}: the adapter reads {_count(card.has_pairs)} a row")
    if not total:
        raise UsageError("no text: the input is empty")
    return read(), total


def _not_empty(examples: Iterator[Example]) -> Iterator[Example]:
    """The examples; raises UsageError at once where there are none."""
    from ..training import UsageError

    first = next(examples, None)
    if first is None:
        raise UsageError("no text: the input is empty")
    return chain((first,), examples)


def _split(lines: Iterable[str], origin: str, has_pairs: bool) -> Iterator[Example]:
    from ..training import Example, UsageError

    for number, line in enumerate(lines, start=1):
        parts = line.split("\t") if has_pairs else [line]
        if len(parts) != 1 + has_pairs:
            raise UsageError(
                f"{origin} {number}: the adapter reads {_count(has_pairs)}, separated by a tab"
            )
        yield Example(parts[0], parts[1] if has_pairs else None, None, f"{origin} {number}")


def _lines(file: Path) -> Iterator[str]:
    """Lines as other tools count them; str.splitlines would also cut at U+2028 and its like."""
    from ..training import UsageError

    try:
        with file.open(encoding="utf-8-sig") as opened:
            for line in opened:
                yield line.removesuffix("\n")
    except FileNotFoundError as error:
        raise UsageError(f"{file}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read as UTF-8 text ({error})") from error


def _standard_input() -> Iterator[str]:
    from ..training import UsageError

    try:
        for line in sys.stdin:
            yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input: cannot be read as {error.encoding} text") from error


def _count(has_pairs: bool) -> str:
    return "two texts" if has_pairs else "one text"


def _lines_of(part: Predictions, as_json: bool) -> Iterator[str]:
    # Outside Unicode a console's escapes are not JSON's.
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    for example, prediction in zip(part.examples, part.rows, strict=True):
        if not as_json:
            shown = " | ".join(text for text in example.content if text is not None)
            yield "\t".join((*prediction.columns, shown)) + "\n"
            continue
        row: dict[str, Any] = {"text": example.text}
        if example.pair is not None:
            row["text_pair"] = example.pair
        if example.label is not None:
            row["expected"] = example.label
        yield json.dumps(row | prediction.fields, ensure_ascii=not is_unicode) + "\n"


@dataclass
class _Counts:
    """The numbers of the remarks at the end."""

    tally: Tally
    texts: int = 0
    truncated: int = 0
    empty: int = 0
    labelled: int = 0

    def add(self, part: Predictions) -> None:
        self.texts += len(part.rows)
        self.truncated += part.truncated
        for example, prediction in zip(part.examples, part.rows, strict=True):
            self.empty += not any((text or "").strip() for text in example.content)
            if example.label is not None:
                self.labelled += 1
                self.tally.add(example, prediction)

    def remarks(self, longest: int) -> Iterator[str]:
        if self.truncated:
            yield f"{self.truncated} texts are longer than {longest} tokens and were cut"
        if self.empty:
            yield f"{self.empty} texts are empty: their answer comes from the special tokens alone"
        if self.labelled:
            rest = self.texts - self.labelled
            yield (
                f"{self.tally.sentence()} on {self.labelled} labelled "
                f"texts{f'; {rest} are without a label' if rest else ''}"
            )

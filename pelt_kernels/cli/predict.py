"""`pelt-kernels predict`"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Debug, notes, speaking_plainly

if TYPE_CHECKING:
    from ..training import Example, Prediction


def predict(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; without any, lines of --file or stdin.")
    ] = None,
    adapter: Annotated[Path, typer.Option(help="The folder adapter/ that training left.")] = Path(
        "adapter"
    ),
    pair: Annotated[
        list[str] | None, typer.Option(help="The second text of each text, in the same order.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="CSV, TSV or JSONL with columns, else lines of text.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Default text, sentence, ...")] = None,
    pair_column: Annotated[str | None, typer.Option(help="The second text's column.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Where there are labels, the accuracy is told.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    model: Annotated[
        str | None, typer.Option(help="The base model, where it has moved since training.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    backend: Annotated[str | None, typer.Option(help="Ask every operator for one backend.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    debug: Debug = False,
) -> None:
    """Label texts with a trained adapter: label, probability and text, separated by tabs.

    The two texts of a pair stand in one line, separated by a tab.
    """
    with speaking_plainly(debug):
        from ..ops import BACKENDS, use_backend
        from ..training import Predictor
        from ..training.config import check_choice
        from ..training.experiment import computing_device
        from ..training.predictor import Card
        from ..training.tasks import check_labels

        card = Card.load(adapter)
        examples = _examples(
            texts, pair, file, (text_column, pair_column, label_column), card.has_pairs
        )
        check_labels(examples, card.labels)
        where = computing_device(device)
        if backend is not None:
            check_choice("backend", backend, tuple(BACKENDS))
        with use_backend(backend) if backend else nullcontext():
            predictions = Predictor(adapter, model, where)(examples, batch_size)
        _print(examples, predictions.rows, as_json)
        _remark(examples, predictions.rows, predictions.truncated, card.max_length)


def _examples(
    texts: list[str] | None,
    pairs: list[str] | None,
    file: Path | None,
    columns: tuple[str | None, str | None, str | None],
    has_pairs: bool,
) -> list[Example]:
    from ..training import Example, UsageError
    from ..training.tasks import Columns, read_examples
    from ..training.tasks.files import SUFFIXES

    if texts and file:
        raise UsageError("give texts or --file, not both")
    if pairs and not texts:
        raise UsageError("--pair goes with texts on the command line")
    if texts and pairs:
        if len(texts) != len(pairs):
            raise UsageError(
                f"expected one --pair for each of {len(texts)} texts, got {len(pairs)}"
            )
        lines = [f"{text}\t{second}" for text, second in zip(texts, pairs, strict=True)]
        origin = "argument"
    elif texts:
        lines, origin = texts, "argument"
    elif file is None:
        if sys.stdin.isatty():
            raise UsageError("no text: give texts, --file, or lines on standard input")
        lines, origin = _lines(sys.stdin.read()), "line"
    elif file.suffix.lower() in SUFFIXES:
        examples = read_examples(file, Columns(*columns), needs_label=False, allows_empty=True)
        if (examples[0].pair is not None) != has_pairs:
            raise UsageError(f"{file}: the adapter reads {_count(has_pairs)} a row")
        return examples
    else:
        lines, origin = _lines(_read(file)), f"line of {file}"
    if not lines:
        raise UsageError("no text: the input is empty")
    split = [line.split("\t") if has_pairs else [line] for line in lines]
    for number, parts in enumerate(split, start=1):
        if len(parts) != 1 + has_pairs:
            raise UsageError(
                f"{origin} {number}: the adapter reads {_count(has_pairs)}, separated by a tab"
            )
    return [
        Example(parts[0], parts[1] if has_pairs else None, None, f"{origin} {number}")
        for number, parts in enumerate(split, start=1)
    ]


def _lines(text: str) -> list[str]:
    """Lines as other tools count them; str.splitlines would also cut at U+2028 and its like."""
    return text.removesuffix("\n").split("\n") if text else []


def _read(file: Path) -> str:
    from ..training import UsageError

    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{file}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read as UTF-8 text ({error})") from error


def _count(has_pairs: bool) -> str:
    return "two texts" if has_pairs else "one text"


def _print(examples: Sequence[Example], predictions: Sequence[Prediction], as_json: bool) -> None:
    for example, prediction in zip(examples, predictions, strict=True):
        if not as_json:
            shown = " | ".join(part for part in example.content if part is not None)
            print(f"{prediction.label}\t{prediction.probability:.4f}\t{shown}")
            continue
        row = {"text": example.text}
        if example.pair is not None:
            row["text_pair"] = example.pair
        if example.label is not None:
            row["expected"] = example.label
        scores = {"probability": prediction.probability, "probabilities": prediction.probabilities}
        print(json.dumps(row | {"label": prediction.label} | scores, ensure_ascii=False))


def _remark(
    examples: Sequence[Example], predictions: Sequence[Prediction], truncated: int, longest: int
) -> None:
    console = notes()
    if truncated:
        console.print(f"{truncated} texts are longer than {longest} tokens and were cut")
    empty = sum(not any((part or "").strip() for part in example.content) for example in examples)
    if empty:
        console.print(f"{empty} texts are empty: their label comes from the special tokens alone")
    expected = [example.label for example in examples]
    if None not in expected:
        right = sum(a == b.label for a, b in zip(expected, predictions, strict=True))
        console.print(f"accuracy {right / len(expected):.4f} on {len(expected)} labelled texts")

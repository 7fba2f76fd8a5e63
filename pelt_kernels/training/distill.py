"""Sentence-level distillation: a file whose targets are what a trained model writes.

Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016; VLM (Lin et al. 2020) trains its
adapters for translation and summaries on such files, whose targets a fully tuned model wrote
greedily.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..methods import parts_of
from ..models import PeltModel
from .base_model import load_writer, load_writing_tokenizer, longest_text
from .encode import Form
from .errors import RunError, UsageError, reason
from .storage import claimed, replacing
from .tasks import Example
from .texts import TextWriter

SUFFIXES = (".csv", ".tsv", ".jsonl")
_PART = "targets.jsonl"  # in a folder beside the output: what was written so far


@dataclass(frozen=True)
class Writing:
    """How targets are written.

    Attributes:
        model: the model's folder or hub id.
        adapter: a folder that `PeltModel.save_pretrained` wrote, or None.
        task: the task of an adapter for several, or None.
        prefix: what stands in front of each text, such as ``"translate English to German: "``.
        max_new_tokens: the longest target; the paper's is 150.
    """

    model: str
    adapter: Path | None = None
    task: str | None = None
    prefix: str = ""
    max_new_tokens: int = 150


class Writer:
    """Writes a target for each text, greedily; what it reads is laid out as in training
    (`pelt_kernels.training.texts`).

    Raises:
        UsageError: a model that does not write, an unknown task. RunError: the model or the adapter
            cannot be loaded.
    """

    def __init__(self, writing: Writing, device: str = "cpu") -> None:
        self.writing = writing
        model = load_writer(writing.model)
        is_causal = not model.config.is_encoder_decoder
        if writing.adapter is not None:
            try:
                model = PeltModel.from_pretrained(model, writing.adapter)
            except (ValueError, OSError) as error:
                raise RunError(
                    f"adapter {writing.adapter} cannot be used: {reason(error)}"
                ) from error
        _set_task(model, writing.task)
        tokenizer = load_writing_tokenizer(writing.model)
        longest = longest_text(writing.model, tokenizer)
        # A decoder alone reads the source, an end, and what it writes.
        self.max_length = longest - writing.max_new_tokens - 1 if is_causal else longest
        if self.max_length < 1:
            raise UsageError(
                f"max-new-tokens: expected fewer than the {longest} tokens that the model reads, "
                f"got {writing.max_new_tokens}"
            )
        form = Form(tokenizer, self.max_length, is_causal=is_causal)
        self.writer = TextWriter(model.to(device).eval(), form, 1, writing.max_new_tokens)
        self.truncated = 0

    def __call__(self, texts: list[str]) -> list[str]:
        """The targets, in order."""
        examples = [Example(self.writing.prefix + text, None, None, "") for text in texts]
        targets, truncated = self.writer(examples, len(texts))
        self.truncated += truncated
        return targets


def _set_task(model: Any, task: str | None) -> None:
    """Has the model write for a task. Raises UsageError."""
    known = parts_of(model.method_config).tasks if isinstance(model, PeltModel) else ()
    if task is None and len(known) > 1:
        raise UsageError(f"task: expected one of the adapter's ({', '.join(known)}), got none")
    if task is not None and task not in known:
        raise UsageError(
            f"task: expected one of the adapter's ({', '.join(known) or 'it has none'}), got "
            f"'{task}'"
        )
    if task is not None:
        model.set_task(task)


def distill(
    source: Path,
    output: Path,
    write: Callable[[list[str]], list[str]],
    *,
    text_column: str = "source",
    target_column: str = "target",
    settings: dict[str, Any] | None = None,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes `output`, the rows of `source` with other targets, and gives their number.

    The output appears whole, at the end. Until then targets are kept in a folder beside it, batch
    by batch, and a call that was broken off is taken up by the next with the same source and
    settings.

    Args:
        source, output: CSV, TSV or JSON Lines, both the same.
        write: the targets of some texts.
        settings: what the targets depend on besides the source, as JSON has it.
        advance: called with the number of rows done since the last call.

    Raises:
        UsageError: a missing or damaged file, an absent column, an output that is there.
        RunError: the output cannot be written, another process writes it, or the source was changed
            meanwhile.
    """
    _check(source, output)
    columns = (text_column, target_column)
    total = sum(1 for _ in _rows(source, columns))
    if not total:
        raise UsageError(f"{source}: the file holds no rows")
    identity = {"source": _digest(source), "columns": list(columns), **(settings or {})}
    folder = output.with_name(f"{output.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output: {folder} cannot be written ({error.strerror})") from error
    with claimed(folder):
        part = folder / _PART
        done = _taken_up(part, identity)
        advance(done)
        texts = (row[text_column] for row in _rows(source, columns))
        _write_targets(part, islice(texts, done, None), write, batch_size, advance)
        _put_together(source, output, columns, part, total)
    shutil.rmtree(folder)
    return total


def _write_targets(
    part: Path,
    texts: Iterator[str],
    write: Callable[[list[str]], list[str]],
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    try:
        with part.open("a", encoding="utf-8") as file:
            while batch := list(islice(texts, batch_size)):
                for target in write(batch):
                    file.write(json.dumps(target) + "\n")
                file.flush()
                advance(len(batch))
    except OSError as error:
        raise RunError(f"{part} cannot be written: {error.strerror or error}") from error


def _put_together(
    source: Path, output: Path, columns: tuple[str, str], part: Path, total: int
) -> None:
    with part.open(encoding="utf-8") as file, replacing(output) as partial:
        next(file)  # the identity
        targets = (json.loads(line) for line in file)
        count = _write_rows(source, partial, output.suffix.lower(), columns, targets)
        if count != total:
            raise RunError(f"{source}: expected {total} rows as at the start, got {count}")


def _taken_up(part: Path, identity: dict[str, Any]) -> int:
    """How many targets are written already, of the same source with the same settings; else the
    file begins anew. A last line that was cut short goes.
    """
    head = json.dumps(identity, sort_keys=True).encode() + b"\n"
    content = part.read_bytes() if part.is_file() else b""
    if not content.startswith(head):
        part.write_bytes(head)
        return 0
    whole = content[: content.rindex(b"\n") + 1]
    if whole != content:
        part.write_bytes(whole)
    return whole.count(b"\n") - 1


def _check(source: Path, output: Path) -> None:
    if not source.is_file():
        raise UsageError(f"{source}: there is no such file")
    suffix = source.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{source}: expected a name ending in {', '.join(SUFFIXES)}")
    if output.suffix.lower() != suffix:
        raise UsageError(f"output: expected a name ending in {suffix} as {source}, got {output}")
    if output.exists():
        raise UsageError(f"output: {output} is there already; name another file")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _rows(source: Path, columns: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """The rows by column. Raises UsageError, naming the line."""
    suffix = source.suffix.lower()
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            rows = _json_rows(file, source) if suffix == ".jsonl" else _table(file, source, suffix)
            for number, row in rows:
                missing = [name for name in columns if name not in row]
                if missing:
                    raise UsageError(
                        f"line {number} of {source}: there is no column '{missing[0]}' among "
                        f"{', '.join(map(str, row))}"
                    )
                if not isinstance(row[columns[0]], str) or not row[columns[0]].strip():
                    raise UsageError(f"line {number} of {source}: expected text in '{columns[0]}'")
                yield row
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: expected UTF-8 ({error.reason})") from error


def _json_rows(file: Any, source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number} of {source}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UsageError(f"line {number} of {source}: expected an object")
        yield number, row


def _table(file: Any, source: Path, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file, **_dialect(suffix))
    try:
        names = next(reader, [])
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise UsageError(
                    f"line {reader.line_num} of {source}: expected {len(names)} fields, got "
                    f"{len(row)}"
                )
            yield reader.line_num, dict(zip(names, row))
    except csv.Error as error:
        raise UsageError(f"line {reader.line_num} of {source}: {error}") from error


def _dialect(suffix: str) -> dict[str, Any]:
    """How a table is read and written; in TSV quotation marks are text."""
    if suffix == ".csv":
        return {"strict": True}
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}


def _write_rows(
    source: Path,
    path: Path,
    suffix: str,
    columns: tuple[str, str],
    targets: Iterator[str],
) -> int:
    """The rows with the targets in their place; how many."""
    count = 0
    table: Any = None
    with path.open("w", encoding="utf-8", newline="") as file:
        for row, target in zip(_rows(source, columns), targets):
            count += 1
            if suffix == ".jsonl":
                file.write(json.dumps(row | {columns[1]: target}, ensure_ascii=False) + "\n")
                continue
            if table is None:
                table = csv.writer(file, lineterminator="\n", **_dialect(suffix))
                table.writerow(row)
            # A tab or a line end in a field would end it in TSV.
            plain = re.sub(r"[\t\r\n]+", " ", target) if suffix == ".tsv" else target
            table.writerow((row | {columns[1]: plain}).values())
    return count

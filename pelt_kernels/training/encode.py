"""From examples to batches: token ids, and an order in which neighbours have like lengths."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, Dataset, Sampler

from .tasks import ATTRIBUTES, NO_CONDITIONS, TASKS, Conditions, Example


@dataclass(frozen=True)
class Form:
    """What decides how the examples of a task become batches.

    Attributes:
        max_length: tokens of a text, the special ones among them.
        max_target_length: tokens of a target with its end.
        is_causal: whether a target is written by a decoder alone, which reads the source before it.
    """

    tokenizer: Any
    max_length: int
    labels: tuple[str, ...] = ()
    conditions: Conditions = NO_CONDITIONS
    max_target_length: int = 0
    is_causal: bool = False


@dataclass(frozen=True)
class Encoded(Dataset[dict[str, Any]]):
    """Examples as token ids."""

    rows: list[dict[str, Any]]
    truncated: int  # how many texts were cut
    cut_targets: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self.rows]


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    number: Callable[[Example], Any] | None = None,
    conditions: Conditions = NO_CONDITIONS,
) -> Encoded:
    """Tokenises examples, truncating to `max_length` (the longer text of a pair first); labels as
    `number` makes them of labelled examples.
    """
    if not examples:
        return Encoded([], 0)
    texts = [example.text for example in examples]
    pairs = None if examples[0].pair is None else [example.pair or "" for example in examples]
    # One pass without a limit tells which rows are cut; its warning would only repeat our note.
    batch = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    full = tokenizer(texts, pairs, truncation=False, verbose=False)
    both = zip(batch["input_ids"], full["input_ids"], strict=True)
    truncated = sum(len(cut) < len(whole) for cut, whole in both)
    rows = []
    for index, example in enumerate(examples):
        row = {name: values[index] for name, values in batch.items()}
        if number is not None:
            row["labels"] = number(example)
        row |= conditions.numbers(example)
        rows.append(row)
    return Encoded(rows, truncated)


@dataclass(frozen=True)
class Pad:
    """Collates rows by padding each batch to its own longest row; `batch_labels` makes a tensor of
    their labels.
    """

    tokenizer: Any
    batch_labels: Callable[[list[Any]], torch.Tensor] = torch.tensor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        labels = [row["labels"] for row in rows if "labels" in row]
        inputs = [without(row, "labels", ATTRIBUTES, TASKS) for row in rows]
        batch = dict(self.tokenizer.pad(inputs, padding=True, return_tensors="pt"))
        if labels:
            batch["labels"] = self.batch_labels(labels)
        return batch | condition_tensors(rows)


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """The row without some of its values."""
    return {name: value for name, value in row.items() if name not in names}


def condition_tensors(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``attributes`` {name: [B]} and ``tasks`` [B], int64, as far as the rows have them."""
    made: dict[str, Any] = {}
    if ATTRIBUTES in rows[0]:
        names = rows[0][ATTRIBUTES]
        made[ATTRIBUTES] = {
            name: torch.tensor([row[ATTRIBUTES][name] for row in rows]) for name in names
        }
    if TASKS in rows[0]:
        made[TASKS] = torch.tensor([row[TASKS] for row in rows])
    return made


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch there, the tensors of its dictionaries as well."""
    return {
        name: on_device(value, device) if isinstance(value, dict) else value.to(device)
        for name, value in batch.items()
    }


class LengthGroups(Sampler[int]):
    """An order for each epoch in which the `batch_size` rows of a batch have like lengths.

    Rows are shuffled, cut into pools of `POOL` batches, sorted by length within a pool, and the
    batches are shuffled again. The order is a function of seed and epoch alone, so that a resumed
    epoch continues in the same order.
    """

    POOL = 16

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"order {self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        size = self.batch_size * self.POOL
        pools = (
            sorted(order[at : at + size], key=self.lengths.__getitem__)
            for at in range(0, len(order), size)
        )
        grouped = [index for pool in pools for index in pool]
        batches = [
            grouped[at : at + self.batch_size] for at in range(0, len(grouped), self.batch_size)
        ]
        # A short batch stays last: elsewhere it would shift the bounds of all batches after it.
        short = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        draw.shuffle(batches)
        return iter([index for batch in batches + short for index in batch])


class Shares(BatchSampler):
    """The rows that one of several processes has in each batch: every n-th, so that the processes'
    rows have like lengths. A batch with fewer rows than processes goes whole to each of them.
    """

    def __init__(self, order: Sampler[int], batch_size: int, process: int, processes: int):
        super().__init__(order, batch_size, drop_last=False)
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            is_whole = len(batch) < self.processes
            yield batch if is_whole else batch[self.process :: self.processes]

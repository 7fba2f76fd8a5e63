"""From examples to batches: token ids, and an order in which neighbours have like lengths."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from .tasks import Example


@dataclass(frozen=True)
class Encoded(Dataset[dict[str, Any]]):
    """Examples as token ids."""

    rows: list[dict[str, Any]]
    truncated: int  # how many were cut

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
        rows.append(row)
    return Encoded(rows, truncated)


@dataclass(frozen=True)
class Pad:
    """Collates rows by padding each batch to its own longest row; `batch_labels` makes a tensor of
    their labels.
    """

    tokenizer: Any
    batch_labels: Callable[[list[Any]], torch.Tensor] = torch.tensor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [row["labels"] for row in rows if "labels" in row]
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, padding=True, return_tensors="pt"))
        if labels:
            batch["labels"] = self.batch_labels(labels)
        return batch


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

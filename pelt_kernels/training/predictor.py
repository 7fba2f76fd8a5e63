"""Answers to texts, of a trained adapter in its base model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ..methods import parts_of
from ..models import PeltModel
from .base_model import load_classifier, load_tokenizer, longest_text
from .encode import Pad, encode
from .errors import RunError, UsageError, reason
from .problems import PROBLEMS, Answer
from .records import read_record
from .storage import write_json
from .tasks import CLASSIFICATION, REGRESSION, SEPARATOR, Example

FILE = "task.json"
POOL = 32  # batches whose rows are sorted by length together


@dataclass(frozen=True)
class Card:
    """What is stored beside an adapter's weights, in `task.json`: task, labels, base model, and
    what the labels are.
    """

    task: str
    model: str
    labels: tuple[str, ...]
    has_pairs: bool
    max_length: int
    problem: str = CLASSIFICATION
    label_separator: str = SEPARATOR

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Card:
        """Raises UsageError where there is no adapter, RunError where its card is damaged."""
        if not folder.is_dir():
            raise UsageError(f"adapter: there is no folder {folder}")
        path = folder / FILE
        if not path.is_file():
            raise UsageError(f"adapter: {folder} holds no trained adapter ({FILE} is missing)")
        types = get_type_hints(cls)
        later = [field.name for field in fields(cls) if field.default is not MISSING]
        values = read_record(path, types, "adapter", optional=later)
        values = {name: values[name] for name in types if name in values}
        card = cls(**values | {"labels": tuple(values["labels"])})
        card._check(path)
        return card

    def _check(self, path: Path) -> None:
        """Raises RunError where values do not go together."""
        if self.problem not in PROBLEMS:
            raise RunError(
                f"adapter: {path} is damaged (expected problem as one of {', '.join(PROBLEMS)}, "
                f"got {self.problem!r:.80})"
            )
        fewest = 0 if self.problem == REGRESSION else 2
        if len(set(self.labels)) < max(fewest, len(self.labels)) or self.max_length < 1:
            raise RunError(
                f"adapter: {path} is damaged (expected different labels, two at least, and "
                f"max_length >= 1, got {self.labels!r:.80} and {self.max_length})"
            )


def load_tuned(folder: Path, card: Card, name: str) -> PeltModel:
    """The base model of a name with the adapter in it. Raises RunError where they do not fit."""
    problem = PROBLEMS[card.problem]
    base = load_classifier(name, problem.outputs(card.labels), problem.head)
    try:
        return PeltModel.from_pretrained(base, folder)
    except (ValueError, OSError) as error:
        raise RunError(f"adapter {folder} cannot be used: {reason(error)}") from error


@dataclass(frozen=True)
class Predictions:
    """Examples with one answer to each, in order, and how many texts were cut to the longest
    length.
    """

    examples: list[Example]
    rows: list[Any]  # of the answers of the card's problem
    truncated: int


class Predictor:
    """Answers texts with a saved adapter: classes, scores or sets of labels, as it was trained.

    Args:
        folder: the adapter, as training leaves it.
        model: the base model where it is not the one named in the adapter's card.
        device: where to compute.

    Raises:
        UsageError: no adapter there. RunError: damaged, of another architecture, or the base model
            cannot be loaded.
    """

    def __init__(self, folder: Path, model: str | None = None, device: str = "cpu"):
        self.card = Card.load(folder)
        self.problem = PROBLEMS[self.card.problem]
        name = model or self.card.model
        tuned = load_tuned(folder, self.card, name)
        self.model: torch.nn.Module = tuned.to(device).eval()
        if parts_of(tuned.method_config).pruning is not None and not tuned.why_not_dense():
            # PST's forward computes the pruned weights again, which for one text takes longer than
            # the rest of the model. Here they never change.
            self.model = tuned.export_dense()
        self.tokenizer = load_tokenizer(name)
        self.max_length = min(self.card.max_length, longest_text(name, self.tokenizer))

    def __call__(self, examples: Iterable[Example], batch_size: int = 32) -> Predictions:
        """The answers to the examples. An empty text is the model's special tokens alone."""
        parts = list(self.stream(examples, batch_size))
        return Predictions(
            [example for part in parts for example in part.examples],
            [row for part in parts for row in part.rows],
            sum(part.truncated for part in parts),
        )

    def stream(
        self,
        examples: Iterable[Example],
        batch_size: int = 32,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Predictions]:
        """The same, some batches at a time in the order of the examples, which may be more than fit
        into memory. `advance` is called with the number of those done since the last call.
        """
        rest = iter(examples)
        while part := list(islice(rest, batch_size * POOL)):
            yield self._predict(part, batch_size, advance)

    def _predict(
        self, examples: list[Example], batch_size: int, advance: Callable[[int], None]
    ) -> Predictions:
        encoded = encode(examples, self.tokenizer, self.max_length)
        pad = Pad(self.tokenizer)
        lengths = encoded.lengths
        order = sorted(range(len(encoded)), key=lengths.__getitem__)  # little padding per batch
        by_index: dict[int, Answer] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            logits = self._logits(pad([encoded[index] for index in chosen]))
            answers = self.problem.answers(logits, self.card.labels)
            by_index.update(zip(chosen, answers, strict=True))
            advance(len(chosen))
        rows = [by_index[index] for index in range(len(encoded))]
        return Predictions(examples, rows, encoded.truncated)

    @torch.inference_mode()
    def _logits(self, batch: dict[str, Any]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        return self.model(
            **{name: value.to(device) for name, value in batch.items()}
        ).logits.float()

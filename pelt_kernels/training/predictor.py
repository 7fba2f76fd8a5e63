"""Answers to texts, of a trained adapter in its base model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ..methods import parts_of
from ..models import PeltModel
from .base_model import longest_text
from .encode import Form, Pad, encode
from .errors import RunError, UsageError, reason
from .problems import PROBLEMS, Answer, HeadProblem, Text
from .records import read_record
from .storage import write_json
from .tasks import (
    CLASSIFICATION,
    GENERATION,
    REGRESSION,
    SEPARATOR,
    Conditions,
    Example,
)
from .texts import TextWriter

FILE = "task.json"
POOL = 32  # batches whose rows are sorted by length together
WRITING_POOL = 4  # the same of texts that are written, which takes longer


@dataclass(frozen=True)
class Card:
    """What is stored beside an adapter's weights, in `task.json`: task, labels, base model, and
    what the labels are; the labels of attributes by name, with the columns that held them, and the
    names of tasks; how long a text is written, and with how many beams.
    """

    task: str
    model: str
    labels: tuple[str, ...]
    has_pairs: bool
    max_length: int
    problem: str = CLASSIFICATION
    label_separator: str = SEPARATOR
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attribute_columns: dict[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    task_column: str | None = None
    max_target_length: int = 0
    beams: int = 1

    @property
    def conditions(self) -> Conditions:
        return Conditions(tuple(self.attributes.items()), self.tasks)

    def form(self, tokenizer: Any, max_length: int, is_causal: bool) -> Form:
        return Form(
            tokenizer, max_length, self.labels, self.conditions, self.max_target_length, is_causal
        )

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
        later = [
            each.name
            for each in fields(cls)
            if each.default is not MISSING or each.default_factory is not MISSING
        ]
        values = read_record(path, types, "adapter", optional=later)
        values = {name: values[name] for name in types if name in values}
        attributes = values.get("attributes", {})
        tuples = {
            "labels": tuple(values["labels"]),
            "tasks": tuple(values.get("tasks", ())),
            "attributes": {name: tuple(labels) for name, labels in attributes.items()},
        }
        card = cls(**values | tuples)
        card._check(path)
        return card

    def _check(self, path: Path) -> None:
        """Raises RunError where values do not go together."""
        if self.problem not in PROBLEMS:
            raise RunError(
                f"adapter: {path} is damaged (expected problem as one of {', '.join(PROBLEMS)}, "
                f"got {self.problem!r:.80})"
            )
        is_writer = self.problem == GENERATION
        if is_writer and min(self.max_target_length, self.beams) < 1:
            raise RunError(
                f"adapter: {path} is damaged (expected max_target_length and beams >= 1, got "
                f"{self.max_target_length} and {self.beams})"
            )
        fewest = 0 if is_writer or self.problem == REGRESSION else 2
        if len(set(self.labels)) < max(fewest, len(self.labels)) or self.max_length < 1:
            raise RunError(
                f"adapter: {path} is damaged (expected different labels, two at least, and "
                f"max_length >= 1, got {self.labels!r:.80} and {self.max_length})"
            )


def load_tuned(folder: Path, card: Card, name: str) -> PeltModel:
    """The base model of a name with the adapter in it. Raises RunError where they do not fit."""
    base = PROBLEMS[card.problem].load(name, card.labels)
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
    """Answers texts with a saved adapter: classes, scores, sets of labels or texts, as it was
    trained.

    Args:
        folder: the adapter, as training leaves it.
        model: the base model where it is not the one named in the adapter's card.
        device: where to compute.
        beams: of a model that writes; None is the number of its training.
        max_new_tokens: its longest text; None is the longest target of its training.

    Raises:
        UsageError: no adapter there. RunError: damaged, of another architecture, or the base model
            cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        model: str | None = None,
        device: str = "cpu",
        *,
        beams: int | None = None,
        max_new_tokens: int | None = None,
    ):
        self.card = Card.load(folder)
        self.problem = PROBLEMS[self.card.problem]
        name = model or self.card.model
        tuned = load_tuned(folder, self.card, name)
        self.model: torch.nn.Module = tuned.to(device).eval()
        if parts_of(tuned.method_config).pruning is not None and not tuned.why_not_dense():
            # PST's forward computes the pruned weights again, which for one text takes longer than
            # the rest of the model. Here they never change.
            self.model = tuned.export_dense()
        self.tokenizer = self.problem.tokenizer(name)
        self.max_length = min(self.card.max_length, longest_text(name, self.tokenizer))
        is_causal = not tuned.config.is_encoder_decoder
        self.form = self.card.form(self.tokenizer, self.max_length, is_causal)
        self.writer = TextWriter(
            self.model,
            self.form,
            self.card.beams if beams is None else beams,
            self.card.max_target_length if max_new_tokens is None else max_new_tokens,
        )

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
        pool = POOL if isinstance(self.problem, HeadProblem) else WRITING_POOL
        while part := list(islice(rest, batch_size * pool)):
            yield self._predict(part, batch_size, advance)

    def _predict(
        self, examples: list[Example], batch_size: int, advance: Callable[[int], None]
    ) -> Predictions:
        if not isinstance(self.problem, HeadProblem):
            texts, truncated = self.writer(examples, batch_size, advance)
            return Predictions(examples, [Text(text) for text in texts], truncated)
        conditions = self.form.conditions
        encoded = encode(examples, self.tokenizer, self.max_length, conditions=conditions)
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

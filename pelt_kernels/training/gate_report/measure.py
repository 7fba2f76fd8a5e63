"""Forwards of a model over the same rows again and again, with its gates as they are or altered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models import PeltModel
from ..encode import Form, on_device
from ..problems import HeadProblem
from ..tasks import Example

Gate = tuple[int, str]  # the layer and the kind
Rule = Callable[[int, str, Tensor], Tensor]
RuleOfRows = Callable[[Tensor], Rule]  # the rule for a batch, from the numbers of its rows [B]


@dataclass(frozen=True)
class Outcome:
    """What a model makes of n rows, in their order.

    Attributes:
        logits: [n, C], float32; labels: [n] or [n, C], as the problem has them.
        loss: [n]. confidence: [n], or None where the problem has none.
        right: [n] bool, or None.
        gates: [n, K] of the K gates in `names`, pooled over the real tokens.
    """

    problem: HeadProblem
    logits: np.ndarray
    labels: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray | None
    right: np.ndarray | None
    names: tuple[Gate, ...]
    gates: np.ndarray

    def score(self, metric: str, rows: np.ndarray | slice = slice(None)) -> float:
        """A metric of the problem, of some rows."""
        judged = SimpleNamespace(predictions=self.logits[rows], label_ids=self.labels[rows])
        return self.problem.score_logits(judged)[metric]


class Rows:
    """Labelled examples as batches of like lengths.

    Attributes:
        lengths: tokens of each text, the special ones among them, [n].
        labels: as the problem has them, [n] or [n, C].
        truncated: how many texts were cut.
    """

    def __init__(
        self,
        problem: HeadProblem,
        examples: Sequence[Example],
        form: Form,
        batch_size: int,
        device: str,
    ) -> None:
        encoded = problem.encoded(examples, form)
        self.problem, self.device, self.truncated = problem, torch.device(device), encoded.truncated
        self.lengths = np.array(encoded.lengths)
        self._labels = problem.batch([row["labels"] for row in encoded.rows])
        self.labels = self._labels.numpy()
        order = np.argsort(self.lengths, kind="stable")  # little padding per batch
        self._order = torch.from_numpy(order)
        collate = problem.collator(form)
        self._batches = []
        for rows in self._order.split(batch_size):
            batch: dict[str, Any] = collate([encoded.rows[row] for row in rows.tolist()])
            del batch["labels"]
            self._batches.append((rows, batch))

    def __len__(self) -> int:
        return len(self.lengths)

    @torch.inference_mode()
    def outcome(
        self,
        model: torch.nn.Module,
        rule: RuleOfRows | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Outcome:
        """What the model makes of the rows, its gates altered by a rule where one is given.

        Logits and gates stay on the device until the last batch is under way, so no batch waits for
        the one before it.
        """
        tuned = model if isinstance(model, PeltModel) else None
        recorder = _Recorder(tuned if rule is None else None)
        parts = []
        try:
            for rows, batch in self._batches:
                batch = on_device(batch, self.device)
                if rule is not None and tuned is not None:
                    tuned.set_gate_rule(rule(rows.to(self.device)))
                logits = model(**batch).logits.float()
                parts.append(torch.cat([logits, *recorder.columns(batch)], dim=1))
                advance(len(rows))
        finally:
            recorder.stop()
            if rule is not None and tuned is not None:
                tuned.set_gate_rule(None)
        return self._assembled(torch.cat(parts).cpu(), recorder.names)

    def _assembled(self, found: Tensor, names: tuple[Gate, ...]) -> Outcome:
        """From rows in the order of the batches."""
        values = torch.empty_like(found)
        values[self._order] = found
        logits, gates = values.tensor_split([values.shape[1] - len(names)], dim=1)
        confidence = self.problem.confidence(logits)
        return Outcome(
            self.problem,
            logits.numpy(),
            self.labels,
            self.problem.losses(logits, self._labels).double().numpy(),
            None if confidence is None else confidence.double().numpy(),
            self.problem.right(logits.numpy(), self.labels),
            names,
            gates.double().numpy(),
        )


class _Recorder:
    """Reads the gates of a model's forwards; without a model there are none."""

    def __init__(self, model: PeltModel | None) -> None:
        self.model = model
        self.names: tuple[Gate, ...] = ()
        if model is not None:
            model.record_gates(True)

    def columns(self, batch: dict[str, Any]) -> list[Tensor]:
        """The gates of the latest forward as columns [B, 1]."""
        if self.model is None:
            return []
        found = self.model.gate_values()
        self.names = tuple(sorted(found, key=lambda gate: (gate[1], gate[0])))
        mask = batch.get("attention_mask")
        return [_pooled(found[name], mask).unsqueeze(1) for name in self.names]

    def stop(self) -> None:
        if self.model is not None:
            self.model.record_gates(False)


def _pooled(gate: Tensor, mask: Tensor | None) -> Tensor:
    """A gate [B], or the mean over the real tokens of [B, S]."""
    gate = gate.float()
    if gate.ndim == 1:
        return gate
    if mask is None or mask.shape != gate.shape:
        return gate.mean(dim=1)
    weights = mask.to(gate.dtype)
    return (gate * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

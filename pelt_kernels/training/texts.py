"""Sources and targets as token ids, and a model that writes targets.

An encoder reads the source and its decoder the target. A decoder alone reads both as one text:
``source <end> target <end>``, with a loss on the target and its end only; what it is to go on from
is ``source <end>``. The source is cut to its longest length at its end, and so is the target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from .encode import Encoded, Form, condition_tensors, on_device, without
from .tasks import ATTRIBUTES, TASKS, Example

NO_LOSS = -100  # a label that transformers' losses leave out


def source_ids(texts: Sequence[str], form: Form) -> tuple[list[list[int]], list[bool]]:
    """What the model reads of each source, and which were cut to ``form.max_length`` tokens; a
    decoder alone reads the end of a text after them.
    """
    tokenizer = form.tokenizer
    full = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    cut = tokenizer(list(texts), truncation=True, max_length=form.max_length)["input_ids"]
    is_cut = [len(ids) < len(whole) for ids, whole in zip(cut, full, strict=True)]
    longest = form.max_length + form.is_causal
    return [_ended(ids, tokenizer.eos_token_id, longest) for ids in cut], is_cut


def target_ids(texts: Sequence[str], form: Form) -> list[list[int]]:
    """The whole targets with their end."""
    tokenizer = form.tokenizer
    encoded = tokenizer(
        text_target=list(texts), add_special_tokens=not form.is_causal, verbose=False
    )
    return [_ended(ids, tokenizer.eos_token_id) for ids in encoded["input_ids"]]


def encode_texts(examples: Sequence[Example], form: Form) -> Encoded:
    """Rows of sources and targets, the latter cut to ``form.max_target_length``."""
    if not examples:
        return Encoded([], 0)
    sources, is_cut = source_ids([example.text for example in examples], form)
    whole = target_ids([str(example.label) for example in examples], form)
    end, longest = form.tokenizer.eos_token_id, form.max_target_length
    rows = []
    for example, source, target in zip(examples, sources, whole, strict=True):
        kept = target if len(target) <= longest else [*target[: longest - 1], end]
        row: dict[str, Any] = {"input_ids": source, "labels": kept}
        if form.is_causal:
            row = {"input_ids": source + kept, "labels": [NO_LOSS] * len(source) + kept}
        row["attention_mask"] = [1] * len(row["input_ids"])
        rows.append(row | form.conditions.numbers(example))
    return Encoded(rows, sum(is_cut), sum(len(target) > longest for target in whole))


def _ended(ids: list[int], end: int, longest: int | None = None) -> list[int]:
    """The ids with the end of a text behind them, at most so many."""
    if ids and ids[-1] == end:
        return ids
    return [*(ids if longest is None else ids[: longest - 1]), end]


class TextPad:
    """Collates rows of sources and targets, as transformers does, and their conditions."""

    def __init__(self, form: Form) -> None:
        self.pad = DataCollatorForSeq2Seq(form.tokenizer, label_pad_token_id=NO_LOSS)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        conditions = condition_tensors(rows)
        plain = [without(row, ATTRIBUTES, TASKS) for row in rows]
        return dict(self.pad(plain, return_tensors="pt")) | conditions


@dataclass(frozen=True)
class TextWriter:
    """Writes a target for each example.

    Attributes:
        model: has transformers' ``generate``, which gets ``attributes`` and ``tasks`` where rows
            have them.
        beams: 1 takes the most probable word each time.
        max_new_tokens: the longest target.
    """

    model: Any
    form: Form
    beams: int
    max_new_tokens: int

    def __call__(
        self,
        examples: Sequence[Example],
        batch_size: int = 32,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[list[str], int]:
        """The texts in the order of the examples, of which equal ones are written once, and how
        many sources were cut.
        """
        different = {example.read: example for example in examples}
        uses = Counter(example.read for example in examples)
        sources, is_cut = source_ids([example.text for example in different.values()], self.form)
        rows = [
            {"input_ids": ids, **self.form.conditions.numbers(example)}
            for ids, example in zip(sources, different.values(), strict=True)
        ]
        keys = list(different)
        order = sorted(range(len(keys)), key=lambda index: len(sources[index]))
        written: dict[Any, str] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = self._written([rows[index] for index in chosen])
            written.update(zip((keys[index] for index in chosen), texts, strict=True))
            advance(sum(uses[keys[index]] for index in chosen))
        truncated = sum(uses[key] for key, cut in zip(keys, is_cut, strict=True) if cut)
        return [written[example.read] for example in examples], truncated

    @torch.inference_mode()
    def _written(self, rows: list[dict[str, Any]]) -> list[str]:
        tokenizer, form = self.form.tokenizer, self.form
        inputs = {"input_ids": [row["input_ids"] for row in rows]}
        # A decoder goes on from the last column, so what is left free stands in front.
        side = "left" if form.is_causal else "right"
        batch = dict(tokenizer.pad(inputs, padding=True, padding_side=side, return_tensors="pt"))
        device = next(self.model.parameters()).device
        ids = self.model.generate(
            **on_device(batch | condition_tensors(rows), device),
            max_new_tokens=self.max_new_tokens,
            num_beams=self.beams,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        if form.is_causal:
            ids = ids[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

"""A text for each source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import processes
from ..base_model import empty_writer, load_writer, load_writing_tokenizer
from ..encode import Encoded, Form
from ..errors import UsageError
from ..metrics import ANSWERS
from ..tasks import GENERATION, Example
from ..text_metrics import TEXT_SCORES, text_scores
from ..texts import TextPad, TextWriter, encode_texts
from ._problem import Problem


@dataclass(frozen=True)
class Text:
    """What a model writes."""

    text: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (re.sub(r"[\t\r\n]+", " ", self.text),)

    @property
    def fields(self) -> dict[str, Any]:
        return {"written": self.text}

    @property
    def tested(self) -> dict[str, Any]:
        return {"predicted": self.text}


class Generation(Problem):
    """The cross-entropy of the target's tokens, by the model's own loss."""

    name = GENERATION
    metrics = TEXT_SCORES

    def load(self, model: str, labels: Sequence[str]) -> Any:
        return load_writer(model)

    def empty(self, model: str, labels: Sequence[str]) -> Any:
        return empty_writer(model)

    def tokenizer(self, model: str) -> Any:
        return load_writing_tokenizer(model)

    def encoded(self, examples: Sequence[Example], form: Form) -> Encoded:
        return encode_texts(examples, form)

    def collator(self, form: Form) -> TextPad:
        return TextPad(form)

    def dev_scores(self, writer: TextWriter, examples: Sequence[Example]) -> dict[str, float]:
        """`metrics` on dev, and how many different texts are written; several processes share the
        writing.
        """
        texts = processes.in_shares(lambda share: writer(share)[0], examples)
        scores = self.score(examples, [Text(text) for text in texts], ())
        return scores | {ANSWERS: len(set(texts))}

    def score(
        self, examples: Sequence[Example], answers: Sequence[Text], labels: Sequence[str]
    ) -> dict[str, float]:
        """`metrics`, in which rows that differ in the target only are one text with several
        references.
        """
        references: dict[Any, list[str]] = {}
        texts: dict[Any, str] = {}
        for example, answer in zip(examples, answers, strict=True):
            references.setdefault(example.read, []).append(str(example.label))
            texts[example.read] = answer.text
        return text_scores(list(texts.values()), list(references.values()))

    def tally(self, labels: Sequence[str]) -> _Texts:
        return _Texts(self)


@dataclass
class _Texts:
    """Scores of a corpus need all of its texts."""

    problem: Generation
    examples: list[Example] = field(default_factory=list)
    answers: list[Text] = field(default_factory=list)

    def add(self, example: Example, answer: Text) -> None:
        self.examples.append(example)
        self.answers.append(answer)

    def sentence(self) -> str:
        try:
            found = self.problem.score(self.examples, self.answers, ())
        except UsageError as error:  # what was written is of use without a score
            return f"no score ({error})"
        names = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L"}
        return ", ".join(f"{names[name]} {value:.2f}" for name, value in found.items())

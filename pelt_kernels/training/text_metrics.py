"""BLEU, chrF and ROUGE-L of written texts, by the packages of the extra `generation`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any

from .errors import UsageError

TEXT_SCORES = ("bleu", "chrf", "rouge_l")


def load_scorers() -> tuple[Any, Any]:
    """The modules sacrebleu.metrics and rouge_score.rouge_scorer. Raises UsageError without one."""
    try:
        import sacrebleu.metrics
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UsageError(
            f"texts are judged with sacrebleu and rouge-score, and {error.name} is not installed; "
            "pip install 'pelt-kernels[generation]'"
        ) from error
    return sacrebleu.metrics, rouge_scorer


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU (sacrebleu's 13a tokens), chrF (chrF2) and the mean F1 of ROUGE-L (words in lower
    case, without stemming), each from 0 to 100; a text may have several references, of which
    ROUGE-L takes the nearest.
    """
    metrics, rouge_scorer = load_scorers()
    # Texts with fewer references have None for the others, which sacrebleu leaves out.
    streams = [list(stream) for stream in zip_longest(*references)]
    # force: texts in tokens are no mistake here.
    bleu = metrics.BLEU(force=True).corpus_score(list(texts), streams).score
    chrf = metrics.CHRF().corpus_score(list(texts), streams).score
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    nearest = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in several)
        for text, several in zip(texts, references, strict=True)
    ]
    return {"bleu": float(bleu), "chrf": float(chrf), "rouge_l": 100 * fmean(nearest)}

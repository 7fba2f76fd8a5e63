"""What a run learns: the head it needs, how rows become batches, and how answers are judged.

A problem is one file here and one row in `PROBLEMS`; its name is one of `tasks.PROBLEMS`.
"""

from __future__ import annotations

from ._problem import Answer, HeadProblem, Problem, Tally
from .classification import Classification, Prediction
from .generation import Generation, Text
from .multi_label import LabelSet, MultiLabel
from .regression import Regression, Score

__all__ = [
    "PROBLEMS",
    "Answer",
    "Generation",
    "HeadProblem",
    "LabelSet",
    "Prediction",
    "Problem",
    "Score",
    "Tally",
    "Text",
]

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (Classification(), Regression(), MultiLabel(), Generation())
}

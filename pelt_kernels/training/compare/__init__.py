"""Methods side by side on tasks, by the protocol of UniPELT's paper.

`comparison` does the runs of a `protocol` that are not done yet, in `workers`, each by `runs`, and
keeps their `rows`; `summary`, `tables` and `plots` say what they show.
"""

from __future__ import annotations

from .comparison import compare, report
from .protocol import Comparison, Source

__all__ = ["Comparison", "Source", "compare", "report"]

"""How many parameters are trained, stored, and work for a text at a threshold of its gates."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...models import PeltModel
from .measure import Outcome

Json = dict[str, Any]
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


def active_numbers(model: PeltModel, untouched: Outcome, lengths: np.ndarray) -> Json:
    """``trained`` and ``stored`` parameters, and for each threshold the means over the texts of
    what `PeltModel.count_active` finds; none with the reason ``why_not``.
    """
    found: Json = {
        "trained": sum(parameter.numel() for parameter in model.trained_parameters().values()),
        "stored": model.get_nb_stored_parameters(),
        "why_not": model.why_not_countable(),
        "thresholds": [],
    }
    if not found["why_not"]:
        columns = torch.from_numpy(untouched.gates).unbind(1)
        gates, of_texts = dict(zip(untouched.names, columns)), torch.from_numpy(lengths)
        found["thresholds"] = [
            model.count_active(gates, of_texts, threshold).means() for threshold in THRESHOLDS
        ]
    return found


def active_findings(active: Json) -> list[str]:
    """What they say: a sentence on what is stored, and one or two on what could be skipped."""
    trained, stored = active["trained"], active["stored"]
    size = f"{trained:,} parameters are trained and stored."
    if stored != trained:
        size = f"{trained:,} parameters are trained and {stored:,} stored."
    if active["why_not"]:
        return [size, f"What works for a text is not counted: {active['why_not']}."]
    return [size, _skipped(active), _bound(active)]


def _skipped(active: Json) -> str:
    """From which threshold on parts are skipped, and how many."""
    rows = active["thresholds"]
    first = next((row for row in rows if row["parts"] < 1), None)
    if first is None:
        return (
            f"No gate is below {rows[-1]['threshold']:g}, so up to that threshold there is nothing "
            "to skip."
        )
    before = [row["threshold"] for row in rows if row["threshold"] < first["threshold"]]
    start = f"Up to a threshold of {before[-1]:g} nothing is skipped. " if before[-1] else ""
    said = [first] if first is rows[-1] else [first, rows[-1]]
    return start + " ".join(
        f"At {row['threshold']:g} a text skips {percent(1 - row['parts'])} of its parts and uses "
        f"{percent(row['parameters'] / active['stored'])} of the stored parameters."
        for row in said
    )


def _bound(active: Json) -> str:
    """What skipping could save at most."""
    whole = active["thresholds"][0]["flops_share"]
    return (
        f"All that the method adds is {percent(whole)} of what the layers multiply without it, so "
        f"skipping everything would save {percent(whole / (1 + whole))} of the operations."
    )


def active_rows(active: Json) -> list[tuple[str, ...]]:
    """The cells of a table: threshold, parts that work, parameters, their share of the stored ones,
    what the method adds for a text, and its share of what the layers multiply without it.
    """
    return [
        (
            f"{row['threshold']:g}",
            percent(row["parts"]),
            f"{row['parameters']:,.0f}",
            percent(row["parameters"] / active["stored"]),
            f"{row['added_flops'] / 1e6:,.1f} M",
            percent(row["flops_share"]),
        )
        for row in active["thresholds"]
    ]


COLUMNS = (
    "threshold",
    "parts that work",
    "parameters",
    "of the stored",
    "added FLOPs",
    "of the layers' own",
)


def percent(share: float) -> str:
    """A share without a digit that says nothing: 0 % and 100 % are exact."""
    shown = f"{100 * share:.1f}"
    if shown == "100.0" and share < 1:
        shown = "99.9"
    if shown == "0.0" and share > 0:
        shown = "0.1"
    return f"{shown.removesuffix('.0')} %"

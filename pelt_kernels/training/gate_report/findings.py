"""What a report's numbers say, in words that follow from them, favourable or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from .ablation import ALL, CONSTANTS, OWN_MEAN, REMOVED, SHUFFLED, UNGATED
from .active import active_findings

Json = dict[str, Any]
# Below this standard deviation between texts a gate passes for a constant: it scales its part by
# within one hundredth of the same number for two texts of three.
CONSTANT = 0.01
NOT_SHOWN = "no effect is shown"


def findings(report: Json) -> Json:
    """``headline`` and ``lead``, the finding in two sentences, and a paragraph for each topic."""
    held, spread = _rows(report, [OWN_MEAN]), _spread(report)
    twin = [row for row in report["ablation"]["rows"] if row["change"] == UNGATED]
    return {
        "headline": _headline(report, held),
        "lead": " ".join([spread, *(_of_row(row, report) for row in (*held, *twin))]),
        "openness": " ".join(_openness(report)),
        "variation": spread,
        "relations": {name: _relation(name, report) for name in report["relations"]["traits"]},
        "worth": list(_worth(report)),
        "active": active_findings(report["active"]),
        "drift": _drift(report),
    }


def kinds_of(report: Json) -> list[str]:
    """The kinds of gates, in their order."""
    return list(dict.fromkeys(gate["kind"] for gate in report["gates"]))


def kind_mean(report: Json, kind: str) -> float:
    """The mean over the layers."""
    means = [gate["mean"] for gate in report["gates"] if gate["kind"] == kind]
    return float(sum(means) / len(means))


def place(gate: Json) -> str:
    """Which gate it is, for a sentence."""
    return f"{owner(gate['kind'])} gate in layer {gate['layer']}"


def owner(kind: str) -> str:
    """Whose gate it is: ``lora_query`` is LoRA's of the query."""
    if kind.startswith("lora_"):
        return f"LoRA's {kind.removeprefix('lora_').replace('_', ' ')}"
    return f"the {kind.replace('_', ' ')}'s"


def words(kind: str) -> str:
    """A kind of gate, or a part, as a title."""
    if kind.startswith("lora"):
        of = kind.removeprefix("lora").strip("_").replace("_", " ")
        return f"LoRA ({of})" if of else "LoRA"
    return kind.replace("_", " ")


def points(value: float) -> str:
    """A difference of scores in hundredths, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def interval(row: Json, key: str = "difference") -> str:
    """The bounds of a difference."""
    low, high = row[key]["interval"]
    if key == "difference":
        return f"{points(low)} to {points(high)}"
    return f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def typical_spread(report: Json) -> float:
    """The median of the gates' standard deviations between texts."""
    return float(median(gate["std"] for gate in report["gates"]))


def _rows(report: Json, changes: Sequence[str], of: str | None = None) -> list[Json]:
    """Alterations of all gates, or of one kind where there is one only."""
    kinds = kinds_of(report)
    whole = of or (ALL if len(kinds) > 1 else kinds[0])
    rows = report["ablation"]["rows"]
    found = {row["change"]: row for row in rows if row["of"] == whole}
    return [found[change] for change in changes if change in found]


def _headline(report: Json, choice: Sequence[Json]) -> str:
    """Whether the gates choose by text, and what that choice is worth: the difference that holding
    every gate at its own mean makes.
    """
    metric, traits = report["metric"], report["relations"]["traits"]
    related = [name for name, trait in traits.items() if trait["found"]]
    strongest = max(related, key=lambda name: traits[name]["largest_share"], default="")
    (held,) = choice
    if held["difference"]["is_effect"]:
        depends = held["difference"]["value"] < 0
        return (
            f"The gates choose by text, and {metric} depends on it."
            if depends
            else f"The gates choose by text, and {metric} is better without that choice."
        )
    if typical_spread(report) < CONSTANT:
        return "The gates are levels for each layer and part: they hardly differ between texts."
    if held["loss_difference"]["is_effect"]:
        change = "raises" if held["loss_difference"]["value"] > 0 else "lowers"
        return (
            f"The gates choose by text; holding them still {change} the loss, but no effect on "
            f"{metric} is shown."
        )
    if not related:
        return f"The gates follow nothing that was looked at, and {metric} does not need it."
    most = f", most of all {trait_words(strongest)}," if len(related) > 1 else ""
    return f"The gates follow the text{most} but no effect of that on {metric} is shown."


def _openness(report: Json) -> Iterator[str]:
    means = ", ".join(f"{words(k)} {kind_mean(report, k):.2f}" for k in kinds_of(report))
    yield f"Mean gates over all layers and texts: {means}. Training starts them near 0.5."
    least = min(report["gates"], key=lambda gate: gate["mean"])
    most = max(report["gates"], key=lambda gate: gate["mean"])
    if least is not most:
        yield (
            f"The most closed is {place(least)} ({least['mean']:.2f}), the most open {place(most)} "
            f"({most['mean']:.2f})."
        )


def _spread(report: Json) -> str:
    variance = report["variance"]
    whole = variance["between_gates"] + variance["between_texts"]
    typical = typical_spread(report)
    start = f"Between texts a typical gate varies by a standard deviation of {typical:.3f}"
    if not whole:
        return f"{start}: no gate differs at all."
    share = 100 * variance["between_texts"] / whole
    return (
        f"{start}; {share:.0f} % of the variance of all gate values lies between texts, the rest "
        "between layers and kinds."
    )


def _relation(name: str, report: Json) -> str:
    relations, count = report["relations"], len(report["gates"])
    trait = relations["traits"][name]
    strongest = trait["strongest"]
    figure = f"{trait['statistic']} {strongest['value']:.2f}".replace("-", "−")
    permutations = f"{relations['permutations']:,} permutations"
    if not trait["found"]:
        return (
            f"No relation to {trait_words(name)} is found in any of {count} gates (the strongest: "
            f"{place(strongest)}, {figure}, corrected p {strongest['p']:.2f}, {permutations})."
        )
    gates = "gate relates" if trait["found"] == 1 else "gates relate"
    least = relations["permutations"] + 1
    p = len(relations["traits"]) / least
    shown = f"< {1.1 * p:.3f}" if strongest["p"] <= p * 1.01 else f"{strongest['p']:.3f}"
    return (
        f"{trait['found']} of {count} {gates} to {trait_words(name)}; the strongest is "
        f"{place(strongest)} ({figure}, corrected p {shown}, {permutations})."
    )


def trait_words(name: str) -> str:
    """A trait as it stands in a sentence."""
    return {
        "label": "the label",
        "length": "the text's length",
        "loss": "the loss on the text",
        "confidence": "the model's confidence",
        "task": "the task",
    }[name]


def _of_row(row: Json, report: Json) -> str:
    """A sentence about one alteration."""
    change, of = row["change"], row["of"]
    subject = {
        OWN_MEAN: f"Holding {_the(of)} at their own means",
        SHUFFLED: f"Giving each text {_the(of)} of another text",
        REMOVED: f"Removing {_part(of)}",
        UNGATED: "The model trained without gates",
        **{name: f"Setting {_the(of)} to {name}" for name in CONSTANTS},
    }[change]
    metric, score, loss = report["metric"], row["difference"], row["loss_difference"]
    verb = "differs in" if change == UNGATED else "changes"
    on_score = f"{metric} by {points(score['value'])} points (95 % interval {interval(row)})"
    on_loss = f"the loss by {_signed(loss['value'])} ({interval(row, 'loss_difference')})"
    if score["is_effect"] == loss["is_effect"]:
        more_than_noise = "effects that are more than noise"
        both = more_than_noise if score["is_effect"] else _not_shown(report, score, loss)
        return f"{subject} {verb} {on_score} and {on_loss}: {both}."
    if score["is_effect"]:
        return (
            f"{subject} {verb} {on_score}, which is more than noise, and {on_loss}, which is not."
        )
    unshown = _not_shown(report, score)
    return f"{subject} {verb} {on_score}, {unshown}, and {on_loss}, which is more than noise."


def _not_shown(report: Json, *differences: Json) -> str:
    """Why no effect is shown of a difference whose own interval leaves out 0: it is one of many,
    of which some do so by chance.
    """
    if any(low > 0 or high < 0 for low, high in (each["interval"] for each in differences)):
        return f"no effect that stands out among {len(report['ablation']['rows'])} comparisons"
    return NOT_SHOWN


def _the(of: str) -> str:
    return "all gates" if of == ALL else f"{owner(of)} gates"


def _worth(report: Json) -> Iterator[str]:
    rows = report["ablation"]["rows"]
    yield (
        f"An effect is shown only where it stands out among all {len(rows)} comparisons that are "
        "made here."
    )
    for row in _rows(report, (OWN_MEAN, SHUFFLED)):
        yield "The choice by text: " + _lowered(_of_row(row, report))
    for row in _rows(report, ("0.5", "1")):
        yield "The levels: " + _lowered(_of_row(row, report))
    removed = [row for row in rows if row["change"] == REMOVED]
    if removed:
        parts = "; ".join(
            f"without {_part(row['of'])} {report['metric']} changes by "
            f"{points(row['difference']['value'])} points ({interval(row)}"
            f"{'' if shown else ', ' + _not_shown(report, row['difference'])})"
            for row in removed
            for shown in [row["difference"]["is_effect"]]
        )
        yield f"The parts: {parts}."
    for row in rows:
        if row["change"] == UNGATED:
            yield "No gates at all: " + _lowered(_of_row(row, report))


def _lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _part(name: str) -> str:
    return "LoRA" if name == "lora" else f"the {name}"


def _drift(report: Json) -> str:
    history = report["history"]
    if len(history) < 2:
        return "The run's history holds no gates over training; an adapter alone has none."
    first, last = history[0], history[-1]
    names = [name for name in first["gates"] if name in last["gates"]]
    moved = {name: last["gates"][name] - first["gates"][name] for name in names}
    mean = sum(abs(value) for value in moved.values()) / len(moved)
    furthest = max(moved, key=lambda name: abs(moved[name]))
    layer, _, kind = furthest.partition(".")
    return (
        f"From step {first['step']} to step {last['step']} a gate's mean over a batch moved by "
        f"{mean:.2f} on average, the furthest {place({'kind': kind, 'layer': layer})}, from "
        f"{first['gates'][furthest]:.2f} to {last['gates'][furthest]:.2f}."
    )

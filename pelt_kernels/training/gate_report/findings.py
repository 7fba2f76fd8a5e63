"""What a report's numbers say, in words that follow from them, favourable or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .ablation import ALL, CONSTANTS, OWN_MEAN, REMOVED, SHUFFLED, UNGATED

Json = dict[str, Any]
# Below this standard deviation between texts a gate passes for a constant: it scales its part by
# within one hundredth of the same number for two texts of three.
CONSTANT = 0.01
CHOICES = (OWN_MEAN, SHUFFLED)  # what takes the choice by text away and leaves the level


def findings(report: Json) -> Json:
    """``headline`` and ``lead``, the finding in two sentences, and a paragraph for each topic."""
    choice = _rows(report, CHOICES)
    return {
        "headline": _headline(report, choice),
        "lead": " ".join([_spread(report), *(_of_row(row, report) for row in choice[:1])]),
        "openness": " ".join(_openness(report)),
        "variation": _spread(report),
        "relations": {name: _relation(name, report) for name in report["relations"]["traits"]},
        "worth": list(_worth(report)),
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
    deviations = sorted(gate["std"] for gate in report["gates"])
    middle = len(deviations) // 2
    pair = deviations[middle - (len(deviations) % 2 == 0) : middle + 1]
    return float(sum(pair) / len(pair))


def _rows(report: Json, changes: Sequence[str], of: str | None = None) -> list[Json]:
    """Alterations of all gates, or of one kind where there is one only."""
    kinds = kinds_of(report)
    whole = of or (ALL if len(kinds) > 1 else kinds[0])
    rows = report["ablation"]["rows"]
    found = {row["change"]: row for row in rows if row["of"] == whole}
    return [found[change] for change in changes if change in found]


def _headline(report: Json, choice: Sequence[Json]) -> str:
    metric = report["metric"]
    related = sum(trait["found"] for trait in report["relations"]["traits"].values())
    harmed = [row for row in choice if row["difference"]["is_effect"]]
    by_loss = [row for row in choice if row["loss_difference"]["is_effect"]]
    if not choice:
        return "What the gates do, without a test of what they are worth."
    if any(row["difference"]["value"] < 0 for row in harmed):
        return f"The gates choose by text, and {metric} depends on it."
    if harmed:
        return f"The gates choose by text, and {metric} is better without that choice."
    if typical_spread(report) < CONSTANT:
        return "The gates are levels for each layer and part; they hardly differ between texts."
    if by_loss:
        better = "lower" if by_loss[0]["loss_difference"]["value"] > 0 else "higher"
        return (
            f"The gates differ between texts and make the loss {better} by it, but no effect on "
            f"{metric} is shown."
        )
    follow = "follow the text" if related else "differ between texts"
    return f"The gates {follow}, but no effect of that on {metric} is shown."


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
    start = f"Between texts a gate's standard deviation is {typical:.3f} in the middle"
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
            f"No relation to {_trait_words(name)} is found in any of {count} gates (the strongest: "
            f"{place(strongest)}, {figure}, corrected p {strongest['p']:.2f}, {permutations})."
        )
    gates = "gate relates" if trait["found"] == 1 else "gates relate"
    least = relations["permutations"] + 1
    p = len(relations["traits"]) / least
    shown = f"< {1.1 * p:.3f}" if strongest["p"] <= p * 1.01 else f"{strongest['p']:.3f}"
    return (
        f"{trait['found']} of {count} {gates} to {_trait_words(name)}; the strongest is "
        f"{place(strongest)} ({figure}, corrected p {shown}, {permutations})."
    )


def _trait_words(name: str) -> str:
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
        REMOVED: f"Removing {words(of) if of == 'lora' else f'the {of}'}",
        UNGATED: "The model trained without gates",
        **{name: f"Setting {_the(of)} to {name}" for name in CONSTANTS},
    }[change]
    metric, points_of = report["metric"], points(row["difference"]["value"])
    verb = "differs in" if change == UNGATED else "changes"
    sentence = f"{subject} {verb} {metric} by {points_of} points (95 % interval {interval(row)})"
    loss = row["loss_difference"]
    beside = f"the loss by {_signed(loss['value'])} ({interval(row, 'loss_difference')})"
    verdicts = [
        ("an effect" if each["is_effect"] else "no effect is shown")
        for each in (row["difference"], loss)
    ]
    if verdicts[0] == verdicts[1]:
        both = verdicts[0] + (" on both" if row["difference"]["is_effect"] else " on either")
        return f"{sentence} and {beside}: {both}."
    return f"{sentence}: {verdicts[0]}; and {beside}: {verdicts[1]}."


def _the(of: str) -> str:
    return "all gates" if of == ALL else f"{owner(of)} gates"


def _worth(report: Json) -> Iterator[str]:
    for row in _rows(report, (*CHOICES, *CONSTANTS)):
        yield _of_row(row, report)
    for row in report["ablation"]["rows"]:
        if row["change"] in (REMOVED, UNGATED):
            yield _of_row(row, report)


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

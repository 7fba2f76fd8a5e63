"""The page of a report on gates: one file that loads nothing, for light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from ..plots import gates_over_steps
from . import charts
from .ablation import ALL, OWN_MEAN
from .active import COLUMNS, active_rows
from .charts import Axis, Cell
from .findings import interval, kind_mean, kinds_of, points, typical_spread, words
from .style import STYLE

Json = dict[str, Any]
START = 0.5  # of every gate
LEAST_DEPTH = 0.05  # of the colours of means around it
TRAITS = {
    "label": "label",
    "length": "length in tokens",
    "loss": "loss on the text",
    "confidence": "confidence",
    "task": "task",
}


def page(report: Json) -> str:
    """The report as HTML."""
    found = report["findings"]
    rows = sum(report["rows"].values())
    head = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f'<link rel=icon href="data:,"><title>Gates on {escape(report["task"])}</title>'
        f"<style>{STYLE}</style></head><body><main>"
    )
    top = (
        f"<header><p class=above>The gates of {escape(report['method_config']['method'])} on "
        f"{escape(', '.join(report['rows']))}, {rows:,} texts · {escape(report['adapter'])}</p>"
        f"<h1>{escape(found['headline'])}</h1><p class=lead>{escape(found['lead'])}</p>"
        f"{_tiles(report)}</header>"
    )
    sections = (_openness, _relations, _distributions, _worth, _active, _drift, _method)
    return head + top + "".join(section(report) for section in sections) + "</main></body></html>\n"


def _section(name: str, title: str, *parts: str) -> str:
    return f"<section id={name}><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _said(*sentences: str) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _listed(sentences: Sequence[str]) -> str:
    """The first as a paragraph, the others as a list whose topics are bold."""
    first, *others = sentences
    items = (sentence.partition(":") for sentence in others)
    listed = "".join(
        f"<li><b>{escape(topic)}{colon}</b>{escape(rest)}</li>" for topic, colon, rest in items
    )
    return f"{_said(first)}<ul>{listed}</ul>"


def _panel(content: str) -> str:
    return f"<figure class=panel>{content}</figure>"


def _kinds(report: Json) -> dict[str, str]:
    return {kind: words(kind) for kind in kinds_of(report)}


def _tiles(report: Json) -> str:
    ablation = report["ablation"]
    traits = report["relations"]["traits"]
    means = " · ".join(f"{words(k)} {kind_mean(report, k):.2f}" for k in kinds_of(report))
    whole = [gate["mean"] for gate in report["gates"]]
    related = [name for name, trait in traits.items() if trait["found"]]
    tiles = [
        ("mean gate", f"{sum(whole) / len(whole):.2f}", means),
        ("spread between texts", f"{typical_spread(report):.3f}", "standard deviation of a gate"),
        (
            "traits the gates follow",
            f"{len(related)} of {len(traits)}",
            ", ".join(related) or "none, tested by permutation",
        ),
        (ablation["metric"], f"{ablation['score']:.3f}", f"with loss {ablation['loss']:.3f}"),
    ]
    for row in ablation["rows"]:
        if row["of"] == ALL and row["change"] == OWN_MEAN:
            value = points(row["difference"]["value"])
            tiles.append(("gates held at own mean", value, f"points, {interval(row)}"))
    return (
        "<dl class=tiles>"
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
            for name, value, more in tiles
        )
        + "</dl>"
    )


def _openness(report: Json) -> str:
    gates = report["gates"]
    depth = max(LEAST_DEPTH, *(abs(gate["mean"] - START) for gate in gates))
    spread = max(0.01, *(gate["std"] for gate in gates))
    means, deviations = {}, {}
    for gate in gates:
        key = (gate["layer"], gate["kind"])
        colour = "open" if gate["mean"] > START else "closed"
        share = abs(gate["mean"] - START) / depth
        said = f"from {gate['least']:.3f} to {gate['most']:.3f}"
        means[key] = Cell(f"{gate['mean']:.2f}", charts.mixed(colour, share), title=said)
        deviations[key] = Cell(
            f"{gate['std']:.3f}", charts.mixed("strong", gate["std"] / spread), title=said
        )
    low, high = f"{START - depth:.2f}", f"{START + depth:.2f}"
    return _section(
        "openness",
        "How far each gate is open",
        _said(report["findings"]["openness"], report["findings"]["variation"]),
        "<div class=grid>",
        _panel(
            charts.heat_map("Mean over the texts", means, _kinds(report))
            + charts.scale(low, high, "var(--closed)", "var(--cell)", "var(--open)")
        ),
        _panel(
            charts.heat_map("Standard deviation between texts", deviations, _kinds(report))
            + charts.scale("0", f"{spread:.3f}", "var(--cell)", "var(--strong)")
        ),
        "</div>",
    )


def _relations(report: Json) -> str:
    relations = report["relations"]
    panels = []
    for name, trait in relations["traits"].items():
        cells = {}
        for gate in report["gates"]:
            own = gate["relations"][name]
            share = abs(own["value"]) if "Spearman" in trait["statistic"] else own["value"] ** 0.5
            cells[gate["layer"], gate["kind"]] = Cell(
                f"{own['value']:.2f}".replace("-", "−"),
                charts.mixed("strong", share) if own["is_found"] else "",
                "found" if own["is_found"] else "faint",
                f"corrected p {own['p']:.4f}",
            )
        title = f"{TRAITS[name].capitalize()}: {trait['statistic']}"
        caption = f"<figcaption>{escape(report['findings']['relations'][name])}</figcaption>"
        panels.append(_panel(charts.heat_map(title, cells, _kinds(report)) + caption))
    return _section(
        "relations",
        "What the gates follow",
        _said(
            f"Coloured where a relation is found: more than chance gives, after correction for all "
            f"{len(report['gates'])} gates and {len(relations['traits'])} traits "
            f"({relations['permutations']:,} permutations). Grey numbers are not told from chance."
        ),
        f"<div class=grid>{''.join(panels)}</div>",
    )


def _distributions(report: Json) -> str:
    parts = []
    for group, title in (("by_label", "label"), ("by_task", "task")):
        if report["gates"][0].get(group):
            parts.append(_distribution(report, group, title))
    if not parts:
        return ""
    return _section(
        "distributions",
        "The gates of single texts",
        _said(
            "By layer, from the first on top: the middle nine tenths of the texts as a line, the "
            "middle half as a bar, the median as a dot."
        ),
        *parts,
    )


def _distribution(report: Json, group: str, title: str) -> str:
    counts: dict[str, int] = {}
    for gate in report["gates"]:
        for name, summary in gate[group].items():
            counts[name] = summary["rows"]
    chosen = sorted(counts, key=lambda name: -counts[name])[: charts.COLOURS]
    names = [name for name in counts if name in chosen]
    bounds = [
        bound
        for gate in report["gates"]
        for name in names
        if name in gate[group]
        for bound in (gate[group][name]["quantiles"][0], gate[group][name]["quantiles"][-1])
    ]
    axis = Axis.around(bounds, 24.0, 352.0)
    panels = [
        _panel(
            f"<h3>{escape(word)}</h3>"
            + charts.distributions(
                [gate for gate in report["gates"] if gate["kind"] == kind], group, names, axis
            )
        )
        for kind, word in _kinds(report).items()
    ]
    key = "".join(
        f'<span><i style="background:var(--c{place})"></i>{title} {escape(name)} '
        f"({counts[name]:,})</span>"
        for place, name in enumerate(names)
    )
    left = len(counts) - len(names)
    more = f"<span>and {left} rarer ones, which are in gates.json</span>" if left else ""
    return f"<div class=key>{key}{more}</div><div class=grid>{''.join(panels)}</div>"


def _worth(report: Json) -> str:
    ablation = report["ablation"]
    bounds = [bound for row in ablation["rows"] for bound in row["difference"]["interval"]]
    place = charts.forest_axis(bounds)
    metric = escape(ablation["metric"])
    head = (
        f"<tr><th>gates</th><th>changed to</th><th>{metric}</th><th>points</th>"
        f"<th>{charts.forest_ticks(bounds, place)}</th><th>95 % interval</th><th>loss</th>"
        "<th>verdict</th></tr>"
    )
    body = "".join(_worth_rows(report, place))
    return _section(
        "worth",
        "What the gates are worth",
        _listed(report["findings"]["worth"]),
        _panel(f"<table class=worth><thead>{head}</thead><tbody>{body}</tbody></table>"),
        "<p class=note>Differences from the untouched model "
        f"({metric} {ablation['score']:.3f}, loss {ablation['loss']:.3f}) on the same texts, on a "
        "root scale, with paired bootstrap intervals of 95 % each. The verdict counts all "
        f"{len(ablation['rows'])} comparisons at once. A prefix whose gate is 0 keeps its share of "
        "the softmax; a removed one does not.</p>",
    )


def _worth_rows(report: Json, place: Any) -> Iterator[str]:
    before = None
    for row in report["ablation"]["rows"]:
        difference, loss = row["difference"], row["loss_difference"]
        kind = "none"
        if difference["is_effect"]:
            kind = "better" if difference["value"] > 0 else "worse"
        begins = " class=begins" if before not in (None, row["of"]) else ""
        name = words(row["of"]) if row["of"] != before else ""
        before = row["of"]
        on_loss = ""
        if loss["is_effect"]:
            on_loss = " class=worse" if loss["value"] > 0 else " class=better"
        yield (
            f"<tr{begins}><td>{escape(name)}</td><td>{escape(row['change'])}</td>"
            f"<td>{row['score']:.3f}</td><td class={kind}>{points(difference['value'])}</td>"
            f"<td class=plot>{charts.forest(row, place, kind)}</td><td>{interval(row)}</td>"
            f"<td{on_loss}>{loss['value']:+.3f}</td>".replace(">-", ">−")
            + f"<td class={kind}>{'no effect shown' if kind == 'none' else kind}</td></tr>"
        )


def _active(report: Json) -> str:
    said = _said(" ".join(report["findings"]["active"]))
    rows = active_rows(report["active"])
    if not rows:
        return _section("active", "What works for a text", said)
    head = "".join(f"<th>{escape(title)}</th>" for title in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return _section(
        "active",
        "What works for a text",
        said,
        _panel(f"<table class=worth><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"),
        "<p class=note>Means over the texts, by formula, of parts whose gate is not below the "
        "threshold (skip_below); gates, the head and parts without a gate always work. FLOPs are "
        "two for each multiply-add. A GPU skips less. What skipping does to the score is not "
        "measured here.</p>",
    )


def _drift(report: Json) -> str:
    history = report["history"]
    said = _said(report["findings"]["drift"])
    if len(history) < 2:
        return _section("drift", "Over training", said)
    series = gates_over_steps(history)
    values = [value for entry in history for value in entry["gates"].values()]
    axis = Axis.around(values, 172.0, 8.0)
    panels = [
        _panel(f"<h3>{escape(words(kind))}</h3>{charts.lines(layers, axis, history[-1]['step'])}")
        for kind, layers in sorted(series.items())
    ]
    return _section(
        "drift",
        "Over training",
        said,
        f"<div class=grid>{''.join(panels)}</div>",
        "<p class=note>The mean over the latest batch; numbers at the right are layers.</p>",
    )


def _method(report: Json) -> str:
    relations, ablation = report["relations"], report["ablation"]
    hardware = report["hardware"]
    sentences = (
        "A gate is sigmoid(w · x + b), averaged over a text's real tokens, and scales its part in "
        "that layer for that text. Gates that a decoder has for each token are averaged here.",
        "Relations: the share of a gate's variance between labels (eta squared), Spearman's "
        "correlation with numbers. In each permutation the largest value among all gates is kept, "
        "and p is multiplied by the number of traits; a relation is found below "
        f"{relations['level']:g}. Seed {relations['seed']}.",
        f"Worth: {ablation['draws']:,} paired bootstrap draws; an effect is shown where intervals "
        "that hold for all comparisons at once leave out 0.",
        f"Base model {report['model']}; {report['truncated']} texts were cut; computed on "
        f"{hardware['cpu']}; pelt_kernels {report['versions']['pelt_kernels']}, torch "
        f"{report['versions']['torch']}.",
    )
    return _section("method", "How this was measured", _said(*sentences))

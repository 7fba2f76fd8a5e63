"""What `benchmarks.efficiency` measured, in words, in a table beside the paper's, and as bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import figures
from .peft_tables import NAMES as MODEL_NAMES
from .rows import Rows, by_processor, measured_by, stored_cell, stored_title

# UniPELT's Table 4 (Mao et al., ACL 2022), BERT-base: training and inference, in percent of full
# fine-tuning.
PAPER = {
    "bitfit": (65, 102),
    "prefix": (56, 114),
    "lora": (53, 105),
    "adapter": (55, 107),
    "unipelt-ap": (55, 118),
    "unipelt": (67, 127),
}
KINDS = ("training", "inference")
TITLES = {
    "full": "full fine-tuning",
    "head": "the head alone",
    "bitfit": "BitFit",
    "prefix": "prefix tuning",
    "lora": "LoRA",
    "adapter": "adapter",
    "unipelt-ap": "UniPELT, adapter and prefix",
    "unipelt": "UniPELT, with LoRA",
    "mam": "mix and match",
}
WAYS = {"": "", "eager": ", eager", "compiled": ", torch.compile",
        "accelerated": ", accelerated", "unpadded": ", unpadded"}  # fmt: skip
COLOURS = {"transformers": "#999999", "pelt_kernels": figures.BLUE, "PEFT": "#009E73",
           "adapters": figures.ORANGE}  # fmt: skip


class Goal(NamedTuple):
    """A share or a ratio that a contender should stay below."""

    contender: str
    kind: str
    over: str
    most: float


GOALS = (
    Goal("unipelt", "training", "full", 0.60),
    Goal("unipelt", "inference", "full", 1.03),
    Goal("unipelt", "training", "adapters-unipelt", 0.75),
    Goal("unipelt-unpadded", "training", "full", 0.60),
    Goal("unipelt-unpadded", "inference", "full", 1.03),
    Goal("unipelt-unpadded", "training", "adapters-unipelt", 0.75),
    Goal("lora", "training", "peft-lora", 0.97),
    *(
        Goal(method, kind, f"{peer}-{method}", 1.0)
        for kind in KINDS
        for method, peer in (
            ("lora", "peft"), ("lora", "adapters"), ("prefix", "peft"), ("prefix", "adapters"),
            ("adapter", "adapters"), ("unipelt-ap", "adapters"), ("unipelt", "adapters"),
            ("mam", "adapters"),
        )
    ),
)  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row to print."""
    cells = [f"{row['model']:13} {row['contender']:28}"]
    for kind in KINDS:
        share = row[kind]["share"]
        cells.append(
            f"{kind} {1e3 * row[kind]['seconds']:7,.0f} ms {100 * share['median']:5.1f} % "
            f"({100 * share['low']:.0f}-{100 * share['high']:.0f}) in {row[kind]['rounds']}"
        )
    return "  ".join([*cells, f"peak {row['peak_bytes'] / 2**20:,.0f} MiB, load {row['load']}"])


def goals(rows: Rows) -> Iterator[str]:
    """A sentence for each goal that the rows decide, on each processor."""
    places: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        place = row["hardware"]["kind"], row["model"]
        places.setdefault(place, {})[row["contender"]] = row
    for place, found in places.items():
        for contender, kind, over, most in GOALS:
            figures_of = found.get(contender, {}).get(kind)
            if figures_of is None:
                continue
            ratio = figures_of["share"] if over == "full" else figures_of["over"].get(over)
            if ratio is None:
                continue
            verdict = "holds" if ratio["median"] <= most else "MISSED"
            yield (
                f"{verdict}: {', '.join(place)}, {contender}, {kind} over {over}: "
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), "
                f"goal {most:.2f}"
            )


def paper_table(rows: Rows) -> str:
    """BERT-base in the paper's layout: the paper's shares, this library's, and the peers'; a table
    for each kind of processor.
    """
    bert = [row for row in rows if row["model"] == "bert-base"]
    return "\n".join(_paper_table(found) for found in by_processor(bert))


def _paper_table(rows: Rows) -> str:
    of_all = {row["contender"]: row for row in rows}
    shown = [f"{by}{method}" for method in PAPER for by in ("", "adapters-", "peft-")]
    chosen = {each: of_all[each] for each in shown if each in of_all}
    stored = stored_title([chosen[method] for method in PAPER if method in chosen])
    titles = ["method", "trained parameters", *stored]
    for kind in KINDS:
        titles += [f"{kind}: the paper's", "here", "`adapters`", "PEFT"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for method, shares in PAPER.items():
        if method not in chosen:
            continue
        own = chosen[method]
        cells = [TITLES[method], f"{own['trainable_parameters']:,}"]
        cells += [stored_cell([own]) for _ in stored]
        for kind, paper in zip(KINDS, shares):
            cells.append(f"{paper} %")
            for contender in (method, f"adapters-{method}", f"peft-{method}"):
                row = chosen.get(contender)
                share = "–" if row is None else f"{100 * row[kind]['share']['median']:.0f} %"
                cells.append(f"**{share}**" if contender == method else share)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _conditions(list(chosen.values()))]) + "\n"


def full(rows: Rows) -> str:
    """Every row, in Markdown: a table for each kind of processor."""
    return "\n".join(map(_full, by_processor(rows)))


def _full(rows: Rows) -> str:
    stored = stored_title(rows)
    titles = ["model", "who", "trained parameters", *stored, "training step", "share of full"]
    titles += ["tokens/s", "forward", "share of full", "peak of the process"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        tokens = row["batch"] * row["length"] / row["training"]["seconds"]
        cells = [MODEL_NAMES[row["model"]], name(row), f"{row['trainable_parameters']:,}"]
        cells += [stored_cell([row]) for _ in stored]
        for kind in KINDS:
            cells.append(f"{1e3 * row[kind]['seconds']:,.0f} ms")
            cells.append("{:.0f} % ({:.0f}–{:.0f})".format(*_percent(row[kind]["share"])))
            if kind == "training":
                cells.append(f"{tokens:,.0f}")
        cells.append(f"{row['peak_bytes'] / 2**20:,.0f} MiB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _conditions(rows)]) + "\n"


def _percent(share: dict[str, float]) -> Iterator[float]:
    return (100 * share[key] for key in ("median", "low", "high"))


def name(row: dict[str, Any]) -> str:
    """Who and which method."""
    title = TITLES[row["method"]] + WAYS[row["way"]]
    return title if row["library"] == "transformers" else f"{title} ({row['library']})"


def _conditions(rows: Sequence[dict[str, Any]]) -> str:
    """The sentence below a table: texts, machine, versions, commit."""
    sizes = ", ".join(
        f"{batch} x {length} ({MODEL_NAMES[model].split(',')[0]})"
        for model, batch, length in dict.fromkeys(
            (row["model"], row["batch"], row["length"]) for row in rows
        )
    )
    versions = dict.fromkeys(
        f"transformers {row['versions']['transformers']} ({row['library']})"
        for row in rows
        if row["library"] in ("pelt_kernels", "adapters")
    )
    rounds = [row["training"]["rounds"] for row in rows]
    return (
        f"Medians of {min(rounds)} to {max(rounds)} rounds in turns, float32; texts x tokens: "
        f"{sizes}; {', '.join(versions)}; {measured_by(rows)}."
    )


def draw(rows: Rows, path: Path) -> None:
    """Bars for each contender of BERT-base, or of the first model: shares of full fine-tuning, on
    the first processor.
    """
    rows = by_processor(rows)[0]
    models = list(dict.fromkeys(row["model"] for row in rows))
    model = "bert-base" if "bert-base" in models else models[0]
    chosen = [row for row in rows if row["model"] == model and row["contender"] != "full"]
    columns: list[tuple[str, list[float], Any]] = []
    for kind, title in zip(KINDS, ("training", "forward")):
        shares = [list(_percent(row[kind]["share"])) for row in chosen]
        spread = [[m - low for m, low, _ in shares], [high - m for m, _, high in shares]]
        columns.append((f"{title}, % of full", [m for m, *_ in shares], spread))
    peaks = [row["peak_bytes"] / 2**30 for row in chosen]
    columns.append(("peak memory, GiB", peaks, None))
    figures.draw_bars(
        path,
        [name(row) for row in chosen],
        columns,
        [COLOURS[row["library"]] for row in chosen],
        f"{MODEL_NAMES[model]}, shares of full fine-tuning; shorter is better",
        chosen,
    )

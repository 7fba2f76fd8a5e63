"""Rewrites what is generated in the pages that people read: the tables (what each backend supports,
which method works where, how fast an operator is, what its CUDA kernels issue, what each method
reaches) and the pictures of the same rows.

    python -m benchmarks.readme

A table stands between two comments that name it; everything else in a file is left alone.
"""

from __future__ import annotations

import textwrap
from importlib import import_module
from math import hypot
from pathlib import Path
from statistics import mean
from typing import Any

from pelt_kernels.ops import OPERATORS, support_table

from . import (
    active_table,
    compared,
    counters_report,
    efficiency,
    efficiency_table,
    families_table,
    figures,
    gates_table,
    layer_calls,
    operator_tables,
    peft_step,
    peft_tables,
    plain_attention,
    step_profile,
)
from .checkout import ROOT
from .peers import peft_tests
from .rows import Rows, measured_by, read, stored_cell, stored_title

README = ROOT / "README.md"
FAMILIES = ROOT / "docs" / "families.md"
BACKENDS = ROOT / "docs" / "operators" / "README.md"
METHODS = ROOT / "benchmarks" / "results" / "methods.jsonl"
STEPS = ROOT / "benchmarks" / "results" / "train_step.jsonl"
COUNTERS = ROOT / "benchmarks" / "results" / "counters.jsonl"
GENERATION = METHODS.with_name("generation.jsonl")
BY_HEART = METHODS.with_name("overfit.jsonl")
RESULTS = METHODS.with_name("README.md")
MODEL_NAMES = {"gpt2": "GPT-2", "t5": "T5"}


def block(text: str, name: str) -> str:
    """What stands between the comments of a table. Raises ValueError where one is missing."""
    return text[slice(*_bounds(text, name))]


def with_block(text: str, name: str, content: str) -> str:
    """The text with the named table replaced."""
    begin, end = _bounds(text, name)
    return f"{text[:begin]}{content}{text[end:]}"


def _bounds(text: str, name: str) -> tuple[int, int]:
    marks = [f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"]
    places = [text.find(mark) for mark in marks]
    if -1 in places:
        raise ValueError(f"expected a page with the comments of the table '{name}', got none")
    return places[0] + len(marks[0]), places[1]


def _digits(share: float) -> str:
    """Two digits, however small, and no exponent for a hundred."""
    return f"{share:.2g}" if share < 99.5 else "100"


def methods_table(rows: Rows) -> str:
    """The methods' accuracy and cost, in Markdown, from what `benchmarks.methods_table` wrote."""
    head = rows[0]
    stored = stored_title(rows)
    titles = ["method", "test accuracy", "trained parameters", "of all", *stored]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        share = 100 * row["trainable_parameters"] / row["total_parameters"]
        cells = [
            f"`{row['method']}`",
            f"{row['accuracy']['mean']:.3f} ± {row['accuracy']['std']:.3f}",
            f"{row['trainable_parameters']:,}",
            f"{_digits(share)} %",
            *(stored_cell([row]) for _ in stored),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len(head["seeds"])
    lines += [
        "",
        f"Mean and standard deviation of {seeds} seeds, {head['train_examples']:,} training "
        f"examples, {head['test_examples']:,} test examples; {measured_by(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def task_file(name: str) -> Path:
    """Where `benchmarks.methods_table` keeps a task of files, by its name in the table."""
    return METHODS.with_name(f"methods_{name}.jsonl")


def tasks_table(tasks: dict[str, Rows]) -> str:
    """The methods' scores on tasks of files side by side, in Markdown; where one does not reach
    more than the linear probe, or learns nothing in a run; what one random expert of AdaMix
    reaches; the conditions.
    """
    by_row = {name: {row["row"]: row for row in rows} for name, rows in tasks.items()}
    metrics = {name: rows[0]["metric"] for name, rows in tasks.items()}
    stored = stored_title([row for rows in tasks.values() for row in rows])
    titles = [f"{name}, {figures.METRIC_NAMES[metric]}" for name, metric in metrics.items()]
    titles = ["method", *titles, "trained parameters", *stored]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in dict.fromkeys(row for rows in by_row.values() for row in rows):
        cells = {task: by_row[task].get(name) for task in tasks}
        shown = [
            "{mean:.3f} ± {std:.3f}".format(**row[metrics[task]]) if row else "–"
            for task, row in cells.items()
        ]
        found = [row for row in cells.values() if row]
        shown.append(f"{max(row['trainable_parameters'] for row in found):,}")
        shown += [stored_cell(found) for _ in stored]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    lines.append("")
    for task, metric in metrics.items():
        lines += _beside_the_probe(task, metric, by_row[task])
        lines += _constant_answers(task, by_row[task])
    lines += _random_experts(metrics, by_row)
    rows = [row for rows in tasks.values() for row in rows]
    first = rows[0]
    trained_on = ", ".join(dict.fromkeys(f"{row['train_examples']:,}" for row in rows))
    sizes = ", ".join(f"{rows[0]['test_examples']:,} ({name})" for name, rows in tasks.items())
    lines += [
        "",
        f"Mean and standard deviation of {len(first['seeds'])} seeds, {trained_on} "
        f"training examples each, test examples: {sizes}; {measured_by(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def _beside_the_probe(task: str, metric: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Which methods do not reach more than the linear probe, in the mean of the seeds, or by less
    than the deviation of the difference between two runs.
    """
    if "head" not in rows or len(rows) == 1:
        return []
    probe = rows["head"][metric]
    gains = {name: row[metric]["mean"] - probe["mean"] for name, row in rows.items()}
    del gains["head"]
    below = [name for name, gain in gains.items() if gain <= 0]
    within = [
        name
        for name, gain in gains.items()
        if 0 < gain <= hypot(rows[name][metric]["std"], probe["std"])
    ]
    if not below and not within:
        return [f"On {task} every method measured reaches more than the linear probe (`head`).  "]
    lines = []
    for names, words in ((below, "no more"), (within, "more, but by less than seeds differ,")):
        if names:
            listed = ", ".join(f"`{name}`" for name in names)
            lines.append(
                f"On {task} these reach {words} than the linear probe (`head`): {listed}.  "
            )
    return lines


def _constant_answers(task: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Which methods learnt nothing in a run, as its notes say."""
    counts = {name: sum(bool(run["notes"]) for run in row["seeds"]) for name, row in rows.items()}
    methods = [f"`{name}` in {count}" for name, count in counts.items() if count]
    if not methods:
        return []
    return [f"On {task} some runs kept a model that gives one answer only: {', '.join(methods)}.  "]


def _random_experts(
    metrics: dict[str, str], by_row: dict[str, dict[str, dict[str, Any]]]
) -> list[str]:
    """What one random expert of each module reaches instead of the average."""
    scores, counts = [], set()
    for task, metric in metrics.items():
        for name, row in by_row[task].items():
            if row["random_experts"]:
                (run,) = (run for run in row["seeds"] if run["seed"] == row["adapter_seed"])
                random_mean = mean(row["random_experts"])
                scores.append(f"`{name}` on {task} {random_mean:.3f} and {run[metric]:.3f}")
                counts.add(str(len(row["random_experts"])))
    if not scores:
        return []
    sentence = (
        f"With one random expert for each module (mean of {' or '.join(sorted(counts))} draws), "
        f"and with the average of the experts, of the seed best on dev: {'; '.join(scores)}."
    )
    return textwrap.wrap(sentence, 100, break_on_hyphens=False)


def steps_table(rows: Rows) -> str:
    """What a training step costs, in Markdown, from what `benchmarks.train_step` wrote."""
    lines = [
        "| method | processor time | peak memory of the process | kept for backward | backends |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        used = ", ".join(f"`{name}` {backend}" for name, backend in row["backends"].items())
        lines.append(
            f"| `{row['method']}` | {1e3 * row['processor_seconds']:.0f} ms "
            f"| {row['peak_bytes'] / 2**20:,.0f} MiB | {row['saved_bytes'] / 2**20:.0f} MiB "
            f"| {used or '–'} |"
        )
    first = rows[0]
    hardware = f"{first['hardware']['cpu']}, {first['hardware']['threads']} thread(s)"
    lines += ["", f"Batch {first['batch']}; {hardware}; torch {first['versions']['torch']}."]
    return "\n".join(lines) + "\n"


def generation_table(rows: Rows) -> str:
    """How well each method writes text from data, in Markdown, from what `benchmarks.generation`
    wrote.
    """
    stored = stored_title(rows)
    titles = ["model", "method", "BLEU", "chrF", "ROUGE-L", "trained parameters", "of all", *stored]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        share = 100 * row["trainable_parameters"] / row["total_parameters"]
        cells = [
            MODEL_NAMES[row["family"]],
            f"`{row['method']}`",
            *(f"{row[score]:.1f}" for score in ("bleu", "chrf", "rouge_l")),
            f"{row['trainable_parameters']:,}",
            f"{_digits(share)} %",
            *(stored_cell([row]) for _ in stored),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    sizes = first["sizes"]
    steps = ", ".join(map(str, sorted({row["steps"] for row in rows})))
    before = ", ".join(map(str, sorted({row["steps_before"] for row in rows})))
    lines += [
        "",
        f"{sizes['layers']} layers (T5: as many twice) of width {sizes['width']}, {before} steps "
        f"on the targets alone; then one seed, {first['train_examples']:,} training examples, "
        f"{steps} steps, "
        f"{first['test_examples']:,} test examples, written greedily; {measured_by(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def by_heart_table(rows: Rows) -> str:
    """How well each method learns pairs by heart, in Markdown, from what `benchmarks.overfit`
    wrote.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["family"], row["method"]): row for row in rows}
    lines = [
        f"| model | {' | '.join(f'`{method}`' for method in methods)} |",
        f"|{'---|' * (1 + len(methods))}",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = [f"`{family}`"]
        for method in methods:
            row = found.get((family, method))
            cells.append("" if row is None else f"{row['exact']} ({row['loss']:.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"Of {first['pairs']} targets those that {first['beams']} beams write word for word, in "
        f"batches of 16; in brackets the loss per word. {measured_by(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def contract_text(operator: str) -> str:
    """The tables of an operator's contract, as they stand in its file."""
    contract = import_module(f"pelt_kernels.ops.{operator}.contract").CONTRACT
    parts = []
    for name in ("inputs", "attributes", "outputs"):
        if table := textwrap.dedent(getattr(contract, name)).strip():
            parts.append(f"{name}\n{textwrap.indent(table, '    ')}\n")
    return f"```text\n{chr(10).join(parts)}```\n"


def tasks() -> dict[str, Rows]:
    """The rows of each task of files, by its name."""
    paths = sorted(METHODS.parent.glob("methods_*.jsonl"))
    return {path.stem.removeprefix("methods_"): read(path) for path in paths}


def tables() -> dict[Path, dict[str, str]]:
    """What stands in each page, by the tables' names; what nobody has measured is left alone."""
    measured = {
        "methods table": (METHODS, methods_table),
        "steps table": (STEPS, steps_table),
        "counters table": (COUNTERS, counters_report.counters_table),
        "generation table": (GENERATION, generation_table),
        "by heart table": (BY_HEART, by_heart_table),
        "active table": (active_table.RESULTS, active_table.table),
        "compared methods": (compared.RESULTS, compared.table),
        "peft table": (peft_step.RESULTS, peft_tables.headline),
        "peft steps table": (peft_step.RESULTS, peft_tables.full),
        "efficiency rows": (efficiency.RESULTS, efficiency_table.full),
        "calls table": (layer_calls.RESULTS, layer_calls.table),
        "profile table": (step_profile.RESULTS, step_profile.table),
        "attention table": (plain_attention.RESULTS, plain_attention.table),
        "gates table": (gates_table.RESULTS, gates_table.followed),
        "peft tests table": (peft_tests.RESULTS, peft_tests.table),
    }
    results = {
        name: table(read(path)) for name, (path, table) in measured.items() if path.is_file()
    }
    results["operators table"] = operator_tables.headline(operator_rows())
    results["every row"] = operator_tables.full(operator_rows())
    if found := tasks():
        results["tasks table"] = tasks_table(found)
    on_front = {
        "efficiency table": (efficiency.RESULTS, efficiency_table.paper_table),
        "gates' worth": (gates_table.RESULTS, gates_table.worth),
    }
    front = {name: table(read(path)) for name, (path, table) in on_front.items() if path.is_file()}
    return {
        README: front,
        FAMILIES: {"families": families_table.table()},
        BACKENDS: {"support table": support_table(list(OPERATORS))},
        RESULTS: results,
        **{BACKENDS.with_name(f"{op}.md"): {"contract": contract_text(op)} for op in OPERATORS},
    }


def rewritten(text: str, found: dict[str, str]) -> str:
    """A page as it should be."""
    for name, content in found.items():
        text = with_block(text, name, content)
    return text


def operator_files() -> list[Path]:
    """A file of `benchmarks.run` for each kind of processor."""
    return sorted(RESULTS.parent.glob("operators_*.jsonl"))


def operator_rows() -> Rows:
    """The rows of all of them."""
    return [row for path in operator_files() for row in read(path)]


def main() -> None:
    """Rewrites the pages in place, and draws the pictures."""
    for page, found in tables().items():
        page.write_text(rewritten(page.read_text(), found))
    draw_pictures(METHODS.parent)


def draw_pictures(folder: Path) -> None:
    """The pictures of the pages, of what has rows."""
    by_task = ({"docstring-match": read(METHODS)} if METHODS.is_file() else {}) | tasks()
    if by_task:
        figures.draw_accuracy(by_task, folder / "accuracy.png")
    if peft_step.RESULTS.is_file():
        figures.draw_steps(read(peft_step.RESULTS), folder / "steps.png")
    if compared.RESULTS.is_file():
        compared.draw(read(compared.RESULTS), folder / compared.PICTURE)
    if efficiency.RESULTS.is_file():
        efficiency_table.draw(read(efficiency.RESULTS), folder / "efficiency.png")
    if active_table.RESULTS.is_file():
        active_table.draw(read(active_table.RESULTS), folder / active_table.PICTURE)
    if STEPS.is_file():
        figures.draw_methods(read(STEPS), folder / "methods.png")


if __name__ == "__main__":
    main()

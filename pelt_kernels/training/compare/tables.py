"""The tables of a comparison, as rows of text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .protocol import size_name
from .summary import UPPER_BOUND


class Table(NamedTuple):
    """A title, names of columns, and rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(summary: dict[str, Any]) -> Iterator[Table]:
    """The average over tasks, each task, the tests, and what each method costs. In the paper's
    layout rows are numbers of training examples and columns are methods.
    """
    names = [*summary["methods"], *([UPPER_BOUND] if summary["upper_bounds"] else [])]
    if len(summary["tasks"]) > 1:
        average = {(row["train_examples"], row["method"]): row for row in summary["averages"]}
        yield _scores(f"average over {len(summary['tasks'])} tasks", names, summary, average)
    for task in summary["tasks"]:
        cells = [cell for cell in summary["cells"] if cell["task"] == task]
        found = {(cell["train_examples"], cell["method"]): cell for cell in cells}
        for bound in summary["upper_bounds"]:
            if bound["task"] == task:
                found[bound["train_examples"], UPPER_BOUND] = bound
        title = f"{task}, {summary['metrics'][task]}"
        yield _scores(title, names, summary, found)
    if summary["tests"]:
        yield _tests(summary["tests"])
    yield _cost(summary)


def markdown(summary: dict[str, Any]) -> str:
    """All tables, and the conditions."""
    parts = []
    for table in tables(summary):
        lines = [f"**{table.title}**", "", _line(table.columns), "|---" * len(table.columns) + "|"]
        parts.append("\n".join([*lines, *map(_line, table.rows)]))
    return "\n\n".join([*parts, conditions(summary)]) + "\n"


def conditions(summary: dict[str, Any]) -> str:
    """How the numbers came about, in a sentence or two."""
    settings, hardware = summary["settings"], summary["hardware"]
    rates = f"{len(settings['lr_factors'])} rates" if not settings["lr"] else "the rates given"
    dev = settings["dev_examples"]
    choice = f"the best of {rates} and of the evaluations on up to {dev:,} dev rows"
    return (
        f"Score x 100, mean ± standard deviation of {len(summary['seeds'])} seeds; "
        f"{choice if dev else 'the last step, without a dev part'}; training rows drawn with seed "
        f"{settings['data_seed']}; model {settings['model']}; {hardware['cpu']}; torch "
        f"{summary['versions']['torch']}."
    )


def _scores(
    title: str, names: Sequence[str], summary: dict[str, Any], found: dict[Any, Any]
) -> Table:
    rows = []
    for count in summary["train_examples"]:
        cells = [found.get((count, name)) for name in names]
        rows.append([size_name(count), *map(_score, cells)])
    return Table(title, ["K", *names], rows)


def _score(cell: dict[str, Any] | None) -> str:
    """A mean with its deviation, which one seed does not have."""
    if cell is None:
        return "–"
    deviation = "" if len(cell.get("scores", "")) == 1 else f" ± {100 * cell['std']:.1f}"
    return f"{100 * cell['mean']:.1f}{deviation}"


def _tests(tests: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            f"{test['method']} – {test['against']}",
            ", ".join(map(size_name, test["train_examples"])),
            f"{100 * test['mean']:+.2f}",
            str(test["pairs"]),
            f"{test['p']:.3f}",
            test["verdict"],
        ]
        for test in tests
    ]
    columns = ["difference", "K", "mean x 100", "pairs", "p", "so it is"]
    return Table("pairs of the same task, rows and seed, by their signs", columns, rows)


def _cost(summary: dict[str, Any]) -> Table:
    rows = []
    for name, counts in summary["parameters"].items():
        seconds = sum(
            cell["processor_seconds"] for cell in summary["cells"] if cell["method"] == name
        )
        share = f"{100 * counts['stored'] / counts['base']:.3g} %"
        rows.append(
            [name, f"{counts['trained']:,}", f"{counts['stored']:,}", share, f"{seconds:,.0f} s"]
        )
    columns = ["method", "trained parameters", "stored", "of the model's", "processor time"]
    return Table("cost", columns, rows)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

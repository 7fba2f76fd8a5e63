"""`pelt-kernels gates`"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import predict_options as given
from .console import Debug, errors_in_one_line, notes, results


def gates(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run, or of an adapter.")],
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            "--task",
            "-t",
            help="A file of rows with labels; several are compared.",
            show_default="the run's test part",
        ),
    ] = None,
    ungated: Annotated[
        Path | None,
        typer.Option(help="A run of the same task without gates, to compare with."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the files.", show_default="RUN"),
    ] = None,
    text_column: given.TextColumn = None,
    pair_column: given.PairColumn = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="The column of the labels.", show_default="label, labels or class"),
    ] = None,
    no_header: given.NoHeader = False,
    model: given.Model = None,
    batch_size: given.BatchSize = 32,
    backend: given.Backend = None,
    device: given.Device = "auto",
    debug: Debug = False,
) -> None:
    """Tell what an adapter's gates do, and what they are worth: gates.json, gates.html, gates.csv.

    The gates of every text, what they follow (label, length, loss, confidence), and the scores
    with gates held, shuffled and parts removed.
    """
    with errors_in_one_line(debug):
        from ..ops import use_backend
        from ..training.gate_report import Watch, report_gates
        from ..training.machine import computing_device
        from ..training.tasks import Columns

        console = notes()
        bar = Progress(
            TextColumn("texts"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        computing = computing_device(device)
        folder = run if output is None else output
        with bar, use_backend(backend) if backend else nullcontext():
            texts = bar.add_task("texts", total=None)
            watch = Watch(
                say=lambda sentence: console.print(sentence, markup=False, soft_wrap=True),
                total=lambda count: bar.update(texts, total=count),
                advance=lambda count: bar.advance(texts, count),
            )
            report = report_gates(
                run,
                folder,
                files=tasks or (),
                columns=Columns(text_column, pair_column, label_column, not no_header),
                ungated=ungated,
                model=model,
                batch_size=batch_size,
                device=computing,
                watch=watch,
            )
        out = results()
        out.print(_table(report))
        for sentence in (report["findings"]["headline"], report["findings"]["lead"]):
            out.print(sentence, markup=False, soft_wrap=True)
        out.print(f"gates.html, gates.json and gates.csv: {folder}", markup=False, soft_wrap=True)


def _table(report: dict[str, Any]) -> Table:
    """The mean gate of each layer and kind."""
    from ..training.gate_report.findings import kinds_of

    gates = report["gates"]
    kinds = kinds_of(report)
    means = {(gate["layer"], gate["kind"]): f"{gate['mean']:.3f}" for gate in gates}
    titles = [kind.replace("_", " ") for kind in kinds]
    table = Table("layer", *titles, title=f"mean gates on {report['task']}")
    for layer in sorted({gate["layer"] for gate in gates}):
        table.add_row(str(layer), *(means.get((layer, kind), "–") for kind in kinds))
    return table

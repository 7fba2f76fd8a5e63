"""`pelt-kernels export`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from . import choices
from .console import Debug, errors_in_one_line, results

if TYPE_CHECKING:
    from ..training import Exported


def export(
    adapter: Annotated[
        Path, typer.Option("--adapter", "-a", help="The folder adapter/ that training left.")
    ] = Path("adapter"),
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new folder for the model.")
    ] = Path("exported"),
    form: Annotated[
        choices.Form | None,
        typer.Option(
            "--format",
            help="dense, 2:4 or csr (a plain model), adapter (experts merged, prefix computed), or "
            "peft (LoRA or a prefix in PEFT's files).",
            show_default="dense, for AdaMix's adapters adapter",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The base model, where it has moved since training."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a trained adapter as a plain transformers model, or for PEFT, ready to serve."""
    with errors_in_one_line(debug):
        from ..training import export as export_adapter

        exported = export_adapter(adapter, output, form, model)
        out = results()
        if exported.matrices:
            out.print(_density(exported))
        if exported.why_adapter:
            out.print(f"an adapter and not a plain model, because of {exported.why_adapter}")
        out.print(f"{exported.form}, {exported.bytes:,} bytes: {output}", markup=False)


def _density(exported: Exported) -> Table:
    """The share of entries that are not 0, by layer and place."""
    places = list(dict.fromkeys(matrix.place for matrix in exported.matrices))
    title = "density of the layers' matrices"
    table = Table("layer", *(place.replace("_", " ") for place in places), "zeros", title=title)
    by_place = {(matrix.layer, matrix.place): matrix for matrix in exported.matrices}
    for layer in dict.fromkeys(matrix.layer for matrix in exported.matrices):
        # An encoder's layer lacks what a decoder's has.
        row = [by_place.get((layer, place)) for place in places]
        zeros = f"{sum(matrix.zeros for matrix in row if matrix):,}"
        shares = (f"{matrix.density:.3f}" if matrix else "–" for matrix in row)
        table.add_row(str(layer), *shares, zeros)
    return table

"""`pelt-kernels export`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import Debug, results, speaking_plainly

if TYPE_CHECKING:
    from ..training import Exported


def export(
    adapter: Annotated[Path, typer.Option(help="The folder adapter/ that training left.")] = Path(
        "adapter"
    ),
    output: Annotated[Path, typer.Option(help="A new folder for the model.")] = Path("exported"),
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="dense, 2:4 or csr (a plain model), or adapter (experts merged, prefix computed). "
            "Default dense, for AdaMix's adapters adapter.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model, where it has moved since training.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a trained adapter as a plain transformers model: merged, pruned, ready to serve."""
    with speaking_plainly(debug):
        from ..training import export as write

        done = write(adapter, output, form, model)
        out = results()
        if done.matrices:
            out.print(_density(done))
        if done.why_adapter:
            out.print(f"an adapter and not a plain model, because of {done.why_adapter}")
        out.print(f"{done.form}, {done.bytes:,} bytes: {output}", markup=False)


def _density(done: Exported) -> Table:
    """The share of entries that are not 0, by layer and place."""
    places = list(dict.fromkeys(matrix.place for matrix in done.matrices))
    title = "density of the layers' matrices"
    table = Table("layer", *(place.replace("_", " ") for place in places), "zeros", title=title)
    by_place = {(matrix.layer, matrix.place): matrix for matrix in done.matrices}
    for layer in dict.fromkeys(matrix.layer for matrix in done.matrices):
        row = [by_place[layer, place] for place in places]
        zeros = f"{sum(matrix.zeros for matrix in row):,}"
        table.add_row(str(layer), *(f"{matrix.density:.3f}" for matrix in row), zeros)
    return table

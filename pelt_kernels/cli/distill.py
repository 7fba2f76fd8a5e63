"""`pelt-kernels distill`"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .console import Debug, errors_in_one_line, notes, results
from .predict_options import Backend, BatchSize, Device


def distill(
    file: Annotated[Path, typer.Option(help="CSV, TSV or JSONL with sources and targets.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new file of the same kind.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Folder or hub id of the model that writes.")
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="A trained adapter for it; without one it writes itself.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Of an adapter for several tasks.")] = None,
    text_column: Annotated[str, typer.Option(help="What the model reads.")] = "source",
    target_column: Annotated[str, typer.Option(help="What is replaced.")] = "target",
    prefix: Annotated[str, typer.Option(help="Put in front of each text.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest target.")] = 150,
    batch_size: BatchSize = 16,
    backend: Backend = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Replace the targets of a file by what a trained model writes greedily.

    The output appears whole, at the end; a command that was broken off is taken up by the same one.
    """
    with errors_in_one_line(debug):
        from ..ops import use_backend
        from ..training.distill import Writer, Writing
        from ..training.distill import distill as write_file
        from ..training.machine import computing_device
        from .progress import counting

        writing = Writing(model, adapter, task, prefix, max_new_tokens)
        console = notes()
        with use_backend(backend) if backend else nullcontext():
            writer = Writer(writing, computing_device(device))
            settings = asdict(writing) | {"adapter": _digest(adapter)}
            with counting(console, "texts", None) as advance:
                count = write_file(
                    file, output, writer, text_column=text_column, target_column=target_column,
                    settings=settings, batch_size=batch_size, advance=advance,
                )  # fmt: skip
        if writer.truncated:
            console.print(
                f"{writer.truncated} texts are longer than {writer.max_length} tokens and were cut"
            )
        results().print(f"{count:,} targets: {output}", markup=False)


def _digest(adapter: Path | None) -> str | None:
    """Of an adapter's weights, so that a command with others does not go on with these targets."""
    from ..models.adapter_files import files_in

    if adapter is None:
        return None
    return hashlib.sha256(files_in(adapter).weights.read_bytes()).hexdigest()

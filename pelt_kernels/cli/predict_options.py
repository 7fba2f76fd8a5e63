"""The options of `pelt-kernels predict`, in the order of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import choices

Texts = Annotated[
    list[str] | None, typer.Argument(help="Texts; without any, lines of --file or stdin.")
]
Adapter = Annotated[
    Path, typer.Option("--adapter", "-a", help="The folder adapter/ that training left.")
]
Pair = Annotated[
    list[str] | None, typer.Option(help="The second text of each text, in the same order.")
]
File = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="CSV, TSV, JSONL or Parquet, else lines of text."),
]
TextColumn = Annotated[
    str | None, typer.Option(help="The column of the texts.", show_default="text, sentence, ...")
]
PairColumn = Annotated[str | None, typer.Option(help="The second text's column.")]
LabelColumn = Annotated[str | None, typer.Option(help="Where there are labels, a score is told.")]
SourceColumn = Annotated[
    str | None,
    typer.Option(help="What a model reads that writes texts.", show_default="source"),
]
TargetColumn = Annotated[str | None, typer.Option(help="Where there are targets, a score is told.")]
Attributes = Annotated[
    list[str] | None,
    typer.Option(
        "--attribute",
        metavar="NAME=LABEL",
        help="The label of an attribute in every row, instead of the column of its training.",
    ),
]
Task = Annotated[str | None, typer.Option(help="The task of every row, of an adapter for several.")]
TaskColumn = Annotated[
    str | None,
    typer.Option(help="Where each row says its task.", show_default="as in training"),
]
Beams = Annotated[
    int | None,
    typer.Option(min=1, help="With which texts are written.", show_default="as in training"),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of the longest text.", show_default="as in training"),
]
NoHeader = Annotated[
    bool, typer.Option("--no-header", help="Columns of --file are called 1, 2, 3, ...")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="The base model, where it has moved since training."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts of one forward pass.")]
Backend = Annotated[
    choices.Backend | None, typer.Option(help="For every operator.", show_default="the fastest")
]
Device = Annotated[choices.Device, typer.Option(help="auto: a GPU where there is one.")]

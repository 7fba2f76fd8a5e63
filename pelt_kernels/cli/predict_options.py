"""The options of `pelt-kernels predict`, in the order of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Texts = Annotated[
    list[str] | None, typer.Argument(help="Texts; without any, lines of --file or stdin.")
]
Adapter = Annotated[Path, typer.Option(help="The folder adapter/ that training left.")]
Pair = Annotated[
    list[str] | None, typer.Option(help="The second text of each text, in the same order.")
]
File = Annotated[
    Path | None, typer.Option(help="CSV, TSV or JSONL with columns, else lines of text.")
]
TextColumn = Annotated[str | None, typer.Option(help="Default text, sentence, ...")]
PairColumn = Annotated[str | None, typer.Option(help="The second text's column.")]
LabelColumn = Annotated[str | None, typer.Option(help="Where there are labels, a score is told.")]
SourceColumn = Annotated[
    str | None, typer.Option(help="What a model reads that writes texts; source.")
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
    str | None, typer.Option(help="Where each row says its task; as in training.")
]
Beams = Annotated[
    int | None, typer.Option(min=1, help="With which texts are written; as in training.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="The longest text written; as in training.")
]
NoHeader = Annotated[
    bool, typer.Option("--no-header", help="Columns of --file are called 1, 2, 3, ...")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Model = Annotated[
    str | None, typer.Option(help="The base model, where it has moved since training.")
]
BatchSize = Annotated[int, typer.Option(min=1)]
Backend = Annotated[str | None, typer.Option(help="Ask every operator for one backend.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]

"""The options of `pelt-kernels train`, in the order of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_METHODS = (
    "unipelt, unipelt-ap, adapter, prefix, control_prefixes, lora, adamix, pst, vlm, hyperpelt, "
    "bitfit, composite, mam, head or full"
)

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="A CSV, TSV or JSONL file, docstring-match (the default) or a data set: "
        "glue/sst2. Several files, each with its own --task, are tasks learned together.",
    ),
]
Evals = Annotated[
    list[str] | None,
    typer.Option(
        "--eval",
        help="A file with the test part; else one is held out of --task. One for each --task.",
    ),
]
Model = Annotated[
    str | None, typer.Option(help="A hub id or a folder; the default lies in a package.")
]
Method = Annotated[str | None, typer.Option(help=f"{_METHODS}.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="A field of the method, such as r=4, sparsity=0.5 or adapter.bottleneck=16; "
        "repeat it for more.",
    ),
]
TrainExamples = Annotated[
    int | None, typer.Option(help="Training examples that each seed draws; default all.")
]
Seeds = Annotated[str | None, typer.Option(help="One run for each, such as 0,1,2.")]
Lr = Annotated[
    str | None, typer.Option(help="Learning rate; of several (1e-3,1e-2) the best on dev.")
]
Epochs = Annotated[int | None, typer.Option(help="Default by method, and more for few examples.")]
BatchSize = Annotated[int | None, typer.Option(help="Default by method.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens kept of a text; 128.")]
Problem = Annotated[
    str | None,
    typer.Option(
        help="What the labels are: classification, regression (scores), multi-label (several "
        "a row) or generation (texts); found out where it is plain."
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="What decides on dev (best weights, stopping, rate): accuracy, f1 or matthews; "
        "spearman or pearson; f1_micro, f1_macro or accuracy; bleu, chrf or rouge_l."
    ),
]
ClassWeights = Annotated[
    str | None,
    typer.Option(help="balanced: all classes weigh the same in the loss, in sum; or none."),
]
Patience = Annotated[
    int | None,
    typer.Option(help="Evaluations on dev without a better score or loss before stopping; 3."),
]
EvalEvery = Annotated[
    int | None, typer.Option(help="Steps between evaluations; 0: an epoch, but at least 25.")
]
Warmup = Annotated[float | None, typer.Option(help="Share of the steps with a rising rate; 0.06.")]
WeightDecay = Annotated[float | None, typer.Option(help="0.")]
TextColumn = Annotated[str | None, typer.Option(help="Default text, sentence, ...")]
PairColumn = Annotated[str | None, typer.Option(help="The second text's column.")]
LabelColumn = Annotated[str | None, typer.Option(help="Default label.")]
LabelSeparator = Annotated[
    str | None, typer.Option(help="Between the labels of a row in CSV and TSV; a comma.")
]
SourceColumn = Annotated[
    str | None, typer.Option(help="What a model reads that writes texts; source.")
]
TargetColumn = Annotated[str | None, typer.Option(help="What it writes; target.")]
AttributeColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--attribute-column",
        metavar="NAME=COLUMN",
        help="The labels of an attribute, for control_prefixes; repeat it for more.",
    ),
]
TaskColumn = Annotated[
    str | None, typer.Option(help="The names of tasks, for methods of several tasks.")
]
MaxTargetLength = Annotated[
    int | None, typer.Option(help="Tokens kept of a target; default the longest.")
]
Beams = Annotated[int | None, typer.Option(help="With which texts are written; 1.")]
NoHeader = Annotated[
    bool | None,
    typer.Option("--no-header", help="CSV or TSV without names: columns are called 1, 2, ..."),
]
Backend = Annotated[str | None, typer.Option(help="Ask every operator for one backend.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder for the results; default runs/<task>-<method>.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run in --output first.")]

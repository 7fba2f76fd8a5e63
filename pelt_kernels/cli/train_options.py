"""The options of `pelt-kernels train`, in the order of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import choices

# Names of transformers' TrainingArguments and of its example scripts, which a file may use, too. An
# underscore is read as a hyphen in every name.
OTHER_NAMES = {
    "dataset-name": "task",
    "gradient-accumulation-steps": "gradient-accumulation",
    "learning-rate": "lr",
    "max-seq-length": "max-length",
    "model-name-or-path": "model",
    "num-beams": "beams",
    "num-train-epochs": "epochs",
    "output-dir": "output",
    "overwrite-output-dir": "overwrite",
    "seed": "seeds",
    "torch-compile": "compile",
    "train-file": "task",
    "warmup-ratio": "warmup",
}


def usual_name(name: str) -> str:
    """The option's name for one that was typed. What an option can be is given here, too, and kept
    as it is.
    """
    if name in choices.VALUES:
        return name
    plain = name.replace("_", "-")
    return OTHER_NAMES.get(plain, plain)


def _option(*names: str, default: str | bool = True, **more: Any) -> Any:
    """`default` is what the help shows in its place, where it is not a value."""
    return typer.Option(*names, show_default=default, **more)


Config = Annotated[
    Path | None,
    _option(
        "--config",
        help="A YAML or JSON file with these options by name, such as a run's run.json; options "
        "given here come before the file's.",
    ),
]
PrintConfig = Annotated[
    bool, _option("--print-config", help="Write all of it as YAML, for --config, and end.")
]
Tasks = Annotated[
    list[str] | None,
    _option(
        "--task",
        "-t",
        default="docstring-match",
        help="A CSV, TSV, JSONL or Parquet file, docstring-match or a data set: glue/sst2. Several "
        "files, each with its own --task, are tasks learned together.",
    ),
]
Evals = Annotated[
    list[str] | None,
    _option(
        "--eval", default="held out of --task", help="A file with the test part, for each --task."
    ),
]
Model = Annotated[str, _option("--model", "-m", help="A hub id or a folder.")]
Method = Annotated[
    choices.Method, _option("--method", help="`pelt-kernels methods` describes them.")
]
Options = Annotated[
    list[str] | None,
    _option(
        "--set",
        metavar="FIELD=VALUE",
        help="A field of the method, such as r=4, sparsity=0.5 or adapter.bottleneck=16; "
        "repeat it for more. `pelt-kernels methods NAME` lists them.",
    ),
]
TrainExamples = Annotated[
    int | None, _option(default="all", help="Training examples that each seed draws.")
]
Seeds = Annotated[str, _option(help="One run for each, such as 0,1,2.")]
Lr = Annotated[
    str | None,
    _option(default="by method", help="Learning rate; of several (1e-3,1e-2) the best on dev."),
]
Epochs = Annotated[
    int | None,
    _option(default="by method, and more for few examples", help="At most; training stops early."),
]
BatchSize = Annotated[
    int | None,
    _option(default="by method", help="Examples of one backward pass, in all processes."),
]
GradientAccumulation = Annotated[int, _option(help="Backward passes of one step.")]
MaxLength = Annotated[
    int | None, _option(default="128, or what the model reads", help="Tokens kept of a text.")
]
Problem = Annotated[
    choices.Problem | None,
    _option(
        default="by the labels",
        help="What the labels are: classes, scores, several a row, or texts.",
    ),
]
Metric = Annotated[
    choices.Metric | None,
    _option(
        default="by --problem: accuracy, spearman, f1_micro or bleu",
        help="What decides on dev (best weights, stopping, rate).",
    ),
]
ClassWeights = Annotated[
    choices.ClassWeights,
    _option(help="balanced: all classes weigh the same in the loss, in sum."),
]
Patience = Annotated[
    int, _option(help="Evaluations on dev without a better score or loss before stopping.")
]
EvalEvery = Annotated[
    int, _option(help="Steps between evaluations; 0: an epoch, but at least 25 steps.")
]
Warmup = Annotated[float, _option(help="Share of the steps with a rising rate.")]
WeightDecay = Annotated[float, _option(help="Of AdamW.")]
TextColumn = Annotated[
    str | None, _option(default="text, sentence, ...", help="The column of the texts.")
]
PairColumn = Annotated[
    str | None, _option(default="text_pair, sentence2, ...", help="The second text's column.")
]
LabelColumn = Annotated[
    str | None, _option(default="label, labels or class", help="The column of the labels.")
]
LabelSeparator = Annotated[str, _option(help="Between the labels of a row in CSV and TSV.")]
SourceColumn = Annotated[
    str | None, _option(default="source", help="What a model reads that writes texts.")
]
TargetColumn = Annotated[str | None, _option(default="target", help="What it writes.")]
AttributeColumns = Annotated[
    list[str] | None,
    _option(
        "--attribute-column",
        metavar="NAME=COLUMN",
        help="The labels of an attribute, for control_prefixes; repeat it for more.",
    ),
]
TaskColumn = Annotated[str | None, _option(help="The names of tasks, for methods of several.")]
MaxTargetLength = Annotated[int | None, _option(default="all", help="Tokens kept of a target.")]
Beams = Annotated[int, _option(help="With which texts are written.")]
NoHeader = Annotated[
    bool, _option("--no-header", help="CSV or TSV without names: columns are called 1, 2, ...")
]
Backend = Annotated[
    choices.Backend | None, _option(default="the fastest", help="For every operator.")
]
Device = Annotated[
    choices.Device,
    _option(help="auto: a GPU if torch sees one. Several: accelerate launch, or torchrun."),
]
Precision = Annotated[choices.Precision, _option(help="bf16 and fp16 by autocast.")]
GradientCheckpointing = Annotated[
    bool,
    _option("--gradient-checkpointing", help="Compute activations twice and keep fewer of them."),
]
Compile = Annotated[bool, _option("--compile", help="Train under torch.compile.")]
ReportTo = Annotated[
    list[str] | None,
    _option(metavar="TRACKER", help="tensorboard, wandb, trackio, ...; repeat it for more."),
]
Output = Annotated[
    Path | None,
    _option("--output", "-o", default="runs/<task>-<method>", help="Folder for the results."),
]
Resume = Annotated[bool, _option("--resume", help="Go on with the run in --output.")]
Overwrite = Annotated[bool, _option("--overwrite", help="Remove the run in --output first.")]
Wait = Annotated[
    bool,
    _option("--wait", help="Wait where another run writes in --output, and do not end at once."),
]

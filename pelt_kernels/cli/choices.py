"""What the options of commands can be.

The lists are written out, and compared with their sources by a test, because those load torch, for
which help and completion would wait.
"""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal[
    "unipelt", "unipelt-ap", "adapter", "prefix", "control_prefixes", "lora", "adamix", "pst",
    "vlm", "hyperpelt", "bitfit", "composite", "mam", "head", "full",
]  # fmt: skip
Problem = Literal["classification", "regression", "multi-label", "generation"]
Metric = Literal[
    "accuracy", "f1", "matthews", "spearman", "pearson", "f1_micro", "f1_macro", "bleu", "chrf",
    "rouge_l",
]  # fmt: skip
ClassWeights = Literal["none", "balanced"]
Backend = Literal["cuda", "triton", "cpu", "cuda_sim", "cpu_sim", "eager"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]
Form = Literal["dense", "2:4", "csr", "adapter", "peft"]
Preset = Literal["unipelt", "adamix", "pst"]

VALUES = frozenset(
    value
    for kind in (Method, Problem, Metric, ClassWeights, Backend, Device, Precision, Form, Preset)
    for value in get_args(kind)
)

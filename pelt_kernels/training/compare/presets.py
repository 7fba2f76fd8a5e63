"""The protocols of papers, as far as they do not name tasks. Each value is one of `Comparison`'s
and can be replaced; what a paper does that is not done here stands in docs/compare.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .protocol import METHODS, Source

# Mao et al. 2022, section 4 and its code: K of 100, 500 and 1 000 rows drawn with data seed 42, the
# next 1 000 as dev, five seeds, patience 10, 128 tokens. Metrics by the names that GLUE gives its
# tasks.
UNIPELT: dict[str, Any] = {
    "methods": METHODS,
    "train_examples": (100, 500, 1000, None),
    "seeds": (0, 1, 2, 3, 4),
    "data_seed": 42,
    "dev_examples": 1000,
    "patience": 10,
    "max_length": 128,
}
# Wang et al. 2022, few-shot: 30 examples, five seeds and no dev part, so that every method has its
# own rate and its last step is tested. Warm-up and weight decay are those of its code for GLUE.
ADAMIX: dict[str, Any] = {
    "methods": ("full", "head", "bitfit", "adapter", "prefix", "lora", "unipelt", "adamix"),
    "train_examples": (30,),
    "seeds": (0, 1, 2, 3, 4),
    "dev_examples": 0,
    "lr_factors": (1.0,),
    "warmup": 0.06,
    "weight_decay": 0.1,
    "max_length": 128,
}
# Li et al. 2022 and its code for BERT: 20 epochs in batches of 32 at 3e-5 without warm-up, a target
# sparsity of 0.9; half of it beside it, and full fine-tuning. The best evaluation of those at the
# final sparsity is kept, however many epochs stand between it and the end.
PST: dict[str, Any] = {
    "methods": ("full", "pst:sparsity=0.5", "pst:sparsity=0.9"),
    "train_examples": (None,),
    "lr": {"": (3e-5,)},
    "epochs": 20,
    "batch_size": 32,
    "patience": 20,
    "warmup": 0.0,
    "weight_decay": 0.0,
    "max_length": 128,
}
PRESETS: dict[str, dict[str, Any]] = {"unipelt": UNIPELT, "adamix": ADAMIX, "pst": PST}
# What GLUE's papers report of these tasks; others have their problem's first metric.
GLUE_METRICS = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "spearman"}


def preset(name: str, tasks: Sequence[Source]) -> dict[str, Any]:
    """A paper's values for `Comparison`, with GLUE's metrics for tasks of its names."""
    metrics = {
        source.name: GLUE_METRICS[kind]
        for source in tasks
        if (kind := source.name.rpartition("/")[2].lower()) in GLUE_METRICS
    }
    return PRESETS[name] | {"metrics": metrics}

"""One training step on the embedded task: seconds and peak memory of each method beside the head
alone.

    python -m benchmarks.train_step [--methods unipelt,head] [--steps 30] [--backend NAME]
                                    [--device cuda] [--model bert-base] [--json FILE]

``--model bert-base`` has the sizes of BERT-base, random weights and random texts of up to 128
tokens: it needs neither files nor a network. Each method runs in a process of its own, so that the
peak is its own. ``saved`` is what autograd keeps from forward for backward in one step, counted
once per storage. ``processor`` is the time of all threads together, which other work on the machine
disturbs less than it does the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .methods_table import METHODS
from .rows import write

BATCH, WARM_UP = 16, 3
BERT_BASE = "bert-base"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a row for each method, and writes them with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--backend", help="ask every operator for one backend")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=(BERT_BASE,), help="instead of the embedded one")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(_measure(options)))
        return 0
    passed = ["--steps", str(options.steps), "--device", options.device]
    passed += ["--backend", options.backend] if options.backend else []
    passed += ["--model", options.model] if options.model else []
    command = [sys.executable, "-m", "benchmarks.train_step", *passed]
    rows = []
    columns = ("ms / step", "processor", "peak MiB", "saved MiB")
    print(f"{'method':12} {' '.join(f'{name:>10}' for name in columns)}  backends")
    for method in options.methods.split(","):
        done = subprocess.run([*command, "--one", method], stdout=subprocess.PIPE, check=True)
        row = json.loads(done.stdout)
        rows.append(row)
        figures = [1e3 * row["seconds"], 1e3 * row["processor_seconds"]]
        figures += [row[key] / 2**20 for key in ("peak_bytes", "saved_bytes")]
        shown = " ".join(f"{figure:10,.1f}" for figure in figures)
        print(f"{method:12} {shown}  {row['backends']}", flush=True)
        if options.json:
            write(options.json, rows)
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers.utils import logging

    from pelt_kernels import get_pelt_model, make_config, use_backend
    from pelt_kernels._hardware import hardware
    from pelt_kernels.training.base_model import EMBEDDED
    from pelt_kernels.training.report import backends_used, peak_memory, versions

    logging.set_verbosity_error()  # that the head is new is the point
    logging.disable_progress_bar()
    torch.manual_seed(0)
    make = _random_bert_base if options.model == BERT_BASE else _embedded
    base, batches = make(WARM_UP + options.steps)
    device = options.device
    model = get_pelt_model(base, make_config(options.one)).to(device).train()
    model.set_progress(1.0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step(batch: dict[str, Any]) -> tuple[float, float]:
        begun = time.perf_counter(), time.process_time()
        model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun[0], time.process_time() - begun[1]

    with use_backend(options.backend) if options.backend else nullcontext():
        saved = _saved_bytes(model, batches[0], device)
        laps = [step(batch) for batch in batches][WARM_UP:]
    return {
        "method": options.one,
        "model": options.model or EMBEDDED,
        "seconds": statistics.median(clock for clock, _ in laps),
        "processor_seconds": statistics.median(processor for _, processor in laps),
        "peak_bytes": peak_memory(),
        "saved_bytes": saved,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "batch": BATCH,
        "steps": options.steps,
        "backends": backends_used(),
        "hardware": hardware(),
        "versions": versions(),
    }


def _random_bert_base(count: int) -> tuple[Any, list[dict[str, Any]]]:
    """A model, and as many batches."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_labels=2)
    batches = []
    for _ in range(count):
        lengths = torch.randint(32, 129, (BATCH, 1))
        batches.append({
            "input_ids": torch.randint(0, config.vocab_size, (BATCH, 128)),
            "attention_mask": (torch.arange(128) < lengths).long(),
            "labels": torch.randint(0, 2, (BATCH,)),
        })  # fmt: skip
    return BertForSequenceClassification(config), batches


def _embedded(count: int) -> tuple[Any, list[dict[str, Any]]]:
    """The model whose weights lie in a package, and as many batches of its task."""
    from pelt_kernels.training.base_model import EMBEDDED, load_classifier, load_tokenizer
    from pelt_kernels.training.encode import LengthGroups, Pad, encode
    from pelt_kernels.training.tasks import Columns, load_task

    task = load_task("docstring-match", None, Columns(None, None, None))
    tokenizer = load_tokenizer(EMBEDDED)
    examples = encode(task.train[: count * BATCH], tokenizer, 128, task.labels)
    order = list(LengthGroups(examples.lengths, BATCH, seed=0))
    pad = Pad(tokenizer)
    starts = range(0, len(order), BATCH)
    batches = [pad([examples[index] for index in order[at : at + BATCH]]) for at in starts]
    return load_classifier(EMBEDDED, 2), batches


def _saved_bytes(model: Any, batch: dict[str, Any], device: str) -> int:
    import torch

    # Weights are there anyway; only what a forward makes counts.
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**{name: value.to(device) for name, value in batch.items()})
    return sum(sizes.values())


if __name__ == "__main__":
    sys.exit(main())

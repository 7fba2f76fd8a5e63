"""One training step on the embedded task: seconds and peak memory of each method beside the head
alone.

    python -m benchmarks.train_step [--methods unipelt,head] [--steps 30] [--backend NAME]
                                    [--device cuda] [--model bert-base] [--against eager]
                                    [--json FILE]
    python -m benchmarks.train_step --peft [...]

``--model`` has the sizes of BERT-base or of another model of `benchmarks.step_models`, random
weights and random texts of up to 128 tokens: it needs neither files nor a network. Each method runs
in a process of its own, so that the peak is its own. ``saved`` is what autograd keeps from forward
for backward in one step, counted once per storage. ``processor`` is the time of all threads
together, which other work on the machine disturbs less than it does the clock. ``--against`` has
another backend take turns with the first, step by step on the same model: ``speedup`` is its
processor time over the first one's, the median of the pairs.

``--peft`` is a benchmark of its own, `benchmarks.peft_step`: PEFT's models as shipped against the
same models accelerated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from . import peft_step, step_models
from .methods_table import METHODS
from .rows import write
from .timing import lap, paired

BATCH, WARM_UP = 16, 3  # texts of the embedded task, and steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a row for each method, and writes them with ``--json``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--peft" in given:
        given.remove("--peft")
        return peft_step.main(given)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--backend", help="ask every operator for one backend")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=step_models.MODELS, help="instead of the embedded one")
    parser.add_argument("--against", help="a backend that takes turns with the first")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.one:
        print(json.dumps(_measure(options)))
        return 0
    passed = ["--steps", str(options.steps), "--device", options.device]
    passed += ["--backend", options.backend] if options.backend else []
    passed += ["--model", options.model] if options.model else []
    passed += ["--against", options.against] if options.against else []
    command = [sys.executable, "-m", "benchmarks.train_step", *passed]
    rows = []
    columns = ["ms / step", "processor", "peak MiB", "saved MiB"]
    columns += ["speedup"] if options.against else []
    print(f"{'method':12} {' '.join(f'{name:>10}' for name in columns)}  backends")
    for method in options.methods.split(","):
        done = subprocess.run([*command, "--one", method], stdout=subprocess.PIPE, check=True)
        row = json.loads(done.stdout)
        rows.append(row)
        figures = [1e3 * row["seconds"], 1e3 * row["processor_seconds"]]
        figures += [row[key] / 2**20 for key in ("peak_bytes", "saved_bytes")]
        figures += [row["speedup"]["median"]] if options.against else []
        shown = " ".join(f"{figure:10,.{2 if figure < 10 else 1}f}" for figure in figures)
        print(f"{method:12} {shown}  {row['backends']}", flush=True)
        if options.json:
            write(options.json, rows)
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers.utils import logging

    from pelt_kernels import get_pelt_model, make_config
    from pelt_kernels._hardware import hardware
    from pelt_kernels.training.base_model import EMBEDDED
    from pelt_kernels.training.machine import backends_used, versions
    from pelt_kernels.training.report import peak_memory

    logging.set_verbosity_error()  # that the head is new is the point
    logging.disable_progress_bar()
    torch.manual_seed(0)
    steps = WARM_UP + options.steps
    base, batches = step_models.make(options.model, steps) if options.model else _embedded(steps)
    device = options.device
    model = get_pelt_model(base, make_config(options.one)).to(device).train()
    model.set_progress(1.0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step(batch: dict[str, Any]) -> None:
        model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    backends = {"": options.backend} | ({"other_": options.against} if options.against else {})
    laps: dict[str, list[tuple[float, float]]] = {prefix: [] for prefix in backends}
    with _asked(options.backend):
        saved = _saved_bytes(model, batches[0], device)
    for number, batch in enumerate(batches):
        # Whoever comes first at a step comes second at the next.
        for prefix in list(backends) if number % 2 else reversed(backends):
            with _asked(backends[prefix]):
                laps[prefix].append(lap(partial(step, batch), device))
    row = {
        "method": options.one,
        "model": options.model or EMBEDDED,
        "peak_bytes": peak_memory(),
        "saved_bytes": saved,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "batch": len(batches[0]["labels"]),
        "steps": options.steps,
        "backends": backends_used(),
        "hardware": hardware(),
        "versions": versions(),
    }
    for prefix, all_laps in laps.items():
        for index, name in enumerate(("seconds", "processor_seconds")):
            row[prefix + name] = statistics.median(each[index] for each in all_laps[WARM_UP:])
    if options.against:
        pairs = zip(laps["other_"][WARM_UP:], laps[""][WARM_UP:])
        row |= {"against": options.against, "speedup": paired([o[1] / m[1] for o, m in pairs])}
    return row


def _asked(backend: str | None) -> Any:
    from pelt_kernels import use_backend

    return use_backend(backend) if backend else nullcontext()


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

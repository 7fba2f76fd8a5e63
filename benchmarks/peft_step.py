"""PEFT's models as shipped against the same models accelerated: a training step and a forward
without gradients, in one process, in turns.

    python -m benchmarks.train_step --peft [--models minilm,llama] [--methods lora-8,prefix]
                                    [--dtypes float32] [--minutes 10] [--json FILE] [--resume]

Both models are copies of one; before they are timed their outputs are compared. A figure is PEFT's
time over the accelerated model's in the same round, the median of the rounds and the 20th and 80th
of a hundred. The time is shared out among the configurations, and each has three rounds at least;
those that it does not reach are named, and ``--resume`` goes on with them. Rows of other kinds of
processors stay in the file. ``lora-8-all`` has LoRA on every Linear and is measured on request.
``memory`` is the share of PEFT's peak in a training step, beyond what is there before it. PEFT's
prefix tuning refuses BERT, so there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pelt_kernels._hardware import hardware

from . import step_models
from .checkout import ROOT, commit
from .rows import kept, processor_order, write
from .timing import lap, paired, peak_bytes

BATCH, BATCHES, ROUNDS = 4, 4, (3, 60)  # texts; batches that take turns; at least and at most
PREFIX_LENGTH = 30
DTYPES = ("float32", "bfloat16")
MODELS = ("minilm", "bert-base", "llama", "gpt2", "t5")  # without a request
METHODS = ("lora-8", "lora-64", "prefix", "lora-8-all")
USUAL = METHODS[:3]
RESULTS = ROOT / "benchmarks" / "results" / "peft_step.jsonl"
SLOWER = 0.97  # of PEFT's speed, and what an accelerated model may not be below
# The difference that outputs may have, as a share of the largest: what the dtype's rounding makes
# of twelve layers; a wrong scale or a lost row is far outside.
CLOSE = {"float32": 1e-4, "bfloat16": 5e-2}


class Configuration(NamedTuple):
    """What one row is of."""

    model: str
    method: str
    dtype: str

    def __str__(self) -> str:
        return " ".join(self)


def configurations(
    models: Sequence[str], methods: Sequence[str], dtypes: Sequence[str]
) -> list[Configuration]:
    """Every one that PEFT has, the models in turn."""
    return [
        Configuration(model, method, dtype)
        for dtype in dtypes
        for model in models
        for method in methods
        if method != "prefix" or step_models.MODELS[model].writes
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each configuration, and writes rows; 1 where a model became slower."""
    parser = argparse.ArgumentParser(
        prog="train_step --peft", description=__doc__.partition("\n\n")[0]
    )
    for name, known, usual in (
        ("models", tuple(step_models.MODELS), MODELS),
        ("methods", METHODS, USUAL),
        ("dtypes", DTYPES, DTYPES),
    ):
        parser.add_argument(f"--{name}", type=_some_of(known), default=usual)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of them")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="ask the accelerated model for one backend")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the file")
    options = parser.parse_args(arguments)
    here = hardware()["kind"]
    rows = kept(options.json, here, options.resume)
    done = {_of(row) for row in rows if row["hardware"]["kind"] == here}
    wanted = configurations(options.models, options.methods, options.dtypes)
    order = configurations(tuple(step_models.MODELS), METHODS, DTYPES)
    waiting = [each for each in wanted if each not in done]
    end = time.perf_counter() + 60 * options.minutes
    for number, each in enumerate(waiting):
        left = end - time.perf_counter()
        if left < 0:
            print("no time for:", *waiting[number:], sep="\n  ")
            break
        row = measure(each, left / (len(waiting) - number), options)
        rows.append(row)
        print(line(row), flush=True)
        if options.json:
            rows.sort(key=lambda row: (processor_order(row), order.index(_of(row))))
            write(options.json, rows)
    slow = [what for row in rows if row["hardware"]["kind"] == here for what in slower(row)]
    print(*slow, sep="\n")
    return 1 if slow else 0


def _some_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected of {', '.join(known)}, got {name}")
        return found

    return names


def _of(row: dict[str, Any]) -> Configuration:
    return Configuration(row["model"], row["method"], row["dtype"])


def measure(what: Configuration, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """A row: what the configuration takes as shipped and accelerated."""
    import peft
    import torch

    import pelt_kernels
    from pelt_kernels.ops._dispatch import forget_choices
    from pelt_kernels.training.machine import backends_used, versions

    torch.manual_seed(0)
    begun = time.perf_counter()
    dtype, device = getattr(torch, what.dtype), options.device
    base, batches = step_models.make(what.model, BATCHES, options.batch)
    # The head's parameters stay in float32 where PEFT keeps them so: the model is cast before.
    base = base.to(device, dtype)
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    made = peft.get_peft_model(base, _config(what.method, base))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)  # not zero, so that the branch does something
    # Both are copies, for where weights lie in memory counts.
    shipped, faster = copy.deepcopy(made), copy.deepcopy(made)
    del base, made
    forget_choices()
    report = pelt_kernels.accelerate(faster, backend=options.backend)
    models = {"peft": shipped, "accelerated": faster}
    _check(what, models, batches[0])
    steps = {name: step_models.training_step(model) for name, model in models.items()}
    peaks = {name: peak_bytes(lambda step=step: step(batches[0]), device) for name, step in
             steps.items()}  # fmt: skip
    reads = {name: step_models.forward(model) for name, model in models.items()}
    left = max(0.0, seconds - (time.perf_counter() - begun))
    row: dict[str, Any] = {**what._asdict()}
    for kind, contenders, share in (("training", steps, 0.7), ("inference", reads, 0.3)):
        row[kind] = compared(_in_turns(contenders, batches, share * left, device))
    return row | {
        "peak_bytes": peaks["accelerated"],
        "peft_peak_bytes": peaks["peft"],
        "batch": options.batch,
        "length": step_models.MODELS[what.model].length,
        "served": {operator: len(names) for operator, names in report.served.items()},
        "left_alone": len(report.left_alone),
        "backends": backends_used(),
        "load": round(os.getloadavg()[0], 1),
        "hardware": hardware(),
        "versions": versions() | {"peft": peft.__version__},
        "commit": commit(),
    }


def _config(method: str, base: Any) -> Any:
    """PEFT's own defaults, but for what the method's name says."""
    import peft

    task = step_models.peft_task(base)
    if method == "prefix":
        return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=PREFIX_LENGTH)
    _, rank, *everywhere = method.split("-")
    targets = {"target_modules": "all-linear"} if everywhere else {}
    return peft.LoraConfig(task_type=task, r=int(rank), lora_alpha=16, **targets)


def _check(what: Configuration, models: dict[str, Any], batch: dict[str, Any]) -> None:
    """Raises AssertionError where the models do not compute the same."""
    import torch

    with torch.no_grad():
        theirs, ours = (model.eval()(**batch).logits.float() for model in models.values())
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= CLOSE[what.dtype]:
        raise AssertionError(
            f"{what}: expected outputs within {CLOSE[what.dtype]} of PEFT's, got {difference:.2g}"
        )


Laps = dict[str, list[tuple[float, float]]]


def _in_turns(
    contenders: dict[str, Callable[[dict[str, Any]], None]],
    batches: list[dict[str, Any]],
    seconds: float,
    device: str,
) -> Laps:
    """Seconds on the clock and of the processor, for each contender a pair per round. All have
    been called before.
    """
    laps: Laps = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() > end:
            break
        # Whoever comes first in a round comes second in the next.
        for name in list(contenders) if number % 2 else reversed(contenders):
            call = partial(contenders[name], batches[number % len(batches)])
            laps[name].append(lap(call, device))
    return laps


def compared(laps: Laps) -> dict[str, Any]:
    """How much faster the accelerated model is, on the clock and in the processor's time."""
    figures: dict[str, Any] = {"rounds": len(laps["peft"])}
    for index, name in enumerate(("", "processor_")):
        theirs, ours = ([each[index] for each in laps[who]] for who in ("peft", "accelerated"))
        figures[f"{name}speedup"] = paired([a / b for a, b in zip(theirs, ours)])
        figures[f"{name}seconds"] = statistics.median(ours)
        figures[f"peft_{name}seconds"] = statistics.median(theirs)
    return figures


def slower(row: dict[str, Any]) -> Iterator[str]:
    """A line for each figure in which the accelerated model is slower."""
    for kind in ("training", "inference"):
        speedup = row[kind]["speedup"]["median"]
        if speedup < SLOWER:
            yield f"slower than PEFT: {_of(row)}, {kind}: {speedup:.2f}x"


def line(row: dict[str, Any]) -> str:
    """A row to print."""
    cells = [f"{_of(row)!s:28}"]
    for kind in ("training", "inference"):
        figures = row[kind]
        cells.append(
            f"{kind} {figures['speedup']['median']:.2f}x ({figures['speedup']['low']:.2f} to "
            f"{figures['speedup']['high']:.2f}; processor "
            f"{figures['processor_speedup']['median']:.2f}x) of "
            f"{1e3 * figures['peft_seconds']:.0f} ms in {figures['rounds']} rounds"
        )
    cells.append(f"memory {row['peak_bytes'] / row['peft_peak_bytes']:.2f}x, load {row['load']}")
    return "  ".join(cells)


if __name__ == "__main__":
    sys.exit(main())

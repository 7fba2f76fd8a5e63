"""The paper's efficiency table: a training step and a forward of each method in each library, as a
share of full fine-tuning, each contender a process of its own, the processes in turn.

    python -m benchmarks.peers.adapters_environment runs/adapters
    python -m benchmarks.efficiency --adapters runs/adapters --minutes 25
        --json benchmarks/results/efficiency.jsonl [--models bert-base] [--contenders lora,...]

Models have the sizes of known ones, random weights and random texts of up to 128 tokens. A round is
a step of every contender on the same batch; a share is that contender's time over full
fine-tuning's in the same round, the median of the rounds and the 20th and 80th of a hundred. Memory
does not hold every contender at once, so they run in groups, full fine-tuning in each.
``head`` trains a classifier on the frozen model; its forward is the frozen model's.

Without ``--adapters`` the contenders of the library `adapters` are left out, which asks for another
transformers; the environment must have the same Python where its models are to be accelerated. Rows
of other kinds of processors stay in the file, and with ``--resume`` those of this one, which are
not measured again. At the end the goals are compared with what was found, in words.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pelt_kernels._hardware import hardware

from . import efficiency_table, step_models
from .checkout import ROOT, commit
from .rows import kept, processor_order, write
from .step_contender import CONTENDERS
from .timing import paired

BASE = "full"
MODELS = ("minilm", "bert-base", "roberta-large")
BATCH = {"minilm": 16, "bert-base": 8, "roberta-large": 2}
# Those that memory holds at a time beside full fine-tuning; who is compared is in one group.
GROUPS = (
    ("unipelt", "unipelt-unpadded", "unipelt-eager", "unipelt-compiled", "adapters-unipelt",
     "adapters-unipelt-accelerated"),
    ("lora", "lora-unpadded", "peft-lora", "peft-lora-accelerated", "peft-lora-unpadded",
     "adapters-lora", "adapters-lora-accelerated", "bitfit", "head"),
    ("adapter", "adapters-adapter", "adapters-adapter-accelerated", "prefix", "peft-prefix",
     "adapters-prefix"),
    ("unipelt-ap", "adapters-unipelt-ap", "mam", "adapters-mam"),
)  # fmt: skip
ROUNDS = (3, 40)  # at least and at most
RESULTS = ROOT / "benchmarks" / "results" / "efficiency.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each contender, writes rows, and compares them with the goals."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--contenders", help="with commas between; default all that can run")
    parser.add_argument("--adapters", type=Path, help="an environment with the library adapters")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of them")
    parser.add_argument("--batch", type=int, help=f"texts; default {BATCH}, else the model's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the file")
    options = parser.parse_args(arguments)
    options.models = options.models.split(",")
    for model in options.models:
        if model not in step_models.MODELS:
            parser.error(f"--models: expected of {', '.join(step_models.MODELS)}, got {model}")
    names = options.contenders.split(",") if options.contenders else list(CONTENDERS)
    for name in names:
        if name not in CONTENDERS:
            parser.error(f"--contenders: expected of {', '.join(CONTENDERS)}, got {name}")
    here = hardware()["kind"]
    rows = kept(options.json, here, options.resume)
    done = {key(row)[1:] for row in rows if key(row)[0] == here}
    wanted = [(model, name) for model in options.models for name in _able(model, names, options)]
    groups = list(_groups(wanted, done))
    end = time.perf_counter() + 60 * options.minutes
    for number, (model, group) in enumerate(groups):
        seconds = (end - time.perf_counter()) / (len(groups) - number)
        for row in measure(model, group, seconds, options):
            rows = [r for r in rows if key(r) != key(row)] + [row]
            print(efficiency_table.line(row), flush=True)
        rows.sort(key=_order)
        if options.json:
            write(options.json, rows)
    print(*efficiency_table.goals(rows), sep="\n")
    return 0


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """What a row is measured of: the kind of processor, the model, the contender."""
    return row["hardware"]["kind"], row["model"], row["contender"]


def _order(row: dict[str, Any]) -> tuple[tuple[bool, str], int, int]:
    """Of a row in the file: by processor, then models and contenders in their order."""
    _, model, contender = key(row)
    return (
        processor_order(row),
        list(step_models.MODELS).index(model),
        list(CONTENDERS).index(contender),
    )


def _able(model: str, names: Sequence[str], options: argparse.Namespace) -> Iterator[str]:
    """The contenders that can run with a model."""
    writes, has_biases = step_models.MODELS[model].writes, step_models.MODELS[model].has_biases
    for name in names:
        library, method, way = CONTENDERS[name]
        if library == "adapters" and options.adapters is None:
            continue
        if method == "bitfit" and not has_biases:
            continue
        if writes and way == "unpadded":
            continue  # a decoder's layers know positions
        if writes and method == "head":
            continue  # its head is the embedding, which belongs to the base model
        if not writes and name == "peft-prefix":
            continue  # PEFT refuses a prefix in a model that does not write
        yield name


def _groups(
    wanted: Sequence[tuple[str, str]], done: set[tuple[str, str]]
) -> Iterator[tuple[str, list[str]]]:
    """The groups of each model, without what is measured already."""
    for model in dict.fromkeys(model for model, _ in wanted):
        for group in GROUPS:
            names = [n for n in group if (model, n) in wanted and (model, n) not in done]
            if names:
                yield model, names


@contextmanager
def started(name: str, model: str, options: argparse.Namespace) -> Iterator[Process]:
    """A contender's process until the end of the block."""
    python = sys.executable
    if CONTENDERS[name].library == "adapters":
        python = str(options.adapters.resolve() / "bin" / "python")
    batch = options.batch or BATCH.get(model) or step_models.MODELS[model].batch
    command = [python, "-m", "benchmarks.step_contender", name, model, str(batch), options.device]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"KINETO_LOG_LEVEL": "99"} | CONTENDERS[name].environment,
    )
    try:
        yield Process(process, name, batch)
    finally:
        process.kill()
        process.wait()


class Process:
    """A contender that answers."""

    def __init__(self, process: subprocess.Popen[str], name: str, batch: int) -> None:
        self.process, self.name, self.batch = process, name, batch
        self.about = self._answer()

    def ask(self, *words: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{json.dumps(words)}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process ended; what it wrote stands above")
        return json.loads(line)


def measure(
    model: str, names: Sequence[str], seconds: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for full fine-tuning and for each of the contenders."""
    begun = time.perf_counter()
    with ExitStack() as stack:
        workers = [stack.enter_context(started(name, model, options)) for name in (BASE, *names)]
        peaks = {worker.name: worker.ask("peak") for worker in workers}
        left = max(0.0, seconds - (time.perf_counter() - begun))
        laps = {
            kind: _in_turns(workers, kind, share * left)
            for kind, share in (("training", 0.75), ("inference", 0.25))
        }
        for worker in workers:
            yield {
                "model": model,
                "contender": worker.name,
                **CONTENDERS[worker.name]._asdict(),
                **{kind: _compared(found, worker.name) for kind, found in laps.items()},
                "peak_bytes": peaks[worker.name],
                "batch": worker.batch,
                "length": step_models.MODELS[model].length,
                "backends": worker.ask("backends"),
                **worker.about,
                "load": round(os.getloadavg()[0], 1),
                "hardware": hardware(),
                "commit": commit(),
            }


Laps = dict[str, list[tuple[float, float]]]


def _in_turns(workers: Sequence[Process], kind: str, seconds: float) -> Laps:
    """Seconds on the clock and of the processor, for each contender a pair per round, in an order
    that is drawn anew.
    """
    generator = random.Random(0)
    laps: Laps = {worker.name: [] for worker in workers}
    end = time.perf_counter() + seconds
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() > end:
            break
        for worker in generator.sample(workers, len(workers)):
            laps[worker.name].append(tuple(worker.ask(kind, number)))
    return laps


def _compared(laps: Laps, name: str) -> dict[str, Any]:
    """What a contender takes, its share of full fine-tuning, and its times over those of each other
    library's contender with the same method.
    """
    found: dict[str, Any] = {"rounds": len(laps[name])}
    method = CONTENDERS[name].method
    for index, prefix in enumerate(("", "processor_")):

        def over(other: str, index: int = index) -> dict[str, float]:
            return paired([a[index] / b[index] for a, b in zip(laps[name], laps[other])])

        found[f"{prefix}seconds"] = statistics.median(lap[index] for lap in laps[name])
        found[f"{prefix}share"] = over(BASE)
        found[f"{prefix}over"] = {
            other: over(other)
            for other in laps
            if other != name and CONTENDERS[other].method == method
        }
    return found


if __name__ == "__main__":
    sys.exit(main())

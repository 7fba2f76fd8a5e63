"""What one BERT layer with a method in it calls, and what those calls take the host.

    python -m benchmarks.layer_calls [--methods unipelt,frozen] [--rounds 60] [--device cuda]
                                     [--json benchmarks/results/layer_calls.jsonl]

In an environment with the library ``adapters`` (`benchmarks.peers.adapters_environment`) its
methods are measured instead, ``adapters-unipelt`` and so on; prefixes, which it computes before the
layers, are not in a layer's figures.

A figure is of one layer: of a model of `MANY` layers less that of one of `FEW`, divided by the
layers between, so nothing around the layers is in it. ``calls`` are torch's operators and this
package's, which count once each; those that only make a view are apart, as ``views``. They are
counted in ``inference`` (evaluation without gradients), in ``forward`` (a
training step's, with dropout) and in ``backward``, and do not depend on the machine. On a GPU
``kernels`` are the kernels launched.

``us`` is processor time on one thread, at sizes where the arithmetic takes next to none: the median
of rounds in which all models take turns. A row takes the place of an older one of the same method,
commit and processor.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .checkout import ROOT, commit
from .rows import Rows, read, write
from .step_contender import CONTENDERS
from .step_contender import make as make_contender

RESULTS = ROOT / "benchmarks" / "results" / "layer_calls.jsonl"
FEW, MANY, ROUNDS = 1, 5, 60
PARTS = ("inference", "forward", "backward")
HIDDEN, HEADS, WORDS, BATCH = 64, 2, 8, 2
OWN = "pelt_kernels"


class Calls(TorchDispatchMode):
    """Counts operators by name; views apart. What an operator calls inside is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.views = self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returned = [result.alias_info for result in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in returned):
            self.views += 1
        else:
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Contender:
    """A method in models of `FEW` and of `MANY` layers, and what is measured of them."""

    def __init__(self, method: str, device: str) -> None:
        self.method, self.device = method, device
        self.models = {count: make(method, count).to(device) for count in (FEW, MANY)}
        mask = torch.ones(BATCH, WORDS, dtype=torch.long, device=device)
        mask[0, WORDS // 2 :] = 0
        words = torch.arange(BATCH * WORDS, device=device).view(BATCH, WORDS)
        self.inputs = {"input_ids": words, "attention_mask": mask}

    def counts(self) -> dict[str, Any]:
        """The row's counts."""
        found = {count: self._counted(model) for count, model in self.models.items()}
        row: dict[str, Any] = {}
        for part in PARTS:
            few, many = found[FEW][part], found[MANY][part]
            names = sorted(many.calls)
            each = {name: many.calls[name] - few.calls[name] for name in names}
            row[part] = {
                "calls": _share(sum(each.values())),
                "views": _share(many.views - few.views),
                "own": {
                    name.partition("::")[2]: _share(count)
                    for name, count in each.items()
                    if name.startswith(f"{OWN}::") and count
                },
            }
            if self.device == "cuda":
                row[part]["kernels"] = _share(many.kernels - few.kernels)
        return row

    def _counted(self, model: Any) -> dict[str, Any]:
        steps = Steps(model, self.inputs)
        found = {}
        for part in PARTS:
            # Under a mode a forward leaves the registered backward, which is one call.
            with Calls():
                steps.before(part)
            found[part] = Calls()
            with found[part]:
                steps.run(part)
            if self.device == "cuda":
                steps.before(part)
                found[part].kernels = _kernels(lambda part=part: steps.run(part))
        return found

    def laps(self) -> dict[str, float]:
        """Microseconds of a layer, from one pass over both models."""
        taken: dict[str, dict[int, float]] = {part: {} for part in PARTS}
        for count, model in self.models.items():
            steps = Steps(model, self.inputs)
            for part in PARTS:
                steps.before(part)
                begun = time.process_time_ns()
                steps.run(part)
                taken[part][count] = (time.process_time_ns() - begun) / 1e3
        return {part: (laps[MANY] - laps[FEW]) / (MANY - FEW) for part, laps in taken.items()}


class Steps:
    """One forward for inference, then one forward and one backward of training."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.model, self.inputs = model, inputs
        self.loss: Any = None

    def before(self, part: str) -> None:
        """What a part needs and what does not count."""
        self.model.train(part != "inference")
        if part == "backward":
            self.loss = self._output().sum()
        else:
            self.model.zero_grad()

    def run(self, part: str) -> None:
        """What counts."""
        if part == "backward":
            self.loss.backward()
        else:
            with torch.set_grad_enabled(part == "forward"):
                self._output()

    def _output(self) -> Any:
        return self.model(**self.inputs).last_hidden_state


def make(method: str, layers: int) -> Any:
    """A BERT of random weights with a method: a name of the command's, ``frozen``, ``peft-lora``
    (PEFT's LoRA on query and value), or one of the library ``adapters`` as `step_contender` has it.
    """
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=WORDS,
    )
    base = BertModel(config, add_pooling_layer=False)
    if method == "frozen":
        base.requires_grad_(False)
        # What is below a trained part is not differentiated; a frozen layer above one is.
        base.embeddings.LayerNorm.requires_grad_(True)
        return base
    if method == "peft-lora":
        import peft

        return peft.get_peft_model(base, peft.LoraConfig(target_modules=["query", "value"]))
    if method in CONTENDERS and CONTENDERS[method].library == "adapters":
        return make_contender(CONTENDERS[method], base)
    from pelt_kernels import get_pelt_model, make_config

    return get_pelt_model(base, make_config(method))


def usual() -> list[str]:
    """The methods that are measured unless others are asked for."""
    methods = ["unipelt", "adapter", "lora", "prefix"]
    if importlib.util.find_spec("adapters"):
        return ["frozen", *(f"adapters-{method}" for method in methods)]
    peers = ["peft-lora"] if importlib.util.find_spec("peft") else []
    return ["frozen", *methods, *peers]


def _share(difference: float) -> float:
    """One layer's share of a difference: a whole number unless layers differ."""
    share = difference / (MANY - FEW)
    return int(share) if share == int(share) else share


def _kernels(call: Callable[[], Any]) -> int:
    """Kernels that a call launches on a GPU."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profile.events())


def measure(methods: Sequence[str], rounds: int, device: str) -> Rows:
    """A row for each method."""
    from pelt_kernels._hardware import hardware
    from pelt_kernels.training.machine import backends_used, versions

    contenders = [Contender(method, device) for method in methods]
    rows: Rows = []
    for contender in contenders:
        rows.append({"method": contender.method, **contender.counts()})
    if device == "cpu":
        laps = [[contender.laps() for contender in contenders] for _ in range(rounds + 3)][3:]
        for number, row in enumerate(rows):
            for part in PARTS:
                row[part]["us"] = round(statistics.median(lap[number][part] for lap in laps), 1)
    common = {
        "backends": backends_used(),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }
    return [row | common for row in rows]


def joined(old: Rows, new: Rows) -> Rows:
    """All rows, a new one in place of an old one of the same method, commit and processor."""

    def of(row: dict[str, Any]) -> tuple[str, ...]:
        return row["method"], row["commit"], row["hardware"]["kind"], str(row["hardware"]["gpu"])

    replaced = {of(row) for row in new}
    return [*(row for row in old if of(row) not in replaced), *new]


def table(rows: Rows) -> str:
    """Calls, those of this package among them, and microseconds of a layer, in Markdown."""
    lines = [
        "| processor | commit | method | inference | forward | backward |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        cells = [row["hardware"]["kind"], row["commit"][:10], f"`{row['method']}`"]
        for part in PARTS:
            own = sum(row[part]["own"].values())
            cells.append(f"{row[part]['calls']} ({own}), {row[part]['us']:,.0f} us")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints a line for each method, and adds the rows to a file with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--methods", default=",".join(usual()))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.methods.split(","), options.rounds, options.device)
    print(f"{'method':10} {''.join(f'{part:>32}' for part in PARTS)}")
    print(f"{'':10} {'calls   views   own      us'.rjust(32) * len(PARTS)}")
    for row in rows:
        cells = []
        for part in PARTS:
            own, us = sum(row[part]["own"].values()), row[part].get("us", float("nan"))
            cells.append(f"{row[part]['calls']:>9} {row[part]['views']:>7} {own:>5} {us:>8.1f}")
        print(f"{row['method']:10} {' '.join(cells)}")
    if options.json:
        old = read(options.json) if options.json.is_file() else []
        write(options.json, joined(old, rows))


if __name__ == "__main__":
    main()

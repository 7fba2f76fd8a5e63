"""What skipping parts with small gates gives: the test score, the parameters and FLOPs that work,
and the time for a text, of trained runs at several thresholds, into benchmarks/results.

    python -m benchmarks.active RUN [RUN ...] --json benchmarks/results/active.jsonl

A run is a folder that `pelt-kernels train --method unipelt` has left, with or without
``--set gate_penalty=...``. All of its test part is scored under `PeltModel.skip_below`, and some of
it is timed: in rounds, in each of which every threshold has a turn in an order that is drawn anew,
so that a share is of the same moment. Prefixes are collapsed, as they are for inference. Rows of a
run that is measured again are replaced, the others stay.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pelt_kernels._hardware import hardware
from pelt_kernels.methods import parts_of
from pelt_kernels.models import PeltModel
from pelt_kernels.training import Predictor
from pelt_kernels.training.gate_report.measure import Outcome, Rows
from pelt_kernels.training.gate_report.source import Source
from pelt_kernels.training.machine import backends_used, versions
from pelt_kernels.training.tasks import Columns, Example

from . import active_table, readme
from .checkout import commit
from .rows import read, write
from .timing import lap, paired

THRESHOLDS = (None, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
TIMED = {1: 16, 32: 64}  # texts of a lap, drawn from the test part, by the size of a batch
ROUNDS = 7


@dataclass
class Measured:
    """A run's model and the rows of its test part."""

    folder: Path
    source: Source
    model: PeltModel
    predictor: Predictor
    examples: list[Example]
    trained: int  # parameters, of which a collapsed prefix has fewer

    @classmethod
    def of(cls, folder: Path) -> Measured | None:
        """None, with a reason in the log, where the run has no gates to skip by."""
        source = Source.of(folder)
        predictor = Predictor(source.adapter, None, "cpu")
        model = predictor.model
        if not isinstance(model, PeltModel) or model.why_not_countable():
            print(f"active: {folder} left out, {model.why_not_countable()}", file=sys.stderr)
            return None
        trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
        if model.prefix is not None:
            model.collapse_prefix()
        parts = source.rows((), Columns(), partial(print, file=sys.stderr))
        examples = [example for part in parts.values() for example in part]
        return cls(folder, source, model, predictor, examples, trained)

    def rows(self, rounds: int) -> Iterator[dict[str, Any]]:
        """A row for each threshold."""
        about = self._about()
        texts = Rows(self.source.problem, self.examples, self.predictor.form, 32, "cpu")
        lengths = torch.from_numpy(texts.lengths)
        untouched = texts.outcome(self.model)
        gates = self._gates(untouched)
        scores = {}
        for threshold in THRESHOLDS:
            self.model.skip_below = threshold
            scores[threshold] = texts.outcome(self.model).score(self.source.metric)
        times = {batch: self._times(batch, rounds) for batch in TIMED}
        about["backends"] = backends_used()
        for threshold in THRESHOLDS:
            yield {
                **about,
                **self.model.count_active(gates, lengths, threshold).means(),
                "score": scores[threshold],
                "times": {str(batch): found[threshold] for batch, found in times.items()},
            }

    def _gates(self, outcome: Outcome) -> dict[tuple[int, str], torch.Tensor]:
        columns = torch.from_numpy(outcome.gates).float().unbind(1)
        return dict(zip(outcome.names, columns, strict=True))

    def _about(self) -> dict[str, Any]:
        config, parts = self.source.config, parts_of(self.model.method_config)
        assert config is not None  # of a run, not of an adapter alone
        return {
            "run": self.folder.resolve().name,
            "task": Path(config.task).resolve().parent.name,
            "model": config.model,
            "metric": self.source.metric,
            "gate_penalty": parts.gate_penalty,
            "gate_penalty_kind": parts.gate_penalty_kind if parts.gate_penalty else None,
            "train_examples": config.train_examples,
            "seeds": list(config.seeds),
            "trained": self.trained,
            "stored": self.model.get_nb_stored_parameters(),
            "texts": len(self.examples),
            "load": round(os.getloadavg()[0], 1),
            "hardware": hardware(),
            "versions": versions(),
            "commit": commit(),
        }

    def _times(self, batch_size: int, rounds: int) -> dict[float | None, dict[str, Any]]:
        """For each threshold the time for a text, and its share of the time without one."""
        batches = list(self._batches(batch_size))
        count = sum(len(batch["input_ids"]) for batch in batches)
        draw = random.Random(0)
        laps: dict[float | None, list[tuple[float, float]]] = {t: [] for t in THRESHOLDS}
        for number in range(rounds + 1):
            for threshold in draw.sample(THRESHOLDS, len(THRESHOLDS)):
                self.model.skip_below = threshold
                found = lap(lambda: self._forwards(batches), "cpu")
                if number:  # the first round is not counted
                    laps[threshold].append(found)
        made = {}
        for threshold, own in laps.items():
            row: dict[str, Any] = {"texts": count, "rounds": rounds}
            for index, prefix in enumerate(("", "processor_")):
                pairs = zip(own, laps[None], strict=True)
                row[f"{prefix}seconds"] = median(found[index] for found in own) / count
                row[f"{prefix}share"] = paired([a[index] / b[index] for a, b in pairs])
            made[threshold] = row
        return made

    def _batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """Some of the texts, those of a batch of like lengths."""
        count = min(TIMED[batch_size], len(self.examples))
        chosen = random.Random(0).sample(self.examples, count)
        form, problem = self.predictor.form, self.source.problem
        rows = sorted(problem.encoded(chosen, form).rows, key=lambda row: len(row["input_ids"]))
        collate = problem.collator(form)
        for start in range(0, len(rows), batch_size):
            batch: dict[str, Any] = collate(rows[start : start + batch_size])
            del batch["labels"]
            yield batch

    @torch.inference_mode()
    def _forwards(self, batches: Sequence[dict[str, Any]]) -> None:
        for batch in batches:
            self.model(**batch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each row, and writes the rows after each run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = read(options.json) if options.json and options.json.is_file() else []
    for folder in options.runs:
        measured = Measured.of(folder)
        if measured is None:
            continue
        fresh = list(measured.rows(options.rounds))
        print(*map(active_table.line, fresh), sep="\n", flush=True)
        replaced = (fresh[0]["task"], fresh[0]["run"])
        rows = [row for row in rows if (row["task"], row["run"]) != replaced] + fresh
        rows.sort(key=lambda row: (row["task"], row["run"]))
        if options.json:
            write(options.json, rows)
    if options.json and options.json.resolve() == active_table.RESULTS:
        readme.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The numbers of a report on gates, and its two files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..._hardware import hardware
from ...methods import parts_of
from ...models import PeltModel
from ..errors import UsageError
from ..experiment import GATE_FILES
from ..machine import versions
from ..predictor import Predictor
from ..storage import replacing, require_writable, write_json
from ..tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, Columns, Example
from . import ablation, comparison, relations
from .ablation import Altered
from .active import active_numbers
from .comparison import Difference
from .findings import findings
from .measure import Outcome, Rows
from .page import page
from .relations import Relation, Trait
from .source import Say, Source

NUMBERS_FILE, PAGE_FILE, TEXTS_FILE = GATE_FILES
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEWEST_ROWS = 8
Json = dict[str, Any]


@dataclass(frozen=True)
class Watch:
    """Where a report sends sentences, and how many texts its forwards have in all and have done."""

    say: Say = lambda sentence: None
    total: Callable[[int], None] = lambda count: None
    advance: Callable[[int], None] = lambda count: None


def report_gates(
    folder: Path,
    output: Path,
    *,
    files: Sequence[Path] = (),
    columns: Columns | None = None,
    ungated: Path | None = None,
    model: str | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    watch: Watch | None = None,
) -> Json:
    """Writes ``gates.json``, ``gates.html`` and ``gates.csv`` into `output` and returns what the
    first holds. The last has a row for each text.

    Args:
        folder: of a finished run, or of an adapter.
        files: labelled rows, each file a task; none: the run's own test part.
        ungated: a run or an adapter that was trained without gates, to compare with.
        model: the base model, where it has moved.

    Raises:
        UsageError: no adapter, one without gates, no labelled rows. RunError: a damaged file.
    """
    watch = watch or Watch()
    source = Source.of(folder)
    twin = None if ungated is None else _twin(ungated, source)
    parts = source.rows(files, columns or Columns(), watch.say)
    examples = [example for part in parts.values() for example in part]
    if len(examples) < FEWEST_ROWS:
        raise UsageError(
            f"gates: expected at least {FEWEST_ROWS} labelled rows, got {len(examples)}"
        )
    require_writable(output)
    predictor = Predictor(source.adapter, model, device)
    tuned = _gated(predictor, source)
    rows = Rows(source.problem, examples, predictor.form, batch_size, device)
    if rows.truncated:
        watch.say(
            f"{rows.truncated} texts are longer than {predictor.max_length} tokens and were cut"
        )
    untouched = rows.outcome(tuned, advance=watch.advance)
    alterations = ablation.count_of(tuned, untouched) + (twin is not None)
    watch.total(len(rows) * (1 + alterations))
    altered = list(ablation.alterations(tuned, rows, untouched, watch.advance))
    if twin is not None:
        other = Predictor(twin.adapter, model, device)
        in_twin = Rows(twin.problem, examples, other.form, batch_size, device)
        outcome = in_twin.outcome(other.model, advance=watch.advance)
        altered.append(Altered(ablation.ALL, ablation.UNGATED, outcome))
    numbers = {
        **_source_numbers(source, parts, rows),
        "method_config": tuned.method_config.to_dict(),
        **_gate_numbers(source, parts, rows, untouched),
        "ablation": _ablation_numbers(untouched, altered, source.metric),
        "active": active_numbers(tuned, untouched, rows.lengths),
        "history": [
            {"step": entry["step"], "gates": entry["gates"]}
            for entry in source.history
            if entry.get("gates")
        ],
        "hardware": hardware(),
        "versions": versions(),
    }
    numbers["findings"] = findings(numbers)
    _write_texts(output / TEXTS_FILE, source, parts, rows, untouched)
    write_json(output / NUMBERS_FILE, numbers)
    with replacing(output / PAGE_FILE) as partial:
        partial.write_text(page(numbers), encoding="utf-8")
    return numbers


def _twin(folder: Path, source: Source) -> Source:
    """The adapter without gates. Raises UsageError where it is for something else."""
    twin = Source.of(folder)
    for name in ("problem", "labels", "has_pairs"):
        expected, got = getattr(source.card, name), getattr(twin.card, name)
        if got != expected:
            raise UsageError(
                f"ungated: expected an adapter of the same task, got one in {folder} whose {name} "
                f"is {got!r:.60} and not {expected!r:.60}"
            )
    return twin


def _gated(predictor: Predictor, source: Source) -> PeltModel:
    """The model. Raises UsageError where nothing in it is gated."""
    model = predictor.model
    config = model.method_config if isinstance(model, PeltModel) else None
    if not isinstance(model, PeltModel) or config is None or not parts_of(config).gated:
        method = f", which is {config.method}" if config is not None else ""
        raise UsageError(
            f"gates: expected an adapter with gates, got {source.adapter}{method}; --method "
            "unipelt trains some, and so does --set gated=true for adapter, prefix and lora"
        )
    return model


def _source_numbers(source: Source, parts: Mapping[str, Sequence[Example]], rows: Rows) -> Json:
    card = source.card
    return {
        "adapter": str(source.adapter),
        "model": card.model,
        "task": card.task,
        "problem": card.problem,
        "labels": list(card.labels),
        "rows": {name: len(part) for name, part in parts.items()},
        "truncated": rows.truncated,
        "metric": source.metric,
    }


def _gate_numbers(
    source: Source, parts: Mapping[str, Sequence[Example]], rows: Rows, untouched: Outcome
) -> Json:
    """Each gate's values and relations, and what the gates have in common."""
    tasks = np.repeat(np.arange(len(parts)), [len(part) for part in parts.values()])
    by_task = {name: tasks == place for place, name in enumerate(parts)}
    by_label = dict(_members(source, rows.labels))
    found = relations.relations(untouched.gates, _traits(source, rows, untouched, tasks))
    groups = {"by_label": by_label} | ({"by_task": by_task} if len(parts) > 1 else {})
    gates = []
    for place, (layer, kind) in enumerate(untouched.names):
        values = untouched.gates[:, place]
        gates.append(
            {
                "layer": layer,
                "kind": kind,
                **_summary(values),
                **{
                    group: {
                        name: _summary(values[chosen])
                        for name, chosen in members.items()
                        if chosen.any()
                    }
                    for group, members in groups.items()
                },
                "relations": {each.trait.name: _of_gate(each, place) for each in found},
            }
        )
    within = float(untouched.gates.var(axis=0).mean())
    between = float(untouched.gates.mean(axis=0).var())
    return {
        "quantiles_at": list(QUANTILES),
        "gates": gates,
        "variance": {"between_gates": between, "between_texts": within},
        "relations": {
            "permutations": relations.PERMUTATIONS,
            "seed": relations.SEED,
            "level": relations.LEVEL,
            "traits": {each.trait.name: _of_trait(each, untouched) for each in found},
        },
    }


def _write_texts(
    path: Path,
    source: Source,
    parts: Mapping[str, Sequence[Example]],
    rows: Rows,
    untouched: Outcome,
) -> None:
    """A row for each text: its task, label, length, what the model says of it, and its gates."""
    answers = source.problem.answers(torch.from_numpy(untouched.logits), source.card.labels)
    tasks = [name for name, part in parts.items() for _ in part]
    labels = [_label(example) for part in parts.values() for example in part]
    confidence = [""] * len(rows) if untouched.confidence is None else untouched.confidence
    gates = [f"{layer}.{kind}" for layer, kind in untouched.names]
    with (
        replacing(path) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        head = ("task", "label", "predicted", "length", "loss", "confidence")
        writer.writerow((*head, *gates))
        for n, (task, label, answer) in enumerate(zip(tasks, labels, answers, strict=True)):
            figures = (untouched.loss[n], confidence[n], *untouched.gates[n])
            rounded = (value if value == "" else f"{value:.6g}" for value in figures)
            writer.writerow((task, label, answer.columns[0], rows.lengths[n], *rounded))


def _label(example: Example) -> str:
    return example.label if isinstance(example.label, str) else ",".join(example.label or ())


def _members(source: Source, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Which rows have each label; nothing for scores."""
    if source.card.problem == REGRESSION:
        return
    for number, label in enumerate(source.card.labels):
        yield label, labels[:, number] > 0 if labels.ndim > 1 else labels == number


def _traits(source: Source, rows: Rows, untouched: Outcome, tasks: np.ndarray) -> list[Trait]:
    kinds = {
        CLASSIFICATION: Trait.of_groups,
        MULTI_LABEL: Trait.of_sets,
        REGRESSION: Trait.of_numbers,
    }
    traits = [
        kinds[source.card.problem]("label", rows.labels),
        Trait.of_numbers("length", rows.lengths),
        Trait.of_numbers("loss", untouched.loss),
    ]
    if untouched.confidence is not None:
        traits.append(Trait.of_numbers("confidence", untouched.confidence))
    if tasks.any():
        traits.append(Trait.of_groups("task", tasks))
    return traits


def _summary(values: np.ndarray) -> Json:
    return {
        "rows": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "least": float(values.min()),
        "most": float(values.max()),
        "quantiles": [float(value) for value in np.quantile(values, QUANTILES)],
    }


def _of_gate(relation: Relation, place: int) -> Json:
    return {
        "value": float(relation.values[place]),
        "p": float(relation.p[place]),
        "is_found": bool(relation.is_found[place]),
    }


def _of_trait(relation: Relation, untouched: Outcome) -> Json:
    strongest = int(relation.shares.argmax())
    layer, kind = untouched.names[strongest]
    return {
        "statistic": relation.trait.statistic,
        "found": int(relation.is_found.sum()),
        "strongest": {"layer": layer, "kind": kind, **_of_gate(relation, strongest)},
        "largest_share": float(relation.shares[strongest]),
    }


def _ablation_numbers(untouched: Outcome, altered: Sequence[Altered], metric: str) -> Json:
    outcomes = [each.outcome for each in altered]
    compared = comparison.differences(untouched, outcomes, metric)
    is_mean = metric == "accuracy" and untouched.right is not None
    return {
        "metric": metric,
        "score": untouched.score(metric),
        "loss": float(untouched.loss.mean()),
        "draws": comparison.DRAWS if is_mean else comparison.SLOW_DRAWS,
        "coverage": comparison.COVERAGE,
        "rows": [
            {
                "of": each.of,
                "change": each.change,
                "score": each.outcome.score(metric),
                "loss": float(each.outcome.loss.mean()),
                "difference": _of_difference(score),
                "loss_difference": _of_difference(loss),
            }
            for each, (score, loss) in zip(altered, compared, strict=True)
        ],
    }


def _of_difference(difference: Difference) -> Json:
    return asdict(difference) | {"interval": list(difference.interval)}

"""What is compared with what, and how: everything that decides the numbers of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

from ..base_model import EMBEDDED
from ..config import LARGEST_COUNT, LARGEST_SEED, TrainConfig
from ..errors import UsageError
from ..experiment_run import rate_name
from ..recipes import recipe
from ..tasks.docstring_match import NAME as EMBEDDED_TASK

# UniPELT's paper (Mao et al. 2022): its methods and sizes, with the head alone, AdaMix and
# mix-and-match beside them.
METHODS = (
    "full", "head", "bitfit", "adapter", "prefix", "lora", "unipelt-ap", "unipelt", "adamix", "mam",
)  # fmt: skip
SINGLE_METHODS = ("adapter", "prefix", "lora")  # the parts of UniPELT, each a method by itself
# A comparison can get more of these later; everything else stays as it was begun.
GROWING = ("tasks", "methods", "train_examples", "seeds")

Cell = tuple[str, int | None, str]  # task, number of training examples, method


class Source(NamedTuple):
    """A task by its name in the tables, where its rows are, and the file of its test part."""

    name: str
    task: str
    eval: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Methods on tasks, with so many training examples, each with its best learning rate.

    Attributes:
        tasks: different names.
        methods: names out of `recipes.RECIPES`, each with fields of its config behind colons where
            they are not the defaults: ``pst:sparsity=0.9``.
        train_examples: K, one row of the tables for each; None takes all.
        seeds: of training; the first one also chooses the learning rate.
        data_seed: of the order in which training rows are drawn, one for all runs.
        dev_examples: the rows after the K drawn ones that choose the best weights, when to stop and
            the learning rate; 0: none, the last step's weights are tested.
        lr: the rates that are tried, by method; ``""`` stands for all methods that are not named.
        lr_factors: of the recipe's rate, for methods that `lr` leaves out.
        metrics: of a task by its name; ``""`` stands for the others.
        model, epochs, batch_size, max_length, patience, eval_every, warmup, weight_decay, backend,
            device, precision: as in `TrainConfig`.
    """

    tasks: tuple[Source, ...] = (Source(EMBEDDED_TASK, EMBEDDED_TASK),)
    methods: tuple[str, ...] = METHODS
    train_examples: tuple[int | None, ...] = (100, 500, 1000, None)
    seeds: tuple[int, ...] = (0, 1, 2)
    data_seed: int = 42
    dev_examples: int = 1000
    lr: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    lr_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    metrics: Mapping[str, str] = field(default_factory=dict)
    model: str = EMBEDDED
    epochs: int | None = None
    batch_size: int | None = None
    max_length: int | None = None
    patience: int = 10
    eval_every: int = 0
    warmup: float = 0.06
    weight_decay: float = 0.0
    backend: str | None = None
    device: str = "auto"
    precision: str = "fp32"

    def rates(self, method: str) -> tuple[float, ...]:
        """The learning rates tried for a method."""
        name = method.partition(":")[0]
        for key in (method, name, ""):
            if key in self.lr:
                return tuple(self.lr[key])
        # Two digits, as people write rates: a third of 1e-3 would have no short name.
        return tuple(float(f"{recipe(name).lr * factor:.2g}") for factor in self.lr_factors)

    def config(self, source: Source, method: str) -> TrainConfig:
        """What each run of a method on a task has in common, checked. Raises UsageError."""
        name, *options = method.split(":")
        return TrainConfig(
            task=source.task,
            eval=source.eval,
            model=self.model,
            method=name,
            options=tuple(options),
            seeds=self.seeds,
            lr=self.rates(method),
            epochs=self.epochs,
            batch_size=self.batch_size,
            max_length=self.max_length,
            metric=self.metrics.get(source.name, self.metrics.get("")),
            patience=self.patience,
            # Without a dev part the only evaluation is that of the last step, which is then kept.
            eval_every=self.eval_every if self.dev_examples else LARGEST_COUNT,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            backend=self.backend,
            device=self.device,
            precision=self.precision,
        ).resolved()

    def check(self) -> None:
        """Raises UsageError for a comparison that cannot be made, whatever the data."""
        for name, values in (
            ("task", [source.name for source in self.tasks]),
            ("methods", self.methods),
            ("train-examples", self.train_examples),
        ):
            if not values or len(set(values)) < len(values):
                shown = ",".join(map(size_name, values)) or "none"
                raise UsageError(f"{name}: expected different ones, one or more, got {shown}")
        if not all(k is None or 1 <= k <= LARGEST_COUNT for k in self.train_examples):
            shown = ",".join(map(size_name, self.train_examples))
            raise UsageError(f"train-examples: expected numbers from 1 or all, got {shown}")
        if not 0 <= self.data_seed <= LARGEST_SEED:
            raise UsageError(
                f"data-seed: expected a number from 0 to {LARGEST_SEED}, got {self.data_seed}"
            )
        if not 0 <= self.dev_examples <= LARGEST_COUNT:
            raise UsageError(f"dev-examples: expected 0 or more, got {self.dev_examples}")
        if not self.lr_factors or not all(0 < f < float("inf") for f in self.lr_factors):
            raise UsageError(f"lr-factors: expected positive numbers, got {self.lr_factors}")
        known = {source.name for source in self.tasks}
        if unknown := [name for name in self.metrics if name and name not in known]:
            raise UsageError(
                f"metric: expected the name of a task ({', '.join(known)}), got {unknown[0]}"
            )
        named = {method.partition(":")[0] for method in self.methods} | set(self.methods)
        if unknown := [name for name in self.lr if name and name not in named]:
            raise UsageError(
                f"lr: expected a method of --methods ({', '.join(self.methods)}), got {unknown[0]}"
            )
        for source in self.tasks:
            for method in self.methods:
                self.config(source, method)
        self._check_rates()

    def _check_rates(self) -> None:
        """Raises UsageError where a method would get more tries than another."""
        grids = {method: self.rates(method) for method in self.methods}
        for (one, rates), (other, others) in pairwise(grids.items()):
            if len(rates) != len(others):
                raise UsageError(
                    f"lr: expected as many rates for every method, got {len(rates)} for {one} and "
                    f"{len(others)} for {other}"
                )
        if not self.dev_examples and max(map(len, grids.values())) > 1:
            raise UsageError(
                "lr: expected one rate for each method where there is no dev part to choose by "
                "(--dev-examples 0), got several; --lr-factors 1 takes the recipe's"
            )

    def stored(self) -> dict[str, Any]:
        """As JSON has it."""
        values = asdict(self) | {"tasks": [source._asdict() for source in self.tasks]}
        values["lr"] = {name: list(rates) for name, rates in self.lr.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> Comparison:
        """From what `stored` has written."""
        mine = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        mine["tasks"] = [Source(**source) for source in mine["tasks"]]
        mine["lr"] = {name: tuple(rates) for name, rates in mine.get("lr", {}).items()}
        return with_changes(cls(), mine)


def with_changes(comparison: Comparison, values: Mapping[str, Any]) -> Comparison:
    """The comparison with other values, lists as tuples."""
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return replace(comparison, **changes)


def size_name(value: int | str | None) -> str:
    """K as it is written."""
    return "all" if value is None else str(value)


class Job(NamedTuple):
    """One run: a method on a task with K examples, a learning rate and a seed. Whether it is tested
    depends on whether its rate was chosen.
    """

    task: str
    train_examples: int | None
    method: str
    lr: float
    seed: int
    is_tested: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells a run from another."""
        return self[:5]

    @property
    def title(self) -> str:
        size = size_name(self.train_examples)
        return f"{self.task}, K={size}, {self.method}, lr {rate_name(self.lr)}, seed {self.seed}"


def named(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Values by name, from ``name=value`` or, for all others, ``value``. Raises UsageError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if name in found or (equals and not name) or not value:
            raise UsageError(f"{option}: expected NAME=VALUE, each name once, got '{text}'")
        found[name] = value
    return found

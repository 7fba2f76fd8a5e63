"""Several tasks in one training: their examples in one dataset, drawn by temperature.

    mixture = TaskMixture({"mt": mt_examples, "qa": qa_examples})
    trainer = MixtureTrainer(model, arguments, temperature=10, train_dataset=mixture, ...)

Each example comes with the number of its task under ``tasks``, as a `PeltModel` of a method for
several tasks takes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

TASKS = "tasks"  # the number of an example's task, as models read it


class TaskMixture(Dataset[dict[str, Any]]):
    """The examples of several datasets, one task after the other, each with its task's number.

    Args:
        datasets: by the name of the task, in the order of the method's `tasks`; each has examples
            that are dictionaries.

    Raises:
        ValueError: no dataset, or one without examples.
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        empty = [name for name, dataset in datasets.items() if not len(dataset)]
        if empty or not datasets:
            raise ValueError(
                "TaskMixture: expected one dataset with examples for each task, got "
                f"{f'none in {empty[0]!r}' if empty else 'no dataset'}"
            )
        self.tasks = tuple(datasets)
        self.datasets = tuple(datasets.values())
        self.sizes = tuple(len(dataset) for dataset in self.datasets)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for task, (dataset, size) in enumerate(zip(self.datasets, self.sizes)):
            if index < size:
                return {**dataset[index], TASKS: task}
            index -= size
        raise IndexError(f"TaskMixture: expected an index below {len(self)}, got one beyond")


class TaskSampler(Sampler[int]):
    """Draws a task with ``p_t = n_t^(1 / temperature) / sum``, then the next of its examples in a
    random order that is drawn anew when it has ended.

    Temperature 1 draws by the number n_t of examples; a high one draws all tasks alike. An epoch
    has as many examples as there are. What is drawn depends on seed and epoch only, so that a
    training that is resumed goes on as it would have.

    Args:
        sizes: n_t, of datasets that stand one after the other.
        temperature: at least 1; HyperFormer++ uses 10.
        group: examples in a row that are of one task; the batch size gives batches of one task.
        seed: of the draws.

    Raises:
        ValueError: a size or the group below 1, or a temperature below 1.
    """

    def __init__(
        self, sizes: Sequence[int], temperature: float = 10.0, *, group: int = 1, seed: int = 0
    ) -> None:
        if not sizes or min(*sizes, group, 1) < 1:
            raise ValueError(
                f"TaskSampler: expected sizes and group >= 1, got {list(sizes)} and {group}"
            )
        if not (temperature >= 1 and math.isfinite(temperature)):
            raise ValueError(f"TaskSampler: expected a temperature >= 1, got {temperature}")
        self.sizes, self.temperature, self.group = tuple(sizes), temperature, group
        self.seed, self.epoch = seed, 0

    def probabilities(self) -> list[float]:
        """p_t of each task."""
        shares = [size ** (1 / self.temperature) for size in self.sizes]
        return [share / sum(shares) for share in shares]

    def set_epoch(self, epoch: int) -> None:
        """Draws those of an epoch from here on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        # Two numbers mixed as torch mixes seeds itself: no pair of them repeats another.
        generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = -(-len(self) // self.group)
        probabilities = torch.tensor(self.probabilities(), dtype=torch.float64)
        drawn = torch.multinomial(probabilities, groups, replacement=True, generator=generator)
        starts = [sum(self.sizes[:task]) for task in range(len(self.sizes))]
        waiting: list[list[int]] = [[] for _ in self.sizes]
        left = len(self)
        for task in drawn.tolist():
            for _ in range(min(self.group, left)):
                if not waiting[task]:
                    order = torch.randperm(self.sizes[task], generator=generator)
                    waiting[task] = order.tolist()
                yield starts[task] + waiting[task].pop()
                left -= 1


class MixtureTrainer(Trainer):
    """transformers.Trainer, which draws a `TaskMixture` by temperature.

    Args:
        temperature: as of a `TaskSampler`.
        one_task_a_batch: whether a batch (of one device and one accumulation step) is of one task,
            as in the papers' codes; methods for several tasks here do not need that.
    """

    def __init__(
        self,
        *args: Any,
        temperature: float = 10.0,
        one_task_a_batch: bool = False,
        **kwargs: Any,
    ) -> None:
        self.temperature, self.one_task_a_batch = temperature, one_task_a_batch
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, TaskMixture):
            sampler: Sampler[Any] | None = super()._get_train_sampler(train_dataset)
            return sampler
        args: Any = self.args
        return TaskSampler(
            dataset.sizes,
            self.temperature,
            group=args.train_batch_size if self.one_task_a_batch else 1,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

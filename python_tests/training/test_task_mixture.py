"""Several tasks in one training: what is drawn, how often, and that a resumed training goes on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from pelt_kernels.training.task_mixture import MixtureTrainer, TaskMixture, TaskSampler

SIZES = (2000, 200, 20)


def task_of(index, sizes=SIZES):
    return next(t for t in range(len(sizes)) if index < sum(sizes[: t + 1]))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0])
def test_tasks_are_drawn_by_temperature(temperature):
    sampler = TaskSampler(SIZES, temperature)
    counts = Counter(task_of(index) for epoch in range(3) for index in drawn(sampler, epoch))
    shares = [size ** (1 / temperature) for size in SIZES]
    for task, share in enumerate(shares):
        p = share / sum(shares)
        n = 3 * len(sampler)
        assert sampler.probabilities()[task] == pytest.approx(p)
        assert abs(counts[task] - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def drawn(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_order_of_a_task_ends_before_one_of_its_examples_comes_again():
    sizes = (30, 4)
    order = drawn(TaskSampler(sizes, 100.0), 0)
    assert len(order) == 34
    small = [index - 30 for index in order if index >= 30]
    assert len(small) > 8
    for start in range(0, len(small) - 3, 4):
        assert sorted(small[start : start + 4]) == [0, 1, 2, 3]


def test_draws_depend_on_seed_and_epoch_only():
    sampler = TaskSampler(SIZES, seed=3)
    first, second = drawn(sampler, 0), drawn(sampler, 1)
    torch.manual_seed(5)
    assert drawn(TaskSampler(SIZES, seed=3), 0) == first != second
    assert drawn(TaskSampler(SIZES, seed=4), 0) != first


def test_a_group_is_of_one_task():
    order = drawn(TaskSampler((50, 51), group=8), 0)
    assert len(order) == 101
    for start in range(0, 101, 8):
        assert len({task_of(index, (50, 51)) for index in order[start : start + 8]}) == 1


def test_examples_carry_their_task():
    mixture = TaskMixture({"mt": [{"x": 1}, {"x": 2}], "qa": [{"x": 3}]})
    assert [mixture[i] for i in range(3)] == [
        {"x": 1, "tasks": 0},
        {"x": 2, "tasks": 0},
        {"x": 3, "tasks": 1},
    ]
    with pytest.raises(IndexError, match="an index below 3"):
        mixture[3]


def test_mistakes_get_a_sentence():
    with pytest.raises(ValueError, match="TaskMixture: .*got none in 'qa'"):
        TaskMixture({"mt": [{}], "qa": []})
    with pytest.raises(ValueError, match="TaskMixture: .*got no dataset"):
        TaskMixture({})
    with pytest.raises(ValueError, match=r"TaskSampler: expected sizes and group >= 1, got \[\]"):
        TaskSampler([])
    with pytest.raises(ValueError, match="temperature >= 1, got 0.5"):
        TaskSampler([1], 0.5)


class Recorder(nn.Module):
    """A model that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, x, tasks):
        self.seen.append((x.tolist(), tasks.tolist()))
        return {"loss": self.weight * x.sum()}


def record(folder, resume_after=None, **options):
    mixture = TaskMixture({"a": [{"x": i} for i in range(8)], "b": [{"x": 100}, {"x": 101}]})
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, num_train_epochs=2, report_to=[],
        save_strategy="steps", save_steps=3, use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    model = Recorder()
    trainer = MixtureTrainer(model, arguments, train_dataset=mixture, **options)
    trainer.train(resume_from_checkpoint=resume_after and str(folder / resume_after))
    return model.seen


def test_a_trainer_draws_and_resumes(tmp_path):
    seen = record(tmp_path)
    assert len(seen) == 10
    tasks = [task for _, batch in seen for task in batch]
    assert 4 < sum(tasks) < 16  # about as many of each
    for x, batch in seen:
        assert [value >= 100 for value in x] == [task == 1 for task in batch]
    assert record(tmp_path, "checkpoint-6") == seen[6:]


def test_a_batch_may_be_of_one_task(tmp_path):
    seen = record(tmp_path, one_task_a_batch=True)
    assert all(len(set(batch)) == 1 for _, batch in seen)
    assert len({batch[0] for _, batch in seen}) == 2

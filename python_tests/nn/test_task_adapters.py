"""Adapters of tasks against a transcription of their formula, sample by sample, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pelt_kernels.nn import TaskAdapters, spare_unselected

D, BOTTLENECKS, EPS = 6, (3, 5, 1), 1e-4


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def random_adapters(bottlenecks=BOTTLENECKS):
    """With values of size 1 everywhere within each task's bottleneck, so that no term is small."""
    adapters = TaskAdapters(D, bottlenecks, eps=EPS, dtype=torch.float64)
    with torch.no_grad():
        for bank in adapters.banks().values():
            bank.normal_()
        for task, m in enumerate(bottlenecks):
            adapters.w_down[task, m:] = 0
            adapters.b_down[task, m:] = 0
            adapters.w_up[task, :, m:] = 0
    return adapters


def one_row(p, x):
    """x + W_up ReLU(W_down LN(x) + b_d) + b_u of a row x [D], by the formula."""
    mean = x.sum() / D
    variance = ((x - mean) ** 2).sum() / D
    normed = (x - mean) / torch.sqrt(variance + EPS) * p["norm_weight"] + p["norm_bias"]
    hidden = torch.clamp(p["w_down"] @ normed + p["b_down"], min=0)
    return x + p["w_up"] @ hidden + p["b_up"]


def transcription(adapters, x, tasks):
    """Each sample by the member of its task, cut to that task's own bottleneck."""
    samples = []
    for sample, task in zip(x, tasks):
        if task == -1:
            samples.append(sample)
            continue
        m = adapters.bottlenecks[task]
        p = {name: bank[task] for name, bank in adapters.banks().items()}
        p["w_down"], p["b_down"] = p["w_down"][:m], p["b_down"][:m]
        p["w_up"] = p["w_up"][:, :m]
        samples.append(torch.stack([one_row(p, row) for row in sample]))
    return torch.stack(samples)


def values_and_gradients(adapters, x, function):
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    leaves = [x, *adapters.parameters()]
    grads = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)
    return y, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads)]


@pytest.mark.parametrize("tasks", [[2, 0, 1, 0], [1, 1, 1, 1], [-1, 2, -1, 0]], ids=str)
def test_a_batch_of_tasks_is_the_formula_on_each_sample(tasks):
    adapters, x = random_adapters(), torch.randn(4, 3, D, dtype=torch.float64)
    index = torch.tensor(tasks)
    y, grads = values_and_gradients(adapters, x, lambda x: adapters(x, index))
    truth, true_grads = values_and_gradients(
        adapters, x, lambda x: transcription(adapters, x, tasks)
    )
    torch.testing.assert_close(y, truth, rtol=0, atol=1e-12)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=0, atol=1e-11)
    assert (y != x).any()


@pytest.mark.parametrize("task", [-1, 0, 2])
def test_one_task_for_the_batch_is_the_same(task):
    adapters, x = random_adapters(), torch.randn(2, 3, D, dtype=torch.float64)
    index = torch.full((2,), task)
    y, grads = values_and_gradients(adapters, x, lambda x: adapters(x, index))
    one, one_grads = values_and_gradients(adapters, x, lambda x: adapters(x, task))
    for found, expected in zip([one, *one_grads], [y, *grads], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(y, x) == (task == -1)


def test_a_single_task_needs_no_bank():
    adapters, x = random_adapters((4,)), torch.randn(3, 2, D, dtype=torch.float64)
    y = adapters(x, torch.tensor([0, -1, 0]))
    truth = transcription(adapters, x, [0, -1, 0])
    torch.testing.assert_close(y, truth, rtol=0, atol=1e-12)


def test_starts_are_the_papers():
    adapters = TaskAdapters(256, (40, 10))
    assert (adapters.norm_weight == 1).all()
    for name in ("norm_bias", "b_down", "b_up"):
        assert not getattr(adapters, name).any()
    assert abs(adapters.w_down[0].std() - 0.02) < 0.001
    assert abs(adapters.w_up[1, :, :10].std() - 0.02) < 0.002
    assert not adapters.w_down[1, 10:].any() and not adapters.w_up[1, :, 10:].any()
    assert adapters.eps == 1e-5


def test_rows_beyond_a_bottleneck_stay_at_zero_in_training():
    adapters = TaskAdapters(D, BOTTLENECKS)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        adapters(torch.randn(4, 3, D), torch.tensor([2, 0, 1, 2])).square().sum().backward()
        optimizer.step()
    for task, m in enumerate(BOTTLENECKS):
        assert adapters.w_down[task, :m].any() and adapters.b_down[task, :m].any()
        assert not adapters.w_down[task, m:].any() and not adapters.b_down[task, m:].any()
        assert not adapters.w_up[task, :, m:].any()


def test_a_task_outside_of_the_batch_is_left_alone():
    adapters = TaskAdapters(D, BOTTLENECKS)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.1)
    handles = spare_unselected(optimizer, nn.Sequential(adapters))
    x = torch.randn(4, 3, D)
    for tasks in ([0, 1, 1, 0], [2, 2, -1, 2]):
        before = {name: bank.detach().clone() for name, bank in adapters.banks().items()}
        optimizer.zero_grad()
        adapters(x, torch.tensor(tasks)).square().sum().backward()
        optimizer.step()
        for name, bank in adapters.banks().items():
            for task in range(3):
                is_same = torch.equal(bank[task], before[name][task])
                assert is_same == (task not in tasks), (name, task)
    for handle in handles:
        handle.remove()


def test_wrong_sizes_and_tasks_get_a_sentence():
    for sizes in ((D, ()), (D, (3, 0)), (0, (3,))):
        with pytest.raises(ValueError, match="TaskAdapters: expected hidden_size >= 1 and a bott"):
            TaskAdapters(*sizes)
    with pytest.raises(ValueError, match=r"down_index in \[0, 3\).*values from 3 to 3"):
        TaskAdapters(D, BOTTLENECKS)(torch.randn(1, 2, D), torch.tensor([3]))

"""Small workspaces of CPU kernels are used again: by one call at a time, in any thread."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pelt_kernels import ops
from pelt_kernels.ops import _native


@pytest.fixture
def kept(monkeypatch):
    """The workspaces that no call uses, as outside of tests, where memory is not poisoned."""
    monkeypatch.setattr(_native, "_poison", False)
    monkeypatch.setattr(_native, "_workspaces", [])
    return _native._workspaces


def test_a_workspace_is_lent_to_one_call_at_a_time(kept):
    first, second = _native.lent_workspace(100), _native.lent_workspace(100)
    assert first.data_ptr() != second.data_ptr()
    _native.give_back(first)
    assert _native.lent_workspace(_native.SMALL_WORKSPACE) is first
    assert not kept


def test_a_large_workspace_is_not_kept(kept):
    lent = _native.lent_workspace(_native.SMALL_WORKSPACE + 1)
    assert lent.nbytes > _native.SMALL_WORKSPACE
    _native.give_back(lent)
    assert not kept


def test_threads_at_once_give_the_numbers_of_one_after_the_other(kept, need):
    need("cpu", _native.why_not("_C"))
    torch.manual_seed(0)
    w_down, w_up = torch.randn(8, 32), torch.randn(32, 8)
    inputs = [torch.randn(4, 64, 32) for _ in range(64)]

    def call(x):
        x = x.clone().requires_grad_()
        y = ops.gated_adapter(x, w_down, w_up, backend="cpu")
        y.square().sum().backward()
        return y.detach(), x.grad

    alone = [call(x) for x in inputs]
    assert len(kept) == 1
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(call, inputs))
    for found, expected in zip(at_once, alone):
        assert all(map(torch.equal, found, expected))
    assert len(kept) <= 5

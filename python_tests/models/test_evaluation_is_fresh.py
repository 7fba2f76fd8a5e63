"""Evaluation computes with the parameters as they are, however they were written."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
from every_method import METHODS

from pelt_kernels.methods import parts_of
from pelt_kernels.models import get_pelt_model


def by_a_fused_optimizer(model):
    """transformers' default, which leaves the version counters of what it writes as they were."""
    parameters = model.trained_parameters().values()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()


def by_data(model):
    for parameter in model.trained_parameters().values():
        parameter.data.mul_(1.5)


def by_load_state_dict(model):
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def by_assignment(model):
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_an_address(model):
    for parameter in model.trained_parameters().values():
        zeros = torch.zeros(parameter.nbytes, dtype=torch.uint8)
        ctypes.memmove(parameter.data_ptr(), zeros.data_ptr(), zeros.nbytes)


WRITERS = [by_a_fused_optimizer, by_data, by_load_state_dict, by_assignment, by_an_address]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_reads_the_parameters_as_they_are(
    method, write, make_base, make_batch, randomise
):
    model = randomise(get_pelt_model(make_base(), METHODS[method]), std=0.05).eval()
    model.set_progress(1.0)
    batch = make_batch(with_labels=False)
    with torch.inference_mode():
        before = model(**batch).logits
    write(model)
    with torch.no_grad():
        found = model(**batch).logits
        assert not torch.equal(found, before)
        assert torch.equal(found, copy.deepcopy(model)(**batch).logits)
        if parts_of(model.method_config).mixture is not None:
            model.merge_experts()
            assert torch.equal(model(**batch).logits, found)

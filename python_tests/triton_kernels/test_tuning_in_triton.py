"""Tuning, the same for every operator in Triton."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import case_of, make_attributes
from closeness import assert_close
from parity import contract_of, inputs_of

from pelt_kernels.ops import _dispatch

CASES = {"gated_adapter": "unipelt", "lora_linear": "unipelt", "prefix_attention": "decode"}


@pytest.mark.backend("triton")
@pytest.mark.parametrize("operator", CASES)
def test_tuning_keeps_the_fastest(operator, monkeypatch):
    """The clock is a list; every candidate gives the numbers of the default."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run compiled here, and the default is in another order of sums")
    backend = _dispatch.implementation(operator, "triton")
    contract, case = contract_of(operator).CONTRACT, case_of(operator, CASES[operator])
    heads = {letter: 1 for letter in "HG" if letter in case.sizes}
    case = replace(case, sizes={**case.sizes, **heads, "B": 1})
    values = inputs_of(operator, case, "float32")
    signature = contract.bind(values, make_attributes(contract, case))
    chosen = _dispatch.select(signature, "triton")
    inputs = dict(zip(contract.input_names, values))
    outputs, plan = [], chosen.plan
    before = dict(plan.configs)

    def measure(function):
        outputs.append(function())
        return -float(len(outputs))  # the last one is the fastest

    monkeypatch.setattr(backend, "CANDIDATES", backend.CANDIDATES[3:4])
    found = backend.tune(chosen, measure, **inputs)
    assert found == dict.fromkeys(found, backend.CANDIDATES[-1])
    assert plan.configs == found != before
    forwards = [o[0] for o in outputs if isinstance(o, tuple)]
    assert len(forwards) < len(outputs) == 2 * len(before)
    for y in forwards:
        assert_close(y, forwards[0], forwards[0], torch.float32, "y")
    plan.configs.update(before)

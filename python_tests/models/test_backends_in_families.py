"""What serves a training step of each family on a CPU when nobody asks for a backend."""

from __future__ import annotations

import pytest
import torch
from test_families_table import config_of, inputs_of, loss_of, make

from benchmarks import families_table
from pelt_kernels.models import get_pelt_model
from pelt_kernels.ops import explain
from pelt_kernels.ops._dispatch import forget_choices

# One family of each shape of layer, and the operators that a method calls in it.
FAMILIES = ("bert", "albert", "deberta-v2", "modernbert", "vit", "gpt2", "llama", "t5", "bart")
OPERATORS = {
    "unipelt": {"gated_adapter", "lora_linear", "prefix_attention"},
    "composite": {"gated_adapter", "lora_linear"},
    "adamix": {"gated_adapter", "symmetric_kl"},
    "pst": {"masked_weight"},
    "hyperpelt": {"gated_adapter", "prefix_attention"},
    "control_prefixes": {"prefix_attention"},
    "vlm": {"gated_adapter"},
}
PAIRS = [(m, f) for m in OPERATORS for f in FAMILIES if families_table.gap_of(m, f) is None]


@pytest.mark.backend("cpu")
@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_the_kernels_serve_all_that_was_not_measured_slower(method, family, make_base):
    torch.manual_seed(0)
    model = get_pelt_model(make(family, make_base), config_of(method, family)).train()
    model.set_progress(0.5)
    forget_choices()
    loss_of(model, inputs_of(method, family)).backward()
    choices = explain()
    assert {choice.operator for choice in choices} == OPERATORS[method]
    for choice in choices:
        assert not choice.requested
        is_slower = choice.refusals.get("cpu", "").startswith("eager took ")
        assert choice.backend == "cpu" or is_slower, choice

"""PEFT's LoRA layers, accelerated, against PEFT as shipped."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora import layer as lora

import pelt_kernels
from pelt_kernels.integrations.peft_lora import AcceleratedLoraLinear


def _with_lora(model, **changes):
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def _run(model, batch):
    """The logits, and the gradients of all that is trained."""
    model.zero_grad()
    logits = model(**batch).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_outputs_and_gradients_are_those_of_peft(family, make_model, batch):
    model = _with_lora(make_model(family))
    expected, keys = _run(model, batch), list(model.state_dict())
    report = pelt_kernels.accelerate(model)
    layers = [n for n, m in model.named_modules() if isinstance(m, lora.Linear)]
    assert list(report.served["lora_linear"]) == layers
    assert report.left_alone == {}
    assert all(type(model.get_submodule(n)) is AcceleratedLoraLinear for n in layers)
    torch.testing.assert_close(_run(model, batch), expected)
    assert list(model.state_dict()) == keys
    pelt_kernels.restore(model)
    assert all(type(model.get_submodule(n)) is lora.Linear for n in layers)

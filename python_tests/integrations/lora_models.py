"""PEFT's LoRA in tiny models, and what a call of one gives."""

from __future__ import annotations

import copy

import peft
import torch

import pelt_kernels


def with_lora(model, name="default", **changes):
    """A PEFT model with values in its adapter that matter."""
    return peft.get_peft_model(model, lora_config(**changes), adapter_name=name)


def lora_config(**changes):
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes
    return peft.LoraConfig(**options)


def run(model, batch, **inputs):
    """The logits, and the gradients of all that is trained."""
    model.zero_grad()
    logits = model(**batch, **inputs).logits
    if logits.requires_grad:
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype)
        (logits * weights.view_as(logits)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


def pair(model):
    """A PEFT model as it is, and an accelerated copy."""
    fast = copy.deepcopy(model)
    pelt_kernels.accelerate(fast)
    return model, fast


def assert_same(model, fast, batch, **inputs):
    """Both give the same logits and gradients."""
    torch.testing.assert_close(run(fast, batch, **inputs), run(model, batch, **inputs))

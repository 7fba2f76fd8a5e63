"""Gradient checkpointing changes memory and nothing else: outputs, gradients, dropout."""

from __future__ import annotations

import pytest
import torch
from every_method import COMPOSITES

from pelt_kernels.methods import (
    BitFitConfig,
    BottleneckAdapterConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import get_pelt_model


def small_apl(**options):
    return UniPELTConfig(
        adapter=BottleneckAdapterConfig(bottleneck=4, activation="gelu", dropout=0.2),
        prefix=PrefixTuningConfig(prefix_length=3, mid=8),
        lora=LoraConfig(r=4, dropout=0.2),
        **options,
    )


METHODS = {
    "unipelt": small_apl(),
    "unipelt-mean": small_apl(gate_pooling="mean"),
    "adapter": BottleneckAdapterConfig(bottleneck=4, activation="gelu", gated=True),
    "prefix": PrefixTuningConfig(prefix_length=3, mid=8),
    "lora": LoraConfig(r=4),
    "bitfit": BitFitConfig(),
    **COMPOSITES,
}


def gradients(model, *batches, seed=5):
    """Two forwards may come before one backward, as in a consistency loss."""
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = [model(**batch) for batch in batches]
    torch.stack([out.loss for out in outputs]).sum().backward()
    # A generator left elsewhere by the recomputation would change the next step's dropout.
    after = torch.rand(1)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return [out.logits.detach() for out in outputs], grads, after


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
@pytest.mark.parametrize("method", METHODS)
def test_on_is_off(method, family, use_reentrant, make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(family, dropout=0.1), METHODS[method])).train()
    batches = make_batch(), make_batch((3, 8), width=12)
    plain, plain_grads, plain_after = gradients(model, *batches)
    assert [name for name, grad in plain_grads.items() if not grad.abs().max() > 0] == []
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checked, checked_grads, checked_after = gradients(model, *batches)
    for one, other in zip(plain, checked, strict=True):
        assert torch.equal(one, other)
    assert plain_grads.keys() == checked_grads.keys()
    for name, grad in plain_grads.items():
        torch.testing.assert_close(checked_grads[name], grad, rtol=1e-5, atol=1e-7, msg=name)
    assert torch.equal(plain_after, checked_after)


def test_layers_are_really_computed_again(make_base, make_batch):
    """Otherwise the comparison above would compare a thing with itself."""
    model = get_pelt_model(make_base(), small_apl()).train()
    calls = []
    adapted = model.base_model.bert.encoder.layer[0].output.LayerNorm
    adapted.register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, expected in ((False, 1), (True, 2)):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls.clear()
        model(**make_batch()).loss.backward()
        assert len(calls) == expected


def test_enabled_on_the_base_model_before_the_method(make_base, make_batch, randomise):
    base = make_base()
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": True})
    model = randomise(get_pelt_model(base, small_apl())).train()
    model(**make_batch()).loss.backward()
    for name, parameter in model.trained_parameters().items():
        assert parameter.grad is not None, name


def test_nothing_of_a_batch_outlives_its_forward(make_base, make_batch):
    for method in METHODS.values():
        model = get_pelt_model(make_base(), method).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**make_batch()).loss.backward()
        for state in model._injection.states:
            assert state.in_flight.mask is None and state.in_flight.prefix_gate is None

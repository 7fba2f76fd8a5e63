"""A rule that decides the gates: what it is given, and what the model computes with its answer."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from language_models import make_language_model, make_pairs

from pelt_kernels.methods import (
    BottleneckAdapterConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import get_pelt_model

PLACES = ("sequential", "parallel")
ALPHA, RANK = 4.0, 4


def apl(placement="sequential", gated=True, alpha=ALPHA, only=None, **changes):
    """Adapter, prefix (a table) and LoRA, or one of them alone."""
    parts = {
        "adapter": BottleneckAdapterConfig(bottleneck=4, placement=placement, gated=gated),
        "prefix": PrefixTuningConfig(prefix_length=3, mid=None, gated=gated),
        "lora": LoraConfig(r=RANK, alpha=alpha, gated=gated),
    }
    return UniPELTConfig(**{n: p if only in (None, n) else None for n, p in parts.items()})


@pytest.fixture
def make_gated(make_base, make_batch, randomise):
    """family, config, dtype -> a randomised model and a batch for it."""

    def make(family, config, dtype=torch.float32):
        base = make_base(dtype=dtype) if family == "bert" else make_language_model(family, dtype)
        batch = make_batch() if family == "bert" else make_pairs(family)
        return randomise(get_pelt_model(base, config)), batch

    return make


def outputs_of(model, batch):
    """The logits and the gradients of what is trained."""
    model.zero_grad()
    found = model(**batch)
    found.loss.backward()
    grads = {n: p.grad for n, p in model.trained_parameters().items() if p.grad is not None}
    return {"logits": found.logits.detach(), **grads}


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_rule_that_changes_nothing_gives_the_outputs_and_gradients_of_no_rule(
    family, placement, make_gated
):
    model, batch = make_gated(family, apl(placement))
    exact, _ = make_gated(family, apl(placement), torch.float64)
    baseline, truth = outputs_of(model, batch), outputs_of(exact, batch)
    model.record_gates()
    model(**batch)
    gates, seen = model.gate_values(), {}

    def same(layer, kind, gate):
        seen[layer, kind] = gate.detach()
        return gate

    model.set_gate_rule(same)
    found = outputs_of(model, batch)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert_close(value, baseline[name], truth[name], torch.float32, name)
    assert seen.keys() == gates.keys() == model.gate_values().keys()
    for key, value in seen.items():
        torch.testing.assert_close(value, gates[key], rtol=0, atol=1e-6)
    model.set_gate_rule(None)
    assert torch.equal(model(**batch).logits, baseline["logits"])


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize(
    "part, placement",
    [*(("adapter", each) for each in PLACES), ("prefix", PLACES[0]), ("lora", PLACES[0])],
)
def test_a_constant_gate_is_the_factor_of_a_part_without_one(part, family, placement, make_gated):
    constant = 0.3
    model, batch = make_gated(family, apl(placement, only=part))
    plain, _ = make_gated(family, apl(placement, gated=False, alpha=constant * RANK, only=part))
    own = model.trained_parameters()
    for name, parameter in plain.trained_parameters().items():
        is_scaled = name.rpartition(".")[2] in ("w_up", "b_up", "table")
        parameter.copy_(own[name] * constant if is_scaled else own[name])
    before = model(**batch).logits
    model.set_gate_rule(lambda layer, kind, gate: torch.full_like(gate, constant))
    model.record_gates()
    found = model(**batch).logits
    torch.testing.assert_close(found, plain(**batch).logits, rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 1e-3
    assert all((value == torch.tensor(constant)).all() for value in model.gate_values().values())


@torch.no_grad()
@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_an_adapter_and_a_branch_with_gate_zero_are_not_there(family, placement, make_gated):
    model, batch = make_gated(family, apl(placement))
    model.set_gate_rule(
        lambda layer, kind, gate: gate if kind.endswith("prefix") else torch.zeros_like(gate)
    )
    alone, _ = make_gated(family, apl(placement, only="prefix"))
    own = model.trained_parameters()
    for name, parameter in alone.trained_parameters().items():
        parameter.copy_(own[name])
    torch.testing.assert_close(model(**batch).logits, alone(**batch).logits, rtol=1e-5, atol=1e-5)


def test_a_rule_is_asked_for_one_layer_and_gradients_flow_through_it(make_gated):
    model, batch = make_gated("bert", apl())
    factor = torch.tensor(0.5, requires_grad=True)
    model.set_gate_rule(lambda layer, kind, gate: gate * factor if layer else gate)
    loss = model(**batch).loss
    loss.backward()
    step = 1e-2
    with torch.no_grad():
        losses = []
        for moved in (0.5 + step, 0.5 - step):
            model.set_gate_rule(lambda layer, kind, gate, by=moved: gate * by if layer else gate)
            losses.append(model(**batch).loss)
    slope = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(factor.grad, slope, rtol=0.05, atol=1e-4)
    gates = [n for n in model.trained_parameters() if ".gate." in n or "extra_gates" in n]
    assert gates and all(model.trained_parameters()[name].grad.abs().sum() > 0 for name in gates)


def test_checkpointed_layers_are_ruled_again(make_gated):
    model, batch = make_gated("bert", apl())
    model.set_gate_rule(lambda layer, kind, gate: gate.clamp(max=0.4))
    expected = outputs_of(model.train(), batch)
    model.gradient_checkpointing_enable()
    found = outputs_of(model, batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_mixed_batch_gives_a_rule_the_gates_of_its_adapters_samples(
    make_base, make_batch, randomise
):
    model = randomise(get_pelt_model(make_base(), apl(), "first"))
    model.add_adapter("second", apl())
    batch, shapes = make_batch(with_labels=False), set()

    def rule(layer, kind, gate):
        shapes.add(tuple(gate.shape))
        return gate * 0.5

    model.set_gate_rule(rule)
    expected = model(**batch).logits
    assert shapes == {(3,)}
    names = ["first", "second", "first"]
    mixed = model(**batch, adapter_names=names).logits
    assert shapes == {(3,), (2,)}
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-5)
    model.set_adapter("second")
    torch.testing.assert_close(mixed[1], model(**batch).logits[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_rule_under_autocast_is_given_what_the_kernels_compute(make_gated):
    model, batch = make_gated("bert", apl())
    model.record_gates()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
        gates = model.gate_values()
        model.set_gate_rule(lambda layer, kind, gate: gate)
        model(**batch)
    for key, value in model.gate_values().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, gates[key], rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "answer, got",
    [
        (lambda gate: gate[:1], r"torch.float32 \[1\] on cpu"),
        (lambda gate: gate.double(), r"torch.float64 \[3\] on cpu"),
        (lambda gate: 0.5, "float"),
    ],
)
@pytest.mark.parametrize("only", ["adapter", "prefix", "lora"])
def test_a_rule_that_gives_no_such_gate_is_refused(answer, got, only, make_gated):
    model, batch = make_gated("bert", apl(only=only))
    model.set_gate_rule(lambda layer, kind, gate: answer(gate))
    with pytest.raises(ValueError, match=rf"torch.float32 \[3\] on cpu \(layer 0, .*got {got}"):
        model(**batch)


def test_what_cannot_be_a_rule_is_refused(make_base, make_gated):
    with pytest.raises(ValueError, match="expected a method with gates"):
        get_pelt_model(make_base(), LoraConfig()).set_gate_rule(lambda layer, kind, gate: gate)
    model, _ = make_gated("bert", apl())
    with pytest.raises(TypeError, match="expected a function of a layer's number"):
        model.set_gate_rule(0.5)

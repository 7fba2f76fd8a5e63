"""The loss's term of the gates: its value, its gradient, and what training with it does to them."""

from __future__ import annotations

import math

import pytest
import torch
from language_models import make_language_model, make_pairs

from pelt_kernels.methods import (
    BottleneckAdapterConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
    config_from_dict,
)
from pelt_kernels.models import PeltModel, get_pelt_model


def apl(penalty=0.0, kind="entropy", **options):
    return UniPELTConfig(
        adapter=BottleneckAdapterConfig(bottleneck=4, **options),
        prefix=PrefixTuningConfig(prefix_length=3, mid=None, **options),
        lora=LoraConfig(r=4, **options),
        gate_penalty=penalty,
        gate_penalty_kind=kind,
    )


def expected_penalty(kind, gates):
    """By hand, from numbers."""
    by_gate = []
    for gate in gates.values():
        each = gate.flatten().tolist()
        if kind == "entropy":
            each = [-g * math.log(g) - (1 - g) * math.log(1 - g) for g in each]
        by_gate.append(sum(each) / len(each))
    return sum(by_gate) / len(by_gate)


@pytest.fixture
def make_pair(make_base, make_batch, randomise):
    """family, penalised config -> the model with it, the same without, and a batch."""

    def make(family, config):
        made = []
        for each in (config, apl()):
            base = make_base() if family == "bert" else make_language_model(family)
            made.append(randomise(get_pelt_model(base, each), std=0.1).train())
        return *made, make_batch() if family == "bert" else make_pairs(family)

    return make


@pytest.mark.parametrize("kind", ["entropy", "l1"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_the_loss_has_the_mean_over_all_gates(family, kind, make_pair):
    model, plain, batch = make_pair(family, apl(0.5, kind))
    plain.record_gates()
    expected = plain(**batch).loss + 0.5 * expected_penalty(kind, plain.gate_values())
    found = model(**batch).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    as_tuple = model(**batch, return_dict=False)
    torch.testing.assert_close(as_tuple[0], found, rtol=1e-5, atol=1e-5)
    # In evaluation, and where nothing is trained, the loss is the base model's own.
    torch.testing.assert_close(model.eval()(**batch).loss, plain.eval()(**batch).loss)
    assert not model.accepts_loss_kwargs


def test_its_gradient_is_the_slope_of_the_loss(make_pair):
    model, _, batch = make_pair("bert", apl(2.0))
    model(**batch).loss.backward()
    step = 1e-2
    for name, parameter in model.trained_parameters().items():
        if not name.endswith(("gate.bias", "prefix.bias")):
            continue
        losses = []
        for by in (step, -2 * step):
            parameter.detach().add_(by)
            losses.append(model(**batch).loss.item())
        parameter.detach().add_(step)
        slope = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(parameter.grad.item(), slope, rtol=0.05, atol=1e-4)


def test_a_checkpointed_model_has_the_same_gradients(make_pair):
    model, _, batch = make_pair("bert", apl(2.0))
    model(**batch).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.trained_parameters().items()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch).loss.backward()
    for name, parameter in model.trained_parameters().items():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False for gate_penalty"):
        model(**batch)


def test_a_compiled_step_has_the_same_loss(make_pair):
    model, _, batch = make_pair("bert", apl(2.0))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, rtol=1e-5, atol=1e-5)


def trained_gates(model, batch, steps=60):
    """The gates of a batch after some steps on it."""
    optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=0.05)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.record_gates()
    with torch.no_grad():
        model.eval()(**batch)
    return torch.cat([value.flatten() for value in model.gate_values().values()])


@pytest.mark.parametrize("kind", ["entropy", "l1"])
def test_training_with_it_moves_the_gates_to_their_ends(kind, make_pair):
    model, plain, batch = make_pair("bert", apl(10.0, kind))
    penalised, free = trained_gates(model, batch), trained_gates(plain, batch)
    distances = [torch.minimum(gates, 1 - gates).mean() for gates in (penalised, free)]
    assert distances[0] < 0.02 and distances[1] > 0.1
    if kind == "l1":
        assert penalised.max() < 0.1


def test_a_forward_without_labels_says_that_it_leaves_the_penalty_out(make_pair):
    model, plain, batch = make_pair("bert", apl(2.0))
    del batch["labels"]
    with pytest.warns(UserWarning, match="without labels leaves gate_penalty out"):
        found = model(**batch).logits
    torch.testing.assert_close(found, plain(**batch).logits, rtol=1e-5, atol=1e-5)


def test_files_hold_it_and_earlier_ones_are_read(make_base, tmp_path):
    config = apl(0.25, "l1")
    assert config_from_dict(config.to_dict()) == config
    earlier = config.to_dict()
    del earlier["gate_penalty"], earlier["gate_penalty_kind"]
    assert config_from_dict(earlier).gate_penalty == 0
    get_pelt_model(make_base(), config).save_pretrained(tmp_path)
    assert PeltModel.from_pretrained(make_base(), tmp_path).method_config == config


@pytest.mark.parametrize(
    "options, words",
    [
        ({"penalty": -1.0}, "expected gate_penalty >= 0"),
        ({"penalty": 1.0, "kind": "l2"}, "expected gate_penalty_kind to be one of entropy, l1"),
        ({"penalty": 1.0, "gated": False}, "expected a gated part for gate_penalty"),
    ],
)
def test_a_penalty_that_means_nothing_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        apl(**options)

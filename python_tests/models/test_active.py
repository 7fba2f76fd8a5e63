"""What works for a text at a threshold: by hand, and against what is counted while it runs."""

from __future__ import annotations

import pytest
import torch
from families import make_reader
from language_models import make_language_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import pelt_kernels
from pelt_kernels.methods import (
    AdaMixConfig,
    BottleneckAdapterConfig,
    CompositeConfig,
    ControlPrefixesConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import get_pelt_model
from pelt_kernels.ops import _register

D, F, L, R, RANK, P, LABELS = 32, 48, 2, 4, 3, 5, 3
ADAPTER, BRANCH, PREFIX = 2 * D * R + D + R, 2 * D * RANK, 2 * P * D
GATES, HEAD = 4 * (D + 1), LABELS * (D + 1)  # of one layer
FROZEN = 2 * (4 * D * D + 2 * D * F)  # of a token in one layer


def apl(**changes):
    parts = {
        "adapter": BottleneckAdapterConfig(bottleneck=R),
        "prefix": PrefixTuningConfig(prefix_length=P, mid=7),
        "lora": LoraConfig(r=RANK),
    }
    return UniPELTConfig(**parts | changes)


def gates_of(**values):
    """Gates of two texts by kind, the same in both layers."""
    return {
        (layer, kind): torch.tensor(value) for layer in range(L) for kind, value in values.items()
    }


OPEN = {"adapter": [0.6, 0.6], "prefix": [0.6, 0.6], "lora_query": [0.6, 0.6],
        "lora_value": [0.6, 0.6]}  # fmt: skip


@pytest.mark.parametrize(
    ("low", "parameters", "flops"),
    [
        ("adapter", ADAPTER, 4 * D * R),
        ("prefix", PREFIX, 4 * P * D),
        ("lora_query", BRANCH, 4 * RANK * D),
    ],
)
def test_a_part_below_the_threshold_counts_in_no_layer(low, parameters, flops, make_base):
    model = get_pelt_model(make_base(), apl())
    lengths = torch.tensor([5, 9])
    whole = L * (ADAPTER + 2 * BRANCH + PREFIX + GATES) + HEAD
    added = L * (4 * D * R + 2 * 4 * RANK * D + 4 * P * D + 4 * 2 * D)
    assert whole == model.get_nb_stored_parameters()
    gates = gates_of(**OPEN | {low: [0.6, 0.2]})
    for threshold in (None, 0.0, 0.2):
        found = model.count_active(gates, lengths, threshold)
        assert found.parameters.tolist() == [whole, whole] and found.parts.tolist() == [1, 1]
        assert found.added_flops.tolist() == [5 * added, 9 * added]
        base = [L * (n * FROZEN + 4 * n * n * D) for n in (5, 9)]
        assert found.base_flops.tolist() == base
    found = model.count_active(gates, lengths, 0.21)
    assert found.parameters.tolist() == [whole, whole - L * parameters]
    assert found.added_flops.tolist() == [5 * added, 9 * (added - L * flops)]
    assert found.parts.tolist() == [1, 0.75] and found.base_flops.tolist() == base
    means = found.means()
    assert means["parameters"] == whole - L * parameters / 2 and means["threshold"] == 0.21
    assert means["flops_share"] == means["added_flops"] / means["base_flops"]


def test_what_has_no_gate_always_works(make_base):
    config = CompositeConfig(
        adapter=BottleneckAdapterConfig(bottleneck=R, gated=True),
        lora=LoraConfig(r=RANK, targets=("query",)),
        adamix=AdaMixConfig(kind="lora", experts=3, r=2, targets=("value",)),
        bitfit=True,
    )
    model = get_pelt_model(make_base(), config)
    stored = model.get_nb_stored_parameters()
    found = model.count_active(gates_of(adapter=[0.6, 0.1]), torch.tensor([1, 1]), 0.5)
    assert found.parameters.tolist() == [stored, stored - L * ADAPTER]
    always = L * (4 * RANK * D + 4 * 2 * D + 2 * D)  # the branch, the experts' mean, the gate
    assert found.added_flops.tolist() == [always + L * 4 * D * R, always]


def test_a_text_has_one_label_of_an_attribute(make_base):
    prefix = ControlPrefixesConfig(
        prefix_length=P, mid=None, attributes={"topic": 3}, attribute_length=2
    )
    model = get_pelt_model(make_base(), UniPELTConfig(adapter=None, lora=None, prefix=prefix))
    found = model.count_active(gates_of(prefix=[0.6, 0.1]), torch.tensor([1, 1]), 0.5)
    always = HEAD + L * (D + 1)
    assert found.parameters.tolist() == [always + L * 2 * (P + 2) * D, always]
    assert found.added_flops.tolist() == [L * (4 * (P + 2) * D + 2 * D), L * 2 * D]


# Products that torch's counter does not know by itself.
ALSO_COUNTED = {
    torch.ops.aten.addmm_: lambda y, s, w, **rest: 2 * s[0] * s[1] * w[1],
    torch.ops.aten.addmv: lambda y, w, x, **rest: 2 * w[0] * w[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v)
    ),
}


def counter_of_torch():
    return FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED)


@pytest.fixture
def counted(monkeypatch):
    """A function -> the FLOPs that torch counts in a call of it. A counter sees an operator from
    outside only, so what the operators' backend in PyTorch calls is counted in a call without one.
    """
    inside = []

    def seen(forward):
        def counting(*args, **kwargs):
            with counter_of_torch() as counter:
                out = forward(*args, **kwargs)
            inside.append(counter.get_total_flops())
            return out

        return counting

    monkeypatch.setattr(_register, "run_forward", seen(_register.run_forward))

    def count(call):
        inside.clear()
        with pelt_kernels.use_backend("eager"):
            call()
            of_operators = sum(inside)
            with counter_of_torch() as counter:
                call()
        return of_operators + counter.get_total_flops()

    return count


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("low", [(), ("adapter",), ("prefix", "lora"), ("adapter", "prefix")])
def test_it_is_what_torch_counts(low, family, make_base, make_batch, counted):
    """Of one text; with a part that is skipped as with one that works."""
    model = get_pelt_model(make_base(family, attention="eager"), apl())
    model.collapse_prefix()
    batch = make_batch(lengths=(9,), with_labels=False)

    def rule(layer, kind, gate):
        return torch.full_like(gate, 0.1 if kind.startswith(low) and low else 0.6)

    model.set_gate_rule(rule)
    model.skip_below = 0.5
    model.record_gates()
    found = counted(lambda: model(**batch))
    active = model.count_active(model.gate_values(), torch.tensor([9]), 0.5)
    with model.disable_adapter():
        base = counted(lambda: model(**batch))
    behind = 2 * D * D + 2 * D * LABELS  # the pooler, or what stands for it, and the classifier
    assert base - behind == active.base_flops.item()
    assert found - base == active.added_flops.item()


def test_what_cannot_be_counted_is_refused_with_the_reason(make_base):
    model = get_pelt_model(make_base(), apl())
    lengths = torch.tensor([5, 9])
    del (gates := gates_of(**OPEN))[1, "prefix"]
    with pytest.raises(ValueError, match=r"expected the gate \(1, 'prefix'\) of 2 texts.*got none"):
        model.count_active(gates, lengths)
    with pytest.raises(ValueError, match=r"\[3\] as gate_values has it, got \[2\]"):
        model.count_active(gates_of(**OPEN), torch.tensor([5, 9, 2]))
    with pytest.raises(ValueError, match="expected lengths as a number >= 1 for each text"):
        model.count_active(gates_of(**OPEN), torch.tensor([0, 1]))
    for other, reason in (
        (get_pelt_model(make_base(), LoraConfig()), "expected a method with gates"),
        (get_pelt_model(make_language_model("gpt2"), apl()), "expected an encoder"),
        (get_pelt_model(make_reader("albert"), apl()), "1 of 2 that are used again"),
    ):
        assert reason in other.why_not_countable()
        with pytest.raises(ValueError, match=f"count_active: .*{reason}"):
            other.count_active({}, lengths)
    assert model.why_not_countable() == ""

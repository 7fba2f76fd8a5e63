"""Where the parts start, what the gates are, and what padding may change."""

from __future__ import annotations

import pytest
import torch

from pelt_kernels.methods import (
    BottleneckAdapterConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import get_pelt_model

KINDS = {"adapter", "prefix", "lora_query", "lora_value"}


def small_apl(**options):
    return UniPELTConfig(
        adapter=BottleneckAdapterConfig(bottleneck=4),
        prefix=PrefixTuningConfig(prefix_length=3, mid=8),
        lora=LoraConfig(r=4),
        **options,
    )


@torch.no_grad()
def test_a_lora_branch_is_exactly_zero_at_the_start(make_base, make_batch):
    batch = make_batch(with_labels=False)
    base = make_base()
    expected = base(**batch).logits
    model = get_pelt_model(base, LoraConfig())
    assert torch.equal(model(**batch).logits, expected)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.fill_(0.1)
    assert not torch.equal(model(**batch).logits, expected)


@torch.no_grad()
def test_a_gate_with_weights_zero_is_one_half_everywhere(make_base, make_batch):
    model = get_pelt_model(make_base(), small_apl())
    for name, parameter in model.named_parameters():
        if ".gate." in name or "extra_gates" in name:
            parameter.zero_()
    model.record_gates()
    model(**make_batch())
    values = model.gate_values()
    assert {kind for _, kind in values} == KINDS and len(values) == 2 * len(KINDS)
    for value in values.values():
        assert value.shape == (3,) and value.dtype == torch.float32 and not value.requires_grad
        assert torch.equal(value, torch.full((3,), 0.5))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_moves_mean_and_not_masked_mean(attention, make_base, make_batch, randomise):
    lengths = (9, 4, 7)
    for pooling, moves in (("masked_mean", False), ("mean", True)):
        base = make_base(attention=attention)
        model = randomise(get_pelt_model(base, small_apl(gate_pooling=pooling)))
        model.record_gates()
        narrow = model(**make_batch(lengths, with_labels=False)).logits
        gates = model.gate_values()
        wide = model(**make_batch(lengths, width=20, with_labels=False)).logits
        distance = (narrow - wide).abs().max()
        apart = max((gates[key] - value).abs().max() for key, value in model.gate_values().items())
        if moves:
            assert distance > 1e-3 and apart > 1e-3
        else:
            assert distance < 1e-5 and apart < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_a_sentence_alone_is_what_it_is_in_a_padded_batch(family, make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(family), small_apl()))
    lengths = (9, 4, 7)
    together = model(**make_batch(lengths, width=16, with_labels=False)).logits
    ids = make_batch(lengths)["input_ids"]
    for i, length in enumerate(lengths):
        alone = ids[i : i + 1, :length]
        with_mask = model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits
        torch.testing.assert_close(with_mask[0], together[i], rtol=0, atol=1e-5)
        # Without a mask every row is a token, so both poolings are the plain mean.
        torch.testing.assert_close(model(input_ids=alone).logits, with_mask, rtol=0, atol=1e-5)


@torch.no_grad()
def test_gate_values_are_kept_only_while_they_are_asked_for(make_base, make_batch):
    model = get_pelt_model(make_base(), small_apl())
    model(**make_batch())
    assert model.gate_values() == {}
    model.record_gates()
    model(**make_batch((9, 4, 7)))
    model(**make_batch((5, 6)))
    assert {tuple(value.shape) for value in model.gate_values().values()} == {(2,)}
    model.record_gates(False)
    assert model.gate_values() == {}


@torch.no_grad()
def test_only_gated_parts_have_gate_values(make_base, make_batch):
    config = UniPELTConfig(
        adapter=BottleneckAdapterConfig(bottleneck=4, gated=False),
        prefix=PrefixTuningConfig(prefix_length=2, mid=None),
        lora=LoraConfig(r=2, gated=False, targets=("key", "ffn_out")),
    )
    model = get_pelt_model(make_base(), config)
    model.record_gates()
    model(**make_batch())
    assert set(model.gate_values()) == {(0, "prefix"), (1, "prefix")}


@torch.no_grad()
def test_lora_gates_sit_on_every_target(make_base, make_batch, randomise):
    targets = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
    config = UniPELTConfig(adapter=None, prefix=None, lora=LoraConfig(r=2, targets=targets))
    model = randomise(get_pelt_model(make_base(), config))
    model.record_gates()
    narrow = model(**make_batch(with_labels=False)).logits
    assert {kind for _, kind in model.gate_values()} == {f"lora_{target}" for target in targets}
    wide = model(**make_batch(width=20, with_labels=False)).logits
    torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_prefix_of_length_zero_changes_nothing(make_base, make_batch):
    batch = make_batch(with_labels=False)
    base = make_base()
    expected = base(**batch).logits
    model = get_pelt_model(base, PrefixTuningConfig(prefix_length=0))
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_closed_gate_leaves_the_prefix_its_share_of_the_softmax(make_base, make_batch):
    """The papers' behaviour: keys times 0 are zero keys, not absent ones."""
    batch = make_batch(with_labels=False)
    base = make_base()
    expected = base(**batch).logits
    config = UniPELTConfig(adapter=None, lora=None, prefix=PrefixTuningConfig(prefix_length=3))
    model = get_pelt_model(base, config)
    for name, parameter in model.named_parameters():
        if "extra_gates" in name:
            parameter.fill_(0.0 if name.endswith("weight") else -1e4)
    model.record_gates()
    logits = model(**batch).logits
    assert all(torch.equal(value, torch.zeros(3)) for value in model.gate_values().values())
    assert (logits - expected).abs().max() > 1e-4
    for name, parameter in model.named_parameters():
        if name.startswith("prefix."):
            parameter.add_(1.0)
    torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_layers_without_a_prefix_run_the_base_models_attention(make_base, make_batch):
    """Under "pelt" attention, too; and a skipped layer has no prefix and no row of parameters."""
    batch = make_batch(with_labels=False)
    for attention in ("sdpa", "eager"):
        base = make_base(attention=attention)
        model = get_pelt_model(base, UniPELTConfig(prefix=None, adapter=None, lora=LoraConfig(r=2)))
        with model.disable_adapter():
            expected = model(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)
        model.remove()
        one = get_pelt_model(base, PrefixTuningConfig(prefix_length=3, skip_layers=(1,)))
        first, second = (layer.attention.self for layer in one.base_model.bert.encoder.layer)
        assert first._pelt_prefix.prefixes is one.prefix and not hasattr(second, "_pelt_prefix")
        assert one.prefix.num_layers == 1
        assert (one(**batch).logits - expected).abs().max() > 1e-4
        one.remove()

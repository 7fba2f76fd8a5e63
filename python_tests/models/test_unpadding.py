"""Layers that compute real tokens only: the same outputs and gradients, less computed, and the
calls and models in which nothing is packed.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from every_method import METHODS
from language_models import make_language_model
from torch.autograd import gradcheck, gradgradcheck
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from pelt_kernels.methods import UniPELTConfig, with_part_changes
from pelt_kernels.models import get_pelt_model
from pelt_kernels.nn.packing import Packing

LENGTHS, TOKENS = (9, 4, 7), 20
CHOOSERS = ("vlm", "hyperpelt")  # of weights for each sentence
SERVED = [name for name in METHODS if name not in CHOOSERS]


@pytest.fixture
def make(make_base, randomise):
    """make(method, family, dtype): a model with values for everything that is trained."""

    def make(method="unipelt", family="bert", dtype=torch.float64, **changes):
        config = METHODS[method] if isinstance(method, str) else method
        model = get_pelt_model(make_base(family, dtype=dtype, **changes), config)
        return randomise(model)

    return make


def outcome(model, batch):
    """The logits and the gradients of a step from one seed."""
    torch.manual_seed(0)
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    trained = model.trained_parameters().items()
    return output.logits.detach(), {n: p.grad.clone() for n, p in trained if p.grad is not None}


def widths(model, batch):
    """What the FFNs of a forward read: rows of each layer."""
    seen = []
    layers = [m for name, m in model.named_modules() if name.endswith("intermediate.dense")]
    handles = [m.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[:2].numel()))
               for m in layers]  # fmt: skip
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return set(seen)


def assert_same(found, expected, rtol=1e-9):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=rtol)
    assert found[1].keys() == expected[1].keys()
    # What shifts all scores of a query, a key's bias, has a gradient of rounding alone.
    largest = max(grad.abs().max() for grad in expected[1].values())
    for name, grad in found[1].items():
        atol = rtol * float(largest)
        torch.testing.assert_close(grad, expected[1][name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("method", SERVED)
def test_outputs_and_gradients_are_those_with_padding(method, make, make_batch):
    model, batch = make(method), make_batch(LENGTHS)
    model.set_progress(1.0)
    expected = outcome(model, batch)
    model.set_unpadding()
    assert widths(model, batch) == {TOKENS}
    assert_same(outcome(model, batch), expected)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "xlm-roberta"])
@pytest.mark.parametrize("method", ["unipelt", "lora"])
def test_in_other_families(family, method, make, make_batch):
    model, batch = make(method, family), make_batch(LENGTHS)
    expected = outcome(model, batch)
    model.set_unpadding()
    assert_same(outcome(model, batch), expected)


def test_layers_that_share_their_weights(make_batch, randomise):
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "vocab_size": 99}
    config = AlbertConfig(**sizes, num_hidden_layers=3, num_attention_heads=4, num_labels=3)
    base = AlbertForSequenceClassification(config).double().eval()
    model, batch = randomise(get_pelt_model(base, METHODS["unipelt"])), make_batch(LENGTHS)
    expected = outcome(model, batch)
    model.set_unpadding()
    read = []
    layer = base.albert.encoder.albert_layer_groups[0].albert_layers[0]
    layer.ffn.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    assert_same(outcome(model, batch), expected)
    assert read == [TOKENS] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["unipelt", "composite", "lora"])
def test_by_the_kernels(method, dtype, make, make_batch):
    """As near the truth as padded ones."""
    batch = make_batch(LENGTHS)
    truth = outcome(make(method), batch)
    model = make(method, dtype=dtype)
    errors = []
    for is_on in (False, True):
        model.set_unpadding(is_on)
        logits, grads = outcome(model, batch)
        of = [(logits, truth[0]), *((grads[name], truth[1][name]) for name in grads)]
        errors.append([float((a.double() - b).norm()) for a, b in of])
    size = [float(b.norm()) for b in (truth[0], *truth[1].values())]
    eps = torch.finfo(dtype).eps
    for padded, packed, whole in zip(*errors, size, strict=True):
        assert packed <= 2 * padded + 4 * eps * whole + eps * max(size)


def test_hidden_states_of_padding_are_zeros_and_others_the_same(make, make_batch):
    model, batch = make(), make_batch(LENGTHS, with_labels=False)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model(**batch, **asked)
        model.set_unpadding()
        found = model(**batch, **asked)
    real = batch["attention_mask"].bool()
    for one, other in zip(found.hidden_states[1:], expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(one[real], other[real], rtol=1e-9, atol=1e-9)
        assert not one[~real].any()
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(one.mT[real.sum(0)[0] :], other.mT[real.sum(0)[0] :])
        assert one.shape == other.shape


def test_gates_are_those_of_sentences(make, make_batch):
    """Recorded, replaced by a rule, and in the loss."""
    config = with_part_changes(METHODS["unipelt"], UniPELTConfig, gate_penalty=0.5)
    model, batch = make(config), make_batch(LENGTHS)
    model.record_gates()
    model.set_gate_rule(lambda layer, kind, gate: gate * torch.arange(1, 4) / 3)
    model.train()
    expected, gates = outcome(model, batch), model.gate_values()
    model.set_unpadding()
    assert_same(outcome(model, batch), expected)
    assert gates.keys() == model.gate_values().keys()
    for kind, gate in model.gate_values().items():
        assert gate.shape == (3,)
        torch.testing.assert_close(gate, gates[kind], rtol=1e-9, atol=0)


def test_where_nothing_is_gained_nothing_is_packed(make, make_batch):
    model, batch = make("lora"), make_batch(LENGTHS)
    model.set_unpadding()
    full = make_batch((9, 9, 9))
    assert widths(model, full) == {27}
    assert widths(model, {"input_ids": full["input_ids"]}) == {27}
    empty = batch | {"attention_mask": batch["attention_mask"].clone()}
    empty["attention_mask"][1] = 0  # a sentence without tokens
    assert widths(model, empty) == {27}
    gated = make()
    gated.set_unpadding()
    gated.skip_below = 0.3
    assert widths(gated.eval(), batch) == {27}


def test_a_checkpointed_layer_is_as_ever(make, make_batch):
    model, batch = make(), make_batch(LENGTHS)
    model.train()
    expected = outcome(model, batch)
    model.set_unpadding()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(outcome(model, batch), expected)
    model.eval()
    assert widths(model, batch) == {TOKENS}


def test_a_mask_is_read_anew_in_each_forward(make, make_batch):
    """The layers share what the first one reads of it, and a tensor may be filled again."""
    model, batch = make(), make_batch(LENGTHS)
    batch["attention_mask"] = mask = batch["attention_mask"].bool()
    model.set_unpadding()
    assert widths(model, batch) == {TOKENS}
    mask[0, 5:] = False
    assert widths(model, batch) == {TOKENS - 4}
    found = outcome(model, batch)
    model.set_unpadding(False)
    assert_same(found, outcome(model, batch))


def test_dropout_is_of_real_tokens(make, make_batch):
    model, batch = make("unipelt", dtype=torch.float32, dropout=0.3), make_batch(LENGTHS)
    model.set_unpadding()
    model.train()
    one, again = outcome(model, batch), outcome(model, batch)
    assert torch.equal(one[0], again[0])
    torch.manual_seed(1)
    assert not torch.equal(model(**batch).logits, one[0])


def test_a_compiled_model_computes_all(make, make_batch):
    model, batch = make("lora", num_hidden_layers=1), make_batch(LENGTHS)
    expected = outcome(model, batch)
    model.set_unpadding()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, expected[0])


def test_it_belongs_to_the_adapter_and_lives_with_the_model(make, make_batch):
    model, batch = make(), make_batch(LENGTHS)
    model.set_unpadding()
    expected = outcome(model, batch)
    assert widths(copy.deepcopy(model), batch) == {TOKENS}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert widths(torch.load(file, weights_only=False), batch) == {TOKENS}
    model.add_adapter("other", METHODS["lora"])
    model.set_adapter("other")
    assert widths(model, batch) == {27}
    model.set_adapter("default")
    assert widths(model, batch) == {TOKENS}
    with model.disable_adapter():
        assert widths(model, batch) == {27}
    assert_same(outcome(model, batch), expected)
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        mixed = model.eval()(**batch, adapter_names=names).logits
        torch.testing.assert_close(mixed[0], model(**batch).logits[0])
    base = model.remove()
    assert not any(name.startswith("_pelt") for m in base.modules() for name in vars(m))


@pytest.mark.parametrize("method", CHOOSERS)
def test_weights_of_a_sentence_are_refused(method, make):
    model = make(method, dtype=torch.float32)
    with pytest.raises(ValueError, match="set_unpadding: .* choose weights for each sentence"):
        model.set_unpadding()
    assert not model._injection.packs_tokens


def test_other_models_and_gates_are_refused(make, make_base):
    config = with_part_changes(METHODS["unipelt"], UniPELTConfig, gate_pooling="mean")
    with pytest.raises(ValueError, match="masked_mean"):
        make(config).set_unpadding()
    for family in ("t5", "gpt2", "bart"):
        model = get_pelt_model(make_language_model(family), METHODS["lora"])
        with pytest.raises(ValueError, match="set_unpadding: .* positions or masks"):
            model.set_unpadding()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": 99}
    config = ModernBertConfig(**sizes, pad_token_id=0, reference_compile=False)
    model = get_pelt_model(ModernBertForSequenceClassification(config), METHODS["lora"])
    with pytest.raises(ValueError, match="positions or masks"):
        model.set_unpadding()
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        make("adapter", chunk_size_feed_forward=2).set_unpadding()


def test_packing_there_and_back():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    packing = Packing.of(mask)
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(packing.pack(x)[0], x[mask])
    assert torch.equal(packing.unpack(packing.pack(x)), torch.where(mask[..., None], x, 0.0))
    assert packing.share == 6 / 9
    values = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([values[0, :2].mean(), values[0, 2], values[0, 3:].mean()])
    torch.testing.assert_close(packing.means(values), expected)
    assert torch.equal(packing.over_tokens(expected)[0], expected[[0, 0, 1, 2, 2, 2]])

    def function(x):
        return packing.unpack(packing.pack(x).square())

    assert gradcheck(function, x) and gradgradcheck(function, x)
    assert gradcheck(lambda v: packing.over_tokens(packing.means(v).square()), values)
    assert Packing.of(torch.zeros(2, 3, dtype=torch.bool)) is None

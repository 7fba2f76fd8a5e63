"""Encoders with PEFT's LoRA whose layers compute real tokens only."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from family_models import make_decoder, make_encoder
from lora_models import lora_config, run, with_lora
from torch import nn

import pelt_kernels
from pelt_kernels.integrations import peft_families
from pelt_kernels.integrations.peft_unpadding import UnpaddedLoraModel

TOKENS = 12  # of the batch's 14


def _rows(model, batch, **inputs):
    """How many tokens each layer's first Linear of the FFN reads in a forward."""
    ends = ("intermediate.dense", "ffn.lin1")
    linears = [module for name, module in model.named_modules() if name.endswith(ends)]
    seen = []
    handles = [
        linear.register_forward_pre_hook(lambda module, args: seen.append(args[0][..., 0].numel()))
        for linear in linears
    ]
    with torch.no_grad():
        model(**batch, **inputs)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2
    return set(seen)


def _assert_same(found, expected):
    """In float64. What shifts all scores of a query, a key's bias, has a gradient of rounding."""
    assert found.keys() == expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9 * largest, msg=name)


@pytest.fixture
def batch(batch):
    """The same with padding on the right."""
    return {name: each.flip(1) for name, each in batch.items()}


@pytest.mark.parametrize("family", peft_families.ENCODERS)
def test_outputs_and_gradients_are_pefts(family, batch):
    model = with_lora(make_encoder(family))
    expected = run(model, batch)
    report = pelt_kernels.accelerate(model, unpad=True)
    assert report.served["unpadding"] == ("base_model",)
    assert "prefix_attention" not in report.served
    assert _rows(model, batch) == {TOKENS}
    _assert_same(run(model, batch), expected)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_other_kinds_of_lora(changes, batch):
    changes |= {"target_modules": ["query", "value"]}
    model = with_lora(make_encoder("bert"), **changes)
    expected = run(model, batch)
    pelt_kernels.accelerate(model, unpad=True)
    assert _rows(model, batch) == {TOKENS}
    _assert_same(run(model, batch), expected)


def test_an_attention_that_is_eager(batch):
    model = with_lora(make_encoder("bert", attn_implementation="eager"))
    expected = run(model, batch)
    pelt_kernels.accelerate(model, unpad=True)
    assert _rows(model, batch) == {TOKENS}
    _assert_same(run(model, batch), expected)


def test_padding_on_the_left_stays(batch):
    """A head reads the first token, real or not."""
    batch = {name: each.flip(1) for name, each in batch.items()}
    model = with_lora(make_encoder("bert"))
    expected = run(model, batch)
    pelt_kernels.accelerate(model, unpad=True)
    assert _rows(model, batch) == {14}
    _assert_same(run(model, batch), expected)


def test_labels_of_tokens_have_the_same_loss(batch):
    from transformers import AutoModelForTokenClassification

    model = with_lora(make_encoder("roberta", AutoModelForTokenClassification))
    labels = torch.arange(14).reshape(2, 7) % 2
    labels[batch["attention_mask"] == 0] = -100
    expected = model(**batch, labels=labels).loss
    pelt_kernels.accelerate(model, unpad=True)
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected)


def test_adapters_by_sample_and_without_adapters(batch):
    model = with_lora(make_encoder("bert"), "one").eval()
    torch.manual_seed(5)
    model.add_adapter("two", lora_config())
    names = {"adapter_names": ["two", "one"]}
    expected = model(**batch, **names).logits
    pelt_kernels.accelerate(model, unpad=True)
    assert _rows(model, batch, **names) == {14}
    torch.testing.assert_close(model(**batch, **names).logits, expected)
    assert _rows(model, batch) == {TOKENS}
    with model.disable_adapter():
        assert _rows(model, batch) == {TOKENS}


def test_nothing_is_packed_without_padding_or_in_checkpointed_layers(batch):
    model = with_lora(make_encoder("bert"))
    pelt_kernels.accelerate(model, unpad=True)
    assert _rows(model, {"input_ids": batch["input_ids"]}) == {14}
    expected = run(model, batch)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert _rows(model, batch) == {14}
    _assert_same(run(model, batch), expected)


def _left(model):
    """Hooks, and what hangs on the modules by names of this project's."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    names = [name for m in model.modules() for name in vars(m) if "pelt" in name]
    return hooks, names


def test_it_is_switched_and_taken_back(batch):
    model = with_lora(make_encoder("bert"))
    expected, before = run(model, batch), _left(model)
    pelt_kernels.accelerate(model)
    with pelt_kernels.accelerated(model, unpad=True):
        assert _rows(model, batch) == {TOKENS}
    assert _rows(model, batch) == {14}
    pelt_kernels.accelerate(model, unpad=True)
    assert type(model.base_model) is UnpaddedLoraModel
    pelt_kernels.accelerate(model)
    assert _rows(model, batch) == {14}
    pelt_kernels.accelerate(model, unpad=True)
    pelt_kernels.restore(model)
    assert type(model.base_model) is peft.LoraModel
    assert _left(model) == before == (0, [])
    _assert_same(run(model, batch), expected)


def test_a_model_without_its_adapters_is_transformers_own():
    model = with_lora(make_encoder("bert"))
    pelt_kernels.accelerate(model, unpad=True)
    base = model.merge_and_unload()
    assert _left(base) == (0, [])
    assert b"pelt_kernels" not in pickle.dumps(base)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_unpadded_by_itself(copied, batch):
    model = with_lora(make_encoder("bert"))
    pelt_kernels.accelerate(model, unpad=True)
    expected = run(model, batch)
    other = copied(model)
    assert _rows(other, batch) == {TOKENS}
    _assert_same(run(other, batch), expected)
    pelt_kernels.restore(model)
    assert _rows(model, batch) == {14} and _rows(other, batch) == {TOKENS}


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)


def _prefix():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(make_decoder("gpt2"), config)


REFUSED = {
    "got LlamaForCausalLM, whose layers read positions": lambda: with_lora(make_decoder("llama")),
    "got _Plain, whose layers": lambda: with_lora(_Plain(), target_modules=["query"]),
    "chunk_size_feed_forward": lambda: with_lora(make_encoder("bert", chunk_size_feed_forward=2)),
    "a model with PEFT's LoRA for unpad=True, got one without": _prefix,
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_cannot_are_refused_and_left_as_they_are(message):
    model = REFUSED[message]()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        pelt_kernels.accelerate(model, unpad=True)
    assert {name: type(module) for name, module in model.named_modules()} == before

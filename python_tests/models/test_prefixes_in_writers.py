"""Prefixes in every kind of attention, against the families' own attention over keys and values that
the prefixes were put in front of.
"""

from __future__ import annotations

import sys

import pytest
import torch
from families import WRITERS, make_writer
from test_writers import ENCODER_DECODERS, batch, randomised
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from pelt_kernels import PrefixTuningConfig, get_pelt_model, use_backend

# transformers' own attention takes the softmax in float32, whatever the model is in.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def pad_columns(tensor, columns):
    """Zeros in front: what is added to the scores of a prefix."""
    return None if tensor is None else torch.nn.functional.pad(tensor, (columns, 0))


def in_front(model):
    """An attention function that concatenates, for the attentions of `model` by their position."""
    prefixes = {}
    for stack in model._injection.stacks:
        for layer, own in zip(stack.layers, stack.prefixes):
            for path, prefix in own.items():
                keys, values = prefix.prefixes.keys_values(prefix.row)
                gate = 1.0
                if prefix.gate is not None:
                    gate = torch.sigmoid(prefix.prefixes.gate_bias[prefix.row])
                names = {id(m): n for n, m in model.base_model.named_modules()}
                prefixes[names[id(layer.get_submodule(path))]] = (gate * keys, gate * values)

    def attend(module, query, key, value, attention_mask, **kwargs):
        keys, values = prefixes[module.test_name]
        batch = len(query)
        key = torch.cat([keys.transpose(0, 1).expand(batch, -1, -1, -1), key], 2)
        value = torch.cat([values.transpose(0, 1).expand(batch, -1, -1, -1), value], 2)
        kwargs["position_bias"] = pad_columns(kwargs.get("position_bias"), len(keys))
        mask = pad_columns(attention_mask, len(keys))
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, mask, **kwargs)

    return attend


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("is_gated", [False, True])
def test_prefixes_are_keys_and_values_in_front(is_gated, family):
    """In float64: logits, and the gradients of everything that is trained."""
    if is_gated and family in ENCODER_DECODERS:
        pytest.skip("an encoder's gate is pooled: test_unipelt_formula has its formula")
    inputs = batch(family)
    config = PrefixTuningConfig(prefix_length=3, mid=8, gated=is_gated)
    model = randomised(get_pelt_model(make_writer(family).double(), config), std=0.5)
    other = make_writer(family, "eager").double()
    for name, module in other.named_modules():
        module.test_name = name
    AttentionInterface.register("in_front", in_front(model))
    AttentionMaskInterface.register("in_front", eager_mask)
    other.set_attn_implementation("in_front")
    read = inputs["labels"] != -100  # rows of padding in a window see nothing
    with use_backend("eager"):
        logits = model(**inputs).logits
    expected = other(**inputs).logits
    torch.testing.assert_close(logits[read], expected[read], **CLOSE)
    assert (logits - make_writer(family).double()(**inputs).logits).abs().max() > 1e-3
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.manual_seed(3))
    weights[~read] = 0
    trained = list(model.trained_parameters().values())
    mine = torch.autograd.grad((logits * weights).sum(), trained)
    theirs = torch.autograd.grad((expected * weights).sum(), trained)
    for name, a, b in zip(model.trained_parameters(), mine, theirs):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")

"""The config of Control Prefixes: its figures, its way through JSON, its sentences."""

from __future__ import annotations

import json

import pytest

from pelt_kernels.methods import ControlPrefixesConfig

WEBNLG = ControlPrefixesConfig(
    prefix_length=48, attributes={"source": 6, "category": 17}, unseen={"category": 2}
)
XSUM = ControlPrefixesConfig(
    prefix_length=48, attributes={"sport": 2, "cats": 40}, attribute_length=1, lengths={"cats": 3}
)


def test_the_figures_are_the_papers():
    config = ControlPrefixesConfig()
    assert (config.prefix_length, config.mid, config.attribute_length) == (50, 800, 2)
    assert config.start == "torch" and not config.gated and config.tables() == {}
    assert WEBNLG.tables() == {"source": (6, 2), "category": (17, 2)}
    assert WEBNLG.unseen_labels() == {"category": (15, 16)}
    assert XSUM.tables() == {"sport": (2, 1), "cats": (40, 3)}
    some = ControlPrefixesConfig(skip_layers=(0,), skip_cross=[2, 3])
    # As in a model whose encoder has 6 layers: the layer 8 is the decoder's layer 2.
    assert some.skips("encoder", 0, 0) and not some.skips("decoder", 6, 0)
    assert some.skips("cross", 8, 2) and not some.skips("decoder", 8, 2)


@pytest.mark.parametrize("config", [WEBNLG, XSUM], ids=["webnlg", "xsum"])
def test_the_order_of_attributes_outlives_sorted_json(config):
    values = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    again = ControlPrefixesConfig.from_dict(values)
    assert again == config and list(again.tables()) == list(config.tables())
    assert hash(again) == hash(config)


MISTAKES = {
    r"attributes as whole numbers >= 1 by different names, got \{'a': 0\}": {
        "attributes": {"a": 0}
    },
    "attributes as whole numbers >= 1 by different names, got 3": {"attributes": 3},
    "attributes as .* by different names, got .*'a', True": {"attributes": [("a", True)]},
    "attributes as .* by different names, got .*'a', 2": {"attributes": [("a", 2), ("a", 3)]},
    "attributes as at most three": {"attributes": dict.fromkeys("abcd", 2)},
    "attributes with names of letters": {"attributes": {"a b": 2}},
    r"lengths for attributes \(a\), got .*'b'": {"attributes": {"a": 2}, "lengths": {"b": 2}},
    r"unseen for attributes \(there are none\)": {"unseen": {"b": 2}},
    "unseen as no more labels than": {"attributes": {"a": 2}, "unseen": {"a": 3}},
    "attribute_length as a whole number >= 1, got 0": {"attribute_length": 0},
    "start to be one of normal, torch, got 'lora'": {"start": "lora"},
    r"skip_cross as a list of layer numbers from 0, got \(-1,\)": {"skip_cross": (-1,)},
    "trainable_tokens as a list of different ids of words, got 3": {"trainable_tokens": 3},
    r"trainable_tokens as a list .*got \(1, 1\)": {"trainable_tokens": (1, 1)},
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_are_one_sentence(sentence):
    with pytest.raises(ValueError, match="ControlPrefixesConfig: expected " + sentence) as raised:
        ControlPrefixesConfig(**MISTAKES[sentence])
    assert "\n" not in str(raised.value)

"""LoRA adapters computed from others, against PEFT's on the same weights."""

from __future__ import annotations

import peft
import pytest
import torch
from families import make_writer

from pelt_kernels import LoraConfig, UniPELTConfig, get_pelt_model

CONFIGS = {
    "default": LoraConfig(r=4, alpha=7),
    "other": LoraConfig(r=4, alpha=3, use_rslora=True),
    "wide": LoraConfig(r=6),
}
IDS = torch.tensor([[5, 9, 7, 44, 12], [8, 6, 71, 30, 2]])


@pytest.fixture
def make(make_base, randomise):
    """family -> a model with adapters of random values."""

    def made(family):
        base = make_writer(family) if family == "llama" else make_base(family)
        model = get_pelt_model(base, CONFIGS["default"])
        for seed, (name, config) in enumerate(CONFIGS.items()):
            if name != "default":
                model.add_adapter(name, config)
            model.set_adapter(name)
            randomise(model, seed=seed)
        return model.eval()

    return made


def _lora(model, name):
    model.set_adapter(name)
    named = model.trained_parameters().items()
    return {key: value.detach().clone() for key, value in named if ".lora_" in key}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_same_as_peft(make, tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path, format="peft")
    there = peft.PeftModel.from_pretrained(make_writer("llama"), tmp_path).eval()
    for name in ("other", "wide"):
        there.load_adapter(tmp_path / name, name)
    for number, (names, weights, options) in enumerate([
        (["default", "other"], [0.7, -0.4], {"combination_type": "linear"}),
        (["default", "wide", "other"], [0.7, 1.5, -0.4], {"combination_type": "cat"}),
        (["default", "other"], [0.7, 0.4], {"combination_type": "ties", "density": 0.4}),
        (
            ["default", "other"],
            [1.0, -2.0],
            {"combination_type": "ties", "density": 0.8, "majority_sign_method": "frequency"},
        ),
        (["default", "other"], [0.6, 0.5], {"combination_type": "dare_ties", "density": 1.0}),
    ]):  # fmt: skip
        name = f"mixed{number}"
        model.add_weighted_adapter(names, weights, name, **options)
        there.add_weighted_adapter(names, weights, name, **options)
        model.set_adapter(name)
        there.set_adapter(name)
        got, wanted = model(input_ids=IDS).logits, there(input_ids=IDS).logits
        assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max(), options


@torch.no_grad()
def test_dare_keeps_a_share_and_the_expectation(make):
    model = make("bert")
    model.add_weighted_adapter(["default"], [1.0], "whole")
    options = {"combination_type": "dare_linear", "density": 0.25}
    for name, seed in (("one", 1), ("same", 1), ("two", 2)):
        model.add_weighted_adapter(["default"], [1.0], name, **options, seed=seed)
    whole, one, same, two = (_lora(model, name) for name in ("whole", "one", "same", "two"))
    numbers, kept = 0, 0
    for key, value in one.items():
        assert torch.equal(value, same[key]) and not torch.equal(value, two[key])
        is_kept = value != 0
        torch.testing.assert_close(value[is_kept], whole[key][is_kept] / 0.25)
        numbers, kept = numbers + value.numel(), kept + int(is_kept.sum())
    # Five standard deviations of a binomial distribution.
    assert abs(kept - numbers / 4) < 5 * (numbers * 0.25 * 0.75) ** 0.5


def test_the_head_is_the_one_that_is_named(make):
    model = make("bert")
    model.add_weighted_adapter(["default", "other"], [1, 1], "first")
    model.add_weighted_adapter(["default", "other"], [1, 1], "named", head="wide")
    for name, source in (("first", "default"), ("named", "wide")):
        heads = []
        for each in (name, source):
            model.set_adapter(each)
            heads.append(model.trained_parameters()["base_model.classifier.weight"].clone())
        assert torch.equal(*heads)
    model.set_adapter("named")
    assert all(parameter.requires_grad for parameter in model.trained_parameters().values())


def test_what_cannot_be_combined(make):
    model = make("bert")
    model.add_adapter("gated", UniPELTConfig.apl())
    model.add_adapter("keys", LoraConfig(r=4, targets=("key",)))
    model.add_adapter("pattern", LoraConfig(r=4, rank_pattern={"query": 2}))
    known, batch = list(model.adapter_configs), IDS
    before = model(input_ids=batch).logits

    def refuse(match, adapters=("default", "other"), weights=(1.0, 1.0), name="new", **options):
        with pytest.raises(ValueError, match=match) as raised:
            model.add_weighted_adapter(adapters, weights, name, **options)
        assert str(raised.value).startswith("add_weighted_adapter: ")
        assert "\n" not in str(raised.value) and list(model.adapter_configs) == known

    refuse("one r for linear, got r = 4, 6; combination_type='cat' takes", ("default", "wide"))
    refuse("LoRA without gates and biases, got 'gated' of 'unipelt'", ("default", "gated"))
    refuse("the same targets, got .*'keys'", ("default", "keys"))
    refuse("got 'pattern' with rank_pattern", ("default", "pattern"))
    refuse("one of the adapters .* got 'none'", ("default", "none"))
    refuse("one of the adapters .* got 'none'", head="none")
    refuse("different adapters' names, got", ("other", "other"))
    refuse("different adapters' names, got", ())
    refuse("2 finite weights", weights=(1.0,))
    refuse("2 finite weights", weights=(1.0, float("nan")))
    refuse("got 'wide', which the model has", name="wide")
    refuse("linear, ties, dare_linear, dare_ties, cat, got 'svd'", combination_type="svd")
    refuse("total, frequency, got 'most'", majority_sign_method="most")
    refuse("no density for linear, got 0.5", density=0.5)
    for density in (None, 0, 1.5):
        refuse("density > 0 and <= 1", combination_type="ties", density=density)
    with model.disable_adapter():
        refuse("expected the method to be in the model")
    assert torch.equal(model(input_ids=batch).logits, before)

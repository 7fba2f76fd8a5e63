"""Batches whose samples have different adapters, against each sample with its adapter alone."""

from __future__ import annotations

import pytest
import torch
from families import WRITERS, make_writer

from pelt_kernels import (
    AdaMixConfig,
    BitFitConfig,
    BottleneckAdapterConfig,
    CompositeConfig,
    ControlPrefixesConfig,
    HyperPELTConfig,
    LoraConfig,
    PrefixTuningConfig,
    PSTConfig,
    UniPELTConfig,
    VLMConfig,
    get_pelt_model,
)

BASE = "__base__"
MAM = CompositeConfig(
    adapter=BottleneckAdapterConfig(placement="parallel", scale=4.0, start="lora"),
    prefix=PrefixTuningConfig(prefix_length=3),
)
CONFIGS = {
    "lora": LoraConfig(r=3),
    "wide_lora": LoraConfig(r=5, alpha=7, targets=("query", "key", "ffn_in", "ffn_out")),
    "adapter": BottleneckAdapterConfig(reduction_factor=8),
    "wide_adapter": BottleneckAdapterConfig(reduction_factor=4, scale=2.0),
    "prefix": PrefixTuningConfig(prefix_length=3),
    "long_prefix": PrefixTuningConfig(prefix_length=5, mid=None),
    "unipelt": UniPELTConfig.apl(),
    "unipelt_too": UniPELTConfig.apl(),
    "adamix": AdaMixConfig(),
    "mam": MAM,
}


def _with_adapters(base, configs, randomise):
    model = None
    for seed, (name, config) in enumerate(configs.items()):
        if model is None:
            model = get_pelt_model(base, config, name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        randomise(model, seed=seed)
    return model.eval()


def _one_by_one(model, base, batch, names):
    """The logits of each sample alone."""
    logits = []
    for i, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
        called = base if name == BASE else model
        logits.append(called(**{k: v[i : i + 1] for k, v in batch.items()}).logits)
    return torch.cat(logits)


def _same(got, wanted):
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.fixture
def make(make_base):
    """family -> a tiny model in float64."""

    def made(family):
        if family in WRITERS:
            return make_writer(family).double()
        return make_base(family, dtype=torch.float64)

    return made


def _batch(family, size):
    lengths = torch.arange(size) % 4 + 4
    ids = torch.randint(6, 99, (size, 7), generator=torch.Generator().manual_seed(1))
    seen = torch.arange(7)[None] < lengths[:, None]
    if family in ("gpt2", "llama"):  # they write behind the last column
        seen = seen.flip(1)
    batch = {"input_ids": torch.where(seen, ids, 1), "attention_mask": seen.long()}
    return batch | ({"decoder_input_ids": ids[:, :4]} if family == "t5" else {})


# A classifier has a head for each adapter, in RoBERTa two layers of it.
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
def test_a_mixed_batch_equals_one_by_one(family, make, randomise):
    base, model = make(family), _with_adapters(make(family), CONFIGS, randomise)
    names = [BASE, *CONFIGS, *reversed(CONFIGS), BASE]
    batch = _batch(family, len(names))
    before, active = model(**batch).logits, model.active_adapter
    mixed = model(**batch, adapter_names=names).logits
    assert model.active_adapter == active and torch.equal(model(**batch).logits, before)
    _same(mixed, _one_by_one(model, base, batch, names))
    model.set_adapter(active)
    _same(model(**batch, adapter_names=[active] * len(names)).logits, before)
    _same(model(**batch, adapter_names=[BASE] * len(names)).logits, base(**batch).logits)


@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("llama", 3), ("t5", 3)])
def test_each_sentence_is_continued_by_its_adapter(family, beams, make, randomise):
    chosen = ("lora", "prefix", "unipelt")
    base = make(family)
    model = _with_adapters(make(family), {name: CONFIGS[name] for name in chosen}, randomise)
    names = ["lora", BASE, "prefix", "lora", "unipelt"]
    batch = _batch("llama", len(names))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    mixed = model.generate(**batch, **options, adapter_names=names)
    for i, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
        called = base if name == BASE else model
        alone = called.generate(**{k: v[i : i + 1] for k, v in batch.items()}, **options)
        assert torch.equal(mixed[i : i + 1], alone), name


def test_attention_weights_of_a_mixed_batch(make_base, randomise):
    model = _with_adapters(
        make_base(dtype=torch.float64),
        {
            "short": PrefixTuningConfig(prefix_length=2),
            "other": PrefixTuningConfig(prefix_length=2, mid=None),
        },
        randomise,
    )
    batch = _batch("bert", 3)
    names = ["short", "other", "short"]
    mixed = model(**batch, adapter_names=names, output_attentions=True).attentions
    for name in ("short", "other"):
        model.set_adapter(name)
        rows = [i for i, each in enumerate(names) if each == name]
        for got, wanted in zip(mixed, model(**batch, output_attentions=True).attentions):
            assert got.shape[-1] == 2 + 7
            _same(got[rows], wanted[rows])
    with pytest.raises(ValueError, match=r"prefixes of one length .*got weights of \[9, 7\] col"):
        model(**batch, adapter_names=["short", BASE, "short"], output_attentions=True)


REFUSED = {
    "biases": (BitFitConfig(), "trains in place"),
    "sparse": (PSTConfig(), "pruned weights"),
    "vlm": (VLMConfig(tasks=("a", "b")), "tasks, by which a call"),
    "hyper": (HyperPELTConfig(tasks=("a", "b"), train_norms=False), "tasks, by which a call"),
    "control": (ControlPrefixesConfig(attributes={"tone": 2}), "attributes, by which a call"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_all_samples_would_share_is_refused(name, make):
    config, reason = REFUSED[name]
    family = "bert" if name in ("biases", "sparse") else "t5"
    model = get_pelt_model(make(family), LoraConfig(r=3), "lora")
    model.add_adapter(name, config)
    model.eval()
    batch = _batch(family, 2)
    before = model(**batch).logits
    with pytest.raises(ValueError, match=f"adapter_names: .*got '{name}' with .*{reason}"):
        model(**batch, adapter_names=["lora", name])
    assert torch.equal(model(**batch).logits, before)
    # One that waits is in no sample's way, the one in the model is in all samples'.
    _same(model(**batch, adapter_names=["lora", BASE]).logits[:1], before[:1])
    model.set_adapter(name)
    with pytest.raises(ValueError, match=rf"got '{name}', the active one \(set_adapter another\)"):
        model(**batch, adapter_names=["lora", BASE])


def test_calls_that_cannot_be_mixed(make_base, randomise):
    chosen = {name: CONFIGS[name] for name in ("lora", "prefix")}
    model = _with_adapters(make_base(dtype=torch.float64), chosen, randomise)
    batch = _batch("bert", 3)
    before = model(**batch).logits

    def refuse(match, names, **others):
        with pytest.raises(ValueError, match=match) as raised:
            model(**batch, **others, adapter_names=names)
        assert "\n" not in str(raised.value)

    refuse("one of the adapters lora, prefix, got 'lorra'", ["lora", "lorra", "prefix"])
    refuse("expected 3 names, one for each sample of the batch, got 2", ["lora", "prefix"])
    for names in ("lora", [], {"lora": 3}):
        refuse("expected a list of names, one for each sample", names)
    refuse("expected no attributes beside it", ["lora"] * 3, attributes={"tone": torch.ones(3)})
    with model.disable_adapter():
        refuse("adapter_names: expected the method to be in the model", ["lora"] * 3)
    model.train()
    refuse("expected a model in evaluation, not compiled, got one in training", ["lora"] * 3)
    assert torch.equal(model.eval()(**batch).logits, before)


def test_an_error_inside_a_mixed_call_leaves_the_model_as_it_was(make_base, randomise):
    chosen = {name: CONFIGS[name] for name in ("lora", "prefix")}
    model = _with_adapters(make_base(dtype=torch.float64), chosen, randomise)
    batch = _batch("bert", 3)
    before, modules = model(**batch).logits, dict(model.named_modules())
    wide = batch | {"input_ids": batch["input_ids"].repeat(1, 20)}
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        model(**wide, adapter_names=["lora", BASE, "prefix"])
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(**batch).logits, before)

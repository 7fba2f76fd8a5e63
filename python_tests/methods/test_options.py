"""A method's config from a command line's text: every field can be reached, and nothing else."""

from __future__ import annotations

from dataclasses import fields

import pytest

from pelt_kernels.methods import (
    PRESETS,
    AdaMixConfig,
    BottleneckAdapterConfig,
    CompositeConfig,
    ControlPrefixesConfig,
    LoraConfig,
    MethodConfig,
    PrefixTuningConfig,
    PSTConfig,
    UniPELTConfig,
    config_from_options,
    make_config,
)

READ = {
    "lora r=4 alpha=2 targets=query,key gated=true": LoraConfig(
        r=4, alpha=2.0, targets=("query", "key"), gated=True
    ),
    "lora targets=all-linear exclude=lm_head,mlp.c_proj layers=0,2": LoraConfig(
        targets="all-linear", exclude=("lm_head", "mlp.c_proj"), layers=(0, 2)
    ),
    r"lora targets=.*\.(q|v)_proj use_rslora=true": LoraConfig(
        targets=r".*\.(q|v)_proj", use_rslora=True
    ),
    "lora targets=q_proj rank_pattern=query:2,k:3 alpha_pattern=k:1e1": LoraConfig(
        targets=("q_proj",), rank_pattern={"query": 2, "k": 3}, alpha_pattern={"k": 10.0}
    ),
    "composite lora.targets=all-linear": CompositeConfig(lora=LoraConfig(targets="all-linear")),
    "lora gated=none gate_pooling=mean": LoraConfig(gate_pooling="mean"),
    "pst sparsity=5e-1 r1=2 train_head=false": PSTConfig(sparsity=0.5, r1=2, train_head=False),
    "adamix experts=2 kind=lora share_up=FALSE": AdaMixConfig(
        experts=2, kind="lora", share_up=False
    ),
    "prefix prefix_length=3 mid=none skip_layers=1,2": PrefixTuningConfig(
        prefix_length=3, mid=None, skip_layers=(1, 2)
    ),
    "prefix skip_layers=": PrefixTuningConfig(),
    "control_prefixes attributes=source:6,category:17 unseen=category:2 mid=none": (
        ControlPrefixesConfig(
            attributes={"source": 6, "category": 17}, unseen={"category": 2}, mid=None
        )
    ),
    "control_prefixes trainable_tokens=-1,32100 skip_cross=0 lengths=": ControlPrefixesConfig(
        trainable_tokens=(-1, 32100), skip_cross=(0,)
    ),
    "unipelt adapter=none lora.r=2 gate_pooling=mean": UniPELTConfig(
        adapter=None, lora=LoraConfig(r=2), gate_pooling="mean"
    ),
    "unipelt-ap lora.r=2": UniPELTConfig(lora=LoraConfig(r=2)),
    "composite adapter.bottleneck=16 lora=default bitfit=true": CompositeConfig(
        adapter=BottleneckAdapterConfig(bottleneck=16), lora=LoraConfig(), bitfit=True
    ),
    "mam prefix.prefix_length=5 prefix.mid=none": CompositeConfig.mam(
        prefix=PrefixTuningConfig(prefix_length=5, mid=None)
    ),
    "mam prefix=none adapter.scale=2": CompositeConfig(
        adapter=BottleneckAdapterConfig(
            placement="parallel", reduction_factor=2, scale=2.0, start="lora"
        )
    ),
}


@pytest.mark.parametrize("words", READ)
def test_text_is_read_as_the_field_asks(words):
    name, *options = words.split()
    found = config_from_options(name, dict(option.split("=") for option in options))
    assert found == READ[words]


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"composite"}))
def test_every_field_of_every_method_takes_its_own_value_as_text(name):
    config = make_config(name)
    assert config_from_options(name, {}) == config
    for path, value in paths(config):
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        assert config_from_options(name, {path: text}) == config, path


def paths(config, before=""):
    """The dotted path of each plain field, parts' fields included, and its value."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, MethodConfig):
            yield from paths(value, f"{before}{field.name}.")
        else:
            yield before + field.name, value


MISTAKES = {
    "expected attributes as numbers by name such as source:6,category:17, got 'source'": (
        "control_prefixes",
        "attributes=source",
    ),
    r"a field of LoraConfig \(r, alpha, .*got 'rank'": ("lora", "rank=4"),
    r"a field of BitFitConfig \(it has none\), got 'r'": ("bitfit", "r=4"),
    "expected r as a whole number, got '4.5'": ("lora", "r=4.5"),
    "expected alpha as a number, got ''": ("lora", "alpha="),
    "expected alpha_pattern as numbers by name .*got 'q:x'": ("lora", "alpha_pattern=q:x"),
    "expected gated as true or false or none, got 'yes'": ("lora", "gated=yes"),
    "expected mid as a whole number or none, got 'x'": ("prefix", "mid=x"),
    "expected skip_layers as numbers with commas, got 'last'": ("prefix", "skip_layers=last"),
    "expected r without further fields, got 'r.x'": ("lora", "r.x=1"),
    "adapter as none, default or its fields .*got 'on'": ("composite", "adapter=on"),
    r"a field of BottleneckAdapterConfig .*got 'adapter.r'": ("composite", "adapter.r=1"),
    r"expected sparsity in \[0, 1\), got 1.0": ("pst", "sparsity=1"),
    "begin < end <= 1": ("pst", "end=2"),
    "expected experts as a whole number >= 1, got 0": ("adamix", "experts=0"),
    "got lora and adamix for 'query'": ("composite", "lora=default adamix.kind=lora"),
    "CompositeConfig: expected at least one of": ("composite", ""),
    "expected a method out of unipelt": ("ia3", "r=4"),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_are_one_sentence(sentence):
    name, words = MISTAKES[sentence]
    with pytest.raises(ValueError, match=sentence) as raised:
        config_from_options(name, dict(word.split("=") for word in words.split()))
    assert "\n" not in str(raised.value)

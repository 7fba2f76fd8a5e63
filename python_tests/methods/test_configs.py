"""Methods as data: presets, round trips, and one sentence for every mistake."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pelt_kernels.methods import (
    METHODS,
    PRESETS,
    AdaMixConfig,
    BitFitConfig,
    BottleneckAdapterConfig,
    CompositeConfig,
    HeadConfig,
    LoraConfig,
    PrefixTuningConfig,
    PSTConfig,
    UniPELTConfig,
    config_from_dict,
    make_config,
    parts_of,
)
from pelt_kernels.methods.lora import TARGETS

SAMPLES = [
    UniPELTConfig.apl(),
    UniPELTConfig.ap(gate_pooling="mean"),
    UniPELTConfig.apl(gated=False),
    UniPELTConfig(prefix=None, lora=LoraConfig(r=4, targets=("key",), gated=False)),
    BottleneckAdapterConfig(bottleneck=7, activation="gelu_tanh", dropout=0.1, gated=True),
    PrefixTuningConfig(prefix_length=0, mid=None, skip_layers=(1, 3)),
    LoraConfig(r=256, alpha=0.5, targets=["query"], dropout=0.25),
    *(config() for config in METHODS.values() if config is not CompositeConfig),
    CompositeConfig.mam(),
    CompositeConfig(bitfit=True, pst=PSTConfig(targets=("key",)), adamix=AdaMixConfig()),
    CompositeConfig.mam(lora=LoraConfig(r=2, gated=True), adapter=BottleneckAdapterConfig()),
]


@pytest.mark.parametrize("config", SAMPLES, ids=lambda config: config.method)
def test_dictionaries_go_there_and_back(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert values["method"] == config.method
    assert config_from_dict(values) == config
    assert type(config).from_dict(values) == config
    values.pop("method")
    assert type(config).from_dict(values) == config


def test_defaults_are_the_papers():
    apl = UniPELTConfig()
    assert apl == UniPELTConfig.apl()
    assert apl.adapter.reduction_factor == 16 and apl.adapter.activation == "relu"
    assert apl.adapter.bottleneck_of(768) == 48 and apl.adapter.dropout == 0
    assert apl.prefix.prefix_length == 10 and apl.prefix.mid == 512
    assert (apl.lora.r, apl.lora.alpha, apl.lora.dropout) == (8, 16, 0)
    assert apl.lora.targets == ("query", "value")
    assert apl.gate_pooling == "masked_mean"
    assert UniPELTConfig.ap().lora is None and UniPELTConfig.ap().adapter == apl.adapter


def test_a_part_is_gated_inside_unipelt_and_not_alone():
    parts = parts_of(
        UniPELTConfig(lora=LoraConfig(r=4), adapter=BottleneckAdapterConfig(gated=False))
    )
    assert (parts.adapter.gated, parts.prefix.gated, parts.lora.gated) == (False, True, True)
    assert not parts_of(LoraConfig()).lora.gated and parts_of(LoraConfig(gated=True)).lora.gated
    no_gates = parts_of(UniPELTConfig.apl(gated=False))
    assert not no_gates.gated and (no_gates.adapter and no_gates.prefix and no_gates.lora)


def test_the_pooling_of_unipelt_holds_for_its_parts():
    parts = parts_of(UniPELTConfig(gate_pooling="mean"))
    assert [part.gate_pooling for part in parts.gated] == ["mean"] * 3
    same = UniPELTConfig(lora=LoraConfig(gate_pooling="mean"), gate_pooling="mean")
    assert parts_of(same).lora.gate_pooling == "mean"
    with pytest.raises(ValueError, match=r"'masked_mean' and 'mean' \(lora\); set it on UniPELT"):
        UniPELTConfig(lora=LoraConfig(gate_pooling="mean"))


def test_methods_by_name():
    assert list(METHODS) == [
        "unipelt", "adapter", "prefix", "control_prefixes", "lora", "adamix", "pst", "vlm",
        "hyperpelt", "bitfit", "composite", "head", "full",
    ]  # fmt: skip
    assert make_config("unipelt-ap") == UniPELTConfig.ap()
    assert make_config("lora", r=4) == LoraConfig(r=4)
    assert make_config("mam", bitfit=True) == CompositeConfig.mam(bitfit=True)
    plain = set(PRESETS) - {"composite"}  # which is nothing without parts
    assert {type(make_config(name)) for name in plain} == set(METHODS.values())


def test_mam_has_the_papers_figures():
    mam = CompositeConfig.mam()
    assert mam.adapter.bottleneck_of(1024) == 512 and mam.adapter.bottleneck_of(768) == 384
    assert (mam.adapter.placement, mam.adapter.scale, mam.adapter.start) == ("parallel", 4, "lora")
    assert (mam.prefix.prefix_length, mam.prefix.mid) == (30, 800)
    assert not mam.adapter.gated and not mam.prefix.gated and parts_of(mam).tune == "none"


LORA_EVERYWHERE = LoraConfig(targets=TARGETS)
COLLISIONS = {
    "got lora and pst for 'query'": {"lora": LoraConfig(), "pst": PSTConfig()},
    "got pst and adamix for 'ffn_out'": {"pst": PSTConfig(), "adamix": AdaMixConfig()},
    "got lora and adamix for 'ffn_out'": {"lora": LORA_EVERYWHERE, "adamix": AdaMixConfig()},
    "got lora and adamix for 'query'": {
        "lora": LoraConfig(),
        "adamix": AdaMixConfig(kind="lora"),
    },
    "got the prefix's gate and pst for 'query'": {
        "prefix": PrefixTuningConfig(gated=True),
        "pst": PSTConfig(),
    },
    "got the prefix's gate and adamix for 'query'": {
        "prefix": PrefixTuningConfig(gated=True),
        "adamix": AdaMixConfig(kind="lora"),
    },
}


@pytest.mark.parametrize("sentence", COLLISIONS)
def test_two_parts_in_one_place_are_refused(sentence):
    with pytest.raises(ValueError, match=sentence + "; leave it out of one part's targets"):
        CompositeConfig(**COLLISIONS[sentence])


def test_parts_with_places_of_their_own_go_together():
    config = CompositeConfig(
        adapter=BottleneckAdapterConfig(),
        prefix=PrefixTuningConfig(gated=True),
        lora=LoraConfig(),
        bitfit=True,
        pst=PSTConfig(targets=("ffn_in", "ffn_out"), train_head=False),
        adamix=AdaMixConfig(kind="lora", targets=("key",)),
    )
    parts = parts_of(config)
    assert parts.tune == "bias" and parts.pruning == config.pst and not parts.tune_head
    assert parts.mixture == config.adamix and not parts.adapter.gated


def test_what_a_method_trains_in_place():
    assert parts_of(BitFitConfig()).tune == "bias" and parts_of(HeadConfig()).tune == "none"
    assert parts_of(make_config("full")).tune == "all"


def test_configs_do_not_change():
    config = LoraConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4
    assert dataclasses.replace(config, r=4) == LoraConfig(r=4) != config


MISTAKES = {
    "LoraConfig: expected r as a whole number >= 1, got 0": lambda: LoraConfig(r=0),
    "expected r as a whole number >= 1, got 8.0": lambda: LoraConfig(r=8.0),
    "expected r as a whole number >= 1, got True": lambda: LoraConfig(r=True),
    "expected r <= 256, got 257": lambda: LoraConfig(r=257),
    "expected alpha as a finite number, got nan": lambda: LoraConfig(alpha=float("nan")),
    "expected alpha as a finite number, got '16'": lambda: LoraConfig(alpha="16"),
    r"LoraConfig: expected dropout in \[0, 1\), got 1.0": lambda: LoraConfig(dropout=1.0),
    r"LoraConfig: expected dropout in \[0, 1\), got -0.1": lambda: LoraConfig(dropout=-0.1),
    r"targets as a list of .*got \('q', ' '\)": lambda: LoraConfig(targets=("q", " ")),
    r"targets as a list of .*got \('all-linear',\)": lambda: LoraConfig(targets=("all-linear",)),
    r"targets as a list of .*out of query, .*got \('q',\)": lambda: PSTConfig(targets=("q",)),
    r"AdaMixConfig: expected targets .*got \('q',\)": lambda: AdaMixConfig(targets=("q",)),
    r"targets with a regular expression, got '\(q'": lambda: LoraConfig(targets="(q"),
    "rank_pattern with a regular expression, got '": lambda: LoraConfig(rank_pattern={"*q": 2}),
    "rank_pattern <= 256": lambda: LoraConfig(rank_pattern={"q": 257}),
    "rank_pattern as whole numbers >= 1": lambda: LoraConfig(rank_pattern={"q": 0}),
    "alpha_pattern as finite numbers": lambda: LoraConfig(alpha_pattern={"q": float("inf")}),
    "exclude as a list of different names": lambda: LoraConfig(exclude=("q", "q")),
    "layers as a list of layer numbers": lambda: LoraConfig(layers=(-1,)),
    "use_rslora as True or False": lambda: LoraConfig(use_rslora=1),
    r"targets as a list of .*got \(\)": lambda: LoraConfig(targets=()),
    "targets as a list of .*got 'query'": lambda: LoraConfig(targets="query"),
    "targets as a list of different": lambda: LoraConfig(targets=("query", "query")),
    "gated as True, False or None, got 'yes'": lambda: LoraConfig(gated="yes"),
    "gate_pooling to be one of masked_mean, mean, got 'token'": lambda: LoraConfig(
        gate_pooling="token"
    ),
    "expected prefix_length as a whole number >= 0, got -1": lambda: PrefixTuningConfig(
        prefix_length=-1
    ),
    "expected mid as a whole number >= 1 or None, got 0": lambda: PrefixTuningConfig(mid=0),
    r"skip_layers as a list .*got \(-1,\)": lambda: PrefixTuningConfig(skip_layers=(-1,)),
    "skip_layers as a list .*got 3": lambda: PrefixTuningConfig(skip_layers=3),
    "activation to be one of relu, gelu, .*got 'swish'": lambda: BottleneckAdapterConfig(
        activation="swish"
    ),
    "reduction_factor as a whole number >= 1, got 0": lambda: BottleneckAdapterConfig(
        reduction_factor=0
    ),
    "bottleneck as a whole number >= 1 or None, got 0": lambda: BottleneckAdapterConfig(
        bottleneck=0
    ),
    "hidden size 8, got 16": lambda: BottleneckAdapterConfig().bottleneck_of(8),
    "at least one of adapter, prefix and lora": lambda: UniPELTConfig(
        adapter=None, prefix=None, lora=None
    ),
    "expected lora as LoraConfig or None, got dict": lambda: UniPELTConfig(lora={"r": 8}),
    "UniPELTConfig: expected gate_pooling": lambda: UniPELTConfig(gate_pooling="max"),
    "expected the fields r, alpha, .*got the unknown 'rank'": lambda: config_from_dict(
        {"method": "lora", "rank": 8}
    ),
    r"expected the fields \(none\), got the unknown 'r'": lambda: BitFitConfig.from_dict({"r": 1}),
    "expected method 'lora', got 'prefix'": lambda: LoraConfig.from_dict({"method": "prefix"}),
    "LoraConfig: expected a dictionary, got list": lambda: LoraConfig.from_dict([]),
    "method to be one of unipelt, .*got 'ia3'": lambda: config_from_dict({"method": "ia3"}),
    "method to be one of unipelt, .*got \\['lora'\\]": lambda: config_from_dict(
        {"method": ["lora"]}
    ),
    "a dictionary with the key 'method', got {}": lambda: config_from_dict({}),
    "a dictionary with the key 'method', got None": lambda: config_from_dict(None),
    "expected a method out of unipelt, .*unipelt-ap, mam, got 'ia3'": lambda: make_config("ia3"),
    "the method 'lora' does not take these options: .*'rank'": lambda: make_config("lora", rank=1),
    "expected the fields adapter, .*got the unknown 'central'": lambda: config_from_dict(
        UniPELTConfig().to_dict() | {"central": 1}
    ),
    "placement to be one of sequential, parallel, got 'beside'": lambda: BottleneckAdapterConfig(
        placement="beside"
    ),
    "expected scale as a finite number, got inf": lambda: BottleneckAdapterConfig(
        scale=float("inf")
    ),
    "start to be one of normal, lora, got 'zero'": lambda: BottleneckAdapterConfig(start="zero"),
    "expected at least one of adapter, .* and trainable_tokens, got none": CompositeConfig,
    "expected bitfit as True or False, got 1": lambda: CompositeConfig(bitfit=1),
    "expected pst as PSTConfig or None, got LoraConfig": lambda: CompositeConfig(pst=LoraConfig()),
    "expected adapter as BottleneckAdapterConfig or None, got LoraConfig": lambda: config_from_dict(
        UniPELTConfig().to_dict() | {"adapter": LoraConfig().to_dict()}
    ),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_are_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        MISTAKES[sentence]()
    assert "\n" not in str(raised.value)

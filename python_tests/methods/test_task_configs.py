"""The configs of methods for several tasks: sizes, round trips, and one sentence for mistakes."""

from __future__ import annotations

import json

import pytest

from pelt_kernels.methods.hyperpelt import HyperPELTConfig
from pelt_kernels.methods.vlm import VLMConfig


@pytest.mark.parametrize(
    "config",
    [
        VLMConfig(tasks=["mt", "qa"], bottlenecks=[300, 10]),
        HyperPELTConfig(tasks=["cola"], bottleneck=0, features=512, train_norms=False),
    ],
    ids=lambda config: config.method,
)
def test_dictionaries_go_there_and_back(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(values) == config


def test_sizes_of_tasks():
    tasks = ("mt", "qa", "nlg")
    assert VLMConfig(tasks=tasks).bottleneck_of_each() == (100,) * 3
    sizes = (300, 300, 10)
    assert VLMConfig(tasks=tasks, bottlenecks=sizes).bottleneck_of_each() == sizes


def test_defaults_are_those_of_hyperformer():
    config = HyperPELTConfig()
    assert config.bottleneck_of(768) == 24 and HyperPELTConfig(bottleneck=7).bottleneck_of(8) == 7
    assert (config.embedding_size, config.mid, config.size) == (64, 128, 64)
    assert config.activation == "gelu_tanh" and config.train_norms
    with pytest.raises(ValueError, match="reduction_factor <= the model's hidden size 16, got 32"):
        config.bottleneck_of(16)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (VLMConfig, {"tasks": ()}, r"tasks as a list of different names of tasks, got \(\)"),
        (VLMConfig, {"tasks": ("a", "a")}, "different names of tasks"),
        (VLMConfig, {"tasks": "qa"}, "different names of tasks, got 'qa'"),
        (VLMConfig, {"tasks": ("a", " b")}, "different names of tasks"),
        (VLMConfig, {"bottlenecks": (1, 2)}, r"one for each \(1\), got \(1, 2\)"),
        (VLMConfig, {"bottlenecks": (0,)}, r"whole numbers >= 1.*got \(0,\)"),
        (VLMConfig, {"bottlenecks": (True,)}, "whole numbers >= 1"),
        (HyperPELTConfig, {"tasks": (1,)}, "different names of tasks"),
        (HyperPELTConfig, {"prefix_length": -1}, "prefix_length as a whole number >= 0, got -1"),
        (HyperPELTConfig, {"prefix_length": 0, "bottleneck": 0}, "leaves nothing to write"),
        (HyperPELTConfig, {"activation": "sin"}, "activation to be one of"),
        (HyperPELTConfig, {"features": 0}, "features as a whole number >= 1 or None"),
        (HyperPELTConfig, {"mid": 0}, "mid as a whole number >= 1"),
        (HyperPELTConfig, {"train_norms": 1}, "train_norms as True or False"),
        (HyperPELTConfig, {"tasks": ("a", "b"), "materialized": True}, "one task .*got 2 tasks"),
    ],
)
def test_mistakes_get_a_sentence(kind, options, words):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: expected .*{words}"):
        kind(**options)

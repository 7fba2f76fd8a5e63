"""The attention of a model with PEFT's LoRA: the kernels' while it is accelerated, on a CPU."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import peft
import pytest
import torch
from closeness import assert_close
from family_models import make_decoder, make_encoder, make_writer
from lora_models import assert_same, lora_config, run, with_lora
from torch import nn

import pelt_kernels
from pelt_kernels.integrations import peft_families
from pelt_kernels.integrations.peft_attention import AcceleratedLoraModel
from pelt_kernels.methods import PrefixTuningConfig
from pelt_kernels.models import get_pelt_model
from pelt_kernels.ops.prefix_attention import without_prefix

pytestmark = pytest.mark.backend("cpu")


@pytest.fixture(autouse=True)
def _pays_from_the_first_score(monkeypatch):
    for name in ("PAYS_FROM", "PAYS_FROM_WITH_DROPOUT"):
        monkeypatch.setattr(without_prefix, name, 0)
    pelt_kernels.ops.forget_choices()


def _calls():
    return [c for c in pelt_kernels.explain("prefix_attention") if c.backend == "cpu"]


def _names(model):
    """The attentions that a model's modules read."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return {c._attn_implementation for c in configs if hasattr(c, "_attn_implementation")}


def _configs(model):
    return [id(getattr(module, "config", None)) for module in model.modules()]


def _adapted(family, seed=1):
    make = make_encoder
    if family in peft_families.DECODERS:
        make = make_decoder
    elif family in peft_families.WRITERS:
        make = make_writer
    model = make(family)
    torch.manual_seed(seed)
    return with_lora(model)


ALL = (*peft_families.DECODERS, *peft_families.ENCODERS, *peft_families.WRITERS)


PADDED = [(family, side) for family in ALL for side in ("right", "left")]
ALONE = [(family, None) for family in peft_families.DECODERS]


@pytest.mark.parametrize(("family", "padding"), PADDED + ALONE)
def test_outputs_and_gradients_are_those_of_sdpa(family, padding, batch):
    inputs = {"input_ids": batch["input_ids"]}
    if padding:
        inputs["attention_mask"] = batch["attention_mask"]
    if padding != "left":
        inputs = {name: each.flip(1) for name, each in inputs.items()}
    if family in peft_families.WRITERS:
        inputs["labels"] = batch["input_ids"][:, :5].contiguous()

    @cache
    def pair(seed):
        exact = _adapted(family, seed)
        return run(copy.deepcopy(exact).float(), inputs), run(exact, inputs)

    model = _adapted(family).float()
    report = pelt_kernels.accelerate(model)
    assert report.served["prefix_attention"] == ("base_model",)
    pair(1)
    assert not _calls()
    found = run(model, inputs)
    assert _calls()
    for name, value in found.items():
        baseline, truth = (each[name] for each in pair(1))
        others = ([each[name] for each in pair(seed)] for seed in range(2, 6))
        assert_close(value, baseline, truth, torch.float32, name, others)


def test_a_writer_generates_the_same(batch):
    model = _adapted("llama").float()
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    pelt_kernels.accelerate(model)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)


def test_restore_gives_the_models_own_configurations_back():
    model = _adapted("bert")
    before = _configs(model)
    pelt_kernels.accelerate(model)
    assert _names(model.base_model.model.bert) == {"pelt_sdpa"}
    assert model.config._attn_implementation == "sdpa"
    with pelt_kernels.accelerated(model):
        pass
    assert _names(model.base_model.model.bert) == {"pelt_sdpa"}
    pelt_kernels.restore(model)
    assert _configs(model) == before and type(model.base_model) is peft.LoraModel


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_a_model_without_its_adapters_is_transformers_own(leave, batch):
    model = _adapted("bert")
    before = _configs(model.base_model.model)
    pelt_kernels.accelerate(model)
    base = getattr(model, leave)()
    assert _names(base) == {"sdpa"} and set(_configs(base)) <= set(before)
    assert b"pelt_kernels" not in pickle.dumps(base)
    pelt_kernels.restore(model)
    assert type(model.base_model) is peft.LoraModel


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_configurations_of_its_own(copied, batch):
    model = _adapted("bert").float()
    pelt_kernels.accelerate(model)
    other = copied(model)
    assert type(other.base_model) is AcceleratedLoraModel
    assert not set(_configs(model)) & {each for each in _configs(other) if each != id(None)}
    assert_same(model, other, batch)
    pelt_kernels.restore(other)
    assert _names(other) == {"sdpa"} and _names(model.base_model.model.bert) == {"pelt_sdpa"}


def test_another_backend_keeps_the_models_attention(batch):
    """Also of a model that was accelerated before."""
    model = _adapted("bert").float()
    pelt_kernels.accelerate(model)
    report = pelt_kernels.accelerate(model, backend="eager")
    reason = "its attention is served by the backend cpu, and eager was asked for"
    assert report.left_alone == {"base_model": reason}
    assert _names(model) == {"sdpa"} and type(model.base_model) is peft.LoraModel
    with pelt_kernels.accelerated(model):
        assert _names(model.base_model.model.bert) == {"pelt_sdpa"}
    assert _names(model) == {"sdpa"} and type(model.base_model) is peft.LoraModel
    pelt_kernels.accelerate(model, backend="cpu")
    with pelt_kernels.accelerated(model, backend="eager"):
        assert _names(model) == {"sdpa"}
    assert _names(model.base_model.model.bert) == {"pelt_sdpa"}
    run(model, batch)
    assert _calls()


def test_an_attention_that_is_chosen_later_is_the_models():
    model = _adapted("bert")
    pelt_kernels.accelerate(model)
    model.base_model.model.set_attn_implementation("eager")
    assert _names(model) == {"eager"}


def test_a_method_of_this_project_stands_beside_it(batch):
    """Its views are of the model's configurations, and leave those of the acceleration."""
    model = _adapted("bert").float()
    pelt_kernels.accelerate(model)
    base = model.base_model.model
    own = get_pelt_model(base, PrefixTuningConfig(prefix_length=3))
    assert _names(base.bert) == {"pelt"}
    own.eval()(**batch)
    own.remove()
    assert _names(base.bert) == {"pelt_sdpa"}


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, x):
        return self.query(x)


LEFT_ALONE = {
    "its attention is eager; sdpa is served": lambda: make_encoder(
        "bert", attn_implementation="eager"
    ),
    "its base model, _Plain, is not one of transformers'": _Plain,
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_what_is_left_alone_is_named_with_the_reason(reason):
    model = peft.get_peft_model(LEFT_ALONE[reason](), lora_config(target_modules=["query"]))
    report = pelt_kernels.accelerate(model)
    assert report.left_alone == {"base_model": reason}
    assert "prefix_attention" not in report.served


def test_a_family_that_was_not_compared_is_left_alone():
    model = make_encoder("bert")
    model.config.model_type = "other"
    report = pelt_kernels.accelerate(with_lora(model))
    assert report.left_alone["base_model"].startswith("other is not among the families")

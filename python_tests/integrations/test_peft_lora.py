"""PEFT's LoRA layers, accelerated, against PEFT as shipped: the same outputs and gradients."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from closeness import assert_close
from lora_models import assert_same, lora_config, pair, run, with_lora
from peft.tuners.lora import layer as lora
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

import pelt_kernels
from pelt_kernels.integrations import peft_lora
from pelt_kernels.integrations.peft_lora import AcceleratedLoraLinear

SETTINGS = {
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True, "target_modules": ["query", "key", "output.dense"]},
    "patterns": {"rank_pattern": {"query": 2}, "alpha_pattern": {"key": 3.0}},
    "one-layer": {"layers_to_transform": [1], "target_modules": ["query", "value"]},
    "biases": {"bias": "all"},
    "modules-to-save": {"target_modules": ["value"], "modules_to_save": ["classifier"]},
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_outputs_and_gradients_are_those_of_peft(family, way, make_model, batch):
    model = with_lora(make_model(family))
    expected, keys = run(model, batch), list(model.state_dict())
    pelt_kernels.ops.forget_choices()
    report = pelt_kernels.accelerate(model)
    layers = [n for n, m in model.named_modules() if isinstance(m, lora.Linear)]
    assert list(report.served["lora_linear"]) == layers
    assert report.left_alone == {} and report.exceptions.keys() == {"base_model"}
    assert all(type(model.get_submodule(n)) is AcceleratedLoraLinear for n in layers)
    torch.testing.assert_close(run(model, batch), expected)
    assert bool(pelt_kernels.explain("lora_linear")) == (way == "operator")
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_peft_hold(setting, way, make_model, batch):
    model, fast = pair(with_lora(make_model("bert"), **SETTINGS[setting]))
    assert_same(model, fast, batch)


def test_scales_set_between_calls_hold(way, make_model, batch):
    """Numbers, or tensors as for adapters that are swapped in a compiled model."""
    model, fast = pair(with_lora(make_model("llama")))
    for each in (model, fast):
        for layer in each.modules():
            if isinstance(layer, lora.Linear):
                layer.set_scale("default", 3)
                layer.scale_layer(0.5)
    assert_same(model, fast, batch)
    for each in (model, fast):
        prepare_model_for_compiled_hotswap(each, target_rank=6)
    assert_same(model, fast, batch)


def test_the_life_of_adapters_is_that_of_peft(way, make_model, batch):
    """Whatever PEFT does to a model, the accelerated one does too, without another call."""
    model, fast = pair(with_lora(make_model("llama"), "one", target_modules=["q_proj", "up_proj"]))
    both = (model, fast)

    def same(change):
        torch.manual_seed(1)  # of new adapters' values
        change(model)
        torch.manual_seed(1)
        change(fast)
        assert_same(model, fast, batch)

    same(lambda m: m.add_adapter("two", lora_config(r=2, target_modules=["q_proj", "up_proj"])))
    same(lambda m: m.set_adapter("two"))
    same(lambda m: m.base_model.set_adapter(["one", "two"]))
    same(lambda m: m.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", "svd"))
    same(lambda m: m.set_adapter("both"))
    same(lambda m: m.merge_adapter())
    same(lambda m: m.unmerge_adapter())
    same(lambda m: m.delete_adapter("both"))
    for each in both:
        each.set_adapter("one")
    enabled = run(fast, batch)["logits"]
    with model.disable_adapter(), fast.disable_adapter():
        assert_same(model, fast, batch)
        assert not torch.equal(run(fast, batch)["logits"], enabled)
    assert_same(model, fast, batch)
    assert_same(model.merge_and_unload(), fast.merge_and_unload(), batch)


def test_an_adapter_loaded_later_is_served(way, make_model, batch, tmp_path):
    with_lora(make_model("bert")).save_pretrained(tmp_path)
    model, fast = pair(with_lora(make_model("bert"), "first"))
    for each in (model, fast):
        each.load_adapter(tmp_path, "second", is_trainable=True)
        each.set_adapter("second")
    assert_same(model, fast, batch)


@pytest.mark.parametrize("width", [2, 3])
def test_one_batch_mixes_adapters(width, way, monkeypatch):
    """With ranks that differ and a sample without adapter; a layer's input may be [B, Din]."""
    model = nn.Sequential()
    model.add_module("lin", nn.Linear(8, 6))
    model = with_lora(model.double(), "one", target_modules=["lin"])
    model.add_adapter("two", lora_config(r=2, target_modules=["lin"]))
    layer = model.eval().base_model.model.lin
    x = torch.randn([4, 5, 8][-width:] if width == 3 else [4, 8], dtype=torch.float64)
    names = ["two", "__base__", "one", "two"]
    expected = layer(x, adapter_names=names)
    pelt_kernels.accelerate(model)
    if way == "operator":  # PEFT's own way must not be what serves it
        monkeypatch.setattr(lora.Linear, "_mixed_batch_forward", None)
    torch.testing.assert_close(layer(x, adapter_names=names), expected)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=names[:2])


def test_a_model_mixes_adapters(way, make_model, batch):
    model = with_lora(make_model("gpt2"), "one")
    model.add_adapter("two", lora_config())
    model, fast = pair(model.eval())
    assert_same(model, fast, batch, adapter_names=["two", "one"])


@pytest.mark.parametrize("adapters", [1, 2])
def test_dropout_drops_and_scales(adapters, way):
    """Of identities: y - x is the adapters' inputs after dropout, one mask for each of them."""
    model = nn.Sequential()
    model.add_module("lin", nn.Linear(64, 64, bias=False))
    names = [str(i) for i in range(adapters)]
    options = {"r": 64, "lora_alpha": 64, "target_modules": ["lin"], "lora_dropout": 0.25}
    model = with_lora(model, names[0], **options)
    for name in names[1:]:
        model.add_adapter(name, lora_config(**options))
    model.base_model.set_adapter(names)
    pelt_kernels.accelerate(model.train())
    for parameter in model.parameters():
        parameter.data.copy_(torch.eye(64))
    x = torch.ones(256, 64)
    added = (model(x) - x) * 0.75  # how many of the adapters kept an element
    parts = torch.stack([(added.round() == i).float().mean() for i in range(adapters + 1)])
    torch.testing.assert_close(added, added.round())
    expected = torch.tensor([[0.25, 0.75], [0.0625, 0.375, 0.5625]][adapters - 1])
    assert (parts - expected).abs().max() < 0.02  # five deviations of 16384 draws
    assert torch.equal(model.eval()(x), x * (1 + adapters))


def test_adapters_in_float32_beside_bfloat16(way, make_model, batch):
    """PEFT keeps adapters in float32; no activation is cast for them."""
    exact = with_lora(make_model("llama", torch.bfloat16))
    model, fast = pair(copy.deepcopy(exact))
    truth, baseline, found = run(exact.double(), batch), run(model, batch), run(fast, batch)
    layers = [m for m in fast.modules() if isinstance(m, lora.Linear)]
    assert {layer.lora_A["default"].weight.dtype for layer in layers} == {torch.float32}
    assert truth.keys() == found.keys()
    for name in found:
        assert_close(found[name], baseline[name], truth[name], torch.bfloat16, name)


@pytest.mark.parametrize("what", ["bfloat16-adapter", "nested-input", "high-rank"])
def test_what_the_operator_does_not_take_goes_pefts_own_way(what, monkeypatch):
    monkeypatch.setattr(peft_lora, "PAYS_FROM", 0)
    model = nn.Sequential()
    model.add_module("lin", nn.Linear(8, 6))
    model = with_lora(model, target_modules=["lin"])
    x = torch.randn(3, 8)
    if what == "bfloat16-adapter":  # for which PEFT casts x
        model.base_model.model.lin.lora_A.bfloat16()
        model.base_model.model.lin.lora_B.bfloat16()
    elif what == "nested-input":
        x = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    else:
        model.add_adapter("high", lora_config(r=257, target_modules=["lin"]))
        model.set_adapter("high")
    expected = model(x)
    assert pelt_kernels.accelerate(model).count == 1
    pelt_kernels.ops.forget_choices()
    found = model(x)
    assert pelt_kernels.explain() == []
    for one, other in zip(found.unbind(), expected.unbind()):
        assert torch.equal(one, other)


def test_a_base_layer_with_hooks_is_called(way, make_model, batch):
    model, fast = pair(with_lora(make_model("bert"), target_modules=["query"]))
    seen = []
    for each in (model, fast):
        base = each.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
        base.base_layer.register_forward_hook(lambda *call: seen.append(1) or call[2] * 2)
    assert_same(model, fast, batch)
    assert len(seen) == 2
    report = pelt_kernels.accelerate(fast, backend="eager")
    assert [*report.exceptions.values()] == ["its base layer has hooks, so PEFT calls it"]


def test_what_is_left_alone_is_named_with_the_reason(make_model, batch):
    model = with_lora(make_model("bert"), target_modules=["query", "word_embeddings"])
    config = lora_config(target_modules=["query", "value"], use_dora=True)
    model.add_adapter("dora", config)
    model.base_model.set_adapter(["default", "dora"])
    fast = copy.deepcopy(model)
    report = pelt_kernels.accelerate(fast, backend="eager")
    assert pelt_kernels.accelerate(fast, backend="eager") == report
    inside = "base_model.model.bert.encoder.layer.{}.attention.self.{}"
    assert report.served == {"lora_linear": tuple(inside.format(i, "query") for i in (0, 1))}
    embedding = "Embedding of peft.tuners.lora.layer is not PEFT's LoRA beside a plain Linear"
    variant = "its adapters are variants of LoRA (DoraLinearVariant)"
    assert report.left_alone == {
        "base_model.model.bert.embeddings.word_embeddings": embedding,
        **{inside.format(i, "value"): variant for i in (0, 1)},
        "base_model": "its attention is served by the backend cpu, and eager was asked for",
    }
    assert set(report.exceptions.values()) == {"calls with dora go PEFT's own way"}
    assert_same(model, fast, batch)
    text = str(report)
    assert text.startswith("2 modules accelerated, 4 left alone\n")
    assert embedding in text
    assert variant in text


def test_other_methods_of_peft_are_left_alone(make_model):
    config = peft.IA3Config(target_modules=["query"], feedforward_modules=[])
    report = pelt_kernels.accelerate(peft.get_peft_model(make_model("bert"), config))
    assert report.count == 0
    assert set(report.left_alone.values()) == {
        "Linear of peft.tuners.ia3.layer is no layer of LoRA"
    }

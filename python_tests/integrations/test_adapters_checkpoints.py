"""Checkpoints that the library ``adapters`` wrote compute here what they computed there.

They and the logits lie in `adapters_library`, with the script that wrote them.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from pelt_kernels.methods import (
    BottleneckAdapterConfig,
    CompositeConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import PeltModel

FOLDER = Path(__file__).parent / "adapters_library"
ADAPTER = BottleneckAdapterConfig(bottleneck=4, gated=False, gate_pooling="mean")
PARALLEL = BottleneckAdapterConfig(
    bottleneck=4, placement="parallel", scale=4.0, start="lora", gated=False, gate_pooling="mean"
)
PREFIX = PrefixTuningConfig(prefix_length=3, mid=4, gated=False, gate_pooling="mean")
UNIPELT = UniPELTConfig(
    adapter=BottleneckAdapterConfig(bottleneck=4),
    prefix=PrefixTuningConfig(prefix_length=3, mid=4),
    lora=LoraConfig(r=2, alpha=2.0),
    gate_pooling="mean",
)
SIZES = {
    "vocab_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
METHODS = {
    "seq_bn": BottleneckAdapterConfig(
        bottleneck=4, activation="gelu", dropout=0.1, gated=False, gate_pooling="mean"
    ),
    "par_bn": PARALLEL,
    "lora": LoraConfig(
        r=2,
        alpha=6.0,
        targets=("query", "key", "ffn_in", "ffn_out"),
        layers=(1,),
        gated=False,
        gate_pooling="mean",
    ),
    "prefix": PREFIX,
    "prefix_flat": PrefixTuningConfig(
        prefix_length=3, mid=None, skip_layers=(1,), gated=False, gate_pooling="mean"
    ),
    "prefix_ejected": PrefixTuningConfig(
        prefix_length=3, mid=None, gated=False, gate_pooling="mean"
    ),
    "unipelt": UNIPELT,
    "mam": CompositeConfig(adapter=PARALLEL, prefix=PREFIX),
    "unipelt_distilbert": UNIPELT,
    "unipelt_roberta": UNIPELT,
    "flexible_bert": ADAPTER,
    "flexible_roberta": LoraConfig(r=2, alpha=8.0, gated=True, gate_pooling="mean"),
    "flexible_electra": ADAPTER,
    "flexible_distilbert": PARALLEL,
}


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture
def copied(tmp_path):
    """name, changes of fields of its config -> a copy of a checkpoint."""

    def copy(name, **fields):
        folder = tmp_path / name
        shutil.copytree(FOLDER / name, folder)
        path = folder / "adapter_config.json"
        described = json.loads(path.read_text())
        described["config"] |= fields
        path.write_text(json.dumps(described))
        return folder

    return copy


def _base(name="bert", kind=hf.AutoModelForSequenceClassification):
    return kind.from_pretrained(FOLDER / "bases" / name)


def _base_of(folder):
    return _base(json.loads((folder / "adapter_config.json").read_text())["model_type"])


def _logits(model, expected):
    batch = {name: expected[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**batch).logits


def _refused(folder, base, words, error=ValueError):
    """Asserts a sentence, and a base model that is as it was."""
    modules = [type(module) for module in base.modules()]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(error, match=words):
        PeltModel.from_pretrained(base, folder)
    assert [type(module) for module in base.modules()] == modules
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_logits_are_those_of_the_library(name, expected):
    model = PeltModel.from_pretrained(_base_of(FOLDER / name), FOLDER / name)
    assert model.method_config == METHODS[name]
    torch.testing.assert_close(_logits(model, expected), expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["unipelt", "prefix_ejected"])
def test_it_is_trained_saved_and_read_as_its_own(name, expected, tmp_path):
    model = PeltModel.from_pretrained(_base(), FOLDER / name, is_trainable=True)
    model.eval()
    loss = model(input_ids=expected["input_ids"], labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.trained_parameters().values())
    model.save_pretrained(tmp_path)
    again = PeltModel.from_pretrained(_base(), tmp_path)
    assert torch.equal(_logits(again, expected), _logits(model, expected))
    # Into a model that has the method already, from the library's folder.
    for parameter in again.trained_parameters().values():
        parameter.data.zero_()
    again.load_adapter(FOLDER / name)
    assert torch.equal(_logits(again, expected), _logits(model, expected))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("seq_bn", "non_linearity", "leakyrelu"),
        ("seq_bn", "phm_layer", True),
        ("seq_bn", "mh_adapter", True),
        ("seq_bn", "ln_before", True),
        ("seq_bn", "ln_after", True),
        ("seq_bn", "original_ln_before", False),
        ("seq_bn", "original_ln_after", False),
        ("seq_bn", "residual_before_ln", "post_add"),
        ("seq_bn", "leave_out", [1]),
        ("seq_bn", "inv_adapter", "nice"),
        ("seq_bn", "scaling", "learned"),
        ("seq_bn", "stochastic_depth", 0.1),
        ("seq_bn", "reduction_factor", {"0": 4, "default": 2}),
        ("seq_bn", "reduction_factor", None),
        ("seq_bn", "a_later_field", 1),
        ("seq_bn", "architecture", "reft"),
        ("seq_bn", "dropout", 1.0),
        ("lora", "composition_mode", "scale"),
        ("lora", "use_dora", True),
        ("lora", "vera_d", 0.1),
        ("lora", "attn_matrices", ["q", "o"]),
        ("lora", "r", "two"),
        ("prefix", "dropout", 0.1),
        ("prefix", "non_linearity", "relu"),
        ("unipelt", "configs", []),
        ("unipelt", "configs", [{"reduction_factor": 4, "non_linearity": "relu"}] * 2),
    ],
)
def test_a_field_without_a_counterpart_is_named(name, field, value, copied):
    _refused(copied(name, **{field: value}), _base(), field)


@pytest.mark.parametrize(
    ("old", "new"),
    [("gelu", "gelu_tanh"), ("gelu_orig", "gelu"), ("relu", "relu"), ("swish", "silu")],
)
def test_activations_of_a_file_without_a_version(old, new, copied):
    folder = copied("seq_bn", non_linearity=old)
    path = folder / "adapter_config.json"
    described = json.loads(path.read_text())
    del described["version"]
    path.write_text(json.dumps(described))
    assert PeltModel.from_pretrained(_base(), folder).method_config.activation == new


def test_tensors_that_the_config_does_not_ask_for_or_that_are_missing(copied):
    folder = copied("lora")
    tensors = load_file(folder / "adapter.safetensors")
    key = "bert.encoder.layer.1.output.dense.loras.lora.lora_B"
    kept = tensors.pop(key)
    save_file(tensors, folder / "adapter.safetensors")
    _refused(folder, _base(), f"expected {key.removeprefix('bert.')}")
    more = key.replace("lora_B", "m.weight")
    save_file(tensors | {key: kept, more: kept.clone()}, folder / "adapter.safetensors")
    _refused(folder, _base(), "got encoder.layer.1.output.dense.loras.lora.m.weight")
    save_file(tensors | {key: kept[:, :1].contiguous()}, folder / "adapter.safetensors")
    _refused(folder, _base(), r"lora_b \[16, 2\]")


@pytest.mark.parametrize("name", ["prefix", "prefix_flat"])
def test_a_prefix_of_another_length(name, copied):
    _refused(copied(name, prefix_length=4), _base(), r"control_trans|embedding.weight \[4, 16\]")


class _Trap:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_file_of_weights_runs_nothing(copied, capfd):
    folder = copied("par_bn")
    file = folder / "pytorch_adapter.bin"
    torch.save({"x": _Trap()}, file)
    _refused(folder, _base(), "pytorch_adapter.bin cannot be read as tensors")
    file.write_bytes(pickle.dumps(_Trap()))
    _refused(folder, _base(), "pytorch_adapter.bin cannot be read as tensors")
    assert "this must not run" not in "".join(capfd.readouterr())
    file.write_bytes((FOLDER / "par_bn" / file.name).read_bytes()[:-700])
    _refused(folder, _base(), "pytorch_adapter.bin cannot be read as tensors")
    torch.save({"x": [1.0]}, file)
    _refused(folder, _base(), "expected floating-point tensors by name")
    file.unlink()
    _refused(folder, _base(), "adapter.safetensors or pytorch_adapter.bin", FileNotFoundError)


def test_a_fusion_of_adapters(tmp_path):
    (tmp_path / "adapter_fusion_config.json").write_text("{}")
    _refused(tmp_path, _base(), "AdapterFusion has no counterpart here")


def test_another_base_model(copied):
    _refused(FOLDER / "seq_bn", _base("roberta"), "model_type='bert'")
    _refused(FOLDER / "seq_bn", hf.BertForSequenceClassification(_sizes(8)), "hidden_size=16")
    _refused(FOLDER / "seq_bn", hf.BertForSequenceClassification(_sizes(16, 5)), r"\[5, 16\]")
    config = hf.AlbertConfig(**SIZES, hidden_size=16, num_labels=3)
    folder = copied("seq_bn")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "albert"}))
    _refused(folder, hf.AlbertForSequenceClassification(config), "families bert, distilbert")


def _sizes(hidden, labels=3):
    return hf.BertConfig(**SIZES, hidden_size=hidden, num_labels=labels)


def test_without_a_saved_head_the_base_model_keeps_its_own(copied, caplog):
    folder = copied("seq_bn")
    (folder / "model_head.safetensors").unlink()
    base = _base()
    own = base.classifier.weight.detach().clone()
    with caplog.at_level(logging.WARNING, "pelt_kernels"):
        model = PeltModel.from_pretrained(base, folder)
    assert "holds no head" in caplog.text
    assert torch.equal(model.classifier.weight, own)


def test_a_base_model_without_a_head_takes_the_adapter_alone(expected):
    bare = PeltModel.from_pretrained(_base(kind=hf.AutoModel), FOLDER / "flexible_bert")
    whole = PeltModel.from_pretrained(_base(), FOLDER / "flexible_bert")
    batch = {name: expected[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = whole(**batch, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(bare(**batch).last_hidden_state, hidden)


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", 2), ("use_pooler", False), ("head_type", "masked_lm")],
)
def test_a_flexible_head_that_the_base_model_has_not(field, value, copied):
    folder = copied("flexible_bert")
    path = folder / "head_config.json"
    described = json.loads(path.read_text())
    described["config"][field] = value
    path.write_text(json.dumps(described))
    _refused(folder, _base(), f"expected {field} of the saved head")


def test_a_head_of_another_class():
    base = _base(kind=hf.AutoModelForQuestionAnswering)
    _refused(FOLDER / "seq_bn", base, "got classifier.")

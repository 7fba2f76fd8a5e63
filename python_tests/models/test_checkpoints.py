"""What is saved is what was trained; what is loaded is what was saved, or one sentence."""

from __future__ import annotations

import json
import os

import pytest
import torch
from every_method import COMPOSITES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pelt_kernels.methods import (
    BitFitConfig,
    BottleneckAdapterConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import FAMILIES, PeltModel, get_pelt_model

SMALL = {
    "adapter": BottleneckAdapterConfig(bottleneck=4),
    "prefix": PrefixTuningConfig(prefix_length=3, mid=8),
    "lora": LoraConfig(r=4),
}
METHODS = {
    "unipelt": UniPELTConfig(**SMALL),
    "unipelt-ap": UniPELTConfig(**SMALL | {"lora": None}, gate_pooling="mean"),
    "bitfit": BitFitConfig(),
    "head": HeadConfig(),
    "full": FullConfig(),
    **SMALL,
    **COMPOSITES,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_family_and_method(method, family, make_base, make_batch, randomise, tmp_path):
    """Forward, backward, save, load: the same logits, bit for bit."""
    model = randomise(get_pelt_model(make_base(family), METHODS[method]), std=0.05)
    batch = make_batch()
    out = model(**batch)
    out.loss.backward()
    unread = {"lm_head", "pooler"}  # a pooler that the classification head does not read
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(word in name for word in unread):
            used = parameter.grad is not None
            assert used or "position" in name or "token_type" in name, name
        if not parameter.requires_grad:
            assert parameter.grad is None, name
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.trained_parameters())
    again = PeltModel.from_pretrained(make_base(family), tmp_path)
    assert again.method_config == METHODS[method]
    assert not any(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_training_resumes_where_it_stopped(make_base, make_batch, randomise, tmp_path):
    """The reparametrisation is saved, so two steps, a restart and two steps are four steps."""

    def steps(model, optimizer, number):
        for _ in range(number):
            model(**make_batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = randomise(get_pelt_model(make_base(), METHODS["unipelt"]))
    optimizer = torch.optim.SGD(model.trained_parameters().values(), lr=0.1)
    steps(model, optimizer, 2)
    model.save_pretrained(tmp_path)
    steps(model, optimizer, 2)
    again = PeltModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    assert not again.prefix.is_collapsed
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(
        again.trained_parameters()
    )
    steps(again, torch.optim.SGD(again.trained_parameters().values(), lr=0.1), 2)
    for name, parameter in model.trained_parameters().items():
        assert torch.equal(parameter, again.trained_parameters()[name]), name


@torch.no_grad()
@pytest.mark.parametrize("method", ["unipelt", "prefix"])
def test_a_collapsed_prefix_gives_the_same_logits(
    method, make_base, make_batch, randomise, tmp_path
):
    model = randomise(get_pelt_model(make_base(), METHODS[method]))
    batch = make_batch()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path, collapse_prefix=True)
    assert not model.prefix.is_collapsed and model.method_config == METHODS[method]
    assert load_file(tmp_path / "adapter_model.safetensors")["prefix.table"].shape == (
        2,
        2,
        3,
        4,
        8,
    )
    again = PeltModel.from_pretrained(make_base(), tmp_path)
    assert again.prefix.is_collapsed
    torch.testing.assert_close(again(**batch).logits, expected, rtol=0, atol=1e-6)
    model.collapse_prefix()
    assert model.prefix.is_collapsed and set(model.trained_parameters()) == set(
        again.trained_parameters()
    )
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "later")
    later = PeltModel.from_pretrained(make_base(), tmp_path / "later")
    assert torch.equal(later(**batch).logits, model(**batch).logits)


def saved(make_base, tmp_path, method="unipelt", family="bert"):
    get_pelt_model(make_base(family), METHODS[method]).save_pretrained(tmp_path)
    return tmp_path


def refuses(make_base, folder, match, error=ValueError, **base):
    """One sentence, and the base model as it was."""
    model = make_base(**base)
    batch = {"input_ids": torch.arange(5, 12)[None]}
    expected, modules = model(**batch).logits, {n: type(m) for n, m in model.named_modules()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=match) as raised:
        PeltModel.from_pretrained(model, folder)
    assert "\n" not in str(raised.value)
    assert torch.equal(model(**batch).logits, expected)
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_truncated_files_are_refused(make_base, tmp_path):
    folder = saved(make_base, tmp_path)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refuses(make_base, folder, "damaged or cut short")
    weights.write_bytes(whole)
    text = config.read_text()
    for cut in ("", text[: len(text) // 2]):
        config.write_text(cut)
        refuses(make_base, folder, "not JSON, it is damaged or cut short")
    for other in ("[]", '{"peft_type": "LORA"}'):
        config.write_text(other)
        refuses(make_base, folder, "in format 1 of pelt_kernels, got")
    config.write_text(text)
    weights.unlink()
    refuses(make_base, folder, "expected adapter_model.safetensors", FileNotFoundError)
    config.unlink()
    refuses(make_base, folder, "expected adapter_config.json", FileNotFoundError)


def test_other_architectures_and_shapes_are_refused(make_base, tmp_path):
    folder = saved(make_base, tmp_path)
    refuses(make_base, folder, "model_type=bert, .*got model_type=roberta", family="roberta")
    refuses(make_base, folder, "hidden_size=32.*got hidden_size=64", hidden_size=64)
    refuses(make_base, folder, "num_hidden_layers=2.*got num_hidden_layers=3", num_hidden_layers=3)
    refuses(make_base, folder, "num_attention_heads=4.*=2", num_attention_heads=2)
    refuses(make_base, folder, "num_labels=3.*got num_labels=2", num_labels=2)
    from transformers import BertForTokenClassification

    model = BertForTokenClassification(make_base().config)
    with pytest.raises(ValueError, match="architecture=BertForSequenceClassification"):
        PeltModel.from_pretrained(model, folder)


@pytest.mark.parametrize("method", ["unipelt", "full"])
def test_missing_unknown_and_misshapen_tensors_are_refused(method, make_base, tmp_path):
    folder = saved(make_base, tmp_path, method)
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    name = "base_model.classifier.bias"
    save_file({k: v for k, v in tensors.items() if k != name}, path, header)
    refuses(make_base, folder, f"1 missing \\({name}\\) and 0 unknown")
    save_file(tensors | {"extra": torch.zeros(1)}, path, header)
    refuses(make_base, folder, r"0 missing and 1 unknown \(extra\)")
    save_file(tensors | {name: torch.zeros(4)}, path, header)
    refuses(make_base, folder, f"expected {name} \\[3\\] \\(from the model\\), got \\[4\\]")
    save_file(tensors, path, header | {"pelt_kernels": "{}"})
    refuses(make_base, folder, "not from the same save")


def test_a_torn_pair_of_files_is_noticed(make_base, tmp_path):
    """Weights of one save beside the config of another."""
    folder = saved(make_base, tmp_path / "a")
    other = get_pelt_model(make_base(), UniPELTConfig(**SMALL | {"lora": LoraConfig(r=4, alpha=1)}))
    other.save_pretrained(tmp_path / "b")
    os.replace(tmp_path / "b" / "adapter_config.json", folder / "adapter_config.json")
    refuses(make_base, folder, "not from the same save")


def test_a_failing_save_leaves_the_earlier_checkpoint(make_base, randomise, tmp_path, monkeypatch):
    folder = saved(make_base, tmp_path)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        randomise(get_pelt_model(make_base(), METHODS["unipelt"])).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    with pytest.raises(OSError, match="exists|directory"):
        get_pelt_model(make_base(), HeadConfig()).save_pretrained(folder / "adapter_config.json")


def test_load_adapter_takes_the_same_method_only(make_base, make_batch, randomise, tmp_path):
    model = randomise(get_pelt_model(make_base(), METHODS["unipelt"]))
    model.save_pretrained(tmp_path)
    again = get_pelt_model(make_base(), METHODS["unipelt"])
    again.load_adapter(tmp_path)
    batch = make_batch()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="use PeltModel.from_pretrained"):
        get_pelt_model(make_base(), LoraConfig(r=2)).load_adapter(tmp_path)


def test_the_config_file_can_be_read_by_people(make_base, tmp_path):
    values = json.loads((saved(make_base, tmp_path) / "adapter_config.json").read_text())
    assert values["config"]["method"] == "unipelt" and values["config"]["lora"]["r"] == 4
    assert values["base"]["model_type"] == "bert" and values["base"]["num_labels"] == 3


def test_state_dict_holds_what_is_trained(make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(), METHODS["unipelt"]))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(state) == set(model.trained_parameters())
    assert len(model.state_dict(frozen=True)) == len(list(model.named_parameters()))
    other = get_pelt_model(make_base(), METHODS["unipelt"])
    assert other.load_state_dict(state) == ([], [])
    batch = make_batch()
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    wrapped = torch.nn.ModuleDict({"inner": model})
    assert set(wrapped.state_dict()) == {f"inner.{name}" for name in state}
    state.pop("base_model.classifier.bias")
    with pytest.raises(RuntimeError, match="1 missing"):
        other.load_state_dict(state)
    assert other.load_state_dict(state, strict=False).missing_keys == ["base_model.classifier.bias"]

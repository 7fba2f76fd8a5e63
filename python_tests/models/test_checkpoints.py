"""What is saved is what was trained; what is loaded is what was saved, or one sentence."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from every_method import COMPOSITES
from families import ENCODERS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pelt_kernels.methods import (
    AdaMixConfig,
    BitFitConfig,
    BottleneckAdapterConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import PeltModel, get_pelt_model
from pelt_kernels.models.tensor_files import digest

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


@pytest.mark.parametrize("family", ENCODERS)
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
    assert sorted(os.listdir(tmp_path)) == ["pelt_config.json", "pelt_model.safetensors"]
    with safe_open(tmp_path / "pelt_model.safetensors", "pt") as file:
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
    assert load_file(tmp_path / "pelt_model.safetensors")["prefix.table"].shape == (
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


def rewrite(folder, tensors):
    """Other tensors for the config that lies there, with a digest that is right."""
    config = json.loads((folder / "pelt_config.json").read_text())["config"]
    header = json.dumps({"config": config, "sha256": digest(tensors)})
    save_file(tensors, folder / "pelt_model.safetensors", {"pelt_kernels": header})


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
    weights, config = folder / "pelt_model.safetensors", folder / "pelt_config.json"
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
        refuses(make_base, folder, "in format 2 of pelt_kernels, got")
    config.write_text(text)
    weights.unlink()
    refuses(make_base, folder, "expected pelt_model.safetensors", FileNotFoundError)
    config.unlink()
    refuses(make_base, folder, "expected pelt_config.json", FileNotFoundError)


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
    path = folder / "pelt_model.safetensors"
    tensors = load_file(path)
    name = "base_model.classifier.bias"
    rewrite(folder, {k: v for k, v in tensors.items() if k != name})
    refuses(make_base, folder, f"1 missing \\({name}\\) and 0 unknown")
    rewrite(folder, tensors | {"extra": torch.zeros(1)})
    refuses(make_base, folder, r"0 missing and 1 unknown \(extra\)")
    rewrite(folder, tensors | {name: torch.zeros(4)})
    refuses(make_base, folder, f"expected {name} \\[3\\] \\(from the model\\), got \\[4\\]")
    save_file(tensors, path, {"pelt_kernels": "{}"})
    refuses(make_base, folder, "not from the same save")


VALUES = {
    "NaN": (
        torch.tensor([0.0, float("nan"), 0.0]),
        "finite numbers, got NaN or infinity in {name}",
    ),
    "infinity": (
        torch.tensor([0.0, 0.0, -float("inf")]),
        "finite numbers, got NaN or .* in {name}",
    ),
    "int64": (torch.ones(3, dtype=torch.int64), "expected {name} in float32, .*, got int64 in"),
    "bool": (torch.ones(3, dtype=torch.bool), "expected {name} in float32, .*, got bool in"),
    "float64": (torch.full((3,), 1e300, dtype=torch.float64), "{name} in the range of float32"),
}


@pytest.mark.parametrize("case", VALUES)
def test_tensors_of_other_than_finite_numbers_are_refused(case, make_base, tmp_path):
    folder, name = saved(make_base, tmp_path, "lora"), "base_model.classifier.bias"
    value, sentence = VALUES[case]
    rewrite(folder, load_file(folder / "pelt_model.safetensors") | {name: value})
    refuses(make_base, folder, sentence.format(name=name))


def test_what_is_not_finite_is_not_saved(make_base, tmp_path):
    folder = saved(make_base, tmp_path)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    model = get_pelt_model(make_base(), METHODS["unipelt"])
    with torch.no_grad():
        model.get_parameter("base_model.classifier.bias")[1] = float("nan")
    with pytest.raises(ValueError, match="got NaN or infinity in base_model.classifier.bias"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9, 1.0])
def test_a_flipped_bit_is_refused(place, make_base, tmp_path):
    folder = saved(make_base, tmp_path)
    path = folder / "pelt_model.safetensors"
    content = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(content[:8], "little")  # of the tensors, after the header
    content[first + int(place * (len(content) - first - 1))] ^= 1
    path.write_bytes(content)
    refuses(
        make_base, folder, "the digest of its header, [0-9a-f]{12}, got .*; the file is damaged"
    )


def test_weights_from_before_the_digest_load(make_base, make_batch, tmp_path):
    model = get_pelt_model(make_base(), METHODS["unipelt"])
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "pelt_config.json").read_text())
    header = {"format": "pt", "pelt_kernels": json.dumps(described["config"])}
    weights = tmp_path / "pelt_model.safetensors"
    save_file(load_file(weights), weights, header)
    (tmp_path / "pelt_config.json").write_text(json.dumps(described | {"format": 1}))
    batch = make_batch()
    again = PeltModel.from_pretrained(make_base(), tmp_path)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("method", METHODS)
def test_equal_adapters_are_equal_files(method, make_base, tmp_path):
    contents = []
    for number in range(4):
        torch.manual_seed(0)
        folder = saved(make_base, tmp_path / str(number), method)
        contents.append({name: (folder / name).read_bytes() for name in os.listdir(folder)})
    assert len(contents[0]) == 2 and all(content == contents[0] for content in contents)


DEEP = "[" * 100_000 + "]" * 100_000
WRONG_CONFIGS = {
    ("config.targets", '["query", ["a"]]'): "expected targets as a list of different names",
    (
        "config.targets",
        '{"query": 1}',
    ): "LoraConfig: expected targets as a config with its 'method'",
    ("config.targets", '"(q"'): "expected targets with a regular expression, got '(q'",
    ("config.rank_pattern", '[["query", 257]]'): "expected rank_pattern <= 256",
    ("config.r", '"4"'): "expected r as a whole number >= 1, got '4'",
    ("config.r", "true"): "expected r as a whole number >= 1, got True",
    ("config.alpha", "NaN"): "expected alpha as a finite number, got nan",
    ("config.alpha", "1" + "0" * 400): "expected alpha as a finite number, got 1000",
    ("config.dropout", "null"): "expected dropout as a finite number, got None",
    ("config.gated", "1"): "expected gated as True, False or None, got 1",
    ("config.gate_pooling", '[["mean"]]'): "expected gate_pooling to be one of",
    ("config.rank", "4"): "got the unknown 'rank'",
    ("config.method", "[]"): "expected method to be one of",
    ("config", "[1]"): "expected a dictionary with the key 'method'",
    ("config", DEEP): "is not JSON, it is damaged or cut short",
    ("config", '{"a":' * 400 + "1" + "}" * 400): "expected a dictionary with the key 'method'",
    ("base", "null"): "to describe its base model, got NoneType",
    ("base.hidden_size", '"32"'): "expected base.hidden_size as a whole number or null, got '32'",
    ("base.num_labels", "3.0"): "expected base.num_labels as a whole number or null, got 3.0",
    ("base.model_type", '["bert"]'): "expected base.model_type as text, got ['bert']",
    ("base.name_or_path", "7"): "expected base.name_or_path as text or null, got 7",
    ("format", "[2]"): "in format 2 of pelt_kernels, got [2]",
    ("format", "true"): "in format 2 of pelt_kernels, got True",
}


@pytest.mark.parametrize(("key", "text"), WRONG_CONFIGS)
def test_wrong_types_in_the_config_are_named(key, text, make_base, tmp_path):
    folder = saved(make_base, tmp_path, "lora")
    path = folder / "pelt_config.json"
    described = json.loads(path.read_text())
    *parents, last = key.split(".")
    inner = described
    for parent in parents:
        inner = inner[parent]
    inner[last] = "HERE"
    path.write_text(json.dumps(described).replace('"HERE"', text))
    refuses(make_base, folder, re.escape(WRONG_CONFIGS[key, text]))


SIZES = {
    "adapter": {"bottleneck": 10**6},
    "adapter beyond 64 bits": {"bottleneck": 10**30},
    "prefix": {"prefix_length": 10**12},
    "adamix": {"experts": 10**9},
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(
    case, make_base, tmp_path
):
    """Both files say it, so that only the tensors can contradict."""
    name = case.split()[0]
    small = AdaMixConfig(kind="lora", share_up=False) if name == "adamix" else METHODS[name]
    get_pelt_model(make_base(), small).save_pretrained(tmp_path)
    path = tmp_path / "pelt_config.json"
    described = json.loads(path.read_text())
    described["config"] |= SIZES[case]
    path.write_text(json.dumps(described))
    rewrite(tmp_path, load_file(tmp_path / "pelt_model.safetensors"))
    held = sum(v.numel() for v in load_file(tmp_path / "pelt_model.safetensors").values())
    refuses(make_base, tmp_path, f"to be those of its {held:,} numbers, got ")


def test_a_torn_pair_of_files_is_noticed(make_base, tmp_path):
    """Weights of one save beside the config of another."""
    folder = saved(make_base, tmp_path / "a")
    other = get_pelt_model(make_base(), UniPELTConfig(**SMALL | {"lora": LoraConfig(r=4, alpha=1)}))
    other.save_pretrained(tmp_path / "b")
    os.replace(tmp_path / "b" / "pelt_config.json", folder / "pelt_config.json")
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
        get_pelt_model(make_base(), HeadConfig()).save_pretrained(folder / "pelt_config.json")


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
    values = json.loads((saved(make_base, tmp_path) / "pelt_config.json").read_text())
    assert values["config"]["method"] == "unipelt" and values["config"]["lora"]["r"] == 4
    assert values["base"]["model_type"] == "bert" and values["base"]["num_labels"] == 3


def test_state_dict_holds_what_is_trained(make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(), METHODS["unipelt"]))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(state) == {*model.trained_parameters(), "_extra_state"}
    assert len(model.state_dict(frozen=True)) == 1 + len(list(model.named_parameters()))
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

"""A vocabulary that is resized before a method comes, under it, and on its way through files."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from every_method import ADAPTER, LORA, METHODS
from safetensors.torch import load_file
from test_training import trainer

from pelt_kernels.methods import BitFitConfig
from pelt_kernels.models import PeltModel, get_pelt_model

WORDS, MORE = 99, 104
WEIGHT = "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def source(make_base, tmp_path):
    """A folder with the base model, and another for its adapter."""
    make_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(source, words=MORE, seed=0):
    model = hf.BertForSequenceClassification.from_pretrained(source)
    torch.manual_seed(seed)
    model.resize_token_embeddings(words)
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS:].normal_()
    return model.eval()


def with_new_words(batch):
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][:, 1] = MORE - 2
    return batch


@pytest.mark.parametrize("method", ["unipelt", "lora", "bitfit"])
@pytest.mark.parametrize("words", [MORE, 90])
def test_resized_under_a_method_the_base_is_as_large(method, words, make_base, tmp_path):
    base = make_base()
    model = get_pelt_model(base, METHODS[method])
    model.resize_token_embeddings(words)
    assert not base.get_input_embeddings().weight.requires_grad
    with model.disable_adapter():
        assert len(model.get_input_embeddings().weight) == words
    removed = model.remove()
    assert removed.config.vocab_size == len(removed.get_input_embeddings().weight) == words
    removed.save_pretrained(tmp_path)
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.state_dict()[WEIGHT], removed.state_dict()[WEIGHT])


@pytest.mark.parametrize("config", [LORA, BitFitConfig(), METHODS["unipelt"]])
@pytest.mark.parametrize("words", [MORE, 90])
def test_a_head_over_the_vocabulary_gets_its_words_back(config, words, make_base):
    base = hf.BertForMaskedLM(make_base().config).eval()
    bias = base.cls.predictions.bias
    with torch.no_grad():
        bias.normal_()
    first = bias.detach().clone()
    model = get_pelt_model(base, config)
    model.resize_token_embeddings(words)
    with torch.no_grad():
        base.cls.predictions.bias.add_(1.0)
    trained = base.cls.predictions.bias.detach().clone()
    with model.disable_adapter():
        assert torch.equal(base.cls.predictions.bias, trained)
    assert torch.equal(base.cls.predictions.bias, trained)
    model.remove()
    both = min(words, WORDS)
    assert torch.equal(base.cls.predictions.bias[:both], first[:both])
    assert torch.equal(base.cls.predictions.bias[both:], trained[both:])
    assert base(torch.tensor([[5, 6]])).logits.shape[-1] == words


@pytest.mark.parametrize("is_gone", [False, True])
def test_another_head_in_the_place_of_the_first_is_seen_before_anything_changes(
    is_gone, make_base, make_batch
):
    base, batch = make_base(), make_batch(with_labels=False)
    model = get_pelt_model(base, LORA)
    head = torch.nn.Linear(32, 7)
    base.classifier = torch.nn.Sequential(head) if is_gone else head
    logits = model(**batch).logits
    got = "none" if is_gone else r"\[7, 32\]"
    with pytest.raises(ValueError, match=rf"expected classifier.weight \[3, 32\].*got {got}; put"):
        model.remove()
    assert torch.equal(model(**batch).logits, logits)
    assert model.remove(keep_head=True) is base and logits.shape[-1] == 7
    base(**batch)


@pytest.mark.parametrize("method", ["lora", "unipelt", "full"])
def test_added_words_travel_with_the_adapter(method, source, make_batch, randomise, tmp_path):
    model = randomise(get_pelt_model(resized(source), METHODS[method])).eval()
    batch = with_new_words(make_batch(with_labels=False))
    model.save_pretrained(tmp_path / "adapter")
    other = resized(source, seed=1)
    before, expected = other.state_dict()[WEIGHT].clone(), model(**batch).logits
    plain = other(**batch).logits
    again = PeltModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(again(**batch).logits, expected)
    again.save_pretrained(tmp_path / "second")
    for name in ("pelt_config.json", "pelt_model.safetensors"):
        files = [(tmp_path / folder / name).read_bytes() for folder in ("adapter", "second")]
        assert files[0] == files[1]
    if method == "full":
        return
    third = get_pelt_model(resized(source, seed=2), METHODS[method]).eval()
    third.load_adapter(tmp_path / "adapter")
    assert torch.equal(third(**batch).logits, expected)
    with again.disable_adapter():
        assert torch.equal(again.state_dict(frozen=True)["base_model." + WEIGHT], before)
    assert torch.equal(again(**batch).logits, expected)
    removed = again.remove()
    assert torch.equal(removed.state_dict()[WEIGHT], before)
    assert torch.equal(removed(**batch).logits, plain)


def test_added_words_are_in_the_checkpoints_of_a_trainer(source, make_batch, tmp_path):
    model = get_pelt_model(resized(source), LORA)
    trainer(model, make_batch, tmp_path, max_steps=3).train()
    again = get_pelt_model(resized(source, seed=1), LORA)
    first = again.get_input_embeddings().weight.detach().clone()
    checkpoint = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert set(checkpoint) == {*model.trained_parameters(), "vocabulary.added", "_extra_state"}
    again.load_state_dict(checkpoint)
    batch = with_new_words(make_batch(with_labels=False))
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    assert "vocabulary.added" not in again.state_dict(frozen=True)
    assert torch.equal(again.remove().get_input_embeddings().weight, first)
    other = get_pelt_model(resized(source, MORE + 1), LORA)
    with pytest.raises(RuntimeError, match=r"for the 6 words .* the 99 of .* got 5; .*\(104\)"):
        other.load_state_dict(checkpoint)


def test_words_added_under_the_method_travel_too(source, make_batch, make_base, tmp_path):
    for base, other in ((resized(source, WORDS), resized(source)), (make_base(), make_base())):
        model = get_pelt_model(base, LORA).eval()
        model.resize_token_embeddings(MORE)
        with torch.no_grad():
            model.get_input_embeddings().weight[WORDS:].normal_()
        batch = with_new_words(make_batch(with_labels=False))
        model.save_pretrained(tmp_path)
        other.resize_token_embeddings(MORE)
        again = PeltModel.from_pretrained(other, tmp_path)
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_words_that_the_base_has_in_a_file_are_not_written_again(source, tmp_path, make_base):
    resized(source).save_pretrained(tmp_path / "larger")
    held = hf.BertForSequenceClassification.from_pretrained(tmp_path / "larger")
    for base in (held, make_base()):
        get_pelt_model(base, LORA).save_pretrained(tmp_path / "adapter")
        tensors = load_file(tmp_path / "adapter" / "pelt_model.safetensors")
        assert not [name for name in tensors if "vocabulary" in name]


def test_an_adapter_of_another_vocabulary_is_refused(source, tmp_path):
    get_pelt_model(resized(source), ADAPTER).save_pretrained(tmp_path / "adapter")
    base = hf.BertForSequenceClassification.from_pretrained(source)
    modules = [id(module) for module in base.modules()]
    way_out = r"resize_token_embeddings\(104\)"
    with pytest.raises(ValueError, match=rf"vocab_size=104, got vocab_size=99; .*{way_out}"):
        PeltModel.from_pretrained(base, tmp_path / "adapter")
    assert modules == [id(module) for module in base.modules()]
    with pytest.raises(ValueError, match="vocab_size=104, got vocab_size=99"):
        get_pelt_model(base, ADAPTER).load_adapter(tmp_path / "adapter")


def test_files_from_before_the_vocabulary_was_written_load(make_base, tmp_path):
    get_pelt_model(make_base(), LORA).save_pretrained(tmp_path)
    path = tmp_path / "pelt_config.json"
    described = json.loads(path.read_text())
    assert described["base"].pop("vocab_size") == WORDS
    path.write_text(json.dumps(described))
    PeltModel.from_pretrained(make_base(), tmp_path)


@pytest.mark.parametrize("added", [0, 4, -1, 1000, "5"])
def test_added_words_are_those_that_the_file_promises(added, source, tmp_path):
    get_pelt_model(resized(source), LORA).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "pelt_config.json"
    described = json.loads(path.read_text())
    described["base"]["vocab_added"] = added
    path.write_text(json.dumps(described))
    base = resized(source)
    modules = [id(module) for module in base.modules()]
    with pytest.raises(ValueError, match="added"):
        PeltModel.from_pretrained(base, tmp_path / "adapter")
    assert modules == [id(module) for module in base.modules()]

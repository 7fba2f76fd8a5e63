"""What is stored of each method, counted without doing it, against files in which it was done."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from every_method import METHODS
from families import make_reader
from language_models import make_language_model
from safetensors.torch import load_file

from pelt_kernels.methods import ControlPrefixesConfig, UniPELTConfig, parts_of
from pelt_kernels.models import get_pelt_model

WRITTEN = ("unipelt", "prefix", "mam", "composite-adamix", "hyperpelt")


def check(model, folder):
    """The count is that of the file, and of the model itself once that is done to it; and counting
    changes nothing.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    counted = model.get_nb_stored_parameters()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if parts_of(model.method_config).mixture is not None:
        model.merge_experts()
    model.save_pretrained(folder, collapse_prefix=True)
    held = load_file(folder / "pelt_model.safetensors")
    assert counted == sum(tensor.numel() for tensor in held.values())
    if model.prefix is not None:
        model.collapse_prefix()
        assert model.get_nb_trainable_parameters()[0] == counted
    assert model.get_nb_stored_parameters() == counted
    return counted


@pytest.mark.parametrize("method", METHODS)
def test_as_many_numbers_are_counted_as_the_file_holds(method, make_base, tmp_path):
    model = get_pelt_model(make_base(), METHODS[method])
    trained, _ = model.get_nb_trainable_parameters()
    parts = parts_of(METHODS[method])
    is_less = parts.mixture is not None or parts.prefix is not None
    counted = check(model, tmp_path)
    assert (counted < trained) if is_less else (counted == trained)


@pytest.mark.parametrize("method", ["unipelt", "adamix"])
def test_layers_that_share_their_parts_count_once(method, tmp_path):
    check(get_pelt_model(make_reader("albert"), METHODS[method]), tmp_path)


@pytest.mark.parametrize("family", ["t5", "gpt2"])  # sets of prefixes, and one Linear for several
@pytest.mark.parametrize("method", WRITTEN)
def test_those_of_a_writer(method, family, tmp_path):
    check(get_pelt_model(make_language_model(family), METHODS[method]), tmp_path)


@pytest.mark.parametrize("mid", [None, 8])
def test_prefixes_of_attributes_and_gates_of_numbers(mid, make_base, tmp_path):
    prefix = ControlPrefixesConfig(
        prefix_length=3, mid=mid, attributes={"topic": 2, "tone": 3}, lengths={"tone": 1},
        skip_layers=(0,),
    )  # fmt: skip
    check(get_pelt_model(make_base(), prefix), tmp_path / "labels")
    config = UniPELTConfig(adapter=None, lora=None, prefix=prefix)
    check(get_pelt_model(make_language_model("gpt2"), config), tmp_path / "gates")


def test_words_that_no_file_holds_are_stored_too(make_base, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    base = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(104)
    model = get_pelt_model(base, METHODS["lora"])
    trained, _ = model.get_nb_trainable_parameters()
    assert check(model, tmp_path / "adapter") == trained + 5 * 32
    model.remove()
    check(get_pelt_model(base, METHODS["full"]), tmp_path / "full")  # among what is trained


def test_only_the_active_adapter_counts(make_base, tmp_path, capsys):
    alone = get_pelt_model(make_base(), METHODS["unipelt"]).get_nb_stored_parameters()
    model = get_pelt_model(make_base(), METHODS["adamix"])
    experts = model.get_nb_stored_parameters()
    model.add_adapter("other", METHODS["unipelt"])
    assert model.get_nb_stored_parameters() == experts
    model.set_adapter("other")
    assert model.get_nb_stored_parameters() == alone
    with model.disable_adapter():
        model.print_trainable_parameters()
        with pytest.raises(ValueError, match="expected the method to be in the model"):
            model.get_nb_stored_parameters()
    model.print_trainable_parameters()
    inside, outside = capsys.readouterr().out.splitlines()
    assert outside.startswith("trainable params: ")
    assert outside.endswith(f" || stored params: {alone:,}") and "stored" not in inside


def test_a_model_without_values_can_be_counted(make_base):
    counted = get_pelt_model(make_base(), METHODS["unipelt"]).get_nb_stored_parameters()
    with torch.device("meta"):
        empty = make_base().to("meta")
    assert get_pelt_model(empty, METHODS["unipelt"]).get_nb_stored_parameters() == counted

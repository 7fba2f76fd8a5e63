"""Adapters by their ids, pushed with a card, opened with their base model; and what of the base
model a model with a method forwards.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import pelt_kernels
from pelt_kernels.methods import LoraConfig, PrefixTuningConfig
from pelt_kernels.models import PeltModel, get_pelt_model

METHOD = LoraConfig(r=4)


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the hub's API: name -> arguments, and the files of the upload."""
    asked = {}

    class Api:
        def __init__(self, token=None):
            asked["token"] = token

        def create_repo(self, repo_id, **options):
            asked["create_repo"] = options
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, folder_path, **options):
            asked["upload_folder"] = options
            paths = sorted(os.listdir(folder_path))
            asked["files"] = {name: os.path.join(folder_path, name) for name in paths}
            with open(asked["files"]["README.md"]) as file:
                asked["card"] = file.read()
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


@pytest.mark.parametrize("format", ["pelt", "peft"])
def test_pushed_is_the_adapter_with_a_card_and_never_the_base_model(format, make_base, hub):
    base = make_base()
    base.config._name_or_path = "org/base"
    model = get_pelt_model(base, METHOD)
    assert model.push_to_hub("mine", private=True, token="t", format=format) == "https://hub/commit"
    start = "adapter" if format == "peft" else "pelt"
    names = [f"{start}_config.json", f"{start}_model.safetensors"]
    assert sorted(hub["files"]) == ["README.md", *names]
    assert hub["token"] == "t" and hub["create_repo"] == {"private": True, "exist_ok": True}
    assert hub["upload_folder"]["repo_id"] == "me/mine"
    for line in ("library_name: pelt_kernels", "base_model: org/base", "`lora`", "BertFor"):
        assert line in hub["card"]


def test_a_card_tells_what_was_trained_and_what_is_enough(make_base, hub):
    model = get_pelt_model(make_base(), METHOD)
    trained, _ = model.get_nb_trainable_parameters()
    model.push_to_hub("mine")
    assert f"These are {trained:,} parameters." in hub["card"]
    model = get_pelt_model(make_base(), PrefixTuningConfig(prefix_length=3, mid=8))
    trained, _ = model.get_nb_trainable_parameters()
    model.push_to_hub("mine")
    head = 3 * 32 + 3
    stored = 2 * 2 * 3 * 32 + head
    assert f"{trained:,} parameters were trained; {stored:,} are enough" in hub["card"]


def cached(root, source, repo="someone/adapter"):
    """The hub's cache with an adapter in it, as a download leaves it."""
    folder = root / f"models--{repo.replace('/', '--')}"
    for part in ("refs", "snapshots"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    os.rename(source, folder / "snapshots" / ("a" * 40))


def test_a_hub_id_is_opened_from_the_cache(make_base, make_batch, randomise, tmp_path, monkeypatch):
    model = randomise(get_pelt_model(make_base(), METHOD))
    model.save_pretrained(tmp_path / "adapter")
    cached(tmp_path / "cache", tmp_path / "adapter")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    downloads = huggingface_hub.snapshot_download

    def from_cache(*args, **options):
        return downloads(*args, **options, cache_dir=tmp_path / "cache", local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_cache)
    batch = make_batch()
    for revision in (None, "main"):
        again = PeltModel.from_pretrained(make_base(), "someone/adapter", revision=revision)
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    for name, revision in (("someone/other", None), ("someone/adapter", "v2")):
        with pytest.raises(FileNotFoundError, match=f"hub, got '{name}', which is neither here"):
            PeltModel.from_pretrained(make_base(), name, revision=revision)


@pytest.mark.parametrize("written_by", ["pelt", "peft"])
def test_an_adapter_is_opened_with_the_base_model_that_it_names(
    written_by, make_base, make_batch, randomise, tmp_path
):
    make_base().save_pretrained(tmp_path / "base")
    base = type(make_base()).from_pretrained(tmp_path / "base")
    model = randomise(get_pelt_model(base, METHOD)).eval()
    model.save_pretrained(tmp_path / "adapter", format=written_by)
    batch = make_batch()
    for kind in ("AutoPeltModel", "AutoPeltModelForSequenceClassification"):
        again = getattr(pelt_kernels, kind).from_pretrained(tmp_path / "adapter")
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    with pytest.raises(
        TypeError, match="got its name 'bert'; load it with transformers' AutoModel"
    ):
        PeltModel.from_pretrained("bert", tmp_path / "adapter")


def test_an_adapter_that_names_no_base_model_is_refused(make_base, tmp_path):
    get_pelt_model(make_base(), METHOD).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoPeltModel: expected .* to name its base model, got"):
        pelt_kernels.AutoPeltModel.from_pretrained(tmp_path)


REFUSED = {
    "merge_and_unload": "export_dense",
    "unload": "remove",
    "enable_adapters": "disable_adapter",
    "peft_config": "adapter_configs",
    "dequantize": "base_model",
    "set_attn_implementation": "before get_pelt_model",
}


def test_methods_that_would_pass_by_the_method_are_refused(make_base):
    model = get_pelt_model(make_base(), METHOD)
    for name, instead in REFUSED.items():
        sentence = f"PeltModel .of BertForSequenceClassification. has no '{name}'; .*{instead}"
        with pytest.raises(AttributeError, match=sentence):
            getattr(model, name)
        assert not hasattr(model, name)


def test_modules_data_and_harmless_methods_are_the_base_models(make_base):
    base = make_base()
    model = get_pelt_model(base, METHOD)
    assert model.bert is base.bert and model.classifier is base.classifier
    assert model.num_labels == 3 and model.config.id2label == base.config.id2label
    assert model.main_input_name == "input_ids" and model.name_or_path == base.name_or_path
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.num_parameters() == base.num_parameters() and not model.can_generate()
    assert model._no_split_modules == base._no_split_modules
    model.enable_input_require_grads()
    model.resize_token_embeddings(101, mean_resizing=False)
    assert base.get_input_embeddings().num_embeddings == 101

"""One configuration, whichever side it is read from: with the method on, off and removed."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers as hf
from every_method import METHODS

from pelt_kernels.models import get_pelt_model

CHANGES = {
    "problem_type": "multi_label_classification",
    "id2label": {0: "no", 1: "yes", 2: "both"},
    "output_hidden_states": True,
    "pad_token_id": 7,
    "something_new": [1, 2],
}


def everything(config):
    return {name: getattr(config, name) for name in CHANGES}


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("method", ["unipelt", "prefix", "lora"])
def test_what_is_set_after_the_method_came_holds_on_off_and_afterwards(
    method, family, make_base, make_batch
):
    base, batch = make_base(family), make_batch(with_labels=False)
    model = get_pelt_model(base, METHODS[method])
    config = model.config
    assert config is base.config
    for name, value in CHANGES.items():
        setattr(config, name, value)
    batch["labels"] = torch.eye(3)
    for module in base.modules():
        if hasattr(module, "config"):
            assert everything(module.config) == CHANGES
    plain = make_base(family)
    plain.config.update(CHANGES)
    expected = plain(**batch)
    assert len(model(**batch).hidden_states) == 3
    with model.disable_adapter():
        off = model(**batch)
    assert torch.equal(off.loss, expected.loss) and len(off.hidden_states) == 3
    removed = model.remove()
    assert removed.config is config and everything(config) == CHANGES
    assert torch.equal(removed(**batch).loss, expected.loss)


def test_what_the_encoder_is_told_reaches_the_head_too(make_base):
    base = make_base()
    get_pelt_model(base, METHODS["prefix"])
    base.bert.config.problem_type = "regression"
    assert base.config.problem_type == "regression"


@pytest.mark.parametrize("take", ["headed", "headless", "from inside"])
def test_a_model_built_from_the_configuration_is_a_plain_one(take, make_base, make_batch):
    base, batch = make_base(), make_batch(with_labels=False)
    model = get_pelt_model(base if take == "headed" else base.bert, METHODS["unipelt"])
    config = base.bert.config if take == "from inside" else model.config
    built = hf.BertForSequenceClassification(config).eval()
    built.load_state_dict(make_base().state_dict())
    torch.testing.assert_close(
        built(**batch).logits, make_base()(**batch).logits, rtol=0, atol=1e-6
    )
    assert base.config._attn_implementation == "sdpa"
    model(**batch)


@pytest.mark.parametrize("is_headed", [True, False])
def test_files_of_the_base_do_not_name_the_methods_attention(is_headed, make_base, tmp_path):
    base = make_base() if is_headed else make_base().bert
    get_pelt_model(base, METHODS["unipelt"])
    base.save_pretrained(tmp_path)
    assert "pelt" not in (tmp_path / "config.json").read_text()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "bert" and saved["vocab_size"] == 99
    again = type(base.config).from_pretrained(tmp_path)
    assert type(again) is hf.BertConfig


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda both: pickle.loads(pickle.dumps(both))]
)
def test_copies_of_a_model_have_a_configuration_of_their_own(copied, make_base):
    model = get_pelt_model(make_base(), METHODS["unipelt"])
    twin = copied(model)
    twin.config.problem_type = "regression"
    assert twin.base_model.bert.config.problem_type == "regression"
    is_shared = copied is copy.copy
    assert (model.config.problem_type == "regression") is is_shared
    assert model.base_model.bert.config._attn_implementation == "pelt"
    assert twin.base_model.bert.config._attn_implementation == "pelt"


def test_a_configuration_of_its_class_is_made_from_a_view(make_base):
    base = make_base()
    get_pelt_model(base, METHODS["prefix"])
    view = base.bert.config
    assert isinstance(view, hf.BertConfig) and view is not base.config
    assert view.to_dict() == base.config.to_dict()
    assert type(view.from_dict(view.to_dict())) is hf.BertConfig
    assert copy.copy(view).__dict__ is base.config.__dict__

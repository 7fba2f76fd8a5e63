"""An adapter is found under the names that its files have had, and none is taken for another's."""

from __future__ import annotations

import os

import torch

from pelt_kernels.methods import LoraConfig
from pelt_kernels.models import PeltModel, get_pelt_model

METHOD = LoraConfig(r=4)


def test_files_by_their_former_names_load_until_they_are_replaced(make_base, make_batch, tmp_path):
    model = get_pelt_model(make_base(), METHOD)
    model.save_pretrained(tmp_path)
    former = {"pelt_config.json": "adapter_config.json"}
    former |= {"pelt_model.safetensors": "adapter_model.safetensors"}
    for now, before in former.items():
        os.rename(tmp_path / now, tmp_path / before)
    batch = make_batch()
    again = PeltModel.from_pretrained(make_base(), tmp_path)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(former)


def test_an_adapter_of_another_library_in_the_folder_stays(make_base, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    get_pelt_model(make_base(), METHOD).save_pretrained(tmp_path)
    assert len(os.listdir(tmp_path)) == 4
    assert PeltModel.from_pretrained(make_base(), tmp_path).method_config == METHOD

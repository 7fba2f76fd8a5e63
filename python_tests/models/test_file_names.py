"""An adapter is found under the names that its files have had, and none is taken for another's."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

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


def _age(folder):
    """Makes all files of a folder ten seconds older."""
    for path in folder.iterdir():
        then = path.stat().st_mtime_ns - 10 * 10**9
        os.utime(path, ns=(then, then))


def test_of_several_writers_in_a_folder_the_latest_is_read(make_base, tmp_path, caplog):
    """save_pretrained, what a Trainer's save_model writes, PEFT, and save_pretrained again."""
    states = []

    def write(writer, name):
        model = get_pelt_model(make_base(), METHOD)
        with torch.no_grad():
            for parameter in model.trained_parameters().values():
                parameter.normal_(std=1.0 + len(states))
        writer(model)
        states.append(name)
        caplog.clear()
        again = PeltModel.from_pretrained(make_base(), tmp_path)
        for name, value in again.trained_parameters().items():
            assert torch.equal(value, model.trained_parameters()[name]), states
        said = "".join(record.getMessage() for record in caplog.records)
        others = dict.fromkeys(reversed(states[:-1]))
        others.pop(states[-1], None)
        assert (f"the one of {states[-1]} is read" in said) == bool(others)
        _age(tmp_path)

    def peft(model):
        model.save_pretrained(tmp_path / "peft", format="peft")
        for path in (tmp_path / "peft").iterdir():
            os.rename(path, tmp_path / path.name)
        (tmp_path / "peft").rmdir()

    def trainer(model):
        Trainer(model, TrainingArguments(tmp_path, report_to="none", use_cpu=True)).save_model()

    write(lambda model: model.save_pretrained(tmp_path), "pelt_config.json")
    write(trainer, "model.safetensors")
    write(peft, "adapter_config.json")
    write(trainer, "model.safetensors")
    write(lambda model: model.save_pretrained(tmp_path), "pelt_config.json")
    # A state that cannot be opened is no matter while it is older, and never passed over.
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="model.safetensors cannot be read, it is damaged"):
        PeltModel.from_pretrained(make_base(), tmp_path)
    os.utime(tmp_path / "model.safetensors", (0, 0))
    assert PeltModel.from_pretrained(make_base(), tmp_path).method_config == METHOD


@pytest.mark.parametrize("words", [0, 4])
def test_what_a_plain_trainer_saves_opens(words, make_base, make_batch, tmp_path):
    """Its checkpoints and save_model's folder: the state says which method it is of."""

    def resized(model):
        if words:
            model.resize_token_embeddings(99 + words, mean_resizing=False)
        return model

    model = get_pelt_model(make_base(), METHOD)
    resized(model)
    batch = make_batch()
    rows = [{name: value[i] for name, value in batch.items()} for i in range(3)]
    options = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True}
    options |= {"disable_tqdm": True, "per_device_train_batch_size": 3, "learning_rate": 0.1}
    trainer = Trainer(model, TrainingArguments(tmp_path, **options), train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "last")
    expected = model.eval()(**batch).logits
    for folder in ("last", "checkpoint-2"):
        again = PeltModel.from_pretrained(resized(make_base()), tmp_path / folder)
        assert again.method_config == METHOD
        assert torch.equal(again(**batch).logits, expected)
    early = PeltModel.from_pretrained(resized(make_base()), tmp_path / "checkpoint-1")
    assert not torch.equal(early(**batch).logits, expected)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=0, atol=1e-5)


def test_a_state_that_says_nothing_of_itself_is_no_adapter(make_base, tmp_path):
    model = get_pelt_model(make_base(), METHOD)
    state = dict(model.state_dict())
    save_file(
        state | {"_extra_state": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="model.safetensors is not JSON, it is damaged"):
        PeltModel.from_pretrained(make_base(), tmp_path)
    del state["_extra_state"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="expected pelt_config.json in"):
        PeltModel.from_pretrained(make_base(), tmp_path)
    assert model.load_state_dict(load_file(tmp_path / "model.safetensors")) == ([], [])

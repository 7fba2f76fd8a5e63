"""Methods in training: the loss falls, in 16 bits, compiled, under transformers.Trainer."""

from __future__ import annotations

import os

import pytest
import torch
import transformers as hf
from every_method import METHODS
from safetensors.torch import load_file

from pelt_kernels.methods import (
    BottleneckAdapterConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import PeltModel, get_pelt_model

APL = UniPELTConfig(
    adapter=BottleneckAdapterConfig(bottleneck=4),
    prefix=PrefixTuningConfig(prefix_length=3, mid=8),
    lora=LoraConfig(r=4, dropout=0.1),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sixteen_bit_models_train_float32_parts(attention, dtype, make_base, make_batch, randomise):
    batch = make_batch()
    exact = randomise(get_pelt_model(make_base(), APL), std=0.05)
    half = randomise(get_pelt_model(make_base(attention=attention, dtype=dtype), APL), std=0.05)
    assert half.dtype == dtype and half.prefix.down.weight.dtype == torch.float32
    out, truth = half(**batch), exact(**batch)
    assert out.logits.dtype == dtype
    out.loss.backward()
    truth.loss.backward()
    torch.testing.assert_close(out.logits.float(), truth.logits, rtol=0, atol=0.05)
    for name, parameter in exact.trained_parameters().items():
        grad = half.trained_parameters()[name].grad.float()
        distance = (grad - parameter.grad).norm() / (parameter.grad.norm() + 1e-3)
        assert distance < 0.2, f"{name}: {distance}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast(attention, make_base, make_batch, randomise):
    batch = make_batch()
    model = randomise(get_pelt_model(make_base(attention=attention), APL), std=0.05)
    truth = model(**batch)
    truth.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.trained_parameters().items()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.logits.float(), truth.logits, rtol=0, atol=0.05)
    for name, parameter in model.trained_parameters().items():
        assert parameter.grad.dtype == torch.float32
        distance = (parameter.grad - expected[name]).norm() / (expected[name].norm() + 1e-3)
        assert distance < 0.2, f"{name}: {distance}"


@pytest.mark.parametrize("method", ["adamix", "adamix-lora", "pst", "mam"])
def test_evaluation_compiles_without_a_break(method, make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(), METHODS[method]), std=0.05).eval()
    model.set_progress(1.0)
    batch = make_batch(with_labels=False)
    with torch.no_grad():
        expected = model(**batch).logits
        torch._dynamo.reset()
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class Rows(torch.utils.data.Dataset):
    """Twelve sentences with labels, as a tokenizer gives them."""

    def __init__(self, make_batch):
        self.batch = make_batch((9, 4, 7, 3) * 3)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        length = int(self.batch["attention_mask"][i].sum())
        return {
            name: values[i][:length] if values.ndim == 2 else values[i]
            for name, values in self.batch.items()
        }


def collate(rows):
    """Pads to the longest of the batch, so padding differs from step to step."""
    width = max(len(row["input_ids"]) for row in rows)
    pad = {"input_ids": 1, "attention_mask": 0}
    out = {
        name: torch.stack(
            [
                torch.nn.functional.pad(row[name], (0, width - len(row[name])), value=value)
                for row in rows
            ]
        )
        for name, value in pad.items()
    }
    return out | {"labels": torch.stack([row["labels"] for row in rows])}


def trainer(model, make_batch, folder, **options):
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps",
        save_steps=3,
        logging_strategy="no",
        eval_strategy="no",
        seed=3,
        **options,
    )
    rows = Rows(make_batch)
    return hf.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate
    )


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_trainer_saves_what_is_trained_and_resumes(use_reentrant, make_base, make_batch, tmp_path):
    options = {}
    if use_reentrant is not None:
        options = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        }
    model = get_pelt_model(make_base(dropout=0.1), APL)
    first = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
    whole = trainer(model, make_batch, tmp_path / "whole", max_steps=6, **options)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    unmoved = [n for n, p in model.trained_parameters().items() if torch.equal(p, first[n])]
    assert unmoved == []
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    names = {*model.trained_parameters(), "_extra_state"}
    assert set(load_file(checkpoint / "model.safetensors")) == names
    trained = sum(p.numel() for p in model.trained_parameters().values())
    assert os.path.getsize(checkpoint / "model.safetensors") < 4 * trained + 16384
    again = get_pelt_model(make_base(dropout=0.1), APL)
    trainer(again, make_batch, tmp_path / "again", max_steps=6, **options).train(str(checkpoint))
    for name, parameter in model.trained_parameters().items():
        assert torch.equal(parameter, again.trained_parameters()[name]), name


def test_trainer_sees_the_labels_and_the_loss_of_the_base_model(make_base, make_batch, tmp_path):
    base = make_base()
    expected = trainer(base, make_batch, tmp_path)
    given = trainer(get_pelt_model(make_base(), APL), make_batch, tmp_path)
    assert given.label_names == ["labels"]
    assert given.model_accepts_loss_kwargs == expected.model_accepts_loss_kwargs
    predicted = given.predict(Rows(make_batch))
    assert predicted.predictions.shape == (12, 3) and predicted.label_ids.shape == (12,)


def test_predictions_after_training_survive_the_round_trip(make_base, make_batch, tmp_path):
    model = get_pelt_model(make_base(), APL)
    run = trainer(model, make_batch, tmp_path / "run", max_steps=3)
    run.train()
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeltModel.from_pretrained(make_base(), tmp_path / "adapter")
    batch = make_batch()
    assert torch.equal(again(**batch).logits, model(**batch).logits)

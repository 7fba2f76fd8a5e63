"""Models that write text, with a head that classifies it."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from every_method import METHODS
from families import PAD, WRITERS, make_writer

from pelt_kernels.models import get_pelt_model

HEADS = {
    "bart": (hf.BartForSequenceClassification, "classification_head."),
    "gpt2": (hf.GPT2ForSequenceClassification, "score."),
    "llama": (hf.LlamaForSequenceClassification, "score."),
    "t5": (hf.T5ForSequenceClassification, "classification_head."),
}
END = 3  # BART and T5 classify by the last of it


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("method", ["unipelt", "composite-adamix", "lora"])
def test_the_head_is_trained_beside_the_method(method, family, monkeypatch):
    model_class, head = HEADS[family]
    config_class, _, sizes = WRITERS[family]
    monkeypatch.setitem(WRITERS, family, (config_class, model_class, sizes | {"num_labels": 3}))
    ids = torch.tensor([[7, 8, 9, 10, END], [11, 12, 13, END, PAD]])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    labels = torch.tensor([2, 0])
    base = make_writer(family)
    with torch.no_grad():
        untouched = base(**inputs).logits
    model = get_pelt_model(base, METHODS[method]).train()
    model.set_progress(0.0)
    trained = model.trained_parameters()
    assert any(name.startswith(f"base_model.{head}") for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    with torch.no_grad():
        assert model.eval()(**inputs).logits.shape == (2, 3)
        assert torch.equal(model.remove()(**inputs).logits, untouched)

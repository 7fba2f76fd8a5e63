"""AdaMix's two passes in models that write text, by methods.md's words."""

from __future__ import annotations

import pytest
import torch
from families import PAD, WORDS, make_writer
from torch.nn.functional import cross_entropy

from pelt_kernels.methods import AdaMixConfig
from pelt_kernels.models import get_pelt_model
from pelt_kernels.nn import Bank

KINDS = {
    "adapter": AdaMixConfig(bottleneck=4, consistency=100.0),
    "lora": AdaMixConfig(kind="lora", experts=3, r=2, consistency=100.0),
}


def batch_of(family):
    """Two texts and what is to be written: targets are some of the places, with gaps in between."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, WORDS, (2, 8), generator=generator)
    ids[1, 6:] = PAD
    if family == "gpt2":
        labels = torch.where(ids != PAD, ids, -100)
        labels[:, :3] = -100
    else:
        labels = torch.randint(5, WORDS, (2, 6), generator=generator)
        labels[0, 4:] = -100
    labels[1, 4] = -100
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def targets(family, logits, labels):
    """Each place that has a target: its logits, and the target."""
    pairs = []
    for row, text in enumerate(labels.tolist()):
        for place, word in enumerate(text):
            # GPT-2 says at a place what comes next; a decoder behind an encoder reads the target
            # moved by one, so that it says at a place what is there.
            at = place - 1 if family == "gpt2" else place
            if word != -100 and at >= 0:
                pairs.append((logits[row, at], word))
    return torch.stack([z for z, _ in pairs]), torch.tensor([word for _, word in pairs])


@pytest.mark.parametrize("family", ["gpt2", "bart", "t5"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula_over_the_targets(kind, family, draws, monkeypatch):
    inputs = batch_of(family)
    model = get_pelt_model(make_writer(family).double(), KINDS[kind]).train()
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.5 * torch.randn_like(parameter))
    torch.manual_seed(8)  # draws that differ between the passes
    found = model(**inputs)
    made = {bank: [torch.tensor(draw) for draw in drawn] for bank, drawn in draws.items()}
    assert all(len(drawn) == 2 for drawn in made.values())
    monkeypatch.setattr(Bank, "draw", lambda bank: made[bank].pop(0))
    passes = [model.base_model(**inputs) for _ in range(2)]
    (z1, words), (z2, _) = (targets(family, p.logits, inputs["labels"]) for p in passes)
    log1, log2 = z1.log_softmax(-1), z2.log_softmax(-1)
    to_first = (log2.detach().exp() * (log2.detach() - log1)).sum(-1).mean()
    to_second = (log1.detach().exp() * (log1.detach() - log2)).sum(-1).mean()
    consistency = 0.5 * (to_first + to_second)
    assert consistency > 1e-5
    expected = cross_entropy(z1, words) + 100.0 * consistency
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.logits, passes[0].logits)
    parameters = list(model.trained_parameters().values())
    for got, wanted in zip(
        torch.autograd.grad(found.loss, parameters),
        torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)

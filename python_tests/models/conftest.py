"""Tiny encoders with random weights, and batches with padding for them."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from families import BERT_LIKE, PAD
from torch import nn

from pelt_kernels.nn import Bank


def _make_base(family: str = "bert", attention: str = "sdpa", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    if family == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        sizes |= {"seq_classif_dropout": changes.pop("dropout", 0.0)}
        sizes |= {"dropout": sizes["seq_classif_dropout"]}
        sizes |= {"attention_dropout": sizes["dropout"]}
        config_class, model_class = hf.DistilBertConfig, hf.DistilBertForSequenceClassification
    else:
        dropout = changes.pop("dropout", 0.0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 48, "hidden_dropout_prob": dropout}
        sizes |= {"attention_probs_dropout_prob": dropout}
        if family == "electra":
            sizes["embedding_size"] = 16
        config_class, model_class = BERT_LIKE[family]
    config = config_class(
        **sizes | {"vocab_size": 99, "max_position_embeddings": 40, "num_labels": 3} | changes,
        pad_token_id=PAD,
        attn_implementation=attention,
    )
    model = model_class(config)
    # Biases and LayerNorms start as 0 and 1, which would hide a mistake in where they are added.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
    return model.to(dtype).eval()


def _make_batch(lengths=(9, 4, 7), width: int | None = None, with_labels: bool = True):
    generator = torch.Generator().manual_seed(1)
    width = width or max(lengths)
    ids = torch.randint(5, 99, (len(lengths), 32), generator=generator)[:, :width]
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    batch = {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long()}
    if with_labels:
        batch["labels"] = torch.arange(len(lengths)) % 3
    return batch


def _randomise(model, std: float = 0.2, seed: int = 2):
    """Values for everything trained, far enough from the start for every part to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype) * std)
    return model


@pytest.fixture
def make_base():
    """family, attention, dtype, config changes -> a classifier of 2 layers, D = 32, in eval mode."""
    return _make_base


@pytest.fixture
def make_batch():
    """lengths, width -> input_ids, attention_mask, labels."""
    return _make_batch


@pytest.fixture
def randomise():
    """Moves everything a PeltModel trains away from its start."""
    return _randomise


@pytest.fixture
def draws(monkeypatch):
    """What the banks draw from here on: bank -> [[down, up] of each forward]."""
    drawn = {}
    draw = Bank.draw

    def watched(bank):
        made = draw(bank)
        drawn.setdefault(bank, []).append(made.tolist())
        return made

    monkeypatch.setattr(Bank, "draw", watched)
    return drawn


@pytest.fixture(autouse=True)
def _quiet_and_repeatable():
    torch.manual_seed(0)
    hf.logging.set_verbosity_error()

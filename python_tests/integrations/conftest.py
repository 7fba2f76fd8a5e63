"""Tiny models of transformers, for other libraries to put their layers into."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

WORDS = 64
_SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _make_model(family: str, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    if family == "bert":
        sizes = _SIZES | {"intermediate_size": 48, "hidden_dropout_prob": 0.0}
        sizes |= {"attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
        model = hf.BertForSequenceClassification(hf.BertConfig(**sizes | changes))
    elif family == "gpt2":
        sizes = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        sizes |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        sizes |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes | changes))
    else:
        sizes = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
        sizes |= {"initializer_range": 0.2}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes | changes))
    return model.to(dtype).eval()


@pytest.fixture
def make_model():
    """family (bert, gpt2 or llama), dtype, config changes -> a model of 2 layers, D = 32, in eval
    mode.
    """
    return _make_model


@pytest.fixture
def batch():
    """input_ids and attention_mask of two texts, the second one padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (2, 7), generator=generator)
    seen = torch.ones(2, 7, dtype=torch.long)
    seen[1, :2] = 0
    return {"input_ids": ids, "attention_mask": seen}


@pytest.fixture(autouse=True)
def _quiet_and_repeatable():
    torch.manual_seed(0)
    hf.logging.set_verbosity_error()


@pytest.fixture(params=["operator", "composed"])
def way(request, monkeypatch):
    """Both ways in which an accelerated layer of PEFT's LoRA computes: calls as small as those of
    tests do not pay for the operator.
    """
    from pelt_kernels.integrations import peft_lora  # where PEFT is

    if request.param == "operator":
        monkeypatch.setattr(peft_lora, "PAYS_FROM", 0)
    return request.param

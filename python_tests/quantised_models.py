"""Tiny models whose Linears are quantised, by the way that transformers' users take."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import transformers as hf
from torch import nn

LIBRARIES = {
    "nf4": "bitsandbytes",
    "llm-int8": "bitsandbytes",
    "int8": "torchao",
    "int4": "torchao",
}
WORDS = 64
_SIZES = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def kinds(*names):
    """Parameters of a test: those whose library is not installed are skipped."""
    return [pytest.param(name, marks=needs(LIBRARIES[name])) for name in names]


def needs(library):
    """A mark that skips a test where a library is not installed."""
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


def make(family):
    """A classifier or a language model of 2 layers, D = 64, in float32."""
    torch.manual_seed(0)
    if family == "bert":
        sizes = _SIZES | {"intermediate_size": 128, "initializer_range": 0.2}
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return hf.BertForSequenceClassification(hf.BertConfig(**sizes))
    if family == "gpt2":
        sizes = {"vocab_size": WORDS, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32}
        sizes |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, initializer_range=0.2))
    sizes = _SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))


def load(folder, kind, dtype=torch.float32, kept=("classifier", "lm_head")):
    """The model of a folder, quantised as it is loaded, but for what is kept."""
    name = hf.AutoConfig.from_pretrained(folder).architectures[0]
    config = _config(kind, list(kept))
    return getattr(hf, name).from_pretrained(folder, quantization_config=config, dtype=dtype)


def _config(kind, kept):
    if kind == "nf4":
        return hf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept
        )
    if kind == "llm-int8":
        return hf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    from torchao import quantization as ao

    own = ao.Int8WeightOnlyConfig()
    if kind == "int4":
        own = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    return hf.TorchAoConfig(own, modules_to_not_convert=kept)


def dequantised(model):
    """The model with an nn.Linear of the same values for each Linear in 4 bits."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data = bnb.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            ).float()
            plain.bias = module.bias
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, plain)
    return model


def batch_for(model):
    """Two texts with labels, the second one padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (2, 7), generator=generator)
    seen = torch.ones(2, 7, dtype=torch.long)
    seen[1, 5:] = 0
    labels = torch.tensor([0, 1]) if hasattr(model, "classifier") else ids
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}


def run(model):
    """The logits of a forward in training, and the gradients of all that is trained."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**batch_for(model))
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach()} | grads


def losses(model, steps=5):
    """The losses of some steps of AdamW on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batch, found = batch_for(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)

"""A tiny model of each of transformers' families that PEFT is accelerated in, in float64. They have
no dropout, unless an encoder is asked for it, so training and evaluation give the same numbers.
"""

from __future__ import annotations

import torch
import transformers as hf

L = 2
_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": L}
_SIZES |= {"num_attention_heads": 4, "initializer_range": 0.2}
_DECODER = _SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ONE_HEAD_PER_QUERY = ("gpt2", "gpt_neox", "opt", "phi")
_EXTRA = {"gpt2": {"intermediate_size": None}, "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48}}
_EXTRA |= {"gemma": {"head_dim": 8}, "qwen3": {"head_dim": 8}}
_STACKS = {"encoder_layers": L, "decoder_layers": L, "encoder_attention_heads": 4, "d_model": 32}
_STACKS |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_STACKS |= {"vocab_size": 64, "init_std": 0.2, "decoder_start_token_id": 2}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": L, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0}
_WRITERS = {"bart": _STACKS, "mbart": _STACKS, "t5": _T5, "mt5": _T5}
ENCODER = _SIZES | {"max_position_embeddings": 40, "pad_token_id": 1}
ENCODER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DISTILBERT = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": L, "n_heads": 4}
_DISTILBERT |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}


def make_decoder(family, kind=hf.AutoModelForCausalLM, **changes):
    """A model of one stack that writes."""
    heads = {} if family in _ONE_HEAD_PER_QUERY else {"num_key_value_heads": 2}
    sizes = _DECODER | heads | _EXTRA.get(family, {}) | changes
    return _still(_made(kind, family, sizes))


def make_writer(family, **changes):
    """An encoder with a decoder."""
    return _still(_made(hf.AutoModelForSeq2SeqLM, family, _WRITERS[family] | changes))


def make_encoder(family, kind=hf.AutoModelForSequenceClassification, **changes):
    """A model that labels sentences with one of two labels."""
    sizes = _DISTILBERT if family == "distilbert" else ENCODER
    return _made(kind, family, {"num_labels": 2} | sizes | changes)


def _made(kind, family, sizes):
    torch.manual_seed(0)
    return kind.from_config(hf.AutoConfig.for_model(family, **sizes)).double().eval()


def _still(model):
    """Without dropout, which families name in many ways."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model

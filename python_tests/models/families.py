"""Tiny models of the families, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

BERT_LIKE = {
    "bert": (hf.BertConfig, hf.BertForSequenceClassification),
    "camembert": (hf.CamembertConfig, hf.CamembertForSequenceClassification),
    "data2vec-text": (hf.Data2VecTextConfig, hf.Data2VecTextForSequenceClassification),
    "electra": (hf.ElectraConfig, hf.ElectraForSequenceClassification),
    "ernie": (hf.ErnieConfig, hf.ErnieForSequenceClassification),
    "roberta": (hf.RobertaConfig, hf.RobertaForSequenceClassification),
    "xlm-roberta": (hf.XLMRobertaConfig, hf.XLMRobertaForSequenceClassification),
}
ENCODERS = (*BERT_LIKE, "distilbert")
PAD, WORDS = 1, 99

_WORDS = {
    "vocab_size": WORDS, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
_LLAMA = _WORDS | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
_BART = _WORDS | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "decoder_start_token_id": 3, "forced_eos_token_id": None,
    "dropout": 0.0,
}  # fmt: skip
# 4 heads of 16: the inner size 64 is not D.
_T5 = _WORDS | {
    "d_model": 32, "d_kv": 16, "num_heads": 4, "num_layers": 2, "d_ff": 48,
    "decoder_start_token_id": PAD, "dropout_rate": 0.0,
}  # fmt: skip
_GPT2 = _WORDS | {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

_BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
_READER = _BERT | {"vocab_size": WORDS, "pad_token_id": PAD, "max_position_embeddings": 40}
_IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3}
_PIXELS = _BERT | _IMAGE | {"attention_dropout": 0.0}

# Encoders that are not shaped as BERT is.
READERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "albert": (
        hf.AlbertConfig, hf.AlbertForSequenceClassification,
        _READER | {"embedding_size": 16, "classifier_dropout_prob": 0.0},
    ),
    "clip_vision_model": (hf.CLIPVisionConfig, hf.CLIPVisionModel, _PIXELS),
    "deberta-v2": (
        hf.DebertaV2Config, hf.DebertaV2ForSequenceClassification,
        _READER | {
            "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
        },
    ),
    "modernbert": (
        hf.ModernBertConfig, hf.ModernBertForSequenceClassification,
        _READER | {
            "num_hidden_layers": 3, "local_attention": 6, "classifier_pooling": "mean",
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3,
        },
    ),
    "mpnet": (hf.MPNetConfig, hf.MPNetForSequenceClassification, _READER),
    "vit": (hf.ViTConfig, hf.ViTForImageClassification, _PIXELS),
}  # fmt: skip
OF_IMAGES = ("clip_vision_model", "vit")
OWN_ATTENTION = ("deberta-v2", "mpnet")

WRITERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bart": (hf.BartConfig, hf.BartForConditionalGeneration, _BART),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, _LLAMA),
    "gemma3_text": (
        hf.Gemma3TextConfig, hf.Gemma3ForCausalLM,
        _LLAMA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, _GPT2),
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, _LLAMA),
    "mbart": (hf.MBartConfig, hf.MBartForConditionalGeneration, _BART),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, _LLAMA | {"sliding_window": 6}),
    "mt5": (hf.MT5Config, hf.MT5ForConditionalGeneration, _T5 | _GATED),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, _LLAMA),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, _LLAMA),
    "t5": (hf.T5Config, hf.T5ForConditionalGeneration, _T5),
}  # fmt: skip


def make_writer(family: str, attention: str = "sdpa", **changes: Any) -> Any:
    """A model of a family that writes text, in eval mode: 2 layers, D = 32, 99 words."""
    return _made(*WRITERS[family], changes | {"attn_implementation": attention})


def make_reader(family: str, attention: str = "sdpa", **changes: Any) -> Any:
    """A classifier of a family (of CLIP's the tower alone), in eval mode: D = 32, 99 words."""
    attention = "eager" if family in OWN_ATTENTION else attention
    return _made(*READERS[family], changes | {"attn_implementation": attention})


def _made(
    config_class: type, model_class: type, sizes: dict[str, Any], changes: dict[str, Any]
) -> Any:
    torch.manual_seed(0)
    model = model_class(config_class(**sizes | changes))
    # Biases and norms start as 0 and 1, which would hide a mistake in where they are added.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
    return model.eval()

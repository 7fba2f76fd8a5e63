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
    torch.manual_seed(0)
    config_class, model_class, sizes = WRITERS[family]
    config = config_class(**sizes | changes, attn_implementation=attention)
    model = model_class(config)
    # Biases and norms start as 0 and 1, which would hide a mistake in where they are added.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
    return model.eval()

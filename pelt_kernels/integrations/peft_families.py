"""The models under PEFT's whose attention is served."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

# transformers' families that were compared with PEFT, or, of encoders, with the formula.
DECODERS = (
    "cohere",
    "gemma",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)
ENCODERS = (
    "bert",
    "camembert",
    "data2vec-text",
    "distilbert",
    "electra",
    "ernie",
    "roberta",
    "xlm-roberta",
)
WRITERS = ("bart", "mbart", "mt5", "t5")  # an encoder with a decoder


def why_unknown(base: Any) -> str:
    """Why the attention of a model cannot be another; empty where it can."""
    if not isinstance(base, PreTrainedModel):
        return f"its base model, {type(base).__name__}, is not one of transformers'"
    family = base.config.model_type
    if not base._can_set_attn_implementation():
        return f"the attention of {family} does not go through transformers' AttentionInterface"
    if family not in DECODERS + ENCODERS + WRITERS:
        return f"{family} is not among the families that were compared with PEFT"
    return ""

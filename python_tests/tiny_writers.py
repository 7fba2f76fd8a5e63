"""A T5 and a GPT-2 of two narrow layers with a tokenizer of whole words, and a task for them: a
color and a thing become a sentence in other words.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

COLORS = {"red": "rouge", "blue": "bleu", "green": "vert", "black": "noir", "white": "blanc"}
THINGS = {"cat": "chat", "dog": "chien", "horse": "cheval", "bird": "oiseau", "fish": "poisson"}
MOODS = {"calm": "doucement", "loud": "fort"}  # an attribute, of which the source says nothing
OTHER = ["the", "a", "is", "here", "le", "est", "."]
SPECIAL = ["<pad>", "</s>", "<unk>"]
WRITERS = ("t5", "gpt2")

_SIZES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
           "decoder_start_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.1},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
             "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "max_position_embeddings": 64, "decoder_start_token_id": 1, "init_std": 0.1},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}  # fmt: skip


def pairs(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(source, target, mood)."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        color, thing, mood = draw.choice([*COLORS]), draw.choice([*THINGS]), draw.choice([*MOODS])
        filler = " ".join(draw.choices(["here", "is", "a"], k=draw.randrange(3)))
        source = f"{filler} the {color} {thing}".strip()
        made.append((source, f"le {THINGS[thing]} est {COLORS[color]} {MOODS[mood]}", mood))
    return made


def write_pairs(path: Path, table: list[tuple[str, str, str]]) -> Path:
    rows = ["source\ttarget\tmood", *("\t".join(row) for row in table)]
    path.write_text("".join(row + "\n" for row in rows))
    return path


def save_writer(folder: Path, family: str) -> Path:
    """The folder of a model with random weights, and its tokenizer."""
    words = [*SPECIAL, *OTHER]
    for table in (COLORS, THINGS, MOODS):
        words += [*table.keys(), *table.values()]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    is_causal = family in ("gpt2", "llama")
    if not is_causal:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        **({} if family == "gpt2" else {"pad_token": "<pad>"}),
    ).save_pretrained(folder)
    torch.manual_seed(3)
    sizes = _SIZES[family] | {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(family, bos_token_id=1, **sizes)
    kind = AutoModelForCausalLM if is_causal else AutoModelForSeq2SeqLM
    kind.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders by family."""
    folder = tmp_path_factory.mktemp("tiny-writers")
    return {family: save_writer(folder / family, family) for family in WRITERS}


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training and a test file."""
    folder = tmp_path_factory.mktemp("pairs")
    return (
        write_pairs(folder / "train.tsv", pairs(300, seed=1)),
        write_pairs(folder / "test.tsv", pairs(40, seed=2)),
    )

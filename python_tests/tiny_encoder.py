"""A BERT of two narrow layers and a task of a few words, made in a moment, for whole runs."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

GOOD = ["good", "fine", "great", "lovely", "warm"]
BAD = ["bad", "poor", "awful", "dull", "cold"]
OTHER = ["the", "a", "film", "book", "song", "is", "was", "very", "so", "and", "this", "that"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label) with one telling word in each text."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        is_good = draw.random() < 0.5
        words = draw.choices(OTHER, k=draw.randrange(2, 12))
        words.insert(draw.randrange(len(words) + 1), draw.choice(GOOD if is_good else BAD))
        made.append((" ".join(words), "1" if is_good else "0"))
    return made


def write_tsv(path: Path, table: Sequence[tuple[str, str]], header: str = "text\tlabel") -> Path:
    path.write_text(header + "\n" + "".join(f"{text}\t{label}\n" for text, label in table))
    return path


def write_csv(path: Path, table: Sequence[Sequence[str]], header: Sequence[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    words = SPECIAL + OTHER + GOOD + BAD
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training and a test file."""
    folder = tmp_path_factory.mktemp("toy-task")
    return (
        write_tsv(folder / "train.tsv", rows(200, seed=1)),
        write_tsv(folder / "test.tsv", rows(60, seed=2)),
    )


def damage_json(path: Path, key: str, text: str) -> None:
    """Replaces a key's value by JSON text."""
    values = json.loads(path.read_text())
    values[key] = "HERE"
    path.write_text(json.dumps(values).replace('"HERE"', text))

"""`pelt-kernels distill`: the targets are what transformers writes greedily, text by text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import Run
from tiny_encoder import OTHER, SPECIAL
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = SPECIAL + OTHER
TEXTS = ["the film is so", "a book", "this song was very very"]


def save_tiny(folder: Path, kind: str) -> Path:
    """A model that writes, and its tokenizer."""
    torch.manual_seed(3)
    ends = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2, "tie_word_embeddings": False}
    if kind == "t5":
        config = T5Config(
            vocab_size=len(WORDS), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
            decoder_start_token_id=0, **ends,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
        for block in model.decoder.block:  # so that what it writes depends on what it reads
            torch.nn.init.normal_(block.layer[1].EncDecAttention.o.weight)
    else:
        config = GPT2Config(
            vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=24, **ends
        )
        model = GPT2LMHeadModel(config)
        torch.nn.init.normal_(model.transformer.wte.weight, std=0.5)
        torch.nn.init.normal_(model.transformer.wpe.weight, std=0.5)
    torch.nn.init.normal_(model.lm_head.weight)
    model.lm_head.weight.data[: len(SPECIAL)] = 0  # so that it writes words
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=24, eos_token="[SEP]")
    tokenizer.save_pretrained(folder)
    return folder


def written_one_by_one(folder: Path, kind: str, texts: list[str]) -> list[str]:
    loader = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model, tokenizer = loader.from_pretrained(folder).eval(), BertTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]  # with an end behind it
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
                             do_sample=False, pad_token_id=0, eos_token_id=3)  # fmt: skip
        own = out[0] if kind == "t5" else out[0, ids.shape[1] :]
        found.append(tokenizer.decode(own, skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_targets_are_what_the_model_writes(run: Run, tmp_path: Path, kind: str) -> None:
    folder, source = save_tiny(tmp_path / kind, kind), tmp_path / "train.jsonl"
    rows = [{"in": text, "out": "gold", "id": n} for n, text in enumerate(TEXTS)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "distill", "--file", source, "--output", tmp_path / "new.jsonl", "--model", folder,
        "--text-column", "in", "--target-column", "out", "--prefix", "so the ",
        "--max-new-tokens", 8, "--batch-size", 2, "--device", "cpu",
    ]  # fmt: skip
    done = run(*arguments)
    assert done.code == 0, done.err
    assert "3 targets" in done.out
    expected = written_one_by_one(folder, kind, [f"so the {text}" for text in TEXTS])
    assert len(set(expected)) > 1
    found = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert found == [row | {"out": target} for row, target in zip(rows, expected, strict=True)]
    assert "is there already" in run(*arguments).refused(2)


def test_mistakes_get_one_sentence(run: Run, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    arguments = ["distill", "--file", tmp_path / "a.jsonl", "--output", tmp_path / "b.jsonl"]
    assert "there is no folder" in run(*arguments, "--model", "./absent").refused(2)
    model = ["--model", folder]
    sentence = run(*arguments, *model).refused(2)
    assert "max-new-tokens: expected fewer than the 24 tokens" in sentence
    short = [*model, "--max-new-tokens", 4]
    assert "task: expected one of the adapter's (it has none), got 'mt'" in run(
        *arguments, *short, "--task", "mt"
    ).refused(2)
    assert "there is no such file" in run(*arguments, *short).refused(2)
    adapter = [*short, "--adapter", tmp_path]
    assert "adapter" in run(*arguments, *adapter).refused(1)

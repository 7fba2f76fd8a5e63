"""Every method on text from data, with a small GPT-2 and a small T5, into benchmarks/results.

    python -m benchmarks.generation --data e2e.tsv [--methods full,lora] [--runs FOLDER]

The data has a `source` (fields such as ``name : Alimentum | area : city centre``) and a `target`,
as the E2E challenge's; where it is not there, nothing is measured. No weights come with the
project, so both models are first trained on the targets of the training part alone: GPT-2 to go on
with them, T5 to fill in words that were taken out. What a method then has to learn is to write from
the fields. Finished rows are read, so the command can be stopped and started again; remove the
folder of runs to measure anew.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pelt_kernels.training import TrainConfig, Watchers, train
from pelt_kernels.training.encode import Form
from pelt_kernels.training.texts import NO_LOSS, TextPad, target_ids

from . import readme
from .checkout import commit
from .rows import read, write

FAMILIES = ("gpt2", "t5")
NOT_DEFINED = {("t5", "bitfit")}  # its layers have no biases
METHODS = ("full", "lora", "adapter", "unipelt", "prefix", "bitfit", "adamix")
TESTED = 60  # sources, each with all of its targets
SIZES = {"width": 128, "heads": 4, "layers": 2}
STEPS, BATCH, RATE = 500, 32, 2e-3  # of the models' own training
# Models as small as these take higher rates than the recipes', which are for pretrained ones.
RATES = {"full": 2e-3, "bitfit": 2e-2, "prefix": 1e-2}
OTHER_RATE = 5e-3
TAKEN_OUT = 0.4  # share of the words that T5 fills in


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is not trained yet, and writes the rows after each method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a file with source and target")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--train-examples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the models' own training")
    parser.add_argument("--runs", type=Path, default=Path("runs/generation"))
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        print(f"generation: skipped, {options.data} is not there", file=sys.stderr)
        return 0
    options.runs.mkdir(parents=True, exist_ok=True)
    train_file, test_file = _split(options.data, options.runs)
    for family in options.families.split(","):
        model = options.runs / family
        if not (model / "config.json").is_file():
            _make(family, model, train_file, options.steps)
    for method in options.methods.split(","):
        for family in options.families.split(","):
            output = options.runs / f"{family}-{method}"
            if (family, method) in NOT_DEFINED or (output / "commit").is_file():
                continue
            config = TrainConfig(
                task=str(train_file), eval=str(test_file), model=str(options.runs / family),
                method=method, train_examples=options.train_examples, epochs=options.epochs,
                lr=(RATES.get(method, OTHER_RATE),), eval_every=10_000, max_length=80, device="cpu",
            )  # fmt: skip
            train(config, output, overwrite=True, watchers=Watchers(say=print))
            (output / "commit").write_text(commit())
            _write(options.runs)
    _write(options.runs)
    return 0


def _split(data: Path, runs: Path) -> tuple[Path, Path]:
    """A training and a test file that share no source."""
    header, *rows = data.read_text(encoding="utf-8").splitlines()
    sources = sorted({row.split("\t")[0] for row in rows})
    tested = set(random.Random("generation").sample(sources, TESTED))
    paths = runs / "train.tsv", runs / "test.tsv"
    for path, is_tested in zip(paths, (False, True), strict=True):
        chosen = [row for row in rows if (row.split("\t")[0] in tested) == is_tested]
        path.write_text("\n".join([header, *chosen]) + "\n", encoding="utf-8")
    return paths


def _make(family: str, folder: Path, train_file: Path, steps: int) -> None:
    """A model that has read the targets of the training part, and its tokenizer."""
    rows = [line.split("\t") for line in train_file.read_text(encoding="utf-8").splitlines()[1:]]
    folder.mkdir(exist_ok=True)
    tokenizer = _tokenizer(family, [text for row in rows for text in row])
    torch.manual_seed(0)
    model = _model(family, len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    batches = _batches(family, tokenizer, [row[1] for row in rows])
    for step, batch in enumerate(islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"{family}: step {step}, loss {loss.item():.3f}", flush=True)
    (folder / "steps").write_text(str(steps))
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)


def _tokenizer(family: str, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Whole words in lower case, those that the training part has."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "</s>", "<unk>", "<gap>"]
    made.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    if family == "t5":
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=192, **names)


def _model(family: str, words: int) -> Any:
    width, heads, layers = SIZES["width"], SIZES["heads"], SIZES["layers"]
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "vocab_size": words}
    if family == "gpt2":
        sizes = {"n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": 192}
        return GPT2LMHeadModel(GPT2Config(**sizes, **ids))
    sizes = {"d_model": width, "d_kv": width // heads, "d_ff": 4 * width, "num_heads": heads}
    return T5ForConditionalGeneration(
        T5Config(**sizes, num_layers=layers, decoder_start_token_id=0, **ids)
    )


def _batches(family: str, tokenizer: Any, targets: Sequence[str]) -> Any:
    """Without end, in random orders: a text to go on with, or one with gaps and the whole."""
    draw = random.Random("model")
    form = Form(tokenizer, 80, is_causal=family == "gpt2")
    pad = TextPad(form)
    make: Callable[[list[int]], dict[str, Any]] = _whole if family == "gpt2" else _with_gaps(draw)
    encoded = target_ids(targets, form)
    while True:
        draw.shuffle(encoded)
        for start in range(0, len(encoded) - BATCH + 1, BATCH):
            rows = [make(ids) for ids in encoded[start : start + BATCH]]
            yield pad([row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows])


def _whole(ids: list[int]) -> dict[str, Any]:
    """After an end, as a source ends."""
    return {"input_ids": [1, *ids], "labels": [NO_LOSS, *ids]}


def _with_gaps(draw: random.Random) -> Callable[[list[int]], dict[str, Any]]:
    def row(ids: list[int]) -> dict[str, Any]:
        kept = [3 if draw.random() < TAKEN_OUT else word for word in ids[:-1]]
        return {"input_ids": [*kept, ids[-1]], "labels": ids}

    return row


def _write(runs: Path) -> None:
    """The rows that are finished, in their order, in the place of those of the same names."""
    path = readme.GENERATION
    rows = {(row["family"], row["method"]): row for row in (read(path) if path.is_file() else [])}
    for family in FAMILIES:
        for method in METHODS:
            folder = runs / f"{family}-{method}"
            if (folder / "commit").is_file():
                rows[family, method] = _row(folder, family)
    order = [(family, method) for family in FAMILIES for method in METHODS]
    write(path, [rows[key] for key in order if key in rows])
    readme.main()


def _row(folder: Path, family: str) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    (run,) = found["seeds"]
    kept = (
        "method", "method_config", "bleu", "chrf", "rouge_l", "learning_rate",
        "trainable_parameters", "total_parameters", "seconds_per_step", "backends", "hardware",
        "torch",
    )  # fmt: skip
    return {
        "family": family,
        **{key: found[key] for key in kept},
        "stored_parameters": found.get("stored_parameters"),
        "steps": run["steps"],
        "train_examples": found["task"]["examples"]["train"],
        "test_examples": found["task"]["examples"]["test"],
        "sizes": SIZES,
        "steps_before": int((folder.parent / family / "steps").read_text()),
        "commit": (folder / "commit").read_text(),
    }


if __name__ == "__main__":
    sys.exit(main())

"""Methods on models that write text: 64 pairs learned by heart, and written back with beams.

    python -m benchmarks.overfit --data e2e/valid.tsv --json benchmarks/results/overfit.jsonl

A small T5, BART, GPT-2 and Llama is first trained as a whole on other pairs of the file (which
gives it words, not these targets), then frozen, and each method learns 64 pairs of different
sources. A row holds the loss per word that is left and how many of the 64 targets come back word
for word from beams, in batches.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from pelt_kernels import get_pelt_model
from pelt_kernels._hardware import hardware
from pelt_kernels.methods import (
    AdaMixConfig,
    BottleneckAdapterConfig,
    ControlPrefixesConfig,
    HyperPELTConfig,
    LoraConfig,
    MethodConfig,
    PrefixTuningConfig,
    UniPELTConfig,
    VLMConfig,
)

from .checkout import commit
from .rows import read, write

PAIRS, D, HEADS, LAYERS = 64, 64, 4, 2
PAD, BOS, EOS, SEP, UNKNOWN = range(5)
TARGETS = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
COMMON = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def methods(labels: dict[str, int]) -> dict[str, MethodConfig]:
    """The methods with sizes for a model of D = 64."""
    adapter = BottleneckAdapterConfig(bottleneck=64)
    prefix = PrefixTuningConfig(prefix_length=10, mid=128)
    return {
        "control_prefixes": ControlPrefixesConfig(
            prefix_length=24, mid=256, attributes=labels, attribute_length=16
        ),
        "vlm": VLMConfig(tasks=("e2e", "other"), bottlenecks=(128, 16)),
        "hyperpelt": HyperPELTConfig(tasks=("e2e", "other"), bottleneck=64),
        "adamix-lora": AdaMixConfig(kind="lora", r=16, alpha=32.0, targets=TARGETS),
        "unipelt": UniPELTConfig(
            adapter=adapter, prefix=prefix, lora=LoraConfig(r=16, targets=TARGETS)
        ),
    }


def make_model(family: str, words: int) -> Any:
    """A small model of a family with random weights."""
    torch.manual_seed(0)
    common: dict[str, Any] = COMMON | {"vocab_size": words}
    if family == "t5":
        config: Any = hf.T5Config(
            **common, d_model=D, d_kv=D // HEADS, num_heads=HEADS, num_layers=LAYERS, d_ff=4 * D,
            decoder_start_token_id=PAD, dropout_rate=0.0,
        )  # fmt: skip
        return hf.T5ForConditionalGeneration(config)
    if family == "bart":
        config = hf.BartConfig(
            **common, d_model=D, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=4 * D,
            decoder_ffn_dim=4 * D, max_position_embeddings=160, decoder_start_token_id=EOS,
            forced_eos_token_id=None, dropout=0.0, init_std=0.1,
        )  # fmt: skip
        return hf.BartForConditionalGeneration(config)
    if family == "gpt2":
        config = hf.GPT2Config(
            **common, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=160,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config)
    config = hf.LlamaConfig(
        **common, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2, intermediate_size=3 * D, max_position_embeddings=160,
        initializer_range=0.1,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


class Pairs:
    """The pairs of a file as numbers: the 64 shortest of different sources, and the next shortest
    for the base model.
    """

    def __init__(self, path: Path, others: int) -> None:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        rows.sort(key=lambda row: (len((row["source"] + row["target"]).split()), row["source"]))
        first = {row["source"]: row["target"] for row in reversed(rows)}
        chosen = dict(list(first.items())[-PAIRS:])
        rest = [row for row in rows if row["source"] not in chosen][:others]
        texts = [*chosen.items(), *((row["source"], row["target"]) for row in rest)]
        words = sorted({word for pair in texts for text in pair for word in text.split()})
        self.number = {word: 5 + i for i, word in enumerate(words)}
        encoded = [(self._encode(source), self._encode(target)) for source, target in texts]
        self.learned, self.others = encoded[:PAIRS], encoded[PAIRS:]
        self.words = 5 + len(words)
        # What a pair is labelled with: its place's name, and all that is said of the place.
        named = [source.partition(" | ") for source in chosen]
        columns = {"name": [name for name, _, _ in named], "said": [rest for _, _, rest in named]}
        self.labels, self.counts = {}, {}
        for attribute, values in columns.items():
            known = {value: i for i, value in enumerate(dict.fromkeys(values))}
            self.labels[attribute] = torch.tensor([known[value] for value in values])
            self.counts[attribute] = len(known)

    def _encode(self, text: str) -> list[int]:
        return [self.number[word] for word in text.split()]


def padded(rows: list[list[int]], value: int, in_front: bool = False) -> Tensor:
    """Rows of one length."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    joined = [(f + row) if in_front else (row + f) for row, f in zip(rows, fill)]
    return torch.tensor(joined)


def inputs(pairs: list[tuple[list[int], list[int]]], is_decoder: bool) -> dict[str, Tensor]:
    """What a model is trained with: the loss counts the target's words and its end."""
    if not is_decoder:
        ids = padded([[*source, EOS] for source, _ in pairs], PAD)
        labels = padded([[*target, EOS] for _, target in pairs], -100)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
    ids = padded([[*source, SEP, *target, EOS] for source, target in pairs], PAD)
    hidden = [[-100] * (len(source) + 1) + target + [EOS] for source, target in pairs]
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": padded(hidden, -100)}


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of pairs, each once in an epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


def extra_inputs(method: str, pairs: Pairs, rows: list[int]) -> dict[str, Any]:
    """The labels that a method wants beside the text."""
    if method == "control_prefixes":
        return {"attributes": {name: values[rows] for name, values in pairs.labels.items()}}
    if method in ("vlm", "hyperpelt"):
        return {"tasks": torch.zeros(len(rows), dtype=torch.long)}
    return {}


def fit(
    model: Any, pairs: Pairs, method: str, *, steps: int, rate: float, batch: int, stop: float
) -> int:
    """Trains what requires a gradient on the 64 pairs, or, without a method, on the others."""
    data = pairs.learned if method else pairs.others
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = hf.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    torch.manual_seed(0)
    model.train()
    recent = 1.0
    for step, rows in zip(range(1, steps + 1), batches(len(data), batch, seed=1)):
        given = inputs([data[row] for row in rows], not model.config.is_encoder_decoder)
        extra = extra_inputs(method, pairs, rows) if method else {}
        loss = model(**given, **extra).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = 0.9 * recent + 0.1 * loss.item()
        if recent < stop:
            return step
    return steps


@torch.no_grad()
def judge(model: Any, pairs: Pairs, method: str, beams: int, batch: int = 16) -> tuple[float, int]:
    """The loss per word over the 64 pairs, and how many targets are written word for word."""
    model.eval()
    is_decoder = not model.config.is_encoder_decoder
    loss, exact = 0.0, 0
    for start in range(0, PAIRS, batch):
        rows = list(range(start, start + batch))
        chosen = [pairs.learned[row] for row in rows]
        extra = extra_inputs(method, pairs, rows)
        loss += model(**inputs(chosen, is_decoder), **extra).loss.item() * batch / PAIRS
        end = [SEP] if is_decoder else [EOS]
        ids = padded([source + end for source, _ in chosen], PAD, in_front=is_decoder)
        written = model.generate(
            input_ids=ids, attention_mask=(ids != PAD).long(), num_beams=beams, do_sample=False,
            max_new_tokens=40, length_penalty=0.0, **extra,
        )  # fmt: skip
        written = written[:, ids.shape[1] if is_decoder else 1 :]
        for row, (_, target) in zip(written.tolist(), chosen):
            text = row[: row.index(EOS)] if EOS in row else row
            exact += [word for word in text if word not in (PAD, BOS)] == target
    return loss, exact


def rate_of(method: str, model: Any) -> float:
    """The learning rate; a decoder has prefixes in one kind of attention, which learn slowly."""
    is_slow = method == "control_prefixes" and not model.config.is_encoder_decoder
    return 2e-2 if is_slow else 5e-3


def keep_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file, in the place of an earlier one of the same family and method."""
    rows = read(path) if path.is_file() else []
    rows = [old for old in rows if (old["family"], old["method"]) != (row["family"], row["method"])]
    write(path, [*rows, row])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="source and target, as TSV")
    parser.add_argument("--json", type=Path, help="the file that rows are added to")
    parser.add_argument("--families", default="t5,bart,gpt2,llama")
    parser.add_argument("--methods", default="")
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--beams", type=int, default=4)
    options = parser.parse_args(arguments)
    pairs = Pairs(options.data, others=640)
    configs = methods(pairs.counts)
    wanted = options.methods.split(",") if options.methods else list(configs)
    for family in options.families.split(","):
        base = make_model(family, pairs.words)
        fit(base, pairs, "", steps=options.base_steps, rate=3e-3, batch=16, stop=0.0)
        for method in wanted:
            model = get_pelt_model(base, configs[method])
            begin = time.perf_counter()
            steps = fit(
                model,
                pairs,
                method,
                steps=options.steps,
                rate=rate_of(method, model),
                batch=16,
                stop=0.01,
            )
            loss, exact = judge(model, pairs, method, options.beams)
            row = {
                "family": family, "method": method, "loss": round(loss, 4), "exact": exact,
                "pairs": PAIRS, "beams": options.beams, "steps": steps,
                "trained": model.get_nb_trainable_parameters()[0],
                "seconds": round(time.perf_counter() - begin, 1),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if options.json:
                where = {"hardware": hardware(), "torch": torch.__version__, "commit": commit()}
                keep_row(options.json, row | where)
            base = model.remove()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

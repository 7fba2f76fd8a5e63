"""Reports on gates of every kind of problem, of a decoder, and of other methods than UniPELT."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_label_kinds import scored, tagged
from tiny_encoder import write_tsv
from tiny_writers import COLORS, THINGS, save_writer
from transformers import AutoConfig, AutoTokenizer

from pelt_kernels.training import Predictor, TrainConfig, train
from pelt_kernels.training.gate_report import comparison, report_gates


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are no means over rows are computed anew for each draw."""
    monkeypatch.setattr(comparison, "SLOW_DRAWS", 10)


def trained(folder: Path, files: tuple[Path, Path], **options: Any) -> Path:
    """A short run's folder."""
    config = TrainConfig(
        task=str(files[0]), eval=str(files[1]), epochs=1, batch_size=16, max_length=16,
        device="cpu", **options,
    )  # fmt: skip
    train(config, folder)
    return folder


def test_scores_have_no_groups(tiny_model, tmp_path):
    files = [write_tsv(tmp_path / f"{n}.tsv", scored(40, n)) for n in (1, 2)]
    run = trained(tmp_path / "run", tuple(files), model=str(tiny_model), problem="regression")
    report = report_gates(run, tmp_path)
    assert report["relations"]["traits"].keys() == {"label", "length", "loss"}
    assert report["relations"]["traits"]["label"]["statistic"] == "Spearman's correlation"
    assert report["gates"][0]["by_label"] == {}
    metrics = json.loads((run / "metrics.json").read_text())
    assert report["ablation"]["metric"] == "spearman"
    assert report["ablation"]["score"] == pytest.approx(metrics["spearman"])
    assert "id=distributions" not in (tmp_path / "gates.html").read_text()


def test_a_text_counts_for_each_of_its_labels(tiny_model, tmp_path):
    files = []
    for n in (1, 2):
        files.append(tmp_path / f"{n}.jsonl")
        rows = [{"text": text, "labels": labels} for text, labels in tagged(60, n)]
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = trained(tmp_path / "run", tuple(files), model=str(tiny_model), metric="accuracy")
    report = report_gates(run, tmp_path)
    assert "largest eta squared" in report["relations"]["traits"]["label"]["statistic"]
    given = [labels for _, labels in tagged(60, 2)]
    counts = {name: sum(name in labels for labels in given) for name in report["labels"]}
    assert {k: v["rows"] for k, v in report["gates"][0]["by_label"].items()} == counts
    metrics = json.loads((run / "metrics.json").read_text())
    assert report["ablation"]["score"] == pytest.approx(metrics["accuracy"])


def test_the_gates_of_a_decoders_tokens_are_pooled_over_real_ones(tmp_path):
    """In batches with padding they are the means of single texts' tokens."""
    model = save_writer(tmp_path / "gpt2", "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(model)
    config = AutoConfig.from_pretrained(model)
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(model)
    draw, files = random.Random(0), []
    for n in (48, 20):
        rows = []
        for _ in range(n):
            color, filler = draw.choice([*COLORS]), " ".join(["here"] * draw.randrange(6))
            text = f"{filler} the {color} {draw.choice([*THINGS])}".strip()
            rows.append((text, str(int(color in ("red", "blue")))))
        files.append(write_tsv(tmp_path / f"{n}.tsv", rows))
    run = trained(tmp_path / "run", tuple(files), model=str(model))
    report = report_gates(run, tmp_path, batch_size=8)
    predictor = Predictor(run / "adapter")
    predictor.model.record_gates()
    with (tmp_path / "gates.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    texts = [line.split("\t")[0] for line in files[1].read_text().splitlines()[1:]]
    assert {gate["kind"] for gate in report["gates"]} > {"adapter", "prefix"}
    assert report["active"]["thresholds"] == [] and "decoder" in report["active"]["why_not"]
    assert "What works for a text is not counted: " in (tmp_path / "gates.html").read_text()
    for row, text in zip(table, texts, strict=True):
        with torch.inference_mode():
            predictor.model(**predictor.tokenizer(text, return_tensors="pt"))
        for (layer, kind), gate in predictor.model.gate_values().items():
            found = float(row[f"{layer}.{kind}"])
            assert found == pytest.approx(gate[0].mean().item(), rel=1e-4)
    prefix = [gate for gate in report["gates"] if gate["kind"] == "prefix"]
    assert all(gate["std"] < 1e-6 for gate in prefix)  # one number for each layer there


@pytest.mark.parametrize(
    ("method", "options", "kinds", "parts"),
    [
        ("adapter", ("gated=true",), {"adapter"}, ["adapter"]),
        ("lora", ("gated=true",), {"lora_query", "lora_value"}, ["lora"]),
        ("composite", ("adapter.gated=true", "lora.r=2"), {"adapter"}, ["adapter", "lora"]),
    ],
)
def test_other_methods_have_gates_too(
    tiny_model, toy_files, tmp_path, method, options, kinds, parts
):
    """The part of a method of one part leaves the trained head, those of a composite each other."""
    run = trained(
        tmp_path / "run", toy_files, model=str(tiny_model), method=method, options=options,
        train_examples=32,
    )  # fmt: skip
    report = report_gates(run, tmp_path)
    assert {gate["kind"] for gate in report["gates"]} == kinds
    rows = report["ablation"]["rows"]
    assert [row["of"] for row in rows if row["change"] == "removed"] == parts
    closed = {row["of"]: row["loss"] for row in rows if row["change"] == "0"}
    removed = {row["of"]: row["loss"] for row in rows if row["change"] == "removed"}
    whole = "adapter" if "adapter" in kinds else "all gates"
    assert closed[whole] == pytest.approx(removed[parts[0]], rel=1e-6)
    assert np.isfinite([row["score"] for row in rows]).all()

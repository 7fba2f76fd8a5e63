"""The efficiency table: what a contender is, and what is made of the times."""

from __future__ import annotations

import argparse
import io
import json
import sys

import pytest
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import efficiency, efficiency_table, readme, step_contender, step_models
from pelt_kernels.ops import forget_choices


def tiny():
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=50,
            max_position_embeddings=16,
        )
    )


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setitem(step_models.MODELS, "tiny", step_models.StepModel(tiny, 2, 8, False))


PLAIN = ["full", "head", "lora", "unipelt"]


@pytest.mark.parametrize("name", [*PLAIN, "peft-lora", "peft-lora-accelerated"])
def test_a_contender_trains_what_its_method_trains(tiny_model, name):
    if name.startswith("peft-"):
        pytest.importorskip("peft")
    forget_choices()
    worker = step_contender.Worker(step_contender.CONTENDERS[name], "tiny", 2, "cpu")
    frozen = {n: p.clone() for n, p in worker.model.named_parameters() if not p.requires_grad}
    trained = [p.detach().clone() for p in worker.trained]
    assert bool(frozen) is (name != "full")
    for _ in range(2):
        assert all(seconds > 0 for seconds in worker.training())
    assert any((a != b).any() for a, b in zip(trained, worker.trained))
    assert all((frozen[n] == p).all() for n, p in worker.model.named_parameters() if n in frozen)
    before = [p.detach().clone() for p in worker.trained]
    worker.inference()
    assert all((a == b).all() for a, b in zip(before, worker.trained))
    assert worker.peak() > 2**20
    served = worker.backends()
    assert ("lora_linear" in served) is (name in ("lora", "unipelt"))


def test_a_process_answers_line_by_line(tiny_model, monkeypatch):
    answers = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["step_contender", "lora", "tiny", "2", "cpu"])
    monkeypatch.setattr(sys, "stdin", io.StringIO('["training", 1]\n["inference", 2]\n'))
    monkeypatch.setattr(sys, "stdout", answers)
    step_contender.main()
    about, training, inference = map(json.loads, answers.getvalue().splitlines())
    assert 0 < about["trainable_parameters"] < about["total_parameters"]
    assert about["stored_parameters"] == about["trainable_parameters"]  # LoRA's
    assert len(training) == len(inference) == 2


def test_every_contender_is_in_one_group():
    grouped = [name for group in efficiency.GROUPS for name in group]
    assert sorted([*grouped, "full"]) == sorted(step_contender.CONTENDERS)
    wanted = [("minilm", name) for name in ("full", "lora", "peft-lora", "unipelt")]
    found = list(efficiency._groups(wanted, {("minilm", "lora")}))
    assert found == [("minilm", ["unipelt"]), ("minilm", ["peft-lora"])]


def test_a_model_has_the_contenders_that_can_run_with_it():
    options = argparse.Namespace(adapters=None)
    names = ["head", "bitfit", "lora", "peft-prefix", "adapters-lora"]
    for model, able in (
        ("minilm", ["head", "bitfit", "lora"]),
        ("gpt2", ["bitfit", "lora", "peft-prefix"]),
        ("llama", ["lora", "peft-prefix"]),
    ):
        assert list(efficiency._able(model, names, options)) == able


def row(contender, seconds, over=None, model="bert-base"):
    def figures(share):
        spread = {"median": share, "low": share - 0.01, "high": share + 0.01}
        others = {name: spread | {"median": ratio} for name, ratio in (over or {}).items()}
        return {"seconds": share * 10, "share": spread, "over": others, "rounds": 5}

    return {
        "model": model,
        "contender": contender,
        **step_contender.CONTENDERS[contender]._asdict(),
        "training": figures(seconds[0]),
        "inference": figures(seconds[1]),
        "trainable_parameters": 1234,
        "peak_bytes": 2**30,
        "batch": 8,
        "length": 128,
        "threads": 2,
        "load": 0.1,
        "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
        "hardware": {"cpu": "some processor", "kind": "some avx2", "threads": 2, "gpu": None},
        "commit": "0123456789abcdef",
    }


def test_goals_hold_or_are_missed_by_the_medians():
    rows = [
        row("full", (1.0, 1.0)),
        row("unipelt", (0.59, 1.05), {"adapters-unipelt": 0.8}),
        row("lora", (0.5, 1.0), {"peft-lora": 0.9}),
    ]
    said = list(efficiency_table.goals(rows))
    assert said[0].startswith("holds: some avx2, bert-base, unipelt, training over full: 0.59")
    assert said[1].startswith("MISSED: some avx2, bert-base, unipelt, inference over full: 1.05")
    assert "MISSED: some avx2, bert-base, unipelt, training over adapters-unipelt: 0.80" in said[2]
    assert said[3].startswith("holds: some avx2, bert-base, lora, training over peft-lora: 0.90")


def test_a_method_is_compared_with_the_others_in_its_own_rounds():
    laps = {
        "full": [(2.0, 4.0), (4.0, 4.0), (2.0, 4.0)],
        "lora": [(1.0, 1.0), (1.0, 1.0), (1.0, 1.0)],
        "peft-lora": [(2.0, 1.0), (1.0, 1.0), (2.0, 1.0)],
        "head": [(0.5, 1.0)] * 3,
    }
    found = efficiency._compared(laps, "lora")
    assert found["share"]["median"] == 0.5
    assert found["processor_share"]["median"] == 0.25
    assert {name: ratio["median"] for name, ratio in found["over"].items()} == {"peft-lora": 0.5}
    assert found["rounds"] == 3 and found["seconds"] == 1.0


def test_the_tables_hold_the_papers_shares_beside_ours(tmp_path):
    rows = [row("full", (1, 1)), row("unipelt", (0.6, 1.04)), row("adapters-unipelt", (0.9, 1.3))]
    table = efficiency_table.paper_table(rows)
    line = next(text for text in table.splitlines() if "with LoRA" in text)
    assert "| 67 % | **60 %** | 90 % | – | 127 % | **104 %** | 130 % | – |" in line
    whole = efficiency_table.full(rows)
    assert "| UniPELT, with LoRA (adapters) | 1,234 | 9,000 ms | 90 % (89–91) | 114 |" in whole
    rows[1]["stored_parameters"] = 56
    whole, paper = efficiency_table.full(rows), efficiency_table.paper_table(rows)
    assert "| UniPELT, with LoRA (adapters) | 1,234 | – | 9,000 ms |" in whole
    assert "| 1,234 | 56 | 6,000 ms |" in whole and "| 1,234 | 56 | 67 % |" in paper
    elsewhere = [r | {"hardware": r["hardware"] | {"kind": "another avx512"}} for r in rows]
    assert efficiency_table.full(rows + elsewhere) == f"{whole}\n{efficiency_table.full(elsewhere)}"
    efficiency_table.draw(rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 10_000
    assert readme.tables().keys() >= {readme.RESULTS}

"""Where a step spends its time: parts that sum up to the whole, and their table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import step_profile
from benchmarks.step_contender import CONTENDERS, Worker
from benchmarks.step_models import MODELS, StepModel


def row(contender: str, seconds: float, **kinds: float) -> dict[str, Any]:
    found = {"seconds": seconds, "kinds": dict.fromkeys(step_profile.KINDS, 0.0) | kinds}
    found["kinds"] |= {"other operators": 0.0, "optimizer": 0.0, step_profile.REST: 0.0}
    about = {"batch": 8, "length": 128, "commit": "0" * 40, "threads": 2}
    about |= {"hardware": {"cpu": "x", "kind": "AMD avx2"}, "versions": {"torch": "2"}}
    contending = CONTENDERS[contender]._asdict()
    return {"model": "minilm", "contender": contender, "training": found, **contending, **about}


def test_the_parts_sum_up_to_the_step() -> None:
    operators = {"aten::addmm": 2.0, "aten::mm": 1.0, "aten::add_": 1.5, "AddBackward0": 0.3}
    kinds = step_profile.kinds_of({"seconds": 6.0, "optimizer": 0.5, "operators": operators})
    assert kinds["products"] == 3.0 and kinds["optimizer"] == 0.5
    assert kinds["other operators"] == 1.0  # without the optimizer's
    assert sum(kinds.values()) == pytest.approx(6.0)


def test_shares_are_of_full_fine_tuning() -> None:
    rows = [row("full", 4.0, products=3.0), row("lora", 2.0, products=1.0)]
    table = step_profile.table(rows)
    assert "| MiniLM, 6 layers of 384 | full fine-tuning | 100 % | 75.0 % |" in table
    assert "| MiniLM, 6 layers of 384 | LoRA (pelt_kernels) | 50 % | 25.0 % |" in table
    other = row("full", 8.0) | {"hardware": {"cpu": "y", "kind": "Intel avx512"}}
    assert step_profile.table([*rows, other]) == f"{table}\n{step_profile.table([other])}"


def test_a_worker_profiles_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> Any:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 99}
        return BertForSequenceClassification(
            BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        )

    monkeypatch.setitem(MODELS, "minilm", StepModel(small, 2, 8, writes=False))
    with torch.random.fork_rng():
        worker = Worker(CONTENDERS["full"], "minilm", 2, "cpu")
    worker.training()
    found = worker.profile("training")
    assert 0 < found["optimizer"] < found["seconds"]
    assert found["operators"]["aten::addmm"] > 0
    kinds = step_profile.kinds_of(found)
    assert sum(kinds.values()) == pytest.approx(found["seconds"], rel=0.05)

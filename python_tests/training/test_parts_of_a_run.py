"""Metrics, batches, files and options, each by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pelt_kernels.training import RunError, TrainConfig, UsageError
from pelt_kernels.training.base_model import load_tokenizer
from pelt_kernels.training.config import continued, save_config
from pelt_kernels.training.encode import LengthGroups, Pad, encode
from pelt_kernels.training.metrics import score, summarise
from pelt_kernels.training.storage import clear_partial, replacing, require_writable
from pelt_kernels.training.tasks import Example


def test_scores_of_two_classes_by_hand() -> None:
    expected = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    predicted = np.array([1, 1, 0, 1, 0, 0, 0, 0])  # tp 2, fn 1, fp 1, tn 4
    found = score(predicted, expected, classes=2)
    assert found["accuracy"] == pytest.approx(6 / 8)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5)


def test_f1_of_more_classes_is_the_mean_over_all_of_them() -> None:
    found = score(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), classes=3)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_constant_predictions_have_no_correlation() -> None:
    assert score(np.zeros(4, int), np.array([0, 1, 0, 1]), 2)["matthews"] == 0.0


def test_mean_and_deviation() -> None:
    assert summarise([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0}
    assert summarise([1.0]) == {"mean": 1.0, "std": 0.0}


def test_each_epoch_has_its_own_order_of_all_rows() -> None:
    lengths = [number % 37 for number in range(500)]
    groups = LengthGroups(lengths, batch_size=8, seed=3)
    first = list(groups)
    assert sorted(first) == list(range(500)) and list(groups) == first
    groups.set_epoch(1)
    assert list(groups) != first and sorted(groups) == list(range(500))
    assert list(LengthGroups(lengths, 8, seed=4)) != first


def test_batches_hold_rows_of_like_length() -> None:
    lengths = [number % 37 for number in range(512)]
    order = list(LengthGroups(lengths, batch_size=8, seed=0))
    spreads = [
        max(lengths[i] for i in order[at : at + 8]) - min(lengths[i] for i in order[at : at + 8])
        for at in range(0, 512, 8)
    ]
    assert sum(spreads) / len(spreads) < 6  # about 32 in a plain shuffle


def test_long_texts_are_cut_and_counted(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    examples = [Example("good " * n, None, "1", "") for n in (3, 30, 31)]
    encoded = encode(examples, tokenizer, 32, lambda example: ("0", "1").index(example.label))
    assert encoded.lengths == [5, 32, 32] and encoded.truncated == 1
    batch = Pad(tokenizer)([encoded[0], encoded[1]])
    assert batch["input_ids"].shape == (2, 32)
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 32]
    assert batch["labels"].tolist() == [1, 1]


def test_a_pair_keeps_both_texts_when_cut(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    encoded = encode([Example("good film", "bad " * 40, None, "")], tokenizer, 16)
    words = tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"])
    assert words[:4] == ["[CLS]", "good", "film", "[SEP]"] and words.count("bad") == 11


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "weights").write_text("old")
    with (
        pytest.raises(RunError, match="cannot be written: No space left"),
        replacing(target) as new,
    ):
        new.mkdir()
        (new / "weights").write_text("ne")
        raise OSError(28, "No space left on device")
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    with replacing(target) as new:
        new.mkdir()
        (new / "weights").write_text("new")
    assert (target / "weights").read_text() == "new"


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".partial-checkpoint-3").mkdir()
    (tmp_path / ".partial-run.json").write_text("{")
    (tmp_path / "checkpoint-2").mkdir()
    clear_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_too_little_space_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"needs about [\d,]+ MiB under .*MiB are free"):
        require_writable(tmp_path / "new", needed_bytes=2**60)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        require_writable(tmp_path / "file" / "inside")


def test_a_read_only_folder_is_one_sentence(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot be written"):
        require_writable(tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("method", "unipeltt", "method: expected one of unipelt, "),
        ("backend", "cudnn", "backend: expected one of cuda, "),
        ("device", "tpu", "device: expected one of auto, cpu, cuda"),
        ("precision", "int8", "precision: expected one of fp32"),
        ("epochs", 0, "epochs: expected at least 1, got 0"),
        ("batch_size", -1, "batch-size: expected at least 1"),
        ("train_examples", 0, "train-examples: expected at least 1"),
        ("seeds", (1, 1), "seeds: expected different numbers"),
        ("seeds", (), "seeds: expected different numbers"),
        ("lr", (0.0,), "lr: expected different positive numbers"),
        ("lr", (float("nan"),), "lr: expected different positive numbers"),
        ("warmup", 1.5, "warmup: expected a share"),
        ("metric", "auc", "metric: expected one of accuracy, f1, matthews, .*got 'auc'"),
        ("class_weights", "inverse", "class-weights: expected one of none, balanced, got 'inv"),
        ("eval_every", -1, "eval-every: expected 0"),
    ],
)
def test_a_wrong_option_is_refused(option: str, value: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        TrainConfig(**{option: value}).resolved()


def test_a_continued_run_keeps_its_options(tmp_path: Path) -> None:
    config = TrainConfig(method="lora", lr=(1e-3, 1e-2), metric="f1").resolved()
    save_config(config, tmp_path)
    assert continued(tmp_path, {}) == config
    with pytest.raises(UsageError, match="metric: the run in .* was begun with f1, not matthews"):
        continued(tmp_path, {"metric": "matthews"})
    with pytest.raises(UsageError, match="class-weights: the run in .* was begun with none, not b"):
        continued(tmp_path, {"class_weights": "balanced"})
    assert continued(tmp_path, {"lr": (1e-3, 1e-2)}) == config
    with pytest.raises(UsageError, match="method: the run in .* was begun with lora, not prefix"):
        continued(tmp_path, {"method": "prefix"})
    (tmp_path / "run.json").write_text('{"method": "lo')
    with pytest.raises(RunError, match="run.json is damaged"):
        continued(tmp_path, {})
    with pytest.raises(UsageError, match="holds no run"):
        continued(tmp_path / "elsewhere", {})

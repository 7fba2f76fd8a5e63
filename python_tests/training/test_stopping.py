"""Which evaluation is the best, when a run ends, and what weighs in its loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny_encoder import write_tsv
from torch.nn.functional import cross_entropy
from transformers import TrainerControl, TrainerState, TrainingArguments

from pelt_kernels.models import get_pelt_model
from pelt_kernels.training import TrainConfig, UsageError, Watchers, train
from pelt_kernels.training.base_model import load_classifier, load_tokenizer
from pelt_kernels.training.encode import Pad, encode
from pelt_kernels.training.metrics import balanced_weights
from pelt_kernels.training.recipes import RECIPES
from pelt_kernels.training.run_trainer import PeltTrainer
from pelt_kernels.training.stopping import (
    EarlyStopping,
    best_evaluation,
    evaluations_without_gain,
)
from pelt_kernels.training.tasks import Example


def history_of(
    scores: list[float], losses: list[float], metric: str = "accuracy", constant: str = ""
) -> list[dict[str, Any]]:
    """Evaluations after each step; at those marked with a ``c`` all of dev gets one answer."""
    history: list[dict[str, Any]] = [{"loss": 1.0, "step": 1}]
    for step, (score, loss) in enumerate(zip(scores, losses, strict=True), 1):
        answered = 1 if constant[step - 1 : step] == "c" else 2
        history.append(
            {
                "step": step,
                f"eval_{metric}": score,
                "eval_loss": loss,
                "eval_classes_answered": answered,
            }
        )
    return history


# Of 31 % and 69 % of two classes, the model at first answers with the second alone.
UNBALANCED = ([0.738] * 4, [0.611, 0.549, 0.500, 0.456])


@pytest.mark.parametrize(
    ("scores", "losses", "constant", "waited", "best"),
    [
        ([0.5], [0.7], "", 0, 1),
        ([0.5, 0.6], [0.7, 0.8], "", 0, 2),
        ([0.6, 0.6], [0.7, 0.7], "", 1, 1),  # neither score nor loss
        ([0.6, 0.6], [0.7, 0.70004], "", 1, 1),
        ([0.6, 0.6], [0.7, 0.69996], "", 1, 1),  # a loss is equal to four digits
        ([0.6, 0.6], [0.7, 0.6], "", 0, 2),
        ([0.6, 0.5, 0.6], [0.7, 0.5, 0.7], "", 2, 1),  # a lower score is no gain at any loss
        ([0.6, 0.5, 0.7], [0.7, 0.6, 0.9], "", 0, 3),
        (*UNBALANCED, "cccc", 0, 4),
        (*UNBALANCED, "", 0, 4),
        ([*UNBALANCED[0], 0.738, 0.738], [*UNBALANCED[1], 0.46, 0.47], "cccccc", 2, 4),
        ([0.74, *UNBALANCED[0]], [0.65, *UNBALANCED[1]], " cccc", 0, 1),  # a lucky answer before
        ([0.74, *UNBALANCED[0]], [0.65, *UNBALANCED[1]], "", 4, 1),
        ([0.74, 0.738, 0.738], [0.65, 0.66, 0.67], " cc", 2, 1),  # the same answer, nothing learnt
    ],
)
def test_the_loss_decides_where_the_score_stands_still(
    scores: list[float], losses: list[float], constant: str, waited: int, best: int
) -> None:
    history = history_of(scores, losses, constant=constant)
    assert evaluations_without_gain(history, "accuracy") == waited
    found = best_evaluation(history, "accuracy")
    assert found is not None and found["step"] == best


@pytest.mark.parametrize(
    ("history", "stops"),
    [
        (history_of(*UNBALANCED, constant="cccc"), False),
        (history_of([0.8, 0.7, 0.7, 0.7], [0.5, 0.4, 0.3, 0.2]), True),
        (history_of([0.7, 0.8, 0.7, 0.7], [0.5, 0.4, 0.3, 0.2]), False),
    ],
)
def test_patience_of_three(history: list[dict[str, Any]], stops: bool) -> None:
    control = TrainerControl()
    EarlyStopping("accuracy", patience=3).on_evaluate(
        None, TrainerState(log_history=history), control
    )
    assert control.should_training_stop == stops


def test_without_evaluations_there_is_no_best() -> None:
    assert evaluations_without_gain([{"loss": 1.0}], "accuracy") == 0
    assert best_evaluation([{"loss": 1.0}], "accuracy") is None


def test_evaluations_while_pruning_do_not_count() -> None:
    history = history_of([0.9, 0.6, 0.6], [0.1, 0.7, 0.7])
    history[1]["is_pruning"] = True
    found = best_evaluation(history, "accuracy")
    assert found is not None and found["step"] == 2
    assert evaluations_without_gain(history, "accuracy") == 1


def test_the_chosen_metric_decides() -> None:
    history = history_of([0.7, 0.6, 0.6], [0.6, 0.6, 0.6])
    for entry, value in zip(history[1:], [0.0, 0.2, 0.1], strict=True):
        entry["eval_matthews"] = value
    by_metric = {name: best_evaluation(history, name) for name in ("accuracy", "matthews")}
    assert {name: entry and entry["step"] for name, entry in by_metric.items()} == {
        "accuracy": 1,
        "matthews": 2,
    }
    assert evaluations_without_gain(history, "accuracy") == 2
    assert evaluations_without_gain(history, "matthews") == 1


@pytest.fixture(scope="module")
def one_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training and a test file whose texts differ in a word the tokenizer does not know: nothing
    can be learnt but that two thirds have one label.
    """
    folder = tmp_path_factory.mktemp("one-text")
    table = [(f"the film was w{row}", "1" if row % 3 else "0") for row in range(330)]
    return write_tsv(folder / "train.tsv", table[30:]), write_tsv(folder / "test.tsv", table[:30])


@pytest.fixture
def config(tiny_model: Path, one_text: tuple[Path, Path]) -> TrainConfig:
    return TrainConfig(
        task=str(one_text[0]),
        eval=str(one_text[1]),
        model=str(tiny_model),
        method="head",
        lr=(1e-3,),
        epochs=4,
        eval_every=5,
        patience=1,
        train_examples=80,
        batch_size=8,
        max_length=16,
        device="cpu",
    )


def evaluations(output: Path) -> list[dict[str, Any]]:
    (result,) = output.glob("lr-*/result.json")
    history = json.loads(result.read_text())["history"]
    return [entry for entry in history if "eval_loss" in entry]


def test_a_run_goes_on_while_a_constant_answer_improves_and_says_what_it_kept(
    config: TrainConfig, tmp_path: Path
) -> None:
    said: list[str] = []
    found = train(config, tmp_path, watchers=Watchers(say=said.append))
    seen = evaluations(tmp_path)
    losses = [entry["eval_loss"] for entry in seen]
    assert len(seen) == 8 and losses == sorted(losses, reverse=True)
    assert {entry["eval_classes_answered"] for entry in seen} == {1}
    (run,) = found["seeds"]
    assert run["best_step"] == 40 and run["dev_loss"] == losses[-1]
    (note,) = run["notes"]
    assert note in said
    assert "the best on dev by accuracy, gives all 30 dev examples the same answer; " in note
    assert "; --metric matthews, --class-weights balanced, more --epochs or" in note
    assert json.loads((tmp_path / "metrics.json").read_text())["seeds"][0]["notes"] == [note]


def test_a_run_that_tells_classes_apart_says_nothing(
    config: TrainConfig, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    config = replace(config, task=str(toy_files[0]), eval=str(toy_files[1]), lr=(0.1,))
    assert train(config, tmp_path)["seeds"][0]["notes"] == []


def test_the_end_of_a_run_is_evaluated(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, epochs=2, eval_every=15), tmp_path)
    assert [entry["step"] for entry in evaluations(tmp_path)] == [15, 20]


def test_short_epochs_are_not_each_evaluated(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, eval_every=0), tmp_path)
    assert [entry["step"] for entry in evaluations(tmp_path)] == [25, 40]


def test_few_examples_are_gone_through_more_often(config: TrainConfig, tmp_path: Path) -> None:
    recipe = RECIPES["head"]
    for examples in (10, 100, 200, 1000):
        epochs = recipe.epochs_for(examples, batch_size=16)
        steps = epochs * -(-examples // 16)
        assert epochs == recipe.epochs or steps >= recipe.steps > steps - -(-examples // 16)
    found = train(replace(config, epochs=None, lr=(1e-9,)), tmp_path)  # no gain
    assert found["seeds"][0]["steps"] == 10
    assert found["config"]["epochs"] == RECIPES["head"].epochs_for(80, batch_size=8)


def test_the_metric_of_a_run_chooses_rate_and_weights(
    config: TrainConfig, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    config = replace(
        config, task=str(toy_files[0]), eval=None, metric="matthews", lr=(1e-5, 0.1), epochs=2
    )
    said: list[str] = []
    found = train(config, tmp_path, watchers=Watchers(say=said.append))
    assert any(sentence.startswith("dev matthews by learning rate: ") for sentence in said)
    (run,) = found["seeds"]
    tried = found["learning_rates_tried_on_dev"]
    assert run["dev_matthews"] == max(tried.values()) != run["dev_accuracy"]
    assert found["config"]["metric"] == "matthews"


def test_balanced_weights_by_hand() -> None:
    assert balanced_weights([0, 1, 1, 1], classes=2) == [4 / (2 * 1), 4 / (2 * 3)]
    with pytest.raises(ValueError, match=r"expected examples of every class, got \[2, 0, 1\]"):
        balanced_weights([0, 0, 2], classes=3)


def trainer_of(
    tiny_model: Path, method: str, weights: list[float] | None, folder: Path
) -> tuple[PeltTrainer, dict[str, Any]]:
    """A trainer and a batch."""
    tokenizer = load_tokenizer(str(tiny_model))
    texts = [("good film", "1"), ("a bad song", "0"), ("so warm", "1"), ("very fine", "1")]
    examples = [Example(text, None, label, "") for text, label in texts]
    rows = encode(examples, tokenizer, 16, lambda example: ("0", "1").index(example.label))
    config = TrainConfig(method=method).method_for()
    torch.manual_seed(0)
    model = get_pelt_model(load_classifier(str(tiny_model), 2), config)
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # probabilities far from each other
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    trainer = PeltTrainer(model, arguments, rows, rows, order_seed=0, class_weights=weights)
    return trainer, Pad(tokenizer)([rows[index] for index in range(4)])


@pytest.mark.parametrize("method", ["lora", "adamix"])
@pytest.mark.parametrize("is_training", [True, False])
def test_class_weights_in_the_loss(
    tiny_model: Path, tmp_path: Path, method: str, is_training: bool
) -> None:
    """``sum(w_i l_i) / sum(w_i)`` instead of ``mean(l_i)``; a consistency loss stays."""
    weights = [2.0, 2 / 3]
    trainer, batch = trainer_of(tiny_model, method, weights, tmp_path)
    trainer.model.train(is_training)
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)

    def by_hand(dtype: torch.dtype) -> torch.Tensor:
        each = cross_entropy(outputs["logits"].to(dtype), batch["labels"], reduction="none")
        own = torch.tensor(weights, dtype=dtype)[batch["labels"]]
        return outputs["loss"].to(dtype) - each.mean() + (own * each).sum() / own.sum()

    truth = by_hand(torch.float64)
    assert_close(loss.detach(), by_hand(torch.float32).detach(), truth, loss.dtype, "loss")
    assert abs(loss - outputs["loss"]) > 0.01
    consistency = outputs["loss"] - cross_entropy(outputs["logits"], batch["labels"])
    assert (consistency > 1e-3) == (method == "adamix" and is_training)


def test_without_class_weights_the_loss_is_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    trainer, batch = trainer_of(tiny_model, "lora", None, tmp_path)
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert loss is outputs["loss"]


def test_class_weights_of_a_run_are_those_of_its_draw(config: TrainConfig, tmp_path: Path) -> None:
    """Two thirds of one class and a third of the other, made even: the loss can only rise."""
    config = replace(config, lr=(3e-2,), epochs=2, patience=100)
    train(config, tmp_path / "plain")
    found = train(replace(config, class_weights="balanced"), tmp_path / "balanced")
    plain, balanced = (evaluations(tmp_path / name)[-1] for name in ("plain", "balanced"))
    assert plain["eval_loss"] < 0.65 < 0.68 < balanced["eval_loss"]
    assert found["config"]["class_weights"] == "balanced"


def test_a_class_that_is_not_drawn_has_no_weight(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, train_examples=1, class_weights="balanced")
    with pytest.raises(
        UsageError, match="class-weights: expected training examples of every class, got none of "
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

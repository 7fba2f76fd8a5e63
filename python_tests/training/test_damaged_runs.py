"""What a run left is read back with every type checked, and nothing in it is ever executed."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import damage_json

from pelt_kernels.training import Interrupted, RunError, TrainConfig, UsageError, Watchers, train
from pelt_kernels.training.config import load_config, save_config
from pelt_kernels.training.experiment_run import RESULT, rate_name
from pelt_kernels.training.predictor import Card
from pelt_kernels.training.run_trainer import checkpoints


@pytest.fixture(scope="module")
def config(tiny_model: Path, toy_files: tuple[Path, Path]) -> TrainConfig:
    return TrainConfig(
        task=str(toy_files[0]), model=str(tiny_model), method="lora", train_examples=32, epochs=2,
        batch_size=8, max_length=16, device="cpu", seeds=(0, 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def broken_run(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first seed has ended and whose second was stopped after a checkpoint."""
    output = tmp_path_factory.mktemp("broken")
    watchers = Watchers()
    titles: list[str] = []

    def stop_second(title: str) -> list[Any]:
        titles.append(title)
        if len(titles) == 2:
            watchers.stop._can_wait = True
            watchers.stop.request(signal.SIGTERM)
        return []

    watchers.progress = stop_second
    with pytest.raises(Interrupted):
        train(config, output, watchers=watchers)
    return output


@pytest.fixture
def run(broken_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(broken_run, tmp_path / "run"))


def refused(config: TrainConfig, run: Path, sentence: str) -> None:
    with pytest.raises(RunError, match=re.escape(sentence)) as error:
        train(config, run, resume=True)
    assert "\n" not in str(error.value)


WRONG_RESULTS = {
    ("seed", '"0"'): "expected seed as a whole number, got '0'",
    ("seed", "true"): "expected seed as a whole number, got True",
    ("seed", "5"): "is of another run",
    ("dev_accuracy", "null"): "expected dev_accuracy as a number, got None",
    ("seconds_per_step", "[]"): "expected seconds_per_step as a number or null, got []",
    ("backends", '{"lora_linear": 1}'): "expected backends.lora_linear as text, got 1",
    ("history", "{}"): "expected history as a list of an object, got {}",
    ("history", "[3]"): "expected history.0 as an object, got 3",
    ("history", '[{"loss": 1}]'): "history.0.step is missing",
    ("history", '[{"step": 1, "loss": "x"}]'): "expected history.0.loss as a number, got 'x'",
    ("history", '[{"step": 1, "gates": {"x": 1}}]'): "expected gates as <layer>.<kind>",
    ("history", "[" * 10**5 + "]" * 10**5): "result.json is damaged",
}


@pytest.mark.parametrize(("key", "text"), WRONG_RESULTS)
def test_wrong_types_in_a_result_are_named(
    config: TrainConfig, run: Path, key: str, text: str
) -> None:
    (path,) = run.glob("lr-*-seed-0/result.json")
    damage_json(path, key, text)
    refused(config, run, WRONG_RESULTS[key, text])
    refused(config, run, f"remove {path.parent} to train again")


def test_a_result_from_before_the_stored_were_counted_is_read(
    config: TrainConfig, run: Path
) -> None:
    (path,) = run.glob("lr-*-seed-0/result.json")
    values = json.loads(path.read_text())
    stored = values.pop("stored_parameters")
    path.write_text(json.dumps(values))
    found = train(config, run, resume=True)
    assert found["stored_parameters"] == stored == found["trainable_parameters"]  # LoRA's
    assert "stored_parameters" not in found["seeds"][0]


def test_a_result_holds_what_is_checked(run: Path) -> None:
    (path,) = run.glob("lr-*-seed-0/result.json")
    assert set(json.loads(path.read_text())) >= set(RESULT)


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("global_step", '"4"', "expected global_step as a whole number, got '4'"),
        ("log_history", "{}", "expected log_history as a list of an object, got {}"),
        ("best_metric", "true", "expected best_metric as a number or null, got True"),
    ],
)
def test_wrong_types_in_a_trainers_state_are_named(
    config: TrainConfig, run: Path, key: str, text: str, sentence: str
) -> None:
    (path,) = run.glob("lr-*/checkpoint-*/trainer_state.json")
    damage_json(path, key, text)
    refused(config, run, sentence)


def test_the_fingerprint_is_text(config: TrainConfig, run: Path) -> None:
    damage_json(run / "data.json", "fingerprint", "[1]")
    refused(config, run, "data.json is damaged (expected fingerprint as text, got [1])")


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("task", "1", "expected task as text, got 1"),
        ("epochs", '"2"', "expected epochs as a whole number or null, got '2'"),
        ("lr", '[1e-3, "x"]', "expected lr.1 as a number, got 'x'"),
        ("seeds", "0", "expected seeds as a list of a whole number, got 0"),
        ("options", "[[]]", "expected options.0 as text, got []"),
        ("later", "1", "unknown: 'later'"),
    ],
)
def test_wrong_types_in_run_json_are_named(
    tmp_path: Path, key: str, text: str, sentence: str
) -> None:
    save_config(TrainConfig().resolved(), tmp_path)
    damage_json(tmp_path / "run.json", key, text)
    with pytest.raises(RunError, match=re.escape(sentence)):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("task", "null", "expected task as text, got None"),
        ("labels", '"01"', "expected labels as a list of text, got '01'"),
        ("labels", '["0", 1]', "expected labels.1 as text, got 1"),
        ("labels", '["0", "0"]', "expected different labels, two at least"),
        ("has_pairs", "0", "expected has_pairs as true or false, got 0"),
        ("max_length", "16.5", "expected max_length as a whole number, got 16.5"),
        ("max_length", "-1", "max_length >= 1, got"),
    ],
)
def test_wrong_types_in_a_card_are_named(
    tmp_path: Path, key: str, text: str, sentence: str
) -> None:
    Card("toy", "model", ("0", "1"), False, 16).save(tmp_path)
    damage_json(tmp_path / "task.json", key, text)
    with pytest.raises(RunError, match=re.escape(sentence)):
        Card.load(tmp_path)


class Payload:
    """Makes a file when a pickle of it is loaded without limits."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    config: TrainConfig, run: Path, tmp_path: Path, name: str, form: str
) -> None:
    import torch

    made = tmp_path / "executed"
    (path,) = run.glob(f"lr-*/checkpoint-*/{name}")
    torch.save(Payload(made), path) if form == "torch" else path.write_bytes(
        pickle.dumps(Payload(made), protocol=2)
    )
    refused(config, run, f"checkpoint {path.parent} cannot be read (")
    assert not made.exists()
    pickle.loads(pickle.dumps(Payload(made)))
    assert made.exists(), "the payload does nothing, so that nothing was shown"


def test_folders_of_others_beside_checkpoints_are_let_alone(config: TrainConfig, run: Path) -> None:
    (folder,) = run.glob("lr-*-seed-1")
    others = [folder / f"checkpoint-{name}" for name in ("old", "0", "-3", "4x", "04")]
    for other in others:
        other.mkdir()
    assert len(checkpoints(folder)) == 1
    train(config, run, resume=True)
    assert checkpoints(folder) == [] and all(other.is_dir() for other in others)


def test_rates_that_differ_have_names_that_differ(tmp_path: Path) -> None:
    rates = (0.001, 0.0010000001, 1e-5, 1e-5 + 1e-20, 3e-4)
    assert len({rate_name(rate) for rate in rates}) == len(set(rates)) == len(rates)
    assert rate_name(0.001) == "0.001" and float(rate_name(0.0010000001)) == 0.0010000001


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "seeds",
            (2**32,),
            "seeds: expected different numbers from 0 to 4294967295, got 4294967296",
        ),
        ("epochs", 10**30, "epochs: expected at most 2147483647, got 1000"),
        ("batch_size", 2**31, "batch-size: expected at most 2147483647"),
        ("train_examples", 2**31, "train-examples: expected at most"),
        ("eval_every", 10**20, "eval-every: expected 0 (once an epoch) or a number of steps up to"),
    ],
)
def test_numbers_out_of_range_are_refused(field: str, value: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        TrainConfig(**{field: value}).resolved()
    TrainConfig(seeds=(2**32 - 1,)).resolved()

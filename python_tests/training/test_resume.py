"""A run that was stopped and resumed ends with the very weights of a run that was not."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_encoder import rows, write_tsv
from transformers import TrainerCallback

from pelt_kernels.training import (
    Interrupted,
    RunError,
    TrainConfig,
    UsageError,
    Watchers,
    experiment_run,
    load_task,
    train,
)
from pelt_kernels.training.run_trainer import FILES, checkpoints

STEPS_PER_EPOCH = 6  # 48 examples in batches of 8


@pytest.fixture(scope="module", autouse=True)
def every_epoch_is_evaluated() -> Iterator[None]:
    """However short it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment_run, "LEAST_STEPS_BETWEEN_EVALUATIONS", 1)
        yield


@pytest.fixture(scope="module")
def config(tiny_model: Path, toy_files: tuple[Path, Path]) -> TrainConfig:
    train_file, test_file = map(str, toy_files)
    return TrainConfig(
        task=train_file,
        eval=test_file,
        model=str(tiny_model),
        method="unipelt",
        train_examples=48,
        epochs=3,
        batch_size=8,
        max_length=16,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run without a break."""
    output = tmp_path_factory.mktemp("whole")
    train(config, output)
    return output


class StopAt(TrainerCallback):
    """Sends a signal's request when a step has been taken, or when an evaluation has begun."""

    def __init__(self, watchers: Watchers, step: int, event: str = "on_step_end"):
        self.watchers, self.step = watchers, step
        setattr(self, event, self._maybe)

    def _maybe(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and self.watchers.stop.number is None:
            self.watchers.stop.request(signal.SIGTERM)


def interrupted(
    config: TrainConfig, output: Path, step: int, event: str = "on_step_end"
) -> Interrupted:
    watchers = Watchers()
    watchers.progress = lambda title: [StopAt(watchers, step, event)]
    with pytest.raises(Interrupted) as stopped:
        train(config, output, watchers=watchers, resume=(output / "run.json").exists())
    return stopped.value


def run_folder(output: Path) -> Path:
    (folder,) = output.glob("lr-*-seed-0")
    return folder


def weights(output: Path) -> dict[str, Any]:
    return load_file(output / "adapter" / "pelt_model.safetensors")


def assert_same_end(one: Path, two: Path) -> None:
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys() and expected
    for name, value in expected.items():
        assert value.equal(found[name]), name
    assert (one / "test_predictions.jsonl").read_text() == (
        two / "test_predictions.jsonl"
    ).read_text()


@pytest.mark.parametrize(
    ("step", "event"),
    [
        (STEPS_PER_EPOCH + 3, "on_step_end"),  # in the middle of an epoch
        (STEPS_PER_EPOCH, "on_step_end"),  # at its end, before the evaluation
        (2 * STEPS_PER_EPOCH, "on_evaluate"),  # between the evaluation and its checkpoint
        (3 * STEPS_PER_EPOCH, "on_step_end"),  # at the end of all
    ],
)
def test_resuming_reaches_the_same_weights_bitwise(
    config: TrainConfig, whole: Path, tmp_path: Path, step: int, event: str
) -> None:
    stopped = interrupted(config, tmp_path, step, event)
    assert stopped.exit_code == 143
    assert f"checkpoint-{step}" in str(stopped) and "--resume" in str(stopped)
    assert not (tmp_path / "metrics.json").exists()
    train(config, tmp_path, resume=True)
    assert_same_end(whole, tmp_path)


def test_experts_and_pruning_resume_bitwise(config: TrainConfig, tmp_path: Path) -> None:
    """Draws, schedule and the experts' spared moments go on where they were."""
    given = ("adamix.kind=lora", "pst.targets=ffn_in,ffn_out", "pst.sparsity=0.5", "bitfit=true")
    config = replace(config, method="composite", options=given, weight_decay=0.1)
    train(config, tmp_path / "whole")
    interrupted(config, tmp_path / "broken", STEPS_PER_EPOCH + 3)
    train(config, tmp_path / "broken", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "broken")


def test_a_run_stopped_twice_ends_the_same_with_evaluations_by_steps(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, eval_every=4)
    train(config, tmp_path / "whole")
    for step in (4, 9, 13):
        interrupted(config, tmp_path / "broken", step)
    train(config, tmp_path / "broken", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "broken")


def test_training_moves_every_trained_weight_and_dropout_is_on(
    whole: Path, config: TrainConfig
) -> None:
    """Else equal weights after a resumption would mean nothing."""
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["seeds"][0]["steps"] == 3 * STEPS_PER_EPOCH
    model = json.loads((Path(config.model) / "config.json").read_text())
    assert model["hidden_dropout_prob"] > 0
    up = [value for name, value in weights(whole).items() if "lora" in name and name.endswith("b")]
    assert up and all(value.abs().max() > 0 for value in up)  # they start at 0


def test_another_seed_ends_elsewhere(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    train(replace(config, seeds=(1,)), tmp_path)
    assert any(not value.equal(weights(whole)[name]) for name, value in weights(tmp_path).items())


def test_a_killed_process_leaves_its_last_checkpoint(
    config: TrainConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends while the checkpoint of the second epoch is being written."""
    from pelt_kernels.training.run_trainer import PeltTrainer

    save = PeltTrainer._save_rng_state

    def die_in_second(self: PeltTrainer, output_dir: str) -> None:
        if self.state.global_step == 2 * STEPS_PER_EPOCH:
            raise SystemExit
        save(self, output_dir)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(PeltTrainer, "_save_rng_state", die_in_second)
        train(config, tmp_path)
    kept = checkpoints(run_folder(tmp_path))
    assert [path.name for path in kept] == [f"checkpoint-{STEPS_PER_EPOCH}"]
    assert sorted(path.name for path in kept[0].iterdir()) == sorted(FILES)
    train(config, tmp_path, resume=True)
    assert_same_end(whole, tmp_path)


def test_early_stopping_before_the_break_is_early_stopping_after_it(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between the checkpoint at which patience ran out and the run's end."""
    from pelt_kernels.training.run_trainer import PeltTrainer

    config = replace(config, epochs=12, patience=1, lr=(1e-6,))
    found = train(config, tmp_path / "whole")
    assert found["seeds"][0]["steps"] == 2 * STEPS_PER_EPOCH  # nothing is learnt at such a rate

    def die(self: PeltTrainer) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(PeltTrainer, "load_best", die)
        train(config, tmp_path / "broken")
    resumed = train(config, tmp_path / "broken", resume=True)
    assert resumed["seeds"][0]["steps"] == 2 * STEPS_PER_EPOCH
    assert_same_end(tmp_path / "whole", tmp_path / "broken")


def test_finished_runs_are_read_and_not_trained_again(
    config: TrainConfig, tmp_path: Path, toy_files: tuple[Path, Path]
) -> None:
    config = replace(config, epochs=1, lr=(1e-4, 1e-2), seeds=(0, 1))
    titles: list[str] = []

    def watch(title: str) -> Sequence[TrainerCallback]:
        titles.append(title)
        return ()

    first = train(config, tmp_path, watchers=Watchers(progress=watch))
    assert len(titles) == 3  # two rates with the first seed, then the second seed
    assert set(first["learning_rates_tried_on_dev"]) == {"0.0001", "0.01"}
    tried = first["learning_rates_tried_on_dev"]
    assert tried[f"{first['learning_rate']:g}"] == max(tried.values())
    assert [run["seed"] for run in first["seeds"]] == [0, 1]
    accuracies = [run["accuracy"] for run in first["seeds"]]
    assert first["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert first["summary"]["accuracy"]["std"] == pytest.approx(
        abs(accuracies[0] - accuracies[1]) / 2**0.5
    )
    again = train(config, tmp_path, resume=True, watchers=Watchers(progress=watch))
    assert len(titles) == 3
    assert again == first
    assert not list(tmp_path.glob("*/checkpoint-*"))


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_missing_file_of_a_checkpoint_is_one_sentence(
    config: TrainConfig, broken_run: Path, tmp_path: Path, name: str
) -> None:
    for damage in (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        Path.unlink,
    ):
        output = tmp_path / "copy"
        shutil.copytree(broken_run, output)
        (checkpoint,) = checkpoints(run_folder(output))
        damage(checkpoint / name)
        with pytest.raises(
            RunError, match=r"checkpoint .* cannot be read .*remove that folder"
        ) as error:
            train(config, output, resume=True)
        assert "\n" not in str(error.value)
        shutil.rmtree(output)


@pytest.fixture(scope="module")
def broken_run(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("broken")
    interrupted(config, output, step=3)
    return output


def test_removing_a_damaged_checkpoint_starts_again(
    config: TrainConfig, broken_run: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(broken_run, tmp_path, dirs_exist_ok=True)
    (checkpoint,) = checkpoints(run_folder(tmp_path))
    shutil.rmtree(checkpoint)
    train(config, tmp_path, resume=True)
    assert_same_end(whole, tmp_path)


def test_changed_data_cannot_be_resumed(
    config: TrainConfig, broken_run: Path, tmp_path: Path
) -> None:
    other = write_tsv(tmp_path / "train.tsv", rows(200, seed=9))
    output = tmp_path / "run"
    shutil.copytree(broken_run, output)
    with pytest.raises(UsageError, match="has changed since"):
        train(replace(config, task=str(other)), output, resume=True)


def test_a_resumed_run_numbers_its_classes_as_it_was_begun(
    config: TrainConfig, broken_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(broken_run, output)
    stored = json.loads((output / "data.json").read_text())
    assert stored["labels"] == ["0", "1"]
    task = load_task(config.task, config.eval)
    turned = replace(task, labels=("1", "0"))  # as an earlier rule might have ordered them
    (output / "data.json").write_text(
        json.dumps({"fingerprint": turned.fingerprint, "labels": turned.labels})
    )
    train(config, output, resume=True)
    assert json.loads((output / "adapter" / "task.json").read_text())["labels"] == ["1", "0"]
    (output / "data.json").write_text(json.dumps(stored | {"labels": ["1", "0"]}))
    with pytest.raises(UsageError, match="has changed since"):
        train(config, output, resume=True)
    (output / "data.json").write_text(json.dumps({"fingerprint": stored["fingerprint"]}))
    with pytest.raises(RunError, match="data.json is damaged"):
        train(config, output, resume=True)


def test_a_run_is_not_overwritten_by_accident(config: TrainConfig, broken_run: Path) -> None:
    with pytest.raises(UsageError, match="holds a run already; --resume or --overwrite"):
        train(config, broken_run)


def test_files_of_others_are_not_overwritten(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UsageError, match="adapter is there already, and no run of ours left it"):
        train(config, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_replaces_a_run_is_checked_before_the_run_gives_way(
    config: TrainConfig, broken_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(broken_run, output)
    with pytest.raises(UsageError, match="there is no such file"):
        train(replace(config, task="nothing.tsv"), output, overwrite=True)
    assert checkpoints(run_folder(output))


def test_a_loss_that_is_not_a_number_stops_the_run(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"the loss is (nan|inf) at step \d+; a smaller --lr may help"
    ):
        train(replace(config, method="full", lr=(1e30,)), tmp_path)

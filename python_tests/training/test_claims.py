"""One run at a time writes in a folder; what is overwritten is checked before anything is gone."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pelt_kernels.training import RunError, TrainConfig, UsageError, experiment, train
from pelt_kernels.training.predictor import Predictor
from pelt_kernels.training.storage import LOCK_FILE, claimed
from pelt_kernels.training.tasks import Example


@pytest.fixture(scope="module")
def config(tiny_model: Path, toy_files: tuple[Path, Path]) -> TrainConfig:
    return TrainConfig(
        task=str(toy_files[0]), model=str(tiny_model), method="head", train_examples=16, epochs=1,
        batch_size=8, max_length=16, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("done")
    train(config, output)
    return output


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_a_folder_in_which_a_run_is_writing_is_refused_at_once(
    config: TrainConfig, run: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, bool]
) -> None:
    monkeypatch.setattr(experiment, "load_task", lambda *_: pytest.fail("the data was read"))
    before = contents(run)
    with claimed(run), pytest.raises(RunError, match="another run is writing in .*/run; wait for"):
        train(config, run, **how)
    assert contents(run) == before


def while_reading(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], Any]) -> None:
    """Has something happen in the middle of the preparations of the next run, and only of that."""
    load = experiment.load_task

    def first(*arguments: Any) -> Any:
        monkeypatch.setattr(experiment, "load_task", load)
        happens()
        return load(*arguments)

    monkeypatch.setattr(experiment, "load_task", first)


def test_of_two_that_begin_in_one_new_folder_one_goes_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new"
    output.mkdir()
    lock = FileLock(output / LOCK_FILE)
    while_reading(monkeypatch, lock.acquire)
    with pytest.raises(RunError, match="another run is writing"):
        train(config, output)
    assert [path.name for path in output.iterdir()] == [LOCK_FILE]
    lock.release()
    while_reading(monkeypatch, lambda: train(config, output))
    with pytest.raises(UsageError, match="holds a run already; --resume or --overwrite it"):
        train(config, output)
    train(config, output, resume=True)


def claiming_child(folder: Path) -> int:
    """A process that holds the claim of a folder until it is killed."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        with claimed(folder):
            os.write(writes, b"x")
            signal.pause()
        os._exit(0)
    assert os.read(reads, 1) == b"x"
    return child


def test_a_killed_process_leaves_no_claim(tmp_path: Path) -> None:
    child = claiming_child(tmp_path)
    with pytest.raises(RunError, match="another run is writing"), claimed(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with claimed(tmp_path):
        pass


def test_a_second_run_can_wait_for_the_first(tmp_path: Path) -> None:
    child = claiming_child(tmp_path)
    said: list[str] = []

    def waiting(sentence: str) -> None:
        said.append(sentence)
        os.kill(child, signal.SIGKILL)

    with claimed(tmp_path, waiting):
        os.waitpid(child, 0)
    assert said == [f"output: waiting for the run that is writing in {tmp_path}"]


def test_readers_are_not_kept_out(run: Path) -> None:
    with claimed(run):
        found = Predictor(run / "adapter")([Example("a good film", None, None, "here")])
    assert len(found.rows) == 1


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(37, "No locks")])
def test_a_disk_without_locks_is_one_sentence(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", fail)
    with pytest.raises(RunError, match=r"cannot be locked against a second run \(.*[Nn]o "):
        train(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_a_run_is_seen_before_anything_is_removed(
    config: TrainConfig, run: Path, tmp_path: Path
) -> None:
    (folder,) = run.glob("lr-*")
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="lr-.*-seed-0 is a link, and what it leads to is not"):
        train(config, run, overwrite=True)
    assert contents(tmp_path) == before and before
    train(config, run, resume=True)


def test_two_rates_that_look_alike_are_two_runs(config: TrainConfig, tmp_path: Path) -> None:
    found = train(replace(config, lr=(0.001, 0.0010000001)), tmp_path)
    assert set(found["learning_rates_tried_on_dev"]) == {"0.001", "0.0010000001"}
    assert len(list(tmp_path.glob("lr-*/result.json"))) == 2


def test_equal_runs_leave_equal_adapters(config: TrainConfig, done: Path, tmp_path: Path) -> None:
    train(config, tmp_path)
    for path in (done / "adapter").iterdir():
        assert path.read_bytes() == (tmp_path / "adapter" / path.name).read_bytes(), path.name

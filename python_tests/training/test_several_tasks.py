"""VLM and HyperPELT through the commands: a run of two tasks, what it predicts, distils and joins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_writers import pair_files, writers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from pelt_kernels.cli import main
from pelt_kernels.models import PeltModel

__all__ = ["pair_files", "writers"]

METHODS = {
    "vlm": ("gpt2", ["--method", "vlm", "--set", "bottlenecks=8"]),
    "hyperpelt": ("t5", ["--method", "hyperpelt", "--set", "bottleneck=4", "--set",
                         "prefix_length=3"]),
}  # fmt: skip


def run(model: Path, files: tuple[Path, Path], output: Path, *more: str) -> Path:
    words = [
        "train", "--task", str(files[0]), "--eval", str(files[1]), "--model", str(model),
        "--batch-size", "16", "--max-length", "12", "--device", "cpu", "--train-examples", "48",
        "--epochs", "1", "--output", str(output), *more,
    ]  # fmt: skip
    assert main(words) == 0
    return output / "adapter"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_two_tasks(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    family, words = METHODS[method]
    model, eval_file = writers[family], pair_files[1]
    adapter = run(model, pair_files, tmp_path / "run", *words, "--task-column", "mood")
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(found["task"]["tasks"]) == {"calm", "loud"}
    loader = AutoModelForCausalLM if family == "gpt2" else AutoModelForSeq2SeqLM
    tuned = PeltModel.from_pretrained(loader.from_pretrained(model), adapter)
    assert set(tuned.method_config.tasks) == {"calm", "loud"}  # type: ignore[attr-defined]
    # What distill writes for a task is what the model writes for it.
    tokenizer = AutoTokenizer.from_pretrained(model)
    with eval_file.open() as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    for task in ("calm", "loud"):
        output = tmp_path / f"{task}.tsv"
        command = [
            "distill", "--file", str(eval_file), "--output", str(output), "--model", str(model),
            "--adapter", str(adapter), "--task", task, "--max-new-tokens", "5", "--device", "cpu",
        ]  # fmt: skip
        assert main(command) == 0
        with output.open() as file:
            written = [line.rstrip("\n").split("\t") for line in file][1:]
        assert [row[::2] for row in written] == [row[::2] for row in rows]
        for row in written[:3]:
            ids = tokenizer(row[0])["input_ids"]
            ids = torch.tensor([ids if ids[-1] == tokenizer.eos_token_id else
                                [*ids, tokenizer.eos_token_id]])  # fmt: skip
            with torch.no_grad():
                out = tuned.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), tasks=task,
                    max_new_tokens=5, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
            own = out[0, ids.shape[1] :] if family == "gpt2" else out[0]
            assert tokenizer.decode(own, skip_special_tokens=True).strip() == row[1]


def test_tasks_that_were_trained_apart_are_joined(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path
) -> None:
    model = writers["gpt2"]
    for number, task in enumerate(("mt", "qa")):
        more = ["--method", "vlm", "--set", f"bottlenecks={4 + number}", "--set", f"tasks={task}"]
        run(model, pair_files, tmp_path / task, *more)
    folders = [str(tmp_path / task / "adapter") for task in ("mt", "qa")]
    assert main(["join", *folders, "--output", str(tmp_path / "all")]) == 0
    joined = PeltModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), tmp_path / "all"
    )
    ids = torch.tensor([[7, 8, 9, 3]])
    for task, folder in zip(("mt", "qa"), folders, strict=True):
        alone = PeltModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
        with torch.no_grad():
            expected, found = alone(ids).logits, joined(ids, tasks=task).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

"""A run of Control Prefixes: a column's labels choose the prefixes, in training and afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_writers import pair_files, writers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pelt_kernels.cli import main
from pelt_kernels.methods import ControlPrefixesConfig
from pelt_kernels.models import PeltModel

__all__ = ["pair_files", "writers"]

SIZES = ("prefix_length=3", "mid=8", "attributes=tone:3", "unseen=tone:1")
CONTROL = ControlPrefixesConfig(prefix_length=3, mid=8, attributes={"tone": 3}, unseen={"tone": 1})


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_a_columns_labels_choose_prefixes(
    family: str, writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "out"
    arguments = [
        "train", "--task", str(pair_files[0]), "--eval", str(pair_files[1]), "--model",
        str(writers[family]), "--batch-size", "16", "--max-length", "12", "--device", "cpu",
        "--train-examples", "64", "--epochs", "1", "--method", "control_prefixes",
        "--attribute-column", "tone=mood", "--lr", "1e-2", "--output", str(output),
    ]  # fmt: skip
    assert main([*arguments, *(word for size in SIZES for word in ("--set", size))]) == 0
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    base = kind.from_pretrained(writers[family])
    model = PeltModel.from_pretrained(base, output / "adapter")
    assert model.method_config == CONTROL
    ids = torch.tensor([[7, 8, 11], [7, 8, 11]])
    more = {"labels": ids} if family == "t5" else {}
    calm, loud = model(ids, attributes={"tone": torch.tensor([0, 1])}, **more).logits
    assert (calm - loud).abs().max() > 1e-4
    capsys.readouterr()
    command = ["predict", "--adapter", str(output / "adapter"), "--device", "cpu"]
    assert main([*command, "--json", "the red cat", "--attribute", "tone=loud"]) == 0
    assert "written" in json.loads(capsys.readouterr()[0])
    assert main([*command, "the red cat"]) == 2
    assert "expected the attribute tone, one of calm, loud, got none" in capsys.readouterr()[1]

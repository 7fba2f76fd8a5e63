"""AdaMix in whole runs: a resumed one repeats the draws and ends with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from pelt_kernels.training import Interrupted, TrainConfig, Watchers, train


class StopAtNine(TrainerCallback):
    """Asks for a stop after the ninth step."""

    def __init__(self, watchers: Watchers) -> None:
        self.watchers = watchers

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 9:
            self.watchers.stop.request(15)


def test_resuming_repeats_the_draws(tiny_model, toy_files, tmp_path):
    config = TrainConfig(
        task=str(toy_files[0]),
        eval=str(toy_files[1]),
        model=str(tiny_model),
        method="adamix",
        train_examples=48,
        epochs=3,
        batch_size=8,
        max_length=16,
        device="cpu",
        weight_decay=0.1,
    )
    found = train(config, tmp_path / "whole")
    assert found["backends"]["gated_adapter"] and found["summary"]["accuracy"]["mean"] >= 0
    watchers = Watchers()
    watchers.progress = lambda title: [StopAtNine(watchers)]
    with pytest.raises(Interrupted):
        train(config, tmp_path / "again", watchers=watchers)
    train(config, tmp_path / "again", resume=True)

    def weights(folder: Path):
        return load_file(folder / "adapter" / "adapter_model.safetensors")

    expected, repeated = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert expected.keys() == repeated.keys()
    assert all(value.equal(repeated[name]) for name, value in expected.items())

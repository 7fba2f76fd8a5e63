"""AdaMix and PST in whole runs: a resumed one repeats draws and sparsities, to the same weights."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("method", ["adamix", "pst"])
def test_resuming_repeats_draws_and_sparsities(method, tiny_model, toy_files, tmp_path):
    config = TrainConfig(
        task=str(toy_files[0]),
        eval=str(toy_files[1]),
        model=str(tiny_model),
        method=method,
        train_examples=48,
        epochs=3,
        batch_size=8,
        max_length=16,
        device="cpu",
        weight_decay=0.1,
    )
    found = train(config, tmp_path / "whole")
    used = {"adamix": {"gated_adapter", "symmetric_kl"}, "pst": {"masked_weight"}}
    assert set(found["backends"]) == used[method]
    watchers = Watchers()
    watchers.progress = lambda title: [StopAtNine(watchers)]
    with pytest.raises(Interrupted):
        train(config, tmp_path / "again", watchers=watchers)
    train(config, tmp_path / "again", resume=True)

    def weights(folder: Path):
        return load_file(folder / "adapter" / "pelt_model.safetensors")

    expected, repeated = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert expected.keys() == repeated.keys()
    assert all(value.equal(repeated[name]) for name, value in expected.items())


def test_the_kept_model_has_its_final_sparsity(tiny_model, toy_files, tmp_path):
    """Evaluations before it neither choose the best model nor stop the training."""
    config = TrainConfig(
        task=str(toy_files[0]),
        eval=str(toy_files[1]),
        model=str(tiny_model),
        method="pst",
        train_examples=48,
        epochs=3,
        batch_size=8,
        max_length=16,
        device="cpu",
        eval_every=2,
        patience=1,
    )
    train(config, tmp_path)
    (result,) = tmp_path.glob("lr-*/result.json")
    found = json.loads(result.read_text())
    evaluations = [e for e in found["history"] if "eval_accuracy" in e]
    assert found["best_step"] > 0.7 * 18
    assert sum(bool(e.get("is_pruning")) for e in evaluations) == 6

"""Two processes, started by accelerate: the same steps as one, and adapters saved in one piece."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from sharded_steps import (
    METHODS,
    gradients,
    make_accelerated,
    make_base,
    make_model,
    make_optimizer,
    train,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import pelt_kernels
from pelt_kernels.models import PeltModel

STEPS = Path(__file__).with_name("sharded_steps.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two processes wrote, which all tests here read."""
    made = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", str(STEPS), str(made)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return made


@pytest.fixture(scope="module", params=METHODS)
def trained(request):
    """A method's name, and the model after the same steps in this process."""
    model = make_model(request.param)
    train(model, make_optimizer(model), slice(None))
    return request.param, model


def compare(tensors, model):
    start = make_model("unipelt" if model.prefix is not None else "pst").trained_parameters()
    expected = model.trained_parameters()
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert any((tensors[name] - start[name]).abs().max() > 1e-3 for name in tensors)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_three_steps_of_two_processes_are_those_of_one(kind, trained, folder):
    method, model = trained
    again = PeltModel.from_pretrained(make_base(), folder / f"{method}-{kind}")
    compare(again.trained_parameters(), model)


def test_torchs_own_whole_state_is_what_is_trained(trained, folder):
    method, model = trained
    state = torch.load(folder / f"{method}.pt", weights_only=True)
    assert torch.equal(state.pop("_extra_state"), model.get_extra_state())
    compare(state, model)


def test_an_accelerated_peft_model_of_two_processes_has_the_gradients_of_one(folder):
    found = torch.load(folder / "accelerated.pt", weights_only=True)
    pelt_kernels.ops.forget_choices()
    expected = gradients(make_accelerated(), slice(None))
    assert pelt_kernels.explain("lora_linear")
    assert sum("lora_" in name for name in expected) == 8
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_torchs_own_state_goes_back(trained):
    """Of what is trained, and with the names of what is frozen."""
    method, model = trained
    for frozen in (True, False):
        options = StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)
        state = get_model_state_dict(model, options=options)
        other = make_model(method)
        set_model_state_dict(other, dict(state), options=options)
        compare(other.trained_parameters(), model)


def test_prefixes_that_were_sharded_are_written_as_tables(folder):
    whole = PeltModel.from_pretrained(make_base(), folder / "unipelt-fsdp")
    tables = PeltModel.from_pretrained(make_base(), folder / "collapsed")
    assert tables.prefix.is_collapsed and not whole.prefix.is_collapsed
    ids = torch.randint(5, 60, (2, 7))
    torch.testing.assert_close(tables(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("collapse", [False, True])
def test_a_given_state_is_written_instead_of_the_models(collapse, tmp_path):
    model, other = make_model("unipelt"), make_model("unipelt")
    train(other, make_optimizer(other), slice(None))
    state = other.state_dict()
    model.save_pretrained(tmp_path / "given", collapse_prefix=collapse, state_dict=state)
    other.save_pretrained(tmp_path / "own", collapse_prefix=collapse)
    for name in sorted(path.name for path in (tmp_path / "own").iterdir()):
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    missing = next(iter(model.trained_parameters()))
    del state[missing]
    with pytest.raises(ValueError, match=f"got one without 1 of them .{missing}."):
        model.save_pretrained(tmp_path / "no", state_dict=state)
    # accelerate gives an empty one to every process but the one that writes.
    model.save_pretrained(tmp_path / "no", state_dict={}, is_main_process=False)
    assert not (tmp_path / "no").exists()


def test_a_state_gives_up_what_is_frozen():
    model = make_model("unipelt")
    state = model.state_dict()
    assert state.pop("base_model.bert.embeddings.word_embeddings.weight") is None
    with pytest.raises(KeyError):
        state.pop("no such name")
    options = StateDictOptions(ignore_frozen_params=True)
    names = {*model.trained_parameters(), "_extra_state"}
    assert set(get_model_state_dict(model, options=options)) == names
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for copied in (torch.load(file, weights_only=True), copy.deepcopy(state)):
        assert type(copied) is OrderedDict and list(copied) == list(state)

"""Accelerated models of PEFT in what PyTorch and transformers do with a model."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from closeness import assert_close
from lora_models import pair, run, with_lora
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers.pytorch_utils import Conv1D

import pelt_kernels
from pelt_kernels.integrations import peft_lora

TARGETS = ["q_proj", "v_proj"]


@pytest.mark.parametrize(("dropout", "backend"), [(0.1, None), (0.0, "eager"), (0.1, "eager")])
def test_compiled_as_one_graph(dropout, backend):
    """By PEFT's formula, or by the operator where a backend is asked for."""
    model = nn.Sequential(OrderedDict(up=nn.Linear(8, 16), gelu=nn.GELU(), down=Conv1D(8, 16)))
    model = with_lora(model, target_modules=["up", "down"], lora_dropout=dropout).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)

    def step(called):
        model.zero_grad()
        y = called(x)
        y.square().sum().backward()
        return y.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = step(model.eval())
    pelt_kernels.accelerate(model, backend=backend)
    pelt_kernels.ops.forget_choices()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled), expected)
    assert bool(pelt_kernels.explain("lora_linear")) == (backend is not None)
    model.train()
    pelt_kernels.ops.forget_choices()
    first, second = step(compiled)[0], step(compiled)[0]
    assert bool(pelt_kernels.explain("lora_linear")) == (backend is not None)
    assert torch.equal(first, second) == (dropout == 0.0)  # a mask for each call


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_dropout(use_reentrant, way, make_model, batch):
    """Dropout is drawn again as it was."""
    model = with_lora(make_model("llama"), target_modules=TARGETS, lora_dropout=0.1)
    model.enable_input_require_grads()
    pelt_kernels.accelerate(model.train())
    torch.manual_seed(3)
    expected = run(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    torch.testing.assert_close(run(model, batch), expected, rtol=0, atol=0)


def test_autocast(way):
    """Of one layer, by the rule for all kernels: through a model rounding errors grow by chance."""
    exact = nn.Sequential(OrderedDict(lin=nn.Linear(32, 16)))
    exact = with_lora(exact, target_modules=["lin"])
    model, fast = pair(copy.deepcopy(exact))
    x = torch.randn(2, 7, 32)

    def step(called, x):
        x = x.clone().requires_grad_()
        y = called(x)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in called.parameters() if p.requires_grad)]

    with torch.autocast("cpu", torch.bfloat16):
        baseline, found = step(model, x), step(fast, x)
    for each in zip(found, baseline, step(exact.double(), x.double())):
        assert_close(*each, torch.bfloat16, "autocast")


def test_adapters_side_by_side_by_vmap(way):
    """The base layer knows nothing of what a transform stacks."""
    model = nn.Sequential(OrderedDict(lin=nn.Linear(8, 16)))
    model = with_lora(model, target_modules=["lin"]).double().eval()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    stacked = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in trained.items()}
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def call(values):
        return torch.func.functional_call(model, values, (x,))

    expected = torch.stack([call({n: v[i] for n, v in stacked.items()}) for i in range(3)])
    pelt_kernels.accelerate(model)
    torch.testing.assert_close(torch.vmap(call)(stacked), expected)


@pytest.fixture
def mesh():
    """One process on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_after_it_was_accelerated(mesh, make_model, batch, monkeypatch):
    monkeypatch.setattr(peft_lora, "PAYS_FROM", 0)
    model = with_lora(make_model("llama"), target_modules=TARGETS)
    expected = run(model, batch)
    pelt_kernels.accelerate(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    pelt_kernels.ops.forget_choices()
    found = run(model, batch)
    assert pelt_kernels.explain("lora_linear")
    torch.testing.assert_close(found.pop("logits"), expected.pop("logits"))
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad.full_tensor(), expected[name])
    pelt_kernels.restore(model)
    (reason,) = set(pelt_kernels.accelerate(model).left_alone.values())
    assert reason == "its weight is a DTensor; call accelerate before the model is sharded"


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = torch.arange(3, 11) + i
        return {"input_ids": ids, "labels": i % 2}


def test_ten_steps_of_a_trainer(way, make_model, tmp_path):
    """The same losses, and a checkpoint that PEFT reads."""
    model, fast = pair(with_lora(make_model("bert"), target_modules=["query", "value"]))
    losses = []
    for each in (model, fast):
        arguments = hf.TrainingArguments(
            tmp_path, max_steps=10, per_device_train_batch_size=2, logging_steps=1, seed=1,
            learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = hf.Trainer(each, arguments, train_dataset=_Rows())
        trainer.train()
        trainer.save_model(tmp_path / type(each).__name__)
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-2)
    assert (tmp_path / "PeftModel" / "adapter_config.json").is_file()


def test_a_trainer_that_compiles_takes_the_same_steps(make_model, tmp_path):
    """By the operator, and by PEFT's layers as they are, not compiled."""
    model = with_lora(make_model("bert"), target_modules=["query", "value"])
    fast = copy.deepcopy(model)
    pelt_kernels.accelerate(fast, backend="eager")
    pelt_kernels.ops.forget_choices()
    torch._dynamo.reset()
    losses = []
    for each in (model, fast):
        arguments = hf.TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=2, logging_steps=1, seed=1,
            learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            torch_compile=each is fast,
            torch_compile_backend="aot_eager" if each is fast else None,
        )  # fmt: skip
        trainer = hf.Trainer(each, arguments, train_dataset=_Rows())
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert pelt_kernels.explain("lora_linear")
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)

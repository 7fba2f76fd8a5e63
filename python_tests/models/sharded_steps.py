"""What two processes do for `test_sharded.py`: three steps under DDP and under FSDP2, and saving;
of an accelerated PEFT model the gradients of a batch.

accelerate launch --multi_gpu --cpu --num_processes 2 sharded_steps.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers as hf

from pelt_kernels.methods import (
    BottleneckAdapterConfig,
    LoraConfig,
    PrefixTuningConfig,
    PSTConfig,
    UniPELTConfig,
)
from pelt_kernels.models import get_pelt_model

ROWS = 4
METHODS = {
    "unipelt": UniPELTConfig(
        adapter=BottleneckAdapterConfig(bottleneck=4),
        prefix=PrefixTuningConfig(prefix_length=3, mid=8),
        lora=LoraConfig(r=4),
    ),
    "pst": PSTConfig(sparsity=0.5, r1=3, r2=2),
}


def make_base():
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=3, max_position_embeddings=16,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config)


def make_model(method):
    model = get_pelt_model(make_base(), METHODS[method]).train()
    model.set_progress(0.5)
    return model


def make_optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def make_accelerated():
    """A PEFT model with LoRA whose layers run on the operator."""
    import peft

    import pelt_kernels

    options = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}
    model = peft.get_peft_model(make_base(), peft.LoraConfig(**options)).train()
    pelt_kernels.accelerate(model, backend="eager")
    return model


def gradients(model, rows, backward=torch.Tensor.backward):
    """What is trained of a model, by name: its gradients of these rows of a batch."""
    ids = torch.arange(5, 5 + 7 * ROWS).view(ROWS, 7)
    backward(model(input_ids=ids[rows], labels=torch.arange(ROWS)[rows] % 3).loss)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def train(model, optimizer, rows, backward=torch.Tensor.backward):
    """Three steps on these rows of each batch."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        ids = torch.randint(5, 60, (ROWS, 7), generator=generator)
        mask = torch.arange(7) < torch.randint(2, 8, (ROWS, 1), generator=generator)
        labels = torch.randint(3, (ROWS,), generator=generator)
        given = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        loss = model(**{name: value[rows] for name, value in given.items()}).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def main(folder: Path) -> None:
    from accelerate import Accelerator
    from torch.distributed import destroy_process_group
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.distributed_type
    rows = slice(accelerator.process_index, ROWS, 2)
    for method in METHODS:
        model = make_model(method)
        replicated, optimizer = accelerator.prepare(model, make_optimizer(model))
        train(replicated, optimizer, rows, accelerator.backward)
        accelerator.unwrap_model(replicated).save_pretrained(
            folder / f"{method}-ddp",
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(replicated),
        )

        model = make_model(method)
        for layer in model.base_model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
        train(model, make_optimizer(model), rows)
        model.save_pretrained(folder / f"{method}-fsdp")
        if method == "unipelt":
            model.save_pretrained(folder / "collapsed", collapse_prefix=True)
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        state = get_model_state_dict(model, options=options)
        if accelerator.is_main_process:
            torch.save(state, folder / f"{method}.pt")
    model = accelerator.prepare(make_accelerated())
    found = gradients(model, rows, accelerator.backward)
    if accelerator.is_main_process:
        found = {name.removeprefix("module."): grad for name, grad in found.items()}
        torch.save(found, folder / "accelerated.pt")
    destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

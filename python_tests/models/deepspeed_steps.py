"""Three steps of transformers' Trainer, under DeepSpeed's ZeRO stage 2 where ``zero`` is given, of an
accelerated PEFT model or one of ours; prints whether DeepSpeed ran and the losses, as JSON.

    python deepspeed_steps.py peft|pelt FOLDER [zero]
"""

from __future__ import annotations

import json
import sys

import torch
import transformers as hf
from sharded_steps import make_base, make_model

import pelt_kernels

ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int):
        return {"input_ids": torch.arange(3, 11) + i, "labels": i % 2}


def model_of(kind: str):
    if kind == "pelt":
        return make_model("unipelt")
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(make_base(), config)
    pelt_kernels.accelerate(model)
    return model


if __name__ == "__main__":
    kind, folder, *zero = sys.argv[1:]
    arguments = hf.TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=2, logging_steps=1, seed=1, report_to=[],
        learning_rate=1e-2, save_strategy="no", disable_tqdm=True, optim="adamw_torch",
        use_cpu=not zero, deepspeed=ZERO if zero else None,
    )  # fmt: skip
    trainer = hf.Trainer(model_of(kind), arguments, train_dataset=Rows())
    trainer.train()
    trainer.save_model(folder)
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"deepspeed": trainer.is_deepspeed_enabled, "losses": losses}))

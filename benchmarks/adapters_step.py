"""A training step of the library ``adapters`` as shipped and accelerated, in one process, in turns.

    PYTHONPATH=. python -m benchmarks.adapters_step [--layers 6] [--hidden 384] [--rounds 15]

Runs where adapters 1.3 is installed. Each round times one step (forward, backward, AdamW) of each
model, in an order that alternates; printed are the medians and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from typing import Any

import adapters
import torch
import transformers

import pelt_kernels


def _methods() -> dict[str, Any]:
    bottleneck, lora = adapters.SeqBnConfig(reduction_factor=16), adapters.LoRAConfig(r=8)
    return {
        "unipelt": adapters.UniPELTConfig(),
        "mam": adapters.MAMConfig(),
        "prefix": adapters.PrefixTuningConfig(prefix_length=30),
        "seq_bn": bottleneck,
        "lora": lora,
        "seq_bn + lora": adapters.ConfigUnion(bottleneck, lora),
    }


def _model(config: Any, layers: int, hidden: int) -> Any:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32 if hidden < 768 else hidden // 64,
            intermediate_size=4 * hidden,
        )
    )
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    ids = torch.randint(3, 30000, (given.batch, given.length), device=given.device)
    mask = torch.ones_like(ids)
    mask[::2, given.length * 3 // 4 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2}
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads, {given}")
    for name, config in _methods().items():
        shipped = _model(config, given.layers, given.hidden).to(given.device)
        served = copy.deepcopy(shipped)
        pelt_kernels.accelerate(served)
        optimizers = {
            id(model): torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            for model in (shipped, served)
        }

        def step(model: Any, optimizers: dict[int, Any] = optimizers) -> float:
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizers[id(model)].step()
            optimizers[id(model)].zero_grad()
            if given.device != "cpu":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1e3

        times: dict[int, list[float]] = {id(shipped): [], id(served): []}
        for i in range(given.rounds + 2):
            for model in (shipped, served) if i % 2 else (served, shipped):
                times[id(model)].append(step(model))
        before, after = times[id(shipped)][2:], times[id(served)][2:]
        ratio = statistics.median(b / a for b, a in zip(before, after))
        print(
            f"{name:<14} shipped {statistics.median(before):8.1f} ms   accelerated "
            f"{statistics.median(after):8.1f} ms   {ratio:.2f}x"
        )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

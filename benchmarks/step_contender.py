"""One contender of `benchmarks.efficiency`: a process that holds one model and takes a training
step or a forward when it is told to.

    python -m benchmarks.step_contender CONTENDER MODEL BATCH DEVICE

It reads a JSON list from each line of its input and answers with a JSON value: ``["training", n]``
and ``["inference", n]`` with seconds on the clock and of the processor for the n-th batch,
``["profile", kind]`` with what torch's profiler says of one of these, ``["peak"]`` with the most
memory of a training step in bytes, ``["backends"]`` with what served the operators. It imports what
its own contender needs and nothing else of this project, as the library `adapters` asks for a
transformers of its own.
"""

from __future__ import annotations

import json
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import step_models
from .timing import lap

BATCHES, WARM_UP = 4, 2  # different texts, which take turns; calls before the first that is timed
PREFIX_LENGTH, RANK, REDUCTION = 10, 8, 16  # the paper's, in every library


class Contender(NamedTuple):
    """Who runs a method, and how.

    Attributes:
        library: transformers, pelt_kernels, PEFT or adapters.
        method: by this project's name.
        way: ``""``; ``eager``, every operator in plain PyTorch; ``compiled``, that under
            `torch.compile`; ``accelerated``, the library's model by `pelt_kernels.accelerate`;
            ``unpadded``, layers compute real tokens only: by `PeltModel.set_unpadding`, or of
            another library's model by ``accelerate(unpad=True)``.
    """

    library: str
    method: str
    way: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What its process needs in its environment."""
        return {"PELT_KERNELS_BACKEND": "eager"} if self.way in ("eager", "compiled") else {}


CONTENDERS = {
    "full": Contender("transformers", "full"),
    "head": Contender("transformers", "head"),
    "bitfit": Contender("pelt_kernels", "bitfit"),
    "lora": Contender("pelt_kernels", "lora"),
    "lora-unpadded": Contender("pelt_kernels", "lora", "unpadded"),
    "peft-lora": Contender("PEFT", "lora"),
    "peft-lora-accelerated": Contender("PEFT", "lora", "accelerated"),
    "peft-lora-unpadded": Contender("PEFT", "lora", "unpadded"),
    "adapters-lora": Contender("adapters", "lora"),
    "adapters-lora-accelerated": Contender("adapters", "lora", "accelerated"),
    "adapter": Contender("pelt_kernels", "adapter"),
    "adapters-adapter": Contender("adapters", "adapter"),
    "adapters-adapter-accelerated": Contender("adapters", "adapter", "accelerated"),
    "prefix": Contender("pelt_kernels", "prefix"),
    "peft-prefix": Contender("PEFT", "prefix"),
    "adapters-prefix": Contender("adapters", "prefix"),
    "unipelt-ap": Contender("pelt_kernels", "unipelt-ap"),
    "adapters-unipelt-ap": Contender("adapters", "unipelt-ap"),
    "mam": Contender("pelt_kernels", "mam"),
    "adapters-mam": Contender("adapters", "mam"),
    "unipelt": Contender("pelt_kernels", "unipelt"),
    "unipelt-unpadded": Contender("pelt_kernels", "unipelt", "unpadded"),
    "unipelt-eager": Contender("pelt_kernels", "unipelt", "eager"),
    "unipelt-compiled": Contender("pelt_kernels", "unipelt", "compiled"),
    "adapters-unipelt": Contender("adapters", "unipelt"),
    "adapters-unipelt-accelerated": Contender("adapters", "unipelt", "accelerated"),
}


def make(contender: Contender, base: Any) -> Any:
    """The base model with the method in it, the rest of it frozen."""
    if contender.library == "transformers":
        if contender.method == "head":
            base.requires_grad_(False)
            base.classifier.requires_grad_(True)
        return base
    if contender.library == "pelt_kernels":
        return _ours(contender, base)
    model = (_peft if contender.library == "PEFT" else _adapters)(contender.method, base)
    if contender.way:
        import pelt_kernels

        pelt_kernels.accelerate(model, unpad=contender.way == "unpadded")
    return model


def _ours(contender: Contender, base: Any) -> Any:
    from pelt_kernels import get_pelt_model, make_config

    model = get_pelt_model(base, make_config(contender.method))
    model.set_progress(1.0)
    if contender.way == "unpadded":
        model.set_unpadding()
    return torch.compile(model) if contender.way == "compiled" else model


def _peft(method: str, base: Any) -> Any:
    import peft

    task = step_models.peft_task(base)
    if method == "prefix":
        config: Any = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=PREFIX_LENGTH)
    else:
        config = peft.LoraConfig(task_type=task, r=RANK, lora_alpha=16)
    return peft.get_peft_model(base, config)


def _adapters(method: str, base: Any) -> Any:
    import adapters

    def parts(is_gated: bool) -> dict[str, Any]:
        return {
            "prefix": adapters.PrefixTuningConfig(
                prefix_length=PREFIX_LENGTH, bottleneck_size=512, use_gating=is_gated
            ),
            "lora": adapters.LoRAConfig(r=RANK, use_gating=is_gated),
            "adapter": adapters.SeqBnConfig(reduction_factor=REDUCTION, use_gating=is_gated),
        }

    if method == "mam":
        config: Any = adapters.MAMConfig()
    elif method.startswith("unipelt"):
        gated = parts(is_gated=True)
        names = ("adapter", "prefix") if method == "unipelt-ap" else tuple(gated)
        config = adapters.ConfigUnion(*(gated[name] for name in names))
    else:
        config = parts(is_gated=False)[method]
    adapters.init(base)
    base.add_adapter("a", config=config)
    base.train_adapter("a")
    return base


class Worker:
    """A contender's model, what is taken of it, and the batches."""

    def __init__(self, contender: Contender, model: str, batch: int, device: str) -> None:
        torch.manual_seed(0)
        base, batches = step_models.make(model, BATCHES, batch)
        self.device = device
        self.model = make(contender, base).to(device)
        self.batches = [{k: v.to(device) for k, v in each.items()} for each in batches]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.step = step_models.training_step(self.model)
        self.forward = step_models.forward(self.model)

    def about(self) -> dict[str, Any]:
        """What is known before anything runs."""
        import transformers

        whole = sum(parameter.numel() for parameter in self.model.parameters())
        stored = getattr(self.model, "get_nb_stored_parameters", None)  # others do not count them
        return {
            "trainable_parameters": sum(parameter.numel() for parameter in self.trained),
            "stored_parameters": None if stored is None else stored(),
            "total_parameters": whole,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def training(self, number: int = 0) -> tuple[float, float]:
        """A training step on a batch."""
        return lap(partial(self.step, self.batches[number % len(self.batches)]), self.device)

    def inference(self, number: int = 0) -> tuple[float, float]:
        """A forward without gradients on a batch."""
        return lap(partial(self.forward, self.batches[number % len(self.batches)]), self.device)

    def profile(self, kind: str) -> dict[str, Any]:
        """Of a training step or a forward, ``seconds`` on the clock, those in the optimizer among
        them, and those in each operator without the ones that it calls.
        """
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            seconds, _ = getattr(self, kind)()
        events = {event.key: event for event in found.key_averages()}
        optimizer = [
            e.cpu_time_total for name, e in events.items() if name.startswith("Optimizer.step")
        ]
        return {
            "seconds": seconds,
            "optimizer": sum(optimizer) / 1e6,
            "operators": {name: e.self_cpu_time_total / 1e6 for name, e in events.items()},
        }

    def peak(self) -> int:
        """Bytes at the peak of a training step: of the GPU's allocator, or resident in the process,
        weights, gradients and optimizer among them.
        """
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.training()
            return torch.cuda.max_memory_allocated()
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        reset.write_text("5")  # the kernel forgets the peak before this step
        self.training()
        status = Path("/proc/self/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def backends(self) -> dict[str, str]:
        """The backend that served each of this project's operators."""
        if "pelt_kernels" not in sys.modules:
            return {}
        from pelt_kernels import explain

        return {choice.operator: choice.served for choice in explain()}


def main() -> None:
    """Answers until the input ends."""
    name, model, batch, device = sys.argv[1:]
    # Only answers go to the output; libraries print there, too.
    answers, sys.stdout = sys.stdout, sys.stderr
    from transformers.utils import logging

    logging.set_verbosity_error()
    worker = Worker(CONTENDERS[name], model, int(batch), device)
    for _ in range(WARM_UP):
        worker.training()
        worker.inference()
    print(json.dumps(worker.about()), file=answers, flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, command)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()

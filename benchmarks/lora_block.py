"""LoRA on every Linear of a Llama-shaped stack beside PEFT's: time of a forward and backward.

    python -m benchmarks.lora_block [--width 512] [--layers 4] [--length 128] [--rank 8]
                                    [--rounds 7] [--device cpu] [--json FILE]

Both have the same random base, the same A and B, and all Linears as targets. They take turns; a
round's ratio is of two neighbours in time, so a slow machine hits both, and medians count.
``processor`` is the time of all threads together, which other work on the machine disturbs less
than it does the clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .rows import write

CALLS = 3  # of each contender in a round
OURS, PEFT = "pelt_kernels", "PEFT"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both medians and the median of the rounds' ratios; writes them with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    for name, value in (("width", 512), ("layers", 4), ("length", 128), ("rank", 8), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for the row")
    options = parser.parse_args(arguments)
    laps = _in_turns(_steps(options), options.rounds)
    row: dict[str, Any] = {**vars(options), "json": None}
    for kind, name in enumerate(("clock", "processor")):
        ours, theirs = ([lap[kind] for lap in laps[who]] for who in (OURS, PEFT))
        ratios = [mine / other for mine, other in zip(ours, theirs)]
        medians = [statistics.median(figures) for figures in (ours, theirs, ratios)]
        row[name] = dict(zip((OURS, PEFT, "ratio"), medians))
        print(
            f"{name:10} {OURS} {1e3 * medians[0]:.1f} ms, {PEFT} {1e3 * medians[1]:.1f} ms, ratio "
            f"{medians[2]:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    if options.json:
        write(options.json, [row])
    return 0


def _steps(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A forward and backward of each contender, over the same hidden states."""
    import peft
    import torch

    from pelt_kernels import LoraConfig, get_pelt_model

    ours = get_pelt_model(_base(options), LoraConfig(r=options.rank, targets="all-linear"))
    config = peft.LoraConfig(r=options.rank, lora_alpha=16, target_modules="all-linear")
    theirs = peft.get_peft_model(_base(options), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            for side in ("A", "B"):
                if f"lora_{side}.default" in name:
                    own = name.removeprefix("base_model.model.").partition(".lora_")[0]
                    mine = getattr(ours.base_model.get_submodule(own), f"lora_{side.lower()}")
                    mine.normal_(std=0.1)
                    parameter.copy_(mine)
    x = torch.randn(1, options.length, options.width, device=options.device)
    models = {OURS: ours.train(), PEFT: theirs.train()}
    found = {name: model(inputs_embeds=x).last_hidden_state for name, model in models.items()}
    torch.testing.assert_close(found[OURS], found[PEFT], rtol=1e-4, atol=1e-4)

    def step_of(model: Any) -> Callable[[], None]:
        def step() -> None:
            model(inputs_embeds=x).last_hidden_state.sum().backward()
            model.zero_grad(set_to_none=True)
            if options.device == "cuda":
                torch.cuda.synchronize()

        return step

    return {name: step_of(model) for name, model in models.items()}


def _base(options: argparse.Namespace) -> Any:
    """The stack, with the same random weights each time."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4 // 8 * 8,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        use_cache=False,
    )
    return LlamaModel(config).to(options.device)


def _in_turns(
    steps: dict[str, Callable[[], None]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step on the clock and of the processor, for each contender a pair per round."""
    for step in steps.values():
        step()
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds):
        # Whoever comes first in a round comes second in the next.
        for name in list(steps) if number % 2 else list(reversed(steps)):
            begun = time.perf_counter(), time.process_time()
            for _ in range(CALLS):
                steps[name]()
            ended = time.perf_counter(), time.process_time()
            laps[name].append(tuple((e - b) / CALLS for e, b in zip(ended, begun)))  # type: ignore[arg-type]
    return laps


if __name__ == "__main__":
    sys.exit(main())

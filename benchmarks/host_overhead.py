"""The host time of an operator: microseconds around a backend's own work, at a size where that work
takes next to no time.

    python -m benchmarks.host_overhead [--rounds 40] [--json FILE]

A probe replaces a backend's forward and backward and notes when it is entered and left, so the rows
hold for every backend:

* ``entry``     from the Python call to the backend's forward, without and with gradients
* ``around``    the whole call without the backend's own time
* ``backward``  from `torch.autograd.grad` to the backend's backward

The goal is an entry of at most 15 us on one core of a current server processor.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pelt_kernels import ops
from pelt_kernels.ops import OPERATORS, _dispatch

from .rows import write

REPEATS, ROUNDS = 200, 40
now = time.perf_counter_ns


class Probe:
    """Stands in for a backend: notes when it is entered and left, and gives ready results."""

    def __init__(self) -> None:
        self.entered = self.left = self.entered_backward = 0
        self.outputs: Any = None
        self.grads: dict[str, Any] = {}

    def install(self, operator: str) -> None:
        """Takes the place of the eager backend of one operator, whose results of the first call it
        then repeats.
        """
        self.outputs, self.grads = None, {}
        module = _dispatch.implementation(operator, "eager")
        self.forward, self.backward = module.forward, module.backward
        module.forward, module.backward = self._forward, self._backward  # type: ignore[assignment]

    def uninstall(self, operator: str) -> None:
        """Gives the operator its backend back."""
        module = _dispatch.implementation(operator, "eager")
        module.forward, module.backward = self.forward, self.backward  # type: ignore[assignment]

    def _forward(self, call: Any, **inputs: Any) -> Any:
        self.entered = now()
        if self.outputs is None:
            self.outputs = self.forward(call, **inputs)
        # An output is a fresh tensor: autograd refuses to see one twice.
        outputs = [
            [o.detach() for o in out] if isinstance(out, list) else out.detach()
            for out in self.outputs
        ]
        self.left = now()
        return outputs

    def _backward(self, call: Any, needs: Any, **values: Any) -> Any:
        self.entered_backward = now()
        if not self.grads:
            self.grads = self.backward(call, needs, **values)
        return self.grads


def calls(needs_grad: bool) -> dict[str, Callable[[], Any]]:
    """One call of each operator as its method makes it, one row long."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=needs_grad)

    x, down, up, bias, bias_down = tensor(1, 1, 8), tensor(4, 8), tensor(8, 4), tensor(8), tensor(4)
    gate = ops.LearnedGate(tensor(8), tensor(1))
    mask = torch.ones(1, 1, dtype=torch.bool)
    q, k, v, prefix = (
        tensor(1, 2, 1, 8),
        tensor(1, 2, 1, 8),
        tensor(1, 2, 1, 8),
        ops.Prefix(tensor(3, 2, 8), tensor(3, 2, 8)),
    )
    gate_values, weight = torch.rand(1), torch.randn(8, 8)
    branch = ops.LoraBranch(tensor(4, 8), tensor(8, 4), gate=gate)
    options: dict[str, Any] = {"backend": "eager"}
    return {
        "gated_adapter": lambda: ops.gated_adapter(
            x, down, up, b_down=bias_down, b_up=bias, gate=gate, mask=mask, residual=x, **options
        ),
        "prefix_attention": lambda: ops.prefix_attention(
            q, k, v, [prefix], gate=gate_values, key_mask=mask, **options
        ),
        "lora_linear": lambda: ops.lora_linear(
            x, weight, None, [branch], mask=mask, extra_gates=[gate], **options
        ),
        "masked_weight": lambda: ops.masked_weight(
            weight, up, down, up, down, bias, bias, 32, **options
        ),
        "symmetric_kl": lambda: ops.symmetric_kl(up, down.T, **options),
    }


def _median_us(once: Callable[[], tuple[int, ...]], count: int) -> list[float]:
    """What ``once`` measures, in us: the least of the rounds' medians, which other work on the
    machine disturbed least.
    """
    for _ in range(REPEATS):
        once()
    rounds = [
        [statistics.median(column) for column in zip(*(once() for _ in range(REPEATS)))]
        for _ in range(count)
    ]
    return [min(column) / 1e3 for column in zip(*rounds)]


def measure(operator: str, rounds: int = ROUNDS) -> dict[str, float]:
    """The operator's row."""
    probe, row = Probe(), {}
    probe.install(operator)
    try:
        for needs_grad, suffix in ((False, ""), (True, "_grad")):
            call = calls(needs_grad)[operator]

            def once(call: Callable[[], Any] = call) -> tuple[int, int]:
                start = now()
                call()
                end = now()
                return probe.entered - start, end - start - (probe.left - probe.entered)

            with torch.set_grad_enabled(needs_grad):
                row[f"entry{suffix}_us"], row[f"around{suffix}_us"] = _median_us(once, rounds)

        def once_backward() -> tuple[int]:
            result = call()
            y = result[0] if isinstance(result, tuple) else result
            dy = torch.ones_like(y)
            start = now()
            y.backward(dy)
            return (probe.entered_backward - start,)

        row["backward_us"] = _median_us(once_backward, rounds)[0]
    finally:
        probe.uninstall(operator)
    return row


def main() -> None:
    """Prints one row for each operator, and writes them with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the least of so many counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"operator": operator, **measure(operator, options.rounds)} for operator in OPERATORS]
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )
    columns = list(rows[0])
    print("  ".join(f"{name:>16}" for name in columns))
    for row in rows:
        print("  ".join(f"{v:>16}" if isinstance(v, str) else f"{v:>16.1f}" for v in row.values()))
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    main()

"""Attention without a prefix by the kernels beside PyTorch's, as layers call it on a CPU.

    python -m benchmarks.plain_attention [--shapes T5] [--threads 1,2] [--dtypes float32,bfloat16]
        [--seconds 0.3] [--json benchmarks/results/plain_attention.jsonl]

Both are attention functions of transformers', "sdpa" and, with its thresholds at 0, "pelt_sdpa",
with the mask that the mask function of each makes. `SHAPES` stand on both sides of the thresholds
from which "pelt_sdpa" calls the kernels (pelt_kernels/ops/prefix_attention/without_prefix.py):
below them a row says what they would do. The two take turns, and ratios are of pairs: below 1 the
kernels take less time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from pelt_kernels._hardware import hardware
from pelt_kernels.models import sdpa
from pelt_kernels.ops.prefix_attention import without_prefix

from .checkout import ROOT, commit
from .rows import Rows, by_processor, kept, measured_by, processor_order, write
from .timing import interleaved, paired

RESULTS = ROOT / "benchmarks" / "results" / "plain_attention.jsonl"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DROPOUT = 0.1
Row = dict[str, Any]


class Shape(NamedTuple):
    """B texts of N tokens, H heads of queries and G of keys, of size E; causal in a decoder; with a
    bias, as T5's relative positions.
    """

    b: int
    h: int
    g: int
    n: int
    e: int
    is_causal: bool
    has_bias: bool = False

    @property
    def scores(self) -> int:
        """B·H·S·N, with S = N."""
        return self.b * self.h * self.n * self.n


SHAPES = {
    "one text of 32": Shape(1, 12, 12, 32, 64, False),
    "one text of 64": Shape(1, 12, 12, 64, 64, False),
    "one text of 128": Shape(1, 12, 12, 128, 64, False),
    "small batch": Shape(8, 12, 12, 32, 64, False),
    "MiniLM": Shape(16, 12, 12, 128, 32, False),
    "BERT-base": Shape(8, 12, 12, 128, 64, False),
    "BERT-base, long": Shape(2, 12, 12, 512, 64, False),
    "prompt of 64": Shape(1, 12, 12, 64, 64, True),
    "GPT-2": Shape(8, 12, 12, 128, 64, True),
    "GPT-2, long": Shape(2, 12, 12, 512, 64, True),
    "Llama 1B": Shape(1, 32, 8, 512, 64, True),
    "T5-small, one text": Shape(1, 8, 8, 64, 64, False, has_bias=True),
    "T5-small, encoder": Shape(8, 8, 8, 128, 64, False, has_bias=True),
    "T5-small, decoder": Shape(8, 8, 8, 128, 64, True, has_bias=True),
}


class Way(NamedTuple):
    """What is timed: the forward alone, or a training step's forward and backward."""

    with_backward: bool
    dropout: float

    @property
    def name(self) -> str:
        """The table's."""
        if not self.with_backward:
            return "forward"
        return "training with dropout" if self.dropout else "training"


WAYS = (Way(False, 0.0), Way(True, 0.0), Way(True, DROPOUT))


def tokens(shape: Shape) -> torch.Tensor:
    """[B, N] bool: the texts of a padded batch, the longest as long as the batch, the others down
    to half of that.
    """
    lengths = torch.linspace(shape.n / 2, shape.n, shape.b).round().long()
    return torch.arange(shape.n) < lengths[:, None]


def calls(
    shape: Shape, is_padded: bool, way: Way, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """The two contenders, on the same inputs, which lie as a layer's projections leave them."""
    generator = torch.Generator().manual_seed(0)

    def made(heads: int) -> torch.Tensor:
        values = torch.randn(shape.b, shape.n, heads, shape.e, generator=generator)
        return values.to(dtype).transpose(1, 2).requires_grad_(way.with_backward)

    q, k, v = made(shape.h), made(shape.g), made(shape.g)
    weights = made(shape.h).detach().transpose(1, 2)
    options: dict[str, Any] = {"dropout": way.dropout}
    if shape.has_bias:
        bias = torch.randn(1, shape.h, shape.n, shape.n, generator=generator)
        options["position_bias"] = bias.to(dtype)
    module: Any = SimpleNamespace(
        is_causal=shape.is_causal, num_key_value_groups=shape.h // shape.g
    )
    mask: dict[str, Any] = {
        "batch_size": shape.b, "q_length": shape.n, "kv_length": shape.n,
        "attention_mask": tokens(shape) if is_padded else None,
        "mask_function": causal_mask_function if shape.is_causal else bidirectional_mask_function,
        "allow_is_causal_skip": True, "allow_is_bidirectional_skip": True,
    }  # fmt: skip

    def call(function: Any, make_mask: Any) -> Callable[[], Any]:
        seen = make_mask(**mask)

        def step() -> None:
            with torch.set_grad_enabled(way.with_backward):
                out, _ = function(module, q, k, v, seen, **options)
                if way.with_backward:
                    torch.autograd.grad(out, (q, k, v), weights)

        return step

    return {
        "kernels": call(sdpa.sdpa_forward, sdpa.padding_or_sdpa_mask),
        "torch": call(sdpa_attention_forward, sdpa_mask),
    }


def measure(name: str, is_padded: bool, way: Way, dtype: str, seconds: float) -> Row:
    """A row: the two beside each other."""
    shape = SHAPES[name]
    threshold = without_prefix.PAYS_FROM_WITH_DROPOUT if way.dropout else without_prefix.PAYS_FROM
    with mock.patch.multiple(without_prefix, PAYS_FROM=0, PAYS_FROM_WITH_DROPOUT=0):
        samples = interleaved(calls(shape, is_padded, way, DTYPES[dtype]), "cpu", seconds)
    ratios = [ours / theirs for ours, theirs in zip(samples["kernels"], samples["torch"])]
    return {
        "shape": name,
        **shape._asdict(),
        "padded": is_padded,
        "way": way.name,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "chosen": shape.scores >= threshold,
        "ratio": paired(ratios),
        "hardware": hardware(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def table(rows: Rows) -> str:
    """The ratios, in Markdown, a table for each kind of processor and dtype; in brackets those of
    calls that "pelt_sdpa" leaves to PyTorch.
    """
    parts = []
    for kind in by_processor(rows):
        for dtype in DTYPES:
            part = [row for row in kind if row["dtype"] == dtype]
            if part:
                parts.append(_table(part))
    return "\n".join(parts)


def _table(rows: Rows) -> str:
    threads = sorted({row["threads"] for row in rows})
    columns = [(way.name, count) for way in WAYS for count in threads]
    titles = [f"{way}, {count} thread(s)" for way, count in columns]
    lines = [
        f"| {rows[0]['dtype']} | attention | scores | {' | '.join(titles)} |",
        "|---" * (3 + len(titles)) + "|",
    ]
    cells = {(r["shape"], r["padded"], r["way"], r["threads"]): r for r in rows}
    for name, padded in dict.fromkeys((row["shape"], row["padded"]) for row in rows):
        shape = SHAPES[name]
        seen = ["causal"] * shape.is_causal + ["padded"] * padded or ["all"]
        seen += ["bias"] * shape.has_bias
        line = [name, ", ".join(seen), f"{shape.scores:,}"]
        for way, count in columns:
            row = cells.get((name, padded, way, count))
            line.append("–" if row is None else _cell(row))
        lines.append(f"| {' | '.join(line)} |")
    conditions = measured_by([row | {"threads": threads[-1]} for row in rows])
    return "\n".join([*lines, "", f"{conditions}.", ""])


def _cell(row: Row) -> str:
    cell = "{median:.2f} ({low:.2f} to {high:.2f})".format(**row["ratio"])
    return cell if row["chosen"] else f"[{cell}]"


def doubtful(rows: Rows) -> list[str]:
    """A sentence for each row that speaks against its side of a threshold: the kernels are chosen
    and take more than 1.03 of PyTorch's time, or are not and take less than 0.9.
    """
    found = []
    for row in rows:
        ratio = row["ratio"]["median"]
        if ratio > 1.03 if row["chosen"] else ratio < 0.9:
            side = "chosen" if row["chosen"] else "left to PyTorch"
            padded = ", padded" if row["padded"] else ""
            found.append(
                f"{row['shape']}{padded}, {row['way']}, {row['dtype']}, {row['threads']} "
                f"thread(s), {side}: {ratio:.2f} of PyTorch's time"
            )
    return found


def _order(row: Row) -> tuple[tuple[bool, str], int, int, int]:
    """Of a row in the file."""
    shapes, dtype = list(SHAPES), list(DTYPES).index(row["dtype"])
    return processor_order(row), row["threads"], dtype, shapes.index(row["shape"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and what speaks against the thresholds; replaces the rows of this kind of
    processor with the same shapes in a file.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shapes", default="", help="those whose names begin so")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each contender of a row")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    shapes = {name: SHAPES[name] for name in SHAPES if name.startswith(options.shapes)}
    if not shapes:
        parser.error(f"--shapes: expected the beginning of one of {'; '.join(SHAPES)}")
    rows: Rows = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        for dtype in options.dtypes.split(","):
            for name, shape in shapes.items():
                for is_padded in (False, True)[: 1 + (shape.b > 1)]:
                    rows += [measure(name, is_padded, way, dtype, options.seconds) for way in WAYS]
    print(table(rows))
    print("\n".join(doubtful(rows)) or "every threshold holds")
    if options.json:
        kind = hardware()["kind"]
        others = [
            row
            for row in kept(options.json, kind, resume=True)
            if row["hardware"]["kind"] != kind or row["shape"] not in shapes
        ]
        write(options.json, sorted(others + rows, key=_order))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`pelt-kernels info`"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from .console import Debug, errors_in_one_line, results


def info(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also describe this model.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Also describe this adapter.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, the machine, which backends can serve each operator and why others cannot."""
    with errors_in_one_line(debug):
        from .._hardware import hardware
        from ..ops._native import build_info
        from ..training.machine import versions

        built = {"cuda_kernels_for": build_info().get("cuda_capabilities")}
        able = {operator: _ability(operator, call) for operator, call in _probes().items()}
        facts: dict[str, Any] = {"machine": versions() | hardware() | built, "backends": able}
        if model is not None:
            facts["model"] = _describe_model(model)
        if adapter is not None:
            facts["adapter"] = _describe_adapter(adapter)
        if as_json:
            typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
            return
        out = results()
        out.print(_table("pelt-kernels", facts["machine"]))
        matrix, reasons = _matrix(able)
        out.print(matrix)
        for number, reason in enumerate(reasons, start=1):
            out.print(f"({number}) {reason}", markup=False, soft_wrap=True)
        for name, title in (("model", model), ("adapter", adapter)):
            if name in facts:
                out.print(_table(str(title), facts[name]))


def _table(title: str, facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, title=title)
    for name, value in _flat(facts):
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        table.add_row(name.replace("_", " "), escape(str("none" if shown in (None, "") else shown)))
    return table


def _flat(facts: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The facts inside facts by dotted names, as ``--set`` has them."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def _matrix(able: dict[str, dict[str, str]]) -> tuple[Table, list[str]]:
    """Operators by backends, and the reasons to which the cells that are not able refer."""
    reasons: dict[str, int] = {}
    table = Table(Column("operator", no_wrap=True), *next(iter(able.values())), title="backends")
    for operator, by_backend in able.items():
        cells = []
        for answer in by_backend.values():
            is_able, _, why = answer.partition("no: ")
            cells.append(is_able or f"no ({reasons.setdefault(why, len(reasons) + 1)})")
        table.add_row(operator, *cells)
    return table, list(reasons)


def _probes() -> dict[str, Callable[[str], Any]]:
    """A small call of each operator with the backend by name, on the GPU if there is one, and then
    in the dtype of its matrix products.
    """
    import torch

    from ..ops import gated_adapter, lora_linear, masked_weight, prefix_attention, symmetric_kl

    has_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    x = torch.zeros(1, 16, 64, device=device, dtype=dtype)
    down, up = x.new_zeros(16, 64), x.new_zeros(64, 16)
    q, weight = x.new_zeros(1, 2, 16, 32), x.new_zeros(64, 64)
    return {
        "gated_adapter": lambda backend: gated_adapter(x, down, up, backend=backend),
        "prefix_attention": lambda backend: prefix_attention(q, q, q, backend=backend),
        "lora_linear": lambda backend: lora_linear(x, weight, backend=backend),
        "masked_weight": lambda backend: masked_weight(
            weight, up, down, up, down, weight[0], weight[0], 1, backend=backend
        ),
        "symmetric_kl": lambda backend: symmetric_kl(x, x, backend=backend),
    }


def _ability(operator: str, call: Callable[[str], Any]) -> dict[str, str]:
    """Per backend, that it served the call and in which of its forms (on a CPU, with which
    instruction set), or why it did not.
    """
    from ..ops import BACKENDS, BackendError, explain

    able = {}
    for backend in BACKENDS:
        try:
            call(backend)
            form = next(c.form for c in reversed(explain(operator)) if c.requested == backend)
            able[backend] = f"yes, {form}" if form else "yes"
        except BackendError as error:
            # "<operator>: backend '<name>' was asked for but <reason>.  Able: <names>."
            able[backend] = "no: " + str(error).partition(" but ")[2].partition(".  Able")[0]
    return able


def _describe_model(name: str) -> dict[str, Any]:
    from ..models import FAMILIES
    from ..training.base_model import load_config, locate

    config = load_config(name)
    is_known = config.model_type in FAMILIES
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    return {
        "found in": locate(name)[0],
        "family": config.model_type + ("" if is_known else " (not supported)"),
        **{size: getattr(config, size, "unknown") for size in sizes},
    }


def _describe_adapter(folder: Path) -> dict[str, Any]:
    from ..models.adapter_files import read_config
    from ..training import RunError
    from ..training.predictor import Card

    card = Card.load(folder)
    try:
        config, base = read_config(folder)
    except (ValueError, OSError) as error:
        raise RunError(f"adapter {folder} cannot be used: {error}") from error
    return {
        "task": card.task,
        "problem": card.problem,
        "labels": list(card.labels),
        "model": card.model,
        "architecture": base.get("architecture"),
        "longest_text": card.max_length,
        **config.to_dict(),
    }

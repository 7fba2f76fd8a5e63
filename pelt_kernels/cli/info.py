"""`pelt-kernels info`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import Debug, errors_in_one_line, results


def info(
    model: Annotated[str | None, typer.Option(help="Also describe this model.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Also describe this adapter.")] = None,
    debug: Debug = False,
) -> None:
    """Show versions, the machine, which backends can serve each operator and why others cannot."""
    with errors_in_one_line(debug):
        from .._hardware import hardware
        from ..ops._native import build_info
        from ..training.report import versions

        out = results()
        facts = Table(show_header=False, title="pelt-kernels")
        built = {"cuda_kernels_for": build_info().get("cuda_capabilities")}
        for name, value in (versions() | hardware() | built).items():
            shown = ", ".join(value) if isinstance(value, list) else value
            facts.add_row(name.replace("_", " "), str(shown or "none"))
        out.print(facts)
        backends = Table("operator", "backend", "able here", title="backends")
        for operator, call in _probes().items():
            for backend, able in _ability(operator, call).items():
                backends.add_row(operator, backend, able)
        out.print(backends)
        if model is not None:
            out.print(_describe_model(model))
        if adapter is not None:
            out.print(_describe_adapter(adapter))


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


def _describe_model(name: str) -> Table:
    from ..models import FAMILIES
    from ..training.base_model import load_config, locate

    config = load_config(name)
    table = Table(show_header=False, title=name)
    table.add_row("found in", locate(name)[0])
    is_known = config.model_type in FAMILIES
    table.add_row("family", config.model_type + ("" if is_known else " (not supported)"))
    for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        table.add_row(field.replace("_", " "), str(getattr(config, field, "unknown")))
    return table


def _describe_adapter(folder: Path) -> Table:
    from ..models.adapter_files import read_config
    from ..training import RunError
    from ..training.predictor import Card

    card = Card.load(folder)
    try:
        config, base = read_config(folder)
    except (ValueError, OSError) as error:
        raise RunError(f"adapter {folder} cannot be used: {error}") from error
    table = Table(show_header=False, title=str(folder))
    for name, value in {
        "task": card.task,
        "problem": card.problem,
        "labels": ", ".join(card.labels) or "none",
        "model": card.model,
    }.items():
        table.add_row(name, value)
    table.add_row("architecture", str(base.get("architecture")))
    table.add_row("longest text", f"{card.max_length} tokens")
    for name, value in config.to_dict().items():
        table.add_row(name, str(value))
    return table

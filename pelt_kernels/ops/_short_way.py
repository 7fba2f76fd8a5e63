"""The short way of a call past torch's dispatcher: one node of autograd around a backend's forward
and backward.

A call of 27 arguments through the dispatcher and an operator's autograd formula costs more than a
small adapter does: 40 us a call without and 330 us with gradients, against 13 and 30 us this way
(2-core EPYC, torch 2.13). It is for plain tensors outside of any mode or transform: same binding,
same choice, same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from . import _formula
from ._contract import Chosen
from ._values import Value, flatten, is_autocast, unflatten


class _Node(torch.autograd.Function):
    """Tensors come flat, so that autograd sees them, and without the absent ones:
    `Signature.flat_names` tells where each belongs.
    """

    @staticmethod
    def forward(
        ctx: Any, chosen: Chosen, values: Sequence[Value], seed: int, *given: Tensor
    ) -> tuple[Tensor, ...]:
        layout = chosen.layout
        outputs = run_forward(chosen, dict(zip(chosen.contract.input_names, values)), seed)
        flat = flatten(outputs) if chosen.contract.has_list_outputs else outputs
        ctx.chosen, ctx.seed = chosen, seed
        ctx.save_for_backward(*compress(given, layout.kept), *compress(flat, layout.saved))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*compress(flat, layout.frozen))
        return tuple(compress(flat, layout.public))

    @staticmethod
    def backward(ctx: Any, *flat_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if _formula.is_batched(flat_grads):
            return _formula.each(lambda *dys: _Node.backward(ctx, *dys), flat_grads)
        chosen, contract = ctx.chosen, ctx.chosen.contract
        layout = chosen.layout
        tensors = iter(ctx.saved_tensors)
        inputs = layout.by_name([next(tensors) if is_kept else None for is_kept in layout.kept])
        if _formula.needs_formula(flat_grads):
            return _by_formula(ctx, inputs, flat_grads)
        dys = compress(flat_grads, compress(layout.differentiable, layout.public))
        whole = iter([filled(dy, like) for dy, like in zip(dys, layout.likes)])
        named = dict(zip(contract.gradient_names, unflatten(whole, layout.differentiable_lengths)))
        named.update(zip(contract.saved_names, unflatten(tensors, layout.saved_lengths)))
        dy = named[contract.gradient_names[0]]
        needs = dict.fromkeys(contract.backward_names, False)
        asked = ctx.needs_input_grad[3:]
        for name, _ in compress(chosen.flat_names, asked):
            if name in needs:
                needs[name] = True
        found = run_backward(chosen, needs, named, inputs, ctx.seed) if any(needs.values()) else {}
        result: list[Tensor | None] = [None, None, None]
        for (name, i), need in zip(chosen.flat_names, asked):
            if not need:
                result.append(None)
            elif name not in needs:
                result.append(dy)  # an input that was only added: its gradient is the output's
            else:
                result.append(found[name] if i < 0 else found[name][i])
        return tuple(result)


def _by_formula(
    ctx: Any, inputs: dict[str, Value], flat_grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    chosen: Chosen = ctx.chosen
    layout = chosen.layout
    dys = list(compress(flat_grads, compress(layout.differentiable, layout.public)))
    names = chosen.contract.backward_names
    asked = ctx.needs_input_grad[3:]
    wanted = [name for name in compress(chosen.flat_names, asked) if name[0] in names]
    found = iter(_formula.backward(chosen, wanted, dys, inputs, ctx.seed) if wanted else ())
    result: list[Tensor | None] = [None, None, None]
    for (name, _), need in zip(chosen.flat_names, asked):
        result.append((next(found) if name in names else dys[0]) if need else None)
    return tuple(result)


# No transform is active here, which is what `Function.apply` looks for in every argument.
apply = super(torch.autograd.Function, _Node).apply


def like_of(out: Any) -> Any:
    """What `filled` has to know of an output, or of each of a list."""
    return (
        [like_of(o) for o in out]
        if isinstance(out, (list, tuple))
        else (out.shape, out.dtype, out.device)
    )


def filled(dy: Any, like: Any) -> Any:
    """An output's gradient, contiguous; zeros for an output that the loss does not depend on."""
    if isinstance(like, list):
        return [filled(d, k) for d, k in zip(dy or [None] * len(like), like)]
    if dy is not None:
        return dy.contiguous()
    shape, dtype, device = like
    return torch.zeros(shape, dtype=dtype, device=device)


def run_forward(chosen: Chosen, inputs: dict[str, Value], seed: int) -> Sequence[Any]:
    """The outputs of a call, outside of autocast: a backend chooses its dtypes itself, and torch
    would recast what it keeps in float32.
    """
    if chosen.contract.has_seed:
        inputs["seed"] = seed
    if is_autocast(chosen.device):
        with torch.autocast(chosen.device.type, enabled=False):
            outputs = chosen.forward(chosen, **inputs)
    else:
        outputs = chosen.forward(chosen, **inputs)
    return [
        output if output.__class__ is Tensor and not output._is_view() else _no_view(output)
        for output in outputs
    ]


def _no_view(output: Any) -> Any:
    """An output that can be written in place: torch lets nobody write into a view made in a
    custom function, such as what its own product of three dimensions returns.
    """
    if isinstance(output, Tensor):
        return output.data if output._is_view() else output
    return output if output is None else [_no_view(each) for each in output]


def run_backward(
    chosen: Chosen,
    needs: dict[str, bool],
    named: dict[str, Value],
    inputs: dict[str, Value],
    seed: int,
) -> dict[str, Value]:
    """The gradients of a call that ``needs`` names, outside of autocast too."""
    if chosen.contract.has_seed:
        inputs["seed"] = seed
    if is_autocast(chosen.device):
        with torch.autocast(chosen.device.type, enabled=False):
            return chosen.backward(chosen, needs, **named, **inputs)
    return chosen.backward(chosen, needs, **named, **inputs)

"""An operator by its formula: the contract's `reference`, made of PyTorch's own operations.

Kernels compute an output and its first gradient only. A transform of `torch.func`, forward-mode
differentiation, `torch.jit.trace` and a gradient that is to be differentiated again need every
operation. For them the formula runs, with dropout's mask from the same seed; it needs the memory of
its intermediate results, such as the scores of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import _dispatch
from ._contract import Contract, Signature
from ._values import Value, flatten, is_autocast

FlatName = tuple[str, int]  # an input's name, and the place in a list or -1


def reason(values: Sequence[Value]) -> str:
    """What has to see the operations of a call on these inputs; empty if a backend may serve it."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms PyTorch's own operations only"
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and torch._C._is_tracing():
        return "torch.jit.trace records PyTorch's own operations only"
    # A graph that is compiled for forward-mode differentiation is for whatever tangents there are.
    if forward_ad._current_level >= 0 and (is_compiling or has_tangent(values)):
        return "forward-mode differentiation goes through PyTorch's own operations only"
    return ""


def has_tangent(values: Sequence[Value]) -> bool:
    """Is one of these a dual tensor of `torch.autograd.forward_ad`?"""
    return forward_ad._current_level >= 0 and any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in flatten(values)
    )


def forward(
    contract: Contract,
    values: Sequence[Value],
    attributes: Sequence[Any],
    seed: int | Tensor,
    request: str,
    why: str,
) -> tuple[Any, ...]:
    """The public outputs of a call, those without gradient detached.

    Raises BackendError if another backend than eager was asked for by name.
    """
    _dispatch.check_formula(contract.name, request, why)
    values = contract.with_own_indices(values)
    if not torch.compiler.is_compiling():
        with _off_the_record():
            signature = contract.bind(values, attributes)
            contract.check_indices(signature, values)
            _dispatch.remember_formula(signature, request, why)
    outputs = _reference(contract, values, dict(zip(contract.attribute_names, attributes)), seed)
    return tuple(
        out if row.is_differentiable else _detached(out)
        for row, out in zip(contract.public_rows, outputs)
    )


def needs_formula(dys: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass on these gradients of outputs is to be the formula's: the result is
    to be differentiated (``create_graph=True``), or a transform or forward-mode differentiation
    has to see the operations.
    """
    return (
        torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or has_tangent(dys)
    )


def backward(
    signature: Signature,
    wanted: Sequence[FlatName],
    dys: Sequence[Tensor | None],
    inputs: dict[str, Value],
    seed: int | Tensor | None,
) -> list[Tensor]:
    """The gradients of the wanted tensors as autograd finds them in the formula; under
    ``create_graph=True`` they can be differentiated again, by the inputs and by ``dys``.
    """
    contract = signature.contract
    why = reason(dys) or "create_graph=True asks for a gradient that can be differentiated"
    _dispatch.remember_formula(signature, "", why)
    own: dict[str, Any] = {
        name: list(value) if isinstance(value, (list, tuple)) else value
        for name, value in inputs.items()
    }
    leaves: list[Tensor] = []
    with torch.enable_grad():
        for name, i in wanted:
            # Seen as a tensor of its own: one input may be made of another or be given twice, and
            # these are partial derivatives.
            value = inputs[name] if i < 0 else inputs[name][i]
            leaves.append(value.view_as(value))
            if not leaves[-1].requires_grad:  # frozen since, or beside others in a list
                leaves[-1].requires_grad_()
            if i < 0:
                own[name] = leaves[-1]
            else:
                own[name][i] = leaves[-1]
        values = [own[name] for name in contract.input_names]
        outputs = _reference(contract, values, signature.attributes, seed)
    found = [y for y, row in zip(outputs, contract.public_rows) if row.is_differentiable]
    reached = [(y, dy) for y, dy in zip(flatten(found), dys) if dy is not None and y.requires_grad]
    if not reached:
        return [torch.zeros_like(leaf) for leaf in leaves]
    ys, given = zip(*reached)
    return list(
        torch.autograd.grad(
            ys, leaves, given, create_graph=torch.is_grad_enabled(), materialize_grads=True,
            allow_unused=True,
        )
    )  # fmt: skip


def _reference(
    contract: Contract,
    values: Sequence[Value],
    attributes: dict[str, Any],
    seed: int | Tensor | None,
) -> Sequence[Any]:
    """The formula, outside of autocast: it chooses its dtypes itself. Without dropout there may be
    no seed.
    """
    if contract.has_seed:
        attributes = {**attributes, "seed": seed}
    device = next(value for value in flatten(values) if value is not None).device
    if is_autocast(device):
        with torch.autocast(device.type, enabled=False):
            return contract.reference(*values, **attributes)
    return contract.reference(*values, **attributes)


def _detached(out: Any) -> Any:
    return [o.detach() for o in out] if isinstance(out, list) else out.detach()


def is_batched(dys: Sequence[Tensor | None]) -> bool:
    """Does ``is_grads_batched=True`` give several gradients at once? torch's batched tensors of
    that kind support too few operations; `each` is for them.
    """
    return any(dy is not None and _functorch.is_legacy_batchedtensor(dy) for dy in dys)


def each(function: Callable[..., Any], dys: Sequence[Any]) -> Any:
    """``function(*dys)`` for each of several gradients given at once, as one result of them all."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    flat, tree = tree_flatten(dys)
    columns = [
        list(torch._remove_batch_dim(dy, level, 0, 0)) if is_batched([dy]) else dy for dy in flat
    ]
    size = next(len(column) for column in columns if isinstance(column, list))
    rows = []
    for n in range(size):
        row = [column[n] if isinstance(column, list) else column for column in columns]
        found, shape = tree_flatten(function(*tree_unflatten(row, tree)))
        rows.append(found)
    results = [
        None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
        for column in zip(*rows)
    ]
    return tree_unflatten(results, shape)


@contextmanager
def _off_the_record() -> Iterator[None]:
    """Outside of `torch.jit.trace`, where sizes are numbers and checks are part of no graph."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

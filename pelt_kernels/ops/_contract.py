"""An operator's contract as data: names, kinds and shapes of its inputs, attributes and outputs.

A contract is written once, as three small tables, and everything else reads it: the checks of a
call (`Contract.bind`), the schema and the fake implementation given to torch, the inputs that tests
and benchmarks draw, the table of backends and the shape comments of
`csrc/ops/<operator>/params.h`.

Attributes are what a backend may decide by; a dropout seed is none of them: it changes with every
call, so an operator with dropout (`has_seed`) takes it beside them.

An input row is ``name  kind  shapes``. The kind says which dtypes are allowed:

* ``activation``   float32, float16, bfloat16 or float64; all activations of a call share one dtype
* ``parameter``    the activation dtype, or float32 beside 16-bit activations (master parameters)
* ``bool``         a mask
* ``index(M)``     int64 with values in [0, M)
* ``count(N)``     int64 with values in [0, N]

``?`` after the kind: may be absent (None). ``*``: a list; sizes ending in ``_i`` are then one per
element. Shapes are alternatives separated by ``|``. ``grad=dy``: the input's gradient is the
output's, so backward does not need it. ``view``: compiled kernels may read it through its strides;
these stand first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from ._rows import (
    Output,
    bind_shape,
    check_attributes,
    check_dtypes,
    check_not_zero,
    check_output,
    elements,
    parse_attribute,
    parse_input,
    parse_output,
    rows_of,
)
from ._values import Value, extremes, is_fake, is_given, own_copy, scan


@dataclass(frozen=True)
class Layout:
    """How the tensors of a call lie one behind the other, lists expanded and absent ones left out:
    for autograd, which wants them so.
    """

    # For each input its number among the tensors that are there, None, or a tuple of both.
    flat_positions: tuple[tuple[str, Any], ...]
    kept: tuple[bool, ...]  # for each tensor: does backward need it
    # For each output: is it public, ...
    public: tuple[bool, ...]
    saved: tuple[bool, ...]
    differentiable: tuple[bool, ...]
    frozen: tuple[bool, ...]  # public and not differentiable
    # -1 or the length of a list for each row that is public, ...
    output_lengths: tuple[int, ...]
    saved_lengths: tuple[int, ...]
    differentiable_lengths: tuple[int, ...]
    likes: tuple[Any, ...]  # shape, dtype and device of each output that is differentiable

    def by_name(self, tensors: Sequence[Tensor | None]) -> dict[str, Value]:
        """The inputs, from the tensors that are there."""
        inputs: dict[str, Value] = {}
        for name, position in self.flat_positions:
            if position.__class__ is int:
                inputs[name] = tensors[position]
            elif position is None:
                inputs[name] = None
            else:
                inputs[name] = [None if i is None else tensors[i] for i in position]
        return inputs


@dataclass
class Signature:
    """What `bind` learned from one combination of shapes, dtypes and attributes. Backends decide by
    it alone.

    It holds no tensor and no seed, so it is the same for real and for fake inputs and is kept for
    the next equal call.
    """

    contract: Contract
    sizes: dict[str, Any]  # letter -> int, or a tuple of int for sizes ending in _i
    dtype: torch.dtype
    device: torch.device
    given: frozenset[str]  # the optional inputs that are there
    masters: frozenset[str]  # the parameters that are float32 beside 16-bit activations
    attributes: dict[str, Any]
    has_index: bool  # values of one of its inputs have to be checked, beside shapes
    # Of each tensor that is there its input's name and its place in a list or -1, and what it is.
    flat_names: tuple[tuple[str, int], ...]
    tensors: tuple[tuple[torch.Size, torch.dtype], ...]
    layout: Layout = field(init=False)
    # What serves it, by request: without and with a backward to follow.
    chosen: tuple[dict[str, Chosen], dict[str, Chosen]] = field(
        init=False, default_factory=lambda: ({}, {})
    )

    def dimensions(self, name: str, i: int = -1) -> int:
        """How many an input has, or element i of a list; -1 where it is not there."""
        shapes = dict(zip(self.flat_names, self.tensors))
        return len(shapes[name, i][0]) if (name, i) in shapes else -1

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes.items())
        return (
            f"{self.contract.name} {str(self.dtype).removeprefix('torch.')} {self.device.type} "
            f"{sizes}"
        )


@dataclass(init=False)
class Chosen(Signature):
    """A signature with what serves it, which is what a backend's functions get."""

    backend: str
    form: str  # which of its ways, where the backend has several
    plan: Any = None  # what the backend's `plan` made of it, once
    forward: Any = None
    backward: Any = None
    choice: Any = None  # how the dispatch came to it,
    era: int = -1  # and when it last told so

    def __init__(self, signature: Signature, backend: str, form: str) -> None:
        vars(self).update(vars(signature))
        self.backend, self.form = backend, form


@dataclass
class Contract:
    """See the module's docstring; `rules(signature, values)` adds what shapes cannot say and raises
    ValueError.
    """

    name: str
    inputs: str
    attributes: str
    outputs: str
    has_seed: bool
    output_shapes: Callable[[Signature], dict[str, Any]]
    rules: Callable[[Signature, dict[str, Value]], None] = lambda *_: None
    never_zero: str = ""  # letters; the other sizes may be 0
    longest_list: int = 0  # that compiled kernels have room for
    # The formula in PyTorch's own operations, which stands below the contract in its file.
    reference: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.input_rows = [parse_input(row) for row in rows_of(self.inputs)]
        self.attribute_rows = [parse_attribute(row) for row in rows_of(self.attributes)]
        self.output_rows = [parse_output(row) for row in rows_of(self.outputs)]
        self.input_names = tuple(row.name for row in self.input_rows)
        self.has_lists = any(row.is_list for row in self.input_rows)
        self.has_list_outputs = any(row.is_list for row in self.output_rows)
        self.attribute_names = tuple(row.name for row in self.attribute_rows)
        self.is_public = tuple(not row.is_private for row in self.output_rows)
        self.public_rows = [row for row in self.output_rows if not row.is_private]
        self.differentiable_rows = [row for row in self.output_rows if row.is_differentiable]
        self.saved_rows = [row for row in self.output_rows if row.is_saved]
        self.gradient_names = tuple(f"d{row.name}" for row in self.differentiable_rows)
        self.saved_names = tuple(row.name for row in self.saved_rows)
        self.backward_names = tuple(row.name for row in self.input_rows if not row.grad_is_dy)
        # The sizes' letters, as they come up.
        self.letters = tuple(
            dict.fromkeys(
                letter
                for row in self.input_rows
                for shape in row.shapes
                for letter in shape
                if not letter.isdigit()
            )
        )
        self._attributes_hash = not any(row.type.endswith("[]") for row in self.attribute_rows)
        self._signatures: dict[Any, Signature] = {}

    def bind(
        self,
        values: Sequence[Value],
        attributes: Sequence[Any],
        seen: list[Any] | None = None,
    ) -> Signature:
        """Checks one call but for its indices (`check_indices`) and names its sizes; a repeated
        combination costs one look-up.

        ``seen`` is what `scan` saw of the values, if the caller has it already.
        """
        key = (
            *(self.scan(values)[0] if seen is None else seen),
            *(attributes if self._attributes_hash else _hashable(attributes)),
        )
        try:
            signature = self._signatures.get(key)
        except TypeError:  # sizes are symbols while torch.compile traces: they have no hash
            return self._bind(values, attributes)
        if signature is None:
            signature = self._bind(values, attributes)
            if len(self._signatures) >= 4096:  # shapes that never repeat must not grow unbounded
                self._signatures.clear()
            self._signatures[key] = signature
        return signature

    def _bind(self, flat_values: Sequence[Value], flat_attributes: Sequence[Any]) -> Signature:
        values = dict(zip(self.input_names, flat_values))
        attributes = dict(zip(self.attribute_names, flat_attributes))
        sizes: dict[str, Any] = {}
        source: dict[str, str] = {}
        for row in self.input_rows:
            for i, tensor in enumerate(elements(self.name, row, values[row.name])):
                if tensor is not None:
                    bind_shape(self.name, row, i, tensor, sizes, source)
        first = next(row for row in self.input_rows if row.kind == "activation")
        like = values[first.name]
        for letter in self.never_zero.split():
            check_not_zero(self.name, letter, sizes, source)
        masters = check_dtypes(self.name, self.input_rows, first.name, like, values)
        check_attributes(self.name, self.attribute_rows, attributes)
        given = frozenset(row.name for row in self.input_rows if is_given(values[row.name]))
        flat = [
            ((row.name, i if row.is_list else -1), value)
            for row in self.input_rows
            for i, value in enumerate(values[row.name] if row.is_list else (values[row.name],))
            if value is not None
        ]
        signature = Signature(
            contract=self,
            sizes={k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()},
            dtype=like.dtype,
            device=like.device,
            given=given,
            masters=masters,
            attributes=attributes,
            has_index=any(row.bound and row.name in given for row in self.input_rows),
            flat_names=tuple(name for name, _ in flat),
            tensors=tuple((tensor.shape, tensor.dtype) for _, tensor in flat),
        )
        for row in self.input_rows:
            if row.bound and row.name in given and row.bound not in signature.sizes:
                raise ValueError(
                    f"{self.name}: expected a bank with a size {row.bound} beside {row.name}, got "
                    f"none; leave {row.name} out or give the bank a leading dimension"
                )
        self.rules(signature, values)
        signature.layout = self._layout(signature, values)
        return signature

    def _layout(self, signature: Signature, values: dict[str, Value]) -> Layout:
        numbers = itertools.count()

        def position(value: Value) -> Any:
            if isinstance(value, (list, tuple)):
                return tuple(position(v) for v in value)
            return None if value is None else next(numbers)

        shapes = self.output_shapes(signature)
        lengths = {
            row.name: len(shapes[row.name]) if row.is_list else -1 for row in self.output_rows
        }

        def flags(is_of_kind: Callable[[Output], bool]) -> tuple[bool, ...]:
            return tuple(
                is_of_kind(row) for row in self.output_rows for _ in range(abs(lengths[row.name]))
            )

        return Layout(
            flat_positions=tuple((name, position(value)) for name, value in values.items()),
            kept=tuple(name in self.backward_names for name, _ in signature.flat_names),
            public=flags(lambda row: not row.is_private),
            saved=flags(lambda row: row.is_saved),
            differentiable=flags(lambda row: row.is_differentiable),
            frozen=flags(lambda row: not row.is_private and not row.is_differentiable),
            output_lengths=tuple(lengths[row.name] for row in self.public_rows),
            saved_lengths=tuple(lengths[row.name] for row in self.saved_rows),
            differentiable_lengths=tuple(lengths[row.name] for row in self.differentiable_rows),
            likes=tuple(
                (shape, output_dtype(signature, row), signature.device)
                for row in self.differentiable_rows
                for shape in (shapes[row.name] if row.is_list else [shapes[row.name]])
            ),
        )

    def scan(self, values: Sequence[Value]) -> tuple[list[Any], list[Tensor], bool, bool]:
        """What `bind` and a caller have to know of each input, in one look."""
        try:
            return scan(values)
        except RuntimeError:  # a nested tensor has no shape
            self.check_kinds(values)
            raise

    def check_kinds(self, values: Sequence[Value]) -> None:
        """Raises TypeError where something else stands than a dense tensor, or a list of them."""
        for row, value in zip(self.input_rows, values):
            elements(self.name, row, value)

    def with_own_indices(self, values: Sequence[Value]) -> list[Value]:
        """The inputs with a copy of each index that is on the CPU: what is checked is what runs,
        forward and backward, whatever the caller writes into an index meanwhile.
        """
        return [
            value if row.bound is None else own_copy(value)
            for row, value in zip(self.input_rows, values)
        ]

    def check_indices(self, signature: Signature, values: Sequence[Value]) -> None:
        """Index values are read where that costs nothing: on the CPU. On a GPU it would stop the
        stream.
        """
        if signature.device.type != "cpu":
            return
        for row, value in zip(self.input_rows, values):
            if row.bound is None:
                continue
            for i, tensor in enumerate(value if row.is_list else (value,)):
                if tensor is None or is_fake(tensor) or not tensor.numel():
                    continue
                while _functorch.is_functorch_wrapped_tensor(tensor):
                    tensor = _functorch.get_unwrapped(tensor)  # all samples of `torch.vmap` at once
                bound = signature.sizes[row.bound]
                bound = bound[i] if isinstance(bound, tuple) else bound
                low, high = extremes(tensor)
                if low >= 0 and high < bound + row.includes_bound:
                    continue
                label = f"{row.name}[{i}]" if row.is_list else row.name
                end, what = ("]", "") if row.includes_bound else (")", " bank members")
                raise ValueError(
                    f"{self.name}: expected {label} in [0, {bound}{end} "
                    f"({row.bound}={bound}{what}), got values from {low} to {high}"
                )

    def check_outputs(self, signature: Signature, named: dict[str, Value]) -> None:
        """Checks gradients (``dy``) and saved outputs that are given to backward by hand."""
        shapes = self.output_shapes(signature)
        for row in self.output_rows:
            for name in (f"d{row.name}", row.name):
                if name in named:
                    wanted = shapes[row.name] if row.is_list else [shapes[row.name]]
                    found = named[name] if row.is_list else [named[name]]
                    check_output(
                        self.name,
                        name,
                        output_dtype(signature, row),
                        signature.device,
                        wanted,
                        found,
                    )


def output_dtype(signature: Signature, row: Output) -> torch.dtype:
    """By the row's kind: ``activation``, ``float32`` (beside float64 activations float64) or
    ``bool``.
    """
    if row.kind == "bool":
        return torch.bool
    if row.kind == "float32" and signature.dtype != torch.float64:
        return torch.float32
    return signature.dtype


def _hashable(attributes: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([tuple(a) if a.__class__ is list else a for a in attributes])

"""How a call comes from Python to C++ (csrc/bindings/operator.h): the same for every operator and
for both kinds of kernels.

What is the same for equal calls comes once, as a `Plan`; what changes from call to call, addresses
above all, comes as flat lists in the contract's order. The C++ side has the order's names from
generated headers (`cpp_header`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._contract import Chosen, Signature, output_dtype
from ._dispatch import forms_of
from ._gate import POOLINGS
from ._rows import Attribute
from ._values import Value, flatten, unflatten

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_SIXTY_FOUR_BITS = 0xFFFFFFFFFFFFFFFF
# The words of attributes in the order of their numbers; a contract may allow a part of them.
ENUMS: dict[str, tuple[str, ...]] = {
    "Activation": ("relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"),
    "Pooling": ("none", *POOLINGS),
    "ResidualFrom": ("input", "none", "tensor"),
}


def has_enum(row: Attribute) -> bool:
    """Is the attribute one of several words?"""
    return bool(row.choices)


def enum_of(row: Attribute) -> str:
    """The enum that has the attribute's words."""
    return next(name for name, words in ENUMS.items() if set(row.choices) <= set(words))


def kernels_of(backend: str) -> str:
    """``cuda`` or ``cpu``, whose kernels a backend runs, on hardware or simulated."""
    return backend.removesuffix("_sim")


def why_not(call: Signature, backend: str, form: str) -> str:
    """Why the compiled kernels refuse a call, in one sentence; empty if they serve it.

    What follows from sizes is decided by the C++ side, which knows its configurations.
    """
    kernels = kernels_of(backend)
    if not hasattr(_native.library_of(backend), f"{call.contract.name}_{kernels}"):
        return (
            "the compiled module was built without its CUDA kernels"
            if kernels == "cuda"
            else "the compiled module is older than this kernel; build it with `make build`"
        )
    first, dtype = call.contract.input_names[0], str(call.dtype).removeprefix("torch.")
    if kernels == "cpu" and call.dtype not in _CPU_DTYPES:
        return f"it takes float32 or bfloat16, and {first} is {dtype}"
    if call.dtype not in DTYPES:
        return f"it takes float32, float16 or bfloat16, and {first} is {dtype}"
    if kernels == "cpu" and form == _native.TILES and call.dtype != torch.bfloat16:
        return f"its tiles multiply bfloat16, and {first} is {dtype}"
    return _native_plan(call, backend, form).why_not()


class Plan:
    """What is the same for every call of one signature on one backend: the C++ side's description
    of it, the outputs' shapes, and how much memory each direction needs.

    With ``reads_views`` the inputs that the contract calls views are read through their strides.
    Other tensors are made contiguous, and for CUDA kernels to start at a 16-byte border.
    """

    def __init__(self, call: Chosen, reads_views: bool = False) -> None:
        contract = call.contract
        self.native = _native_plan(call, call.backend, call.form)
        self.device = call.device
        self.is_empty = 0 in call.tensors[0][0]  # no row: then no kernel runs
        self._flat_names, self._has_lists = call.flat_names, contract.has_list_outputs
        is_cpu = kernels_of(call.backend) == "cpu"
        self._dense = _contiguous if is_cpu else _native.dense
        views = {row.name for row in contract.input_rows if row.is_view} if reads_views else ()
        self._views = sum(name in views for name, _ in call.flat_names)
        self._rows = _rows_contiguous if is_cpu else _native.readable_rows
        self._depends_on_threads = is_cpu
        self._bytes: dict[Any, int] = {}  # of workspaces
        shapes = contract.output_shapes(call)
        self._lengths = tuple(
            len(shapes[row.name]) if row.is_list else -1 for row in contract.output_rows
        )
        self._outputs = [
            (shape, output_dtype(call, row))
            for row in contract.output_rows
            for shape in (shapes[row.name] if row.is_list else [shapes[row.name]])
        ]
        flat = [
            (row, i)
            for row, length in zip(contract.output_rows, self._lengths)
            for i in (range(length) if length >= 0 else [-1])
        ]
        self._saved = [(row.name, i) if row.is_saved else None for row, i in flat]
        self._gradients = [
            (f"d{row.name}", i) if row.is_differentiable else None for row, i in flat
        ]

    def forward(self, inputs: dict[str, Value]) -> Sequence[Any]:
        """The outputs of a call, from its inputs by name (and ``seed``)."""
        outputs = self.outputs()
        if not self.is_empty:
            self.run_forward(inputs, outputs)
        return outputs

    def backward(self, needs: dict[str, bool], values: dict[str, Value]) -> dict[str, Value]:
        """The gradients that ``needs`` names, from inputs, saved outputs and the gradients of
        outputs by name.
        """
        grads = self.gradients(needs, values)
        if not self.is_empty:
            self.run_backward(values, grads)
        return grads

    def outputs(self) -> Sequence[Any]:
        """The outputs, to be filled; zeros where there are no rows."""
        flat = [_native.empty(shape, dtype, self.device) for shape, dtype in self._outputs]
        if self.is_empty:
            for out in flat:
                out.zero_()
        return unflatten(iter(flat), self._lengths) if self._has_lists else flat

    def gradients(self, needs: dict[str, bool], values: dict[str, Value]) -> dict[str, Value]:
        """The gradients that ``needs`` names, to be filled; zeros where there are no rows."""
        grads = {name: _empty_like(values[name]) for name, need in needs.items() if need}
        if self.is_empty:
            for grad in flatten(grads.values()):
                if grad is not None:
                    grad.zero_()
        return grads

    def run_forward(self, inputs: dict[str, Value], outputs: Sequence[Any]) -> None:
        """Fills the outputs."""
        with_stream(self.device, self._run_forward, inputs, flatten(outputs))

    def run_backward(self, values: dict[str, Value], grads: dict[str, Value]) -> None:
        """Fills the gradients."""
        with_stream(self.device, self._run_backward, values, grads)

    def _run_forward(self, run_on: int, inputs: dict[str, Value], outputs: list[Tensor]) -> None:
        tensors, strides = self._readable(inputs)
        workspace = self._workspace(False, (), run_on)
        self.native.forward(
            _addresses(tensors), strides, _addresses(outputs), _native.pointer(workspace),
            inputs.get("seed", 0) & _SIXTY_FOUR_BITS, run_on,
        )  # fmt: skip

    def _run_backward(self, run_on: int, values: dict[str, Value], grads: dict[str, Value]) -> None:
        tensors, strides = self._readable(values)
        saved = [self._dense(_element(values, place)) for place in self._saved]
        dys = [self._dense(_element(values, place)) for place in self._gradients]
        to = _addresses([_element(grads, name) for name in self._flat_names])
        workspace = self._workspace(True, tuple(address != 0 for address in to), run_on)
        self.native.backward(
            _addresses(tensors), strides, _addresses(saved), _addresses(dys), to,
            _native.pointer(workspace), values.get("seed", 0) & _SIXTY_FOUR_BITS, run_on,
        )  # fmt: skip

    def _readable(
        self, values: dict[str, Value]
    ) -> tuple[list[Tensor | None], list[tuple[int, ...]] | None]:
        """The inputs that are there as kernels read them, copied where they are not so, and the
        strides of the views, which stand first.
        """
        views, dense = self._views, self._dense
        tensors = [values[name] if i < 0 else values[name][i] for name, i in self._flat_names]
        if not views:
            return [dense(tensor) for tensor in tensors], None
        rows = [self._rows(tensor) for tensor in tensors[:views]]
        strides = [tensor.stride()[:-1] for tensor in rows]
        return [*rows, *(dense(tensor) for tensor in tensors[views:])], strides

    def _workspace(self, is_backward: bool, wanted: tuple[bool, ...], run_on: int) -> Tensor | None:
        key = (is_backward, wanted, run_on if self._depends_on_threads else 0)
        size = self._bytes.get(key)
        if size is None:
            size = self._bytes[key] = self.native.workspace_bytes(is_backward, wanted, run_on)
        return _native.workspace(size, self.device)


def with_stream(device: torch.device, run: Any, *arguments: Any) -> None:
    """``run(run_on, *arguments)``: on what kernels run is a GPU's current stream, as an address, or
    a number of threads.
    """
    if device.type == "cuda":
        with _native.on(device) as stream:
            run(stream, *arguments)
    else:
        run(torch.get_num_threads(), *arguments)


def _native_plan(call: Signature, backend: str, form: str) -> Any:
    """The C++ side's description of a call without its tensors."""
    contract = call.contract
    kernels = kernels_of(backend)
    forms = forms_of(contract.name, backend)
    if kernels == "cuda":
        form = str(forms.index(form) if form else 0)
    first = _first_places(contract.input_rows, contract.longest_list)
    return getattr(_native.library_of(backend), f"{contract.name}_{kernels}")(
        dtype=DTYPES[call.dtype],
        form=form,
        sizes=[call.sizes.get(letter) for letter in contract.letters],
        inputs=[
            (first[name] + max(i, 0), len(shape), dtype == torch.float32)
            for (name, i), (shape, dtype) in zip(call.flat_names, call.tensors)
            if i < max(contract.longest_list, 1)
        ],
        outputs=_output_places(call),
        attributes=[
            _number(row, call.attributes[row.name]) for row in contract.attribute_rows
        ],
    )  # fmt: skip


def _first_places(rows: Sequence[Any], longest_list: int) -> dict[str, int]:
    """Where each row's tensor stands, or the first of a list's."""
    places, next_place = {}, 0
    for row in rows:
        places[row.name] = next_place
        next_place += longest_list if row.is_list else 1
    return places


def _output_places(call: Signature) -> list[int]:
    rows, shapes = call.contract.output_rows, call.contract.output_shapes(call)
    first = _first_places(rows, call.contract.longest_list)
    return [
        first[row.name] + i
        for row in rows
        for i in range(len(shapes[row.name]) if row.is_list else 1)
    ]


def _number(row: Attribute, value: Any) -> Any:
    """An attribute's value, words as numbers."""
    if not has_enum(row):
        return value
    words = ENUMS[enum_of(row)]
    return [words.index(word) for word in value] if row.is_list else words.index(value)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _element(values: dict[str, Value], place: tuple[str, int] | None) -> Tensor | None:
    """A tensor by its name and its place in a list, or -1; None where it is not there."""
    if place is None:
        return None
    value = values.get(place[0])
    return value if value is None or place[1] < 0 else value[place[1]]


def _empty_like(value: Value) -> Value:
    """Memory for a gradient, or for each of a list."""
    if isinstance(value, (list, tuple)):
        return [_empty_like(v) for v in value]
    return None if value is None else _native.empty(value.shape, value.dtype, value.device)

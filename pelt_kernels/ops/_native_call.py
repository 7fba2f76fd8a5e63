"""How a call comes from Python to C++ (csrc/bindings/bind.h): the same for every operator and
for both kinds of kernels.

What is the same for equal calls comes once, as a `Plan`; what changes from call to call, addresses
above all, comes as flat lists in the contract's order. The C++ side has the order's names from
generated headers (`cpp_header`).

`supports`, `plan`, `forward` and `backward` are a whole backend where the kernels do all the work:
an operator's `native.py` takes them as they are, or writes its own around a `Plan`.
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
from ._rows import Attribute, Input
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


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """Why the compiled kernels refuse a call, in one sentence; empty if they serve it.

    What follows from sizes and from the GPU is decided by the C++ side, which knows its
    configurations; forward is refused, too, where backward would be and ``needs_grad`` says that it
    follows.
    """
    kernels = kernels_of(backend)
    if not hasattr(_native.library_of(backend), f"{signature.contract.name}_{kernels}"):
        return (
            "the compiled module was built without its CUDA kernels"
            if kernels == "cuda"
            else "the compiled module is older than this kernel; build it with `make build`"
        )
    first, dtype = signature.contract.input_names[0], str(signature.dtype).removeprefix("torch.")
    if kernels == "cpu" and signature.dtype not in _CPU_DTYPES:
        return f"it takes float32 or bfloat16, and {first} is {dtype}"
    if signature.dtype not in DTYPES:
        return f"it takes float32, float16 or bfloat16, and {first} is {dtype}"
    if kernels == "cpu" and form == _native.TILES and signature.dtype != torch.bfloat16:
        return f"its tiles multiply bfloat16, and {first} is {dtype}"
    native = _native_plan(signature, backend, form)
    if kernels == "cpu":
        return str(native.why_not())
    has_rows = 0 not in signature.tensors[0][0]  # without them no kernel runs
    with _native.on(signature.device):
        return str(native.why_not(has_rows, _wanted(signature) if needs_grad else []))


def _wanted(signature: Signature) -> list[list[bool]]:
    """The sets of gradients on which it depends what backward launches: all of them, and all but
    the first input's, which no layer below may need.
    """
    rows = {row.name: row for row in signature.contract.input_rows}
    wanted = [rows[name].is_differentiable for name, _ in signature.flat_names]
    return [chosen for chosen in (wanted, [False, *wanted[1:]]) if any(chosen)]


def plan(chosen: Chosen) -> Plan:
    """What is the same for equal calls. CPU kernels read views through their strides."""
    return Plan(chosen, reads_views=kernels_of(chosen.backend) == "cpu")


def forward(chosen: Chosen, **inputs: Value) -> Sequence[Any]:
    """The outputs of a call, in the contract's order."""
    results: Sequence[Any] = chosen.plan.forward(inputs)
    return results


def backward(chosen: Chosen, needs: dict[str, bool], **values: Value) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name, from inputs, saved outputs and the
    gradients of outputs.
    """
    grads: dict[str, Value] = chosen.plan.backward(needs, values)
    return grads


class Plan:
    """What is the same for every call of one signature on one backend: the C++ side's description
    of it, the outputs' shapes, and how much memory each direction needs.

    With ``reads_views`` the inputs that the contract calls views are read through their strides.
    Other tensors are made contiguous, and for CUDA kernels to start at a 16-byte border.
    """

    def __init__(self, chosen: Chosen, reads_views: bool = False) -> None:
        contract, kernels = chosen.contract, kernels_of(chosen.backend)
        self.native = _native_plan(chosen, chosen.backend, chosen.form)
        self.device, self._is_on_gpu = chosen.device, chosen.device.type == "cuda"
        self._is_simulated = chosen.backend == "cuda_sim"
        # A call on a CPU has ended when it returns.
        self._lends = chosen.backend == "cpu"
        self.is_empty = 0 in chosen.tensors[0][0]  # no row: then no kernel runs
        self._flat_names = chosen.flat_names
        # Of each input's tensor also how it is made readable for the kernels.
        self._dense = Tensor.contiguous if kernels == "cpu" else _native.dense
        rows = _rows_contiguous if kernels == "cpu" else _native.readable_rows
        self._strides_of = Tensor.stride if kernels == "cpu" else _native.row_strides
        views = {row.name for row in contract.input_rows if row.is_view} if reads_views else set()
        self._readers = [(n, i, rows if n in views else self._dense) for n, i in self._flat_names]
        self._views = sum(name in views for name, _ in self._flat_names)
        self._has_lists = contract.has_list_outputs
        self._depends_on_threads = kernels == "cpu"
        self._bytes: dict[Any, int] = {}  # of workspaces
        shapes = contract.output_shapes(chosen)
        self._lengths = tuple(
            len(shapes[row.name]) if row.is_list else -1 for row in contract.output_rows
        )
        flat = [
            (row, i)
            for row, length in zip(contract.output_rows, self._lengths)
            for i in (range(length) if length >= 0 else [-1])
        ]
        self._outputs = [
            _native.shaped(
                shapes[row.name] if i < 0 else shapes[row.name][i],
                output_dtype(chosen, row),
                self.device,
            )
            for row, i in flat
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

    def outputs(self, first: Tensor | None = None) -> Sequence[Any]:
        """The outputs, to be filled; zeros where there are no rows. ``first`` is the first of them
        where kernels add to it.
        """
        flat = [] if first is None else [first]
        for like in self._outputs[len(flat) :]:
            out = _native.fresh(like)
            flat.append(out.zero_() if self.is_empty else out)
        return unflatten(iter(flat), self._lengths) if self._has_lists else flat

    def gradients(self, needs: dict[str, bool], values: dict[str, Value]) -> dict[str, Value]:
        """The gradients that ``needs`` names, to be filled; zeros where there are no rows."""
        grads = {name: _native.empty_like(values[name]) for name, need in needs.items() if need}
        if self.is_empty:
            for grad in flatten(grads.values()):
                if grad is not None:
                    grad.zero_()
        return grads

    def run_forward(
        self, inputs: dict[str, Value], outputs: Sequence[Any], added_to: Sequence[Tensor] = ()
    ) -> None:
        """Fills the outputs; ``added_to`` are those of them that hold what the kernels add to."""
        flat = flatten(outputs) if self._has_lists else outputs
        if self._is_on_gpu:
            with _native.on(self.device) as stream:
                self._run_forward(inputs, flat, added_to, stream)
        else:
            self._run_forward(inputs, flat, added_to, torch.get_num_threads())

    def run_backward(
        self, values: dict[str, Value], grads: dict[str, Value], added_to: Sequence[Tensor] = ()
    ) -> None:
        """Fills the gradients; ``added_to`` are those of them that hold what the kernels add to."""
        if self._is_on_gpu:
            with _native.on(self.device) as stream:
                self._run_backward(values, grads, added_to, stream)
        else:
            self._run_backward(values, grads, added_to, torch.get_num_threads())

    # `run_on`: a GPU's stream, as an address, or on how many threads of a CPU.

    def _run_forward(
        self,
        inputs: dict[str, Value],
        outputs: Sequence[Tensor],
        added_to: Sequence[Tensor],
        run_on: int,
    ) -> None:
        tensors = self._readable(inputs)
        workspace, run = self._workspace(False, (), run_on), self.native.forward
        if self._is_simulated:
            run = _native.on_lent_memory(run, [*tensors, *added_to], [*outputs, workspace])
        run(
            _addresses(tensors), self._strides(tensors), [out.data_ptr() for out in outputs],
            0 if workspace is None else workspace.data_ptr(),
            inputs.get("seed", 0) & _SIXTY_FOUR_BITS, run_on,
        )  # fmt: skip
        self._give_back(workspace)

    def _run_backward(
        self,
        values: dict[str, Value],
        grads: dict[str, Value],
        added_to: Sequence[Tensor],
        run_on: int,
    ) -> None:
        tensors = self._readable(values)
        saved = self._dense_tensors(self._saved, values)
        dys = self._dense_tensors(self._gradients, values)
        to = [
            0 if name not in grads else _native.pointer(grads[name] if i < 0 else grads[name][i])
            for name, i in self._flat_names
        ]
        wanted = tuple([address != 0 for address in to])
        workspace, run = self._workspace(True, wanted, run_on), self.native.backward
        if self._is_simulated:
            run = _native.on_lent_memory(
                run, [*tensors, *saved, *dys, *added_to], [*flatten(grads.values()), workspace]
            )
        run(
            _addresses(tensors), self._strides(tensors), _addresses(saved), _addresses(dys), to,
            0 if workspace is None else workspace.data_ptr(),
            values.get("seed", 0) & _SIXTY_FOUR_BITS, run_on,
        )  # fmt: skip
        self._give_back(workspace)

    def _readable(self, values: dict[str, Value]) -> list[Tensor | None]:
        """The inputs that are there as kernels read them, copied where they are not so."""
        return [
            None
            if (value := values[name]) is None or (i >= 0 and (value := value[i]) is None)
            else read(value)
            for name, i, read in self._readers
        ]

    def _strides(self, tensors: list[Any]) -> list[tuple[int, ...]] | None:
        """Those of the views, which stand first."""
        if not self._views:
            return None
        strides_of = self._strides_of
        return [strides_of(tensor) for tensor in tensors[: self._views]]

    def _dense_tensors(
        self, places: Sequence[tuple[str, int] | None], values: dict[str, Value]
    ) -> list[Tensor | None]:
        """Tensors by their names and places in lists, or -1; None where there is none."""
        dense = self._dense
        return [
            None
            if place is None
            or (value := values.get(place[0])) is None
            or (place[1] >= 0 and (value := value[place[1]]) is None)
            else dense(value)
            for place in places
        ]

    def _workspace(self, is_backward: bool, wanted: tuple[bool, ...], run_on: int) -> Tensor | None:
        key = (is_backward, wanted, run_on if self._depends_on_threads else 0)
        size = self._bytes.get(key)
        if size is None:
            size = self._bytes[key] = self.native.workspace_bytes(is_backward, wanted, run_on)
        if self._lends and size:
            return _native.lent_workspace(size)
        return _native.workspace(size, self.device) if size else None

    def _give_back(self, workspace: Tensor | None) -> None:
        if self._lends and workspace is not None:
            _native.give_back(workspace)


def _native_plan(signature: Signature, backend: str, form: str) -> Any:
    """The C++ side's description of a call without its tensors."""
    contract = signature.contract
    kernels = kernels_of(backend)
    forms = forms_of(contract.name, backend)
    if kernels == "cuda":
        form = str(forms.index(form) if form else 0)
    first = _first_places(contract.input_rows, contract.longest_list)
    rows = {row.name: row for row in contract.input_rows}
    return getattr(_native.library_of(backend), f"{contract.name}_{kernels}")(
        dtype=DTYPES[signature.dtype],
        form=form,
        sizes=[signature.sizes.get(letter) for letter in contract.letters],
        inputs=[
            (first[name] + max(i, 0), _rank(rows[name], shape), dtype == torch.float32)
            for (name, i), (shape, dtype) in zip(signature.flat_names, signature.tensors)
            if i < max(contract.longest_list, 1)
        ],
        outputs=_output_places(signature),
        attributes=[
            _number(row, signature.attributes[row.name]) for row in contract.attribute_rows
        ],
    )  # fmt: skip


def _rank(row: Input, shape: Sequence[int]) -> int:
    """What tells the alternatives of a row's shape apart: the number of dimensions, and where an
    alternative has a 1, as in [1, H, S, N], the bit 16 << d for each dimension d that is 1.
    """
    if not any("1" in alternative for alternative in row.shapes):
        return len(shape)
    return len(shape) + sum(16 << d for d, size in enumerate(shape[:2]) if size == 1)


def _first_places(rows: Sequence[Any], longest_list: int) -> dict[str, int]:
    """Where each row's tensor stands, or the first of a list's."""
    places, next_place = {}, 0
    for row in rows:
        places[row.name] = next_place
        next_place += longest_list if row.is_list else 1
    return places


def _output_places(signature: Signature) -> list[int]:
    rows, shapes = signature.contract.output_rows, signature.contract.output_shapes(signature)
    first = _first_places(rows, signature.contract.longest_list)
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


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

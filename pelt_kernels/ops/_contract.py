"""An operator's contract as data: names, kinds and shapes of its inputs, attributes and outputs.

A contract is written once, as three small tables, and everything else reads it: the checks of a call
(`Contract.bind`), the schema and the fake implementation given to torch, the inputs that tests and benchmarks
draw, the README's support table and the shape comments of `csrc/ops/<operator>/params.h`.

Attributes are what a backend may decide by; a dropout seed is none of them: it changes with every call, so an
operator with dropout (`has_seed`) takes it beside them.

An input row is ``name  kind  shapes``. The kind says which dtypes are allowed:

* ``activation``   float32, float16, bfloat16 or float64; all activations of a call share one dtype
* ``parameter``    the activation dtype, or float32 beside 16-bit activations (master parameters)
* ``bool``         a mask
* ``index(M)``     int64 with values in [0, M); ``index`` without a bound is checked by the operator's rules

``?`` after the kind: may be absent (None). ``*``: a list; sizes ending in ``_i`` are then one per element. Shapes are
alternatives separated by ``|``. ``grad=dy``: the input's gradient is the output's, so backward does not need it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIXTEEN_BIT = (torch.float16, torch.bfloat16)

Shape = tuple[str, ...]
Value = Any  # a Tensor, None, or a list of either


@dataclass(frozen=True)
class Input:
    """One input row of a contract."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    is_optional: bool
    is_list: bool
    bound: str | None
    grad_is_dy: bool

    @property
    def is_differentiable(self) -> bool:
        return self.kind in ("activation", "parameter")


@dataclass(frozen=True)
class Attribute:
    """One attribute row: a number or a word, with its default and the values it may take."""

    name: str
    type: str
    default: Any
    allowed: str

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(self.allowed.split(" | ")) if self.type in ("str", "str[]") and self.allowed else ()


@dataclass(frozen=True)
class Output:
    """One output row: ``differentiable``, ``saved`` (kept for backward), ``private`` (not given to the caller)."""

    name: str
    kind: str
    is_list: bool
    is_differentiable: bool
    is_saved: bool
    is_private: bool


@dataclass
class Call:
    """What `bind` learned from one combination of shapes, dtypes and attributes. Backends decide by it alone.

    It holds no tensor and no seed, so it is the same for real and for fake inputs and is kept for the next equal call.
    """

    contract: Contract
    sizes: dict[str, Any]  # letter -> int, or a tuple of int for sizes ending in _i
    dtype: torch.dtype
    device: torch.device
    given: frozenset[str]  # the optional inputs that are there
    master: frozenset[str]  # the parameters that are float32 beside 16-bit activations
    attributes: dict[str, Any]
    has_index: bool
    slots: tuple[tuple[str, int], ...]  # for each tensor that is there its input's name, and its place in a list or -1
    kept: tuple[bool, ...]  # for each of them: does backward need it
    places: tuple[tuple[str, Any], ...]  # for each input its number among those tensors, None, or a tuple of both
    # Outputs with their lists expanded: which are public, ...; and -1 or the length of a list for each row of a kind.
    public: tuple[bool, ...] = ()
    saved: tuple[bool, ...] = ()
    differentiable: tuple[bool, ...] = ()
    frozen: tuple[bool, ...] = ()  # public and not differentiable
    output_lengths: tuple[int, ...] = ()
    saved_lengths: tuple[int, ...] = ()
    differentiable_lengths: tuple[int, ...] = ()
    backend: str = ""  # set by the dispatch, with the two functions of its implementation
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    selected: dict[str, Call] = field(default_factory=dict)  # request -> this call on its backend

    def place(self, given: Sequence[Tensor | None]) -> dict[str, Value]:
        """The inputs by name, from the tensors that are there."""
        return {
            name: given[at] if at.__class__ is int else None if at is None else [None if i is None else given[i] for i in at]
            for name, at in self.places
        }

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes.items())
        return f"{self.contract.name} {str(self.dtype).removeprefix('torch.')} {self.device.type} {sizes}"


@dataclass
class Contract:
    """See the module's docstring; `rules(call, values)` adds what shapes cannot say and raises ValueError."""

    name: str
    inputs: str
    attributes: str
    outputs: str
    has_seed: bool
    rules: Callable[[Call, dict[str, Value]], None]
    output_shapes: Callable[[Call], dict[str, Any]]

    def __post_init__(self) -> None:
        self.input_rows = [_parse_input(row) for row in _rows(self.inputs)]
        self.attribute_rows = [_parse_attribute(row) for row in _rows(self.attributes)]
        self.output_rows = [_parse_output(row) for row in _rows(self.outputs)]
        self.input_names = tuple(row.name for row in self.input_rows)
        self.has_lists = any(row.is_list for row in self.input_rows)
        self.has_list_outputs = any(row.is_list for row in self.output_rows)
        self.attribute_names = tuple(row.name for row in self.attribute_rows)
        self.public_rows = [row for row in self.output_rows if not row.is_private]
        self.differentiable_rows = [row for row in self.output_rows if row.is_differentiable]
        self.saved_rows = [row for row in self.output_rows if row.is_saved]
        self.gradient_names = tuple(f"d{row.name}" for row in self.differentiable_rows)
        self.saved_names = tuple(row.name for row in self.saved_rows)
        self.backward_names = tuple(row.name for row in self.input_rows if not row.grad_is_dy)
        self._attributes_hash = not any(row.type.endswith("[]") for row in self.attribute_rows)
        self._calls: dict[Any, Call] = {}

    def bind(self, values: Sequence[Value], attributes: Sequence[Any]) -> Call:
        """Checks one call and names its sizes; a repeated combination costs one dictionary look-up."""
        key = (_signature(values), tuple(attributes) if self._attributes_hash else _hashable(attributes))
        try:
            call = self._calls.get(key)
        except TypeError:  # symbolic sizes, while torch.compile traces dynamic shapes: they have no hash
            return self._bind(dict(zip(self.input_names, values)), dict(zip(self.attribute_names, attributes)))
        if call is None:
            call = self._bind(dict(zip(self.input_names, values)), dict(zip(self.attribute_names, attributes)))
            if len(self._calls) >= 4096:  # shapes that never repeat must not grow without bound
                self._calls.clear()
            self._calls[key] = call
        if call.has_index:
            self._check_indices(call, values)
        return call

    def _bind(self, values: dict[str, Value], attributes: dict[str, Any]) -> Call:
        sizes: dict[str, Any] = {}
        source: dict[str, str] = {}
        for row in self.input_rows:
            for i, tensor in enumerate(_elements(self, row, values[row.name])):
                if tensor is not None:
                    _bind_shape(self, row, i, tensor, sizes, source)
        first = next(row for row in self.input_rows if row.kind == "activation")
        like = values[first.name]
        master = _check_dtypes(self, first.name, like, values)
        _check_attributes(self, attributes)
        given = frozenset(row.name for row in self.input_rows if _is_given(values[row.name]))
        slots = tuple(
            (row.name, i if row.is_list else -1)
            for row in self.input_rows
            for i, value in enumerate(values[row.name] if row.is_list else (values[row.name],))
            if value is not None
        )
        numbers = itertools.count()

        def place(value: Value) -> Any:
            if isinstance(value, (list, tuple)):
                return tuple(place(v) for v in value)
            return None if value is None else next(numbers)

        call = Call(
            contract=self,
            sizes={k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()},
            dtype=like.dtype,
            device=like.device,
            given=given,
            master=master,
            attributes=attributes,
            has_index=any(row.bound and row.name in given for row in self.input_rows),
            slots=slots,
            kept=tuple(name in self.backward_names for name, _ in slots),
            places=tuple((row.name, place(values[row.name])) for row in self.input_rows),
        )
        for row in self.input_rows:
            if row.bound and row.name in given and row.bound not in call.sizes:
                raise ValueError(
                    f"{self.name}: expected a bank with a size {row.bound} beside {row.name}, got none; "
                    f"leave {row.name} out or give the bank a leading dimension"
                )
        self.rules(call, values)
        self._plan_outputs(call)
        return call

    def _plan_outputs(self, call: Call) -> None:
        shapes = self.output_shapes(call)
        lengths = {row.name: len(shapes[row.name]) if row.is_list else -1 for row in self.output_rows}

        def flags(is_of_kind: Callable[[Output], bool]) -> tuple[bool, ...]:
            return tuple(is_of_kind(row) for row in self.output_rows for _ in range(abs(lengths[row.name])))

        call.public = flags(lambda row: not row.is_private)
        call.saved = flags(lambda row: row.is_saved)
        call.differentiable = flags(lambda row: row.is_differentiable)
        call.frozen = flags(lambda row: not row.is_private and not row.is_differentiable)
        call.output_lengths = tuple(lengths[row.name] for row in self.public_rows)
        call.saved_lengths = tuple(lengths[row.name] for row in self.saved_rows)
        call.differentiable_lengths = tuple(lengths[row.name] for row in self.differentiable_rows)

    def _check_indices(self, call: Call, values: Sequence[Value]) -> None:
        """Index values are read where that costs nothing: on the CPU. On a GPU it would stop the stream."""
        if call.device.type != "cpu":
            return
        for row, value in zip(self.input_rows, values):
            if row.bound is None:
                continue
            for i, tensor in enumerate(value if row.is_list else (value,)):
                if tensor is None or _is_fake(tensor) or not tensor.numel():
                    continue
                bound = call.sizes[row.bound]
                limit = bound[i] if isinstance(bound, tuple) else bound
                low, high = (int(v) for v in torch.aminmax(tensor))
                if low < 0 or high >= limit:
                    raise ValueError(
                        f"{self.name}: expected {row.name} in [0, {limit}) ({row.bound}={limit} bank members), "
                        f"got values from {low} to {high}"
                    )


def lengths_of(values: Iterable[Any]) -> tuple[int, ...]:
    """-1 for a tensor or None, the number of elements for a list."""
    return tuple(len(value) if isinstance(value, (list, tuple)) else -1 for value in values)


def flatten(values: Iterable[Any]) -> list[Any]:
    """Values with their lists expanded; `unflatten` with their `lengths_of` is the way back."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat.extend(value)
        else:
            flat.append(value)
    return flat


def unflatten(flat: Iterator[Any], lengths: Iterable[int]) -> list[Any]:
    """Takes from ``flat`` one value for -1 and a list of n for n."""
    return [next(flat) if length < 0 else [next(flat) for _ in range(length)] for length in lengths]


def _rows(table: str) -> list[str]:
    return [line.strip() for line in table.strip().splitlines() if line.strip()]


def _parse_input(row: str) -> Input:
    match = re.fullmatch(r"(\w+)\s+(\w+)(?:\((\w+)\))?([?*]*)\s+(\[.*\])(\s+grad=dy)?", row)
    if match is None:
        raise ValueError(f"not an input row: {row!r}")
    name, kind, bound, marks, shapes, grad = match.groups()
    parsed = tuple(tuple(re.findall(r"\w+", shape)) for shape in shapes.split("|"))
    return Input(name, kind, parsed, "?" in marks, "*" in marks, bound, grad is not None)


def _parse_attribute(row: str) -> Attribute:
    match = re.fullmatch(r"(\w+)\s+(\w+(?:\[\])?)\s*=\s*(\S+)\s*(.*)", row)
    if match is None:
        raise ValueError(f"not an attribute row: {row!r}")
    name, kind, default, allowed = match.groups()
    convert: dict[str, Callable[[str], Any]] = {
        "float": float, "int": int, "str": str, "bool": lambda text: text == "true"
    }
    value = [] if kind.endswith("[]") else convert[kind](default)
    return Attribute(name, kind, value, allowed)


def _parse_output(row: str) -> Output:
    name, kind, *flags = row.split()
    words = ("differentiable", "saved", "private")
    return Output(name, kind.rstrip("*"), kind.endswith("*"), *(word in flags for word in words))


def _is_given(value: Value) -> bool:
    if isinstance(value, (list, tuple)):
        return any(v is not None for v in value)
    return value is not None


def _is_fake(tensor: Tensor) -> bool:
    return tensor.is_meta or type(tensor) is not Tensor and not isinstance(tensor, torch.nn.Parameter)


def _signature(values: Sequence[Value]) -> tuple[Any, ...]:
    """What a call is recognised by. A wrong type has no shape: it is its own signature and fails in `_bind`."""
    signature: list[Any] = []
    for value in values:
        if value is None:
            signature.append(None)
        elif isinstance(value, Tensor):
            signature += (value.shape, value.dtype, value.device)
        elif isinstance(value, (list, tuple)):
            signature.append(_signature(value) if value else ())
        else:
            signature.append(type(value))
    return tuple(signature)


def _hashable(attributes: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(a) if isinstance(a, list) else a for a in attributes)


def _elements(contract: Contract, row: Input, value: Value) -> Sequence[Tensor | None]:
    if row.is_list:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{contract.name}: expected {row.name} as a list of tensors, got {type(value).__name__}")
        elements: Sequence[Any] = value
    else:
        elements = (value,)
    for element in elements:
        if element is None:
            if not row.is_optional:
                raise TypeError(f"{contract.name}: {row.name} is required, got None")
        elif not isinstance(element, Tensor):
            raise TypeError(f"{contract.name}: expected {row.name} as a torch.Tensor, got {type(element).__name__}")
    return elements


def _bind_shape(
    contract: Contract, row: Input, i: int, tensor: Tensor, sizes: dict[str, Any], source: dict[str, str]
) -> None:
    """Finds the alternative whose rank and known sizes fit, and names its new sizes."""
    label = f"{row.name}[{i}]" if row.is_list else row.name
    known = {letter: _at(sizes, letter, i) for shape in row.shapes for letter in shape}
    for shape in row.shapes:
        if len(shape) == tensor.ndim and all(
            known[letter] is None or known[letter] == size for letter, size in zip(shape, tensor.shape)
        ):
            break
    else:
        raise ValueError(f"{contract.name}: {_shape_sentence(row, label, tensor, known, source)}")
    for letter, size in zip(shape, tensor.shape):
        if known[letter] is None:
            source[letter] = label
            if letter.endswith("_i"):
                column = sizes.setdefault(letter, [])
                column.extend([None] * (i + 1 - len(column)))
                column[i] = size
            else:
                sizes[letter] = size


def _at(sizes: dict[str, Any], letter: str, i: int) -> int | None:
    """The size known for a letter, if any; a shape may also name a number, such as the 1 of a gate's bias."""
    if letter.isdigit():
        return int(letter)
    if letter.endswith("_i"):
        column = sizes.get(letter, [])
        return column[i] if i < len(column) else None
    return sizes.get(letter)


def _shape_sentence(
    row: Input, label: str, tensor: Tensor, known: dict[str, int | None], source: dict[str, str]
) -> str:
    fitting = [shape for shape in row.shapes if len(shape) == tensor.ndim] or list(row.shapes)
    wanted = " or ".join(
        f"[{', '.join(shape)}] = [{', '.join(str(known[s]) if known[s] is not None else s for s in shape)}]"
        for shape in fitting
    )
    letters = dict.fromkeys(s for shape in fitting for s in shape if known[s] is not None and not s.isdigit())
    origin = ", ".join(f"{s}={known[s]} from {source[s]}" for s in letters)
    return f"expected {label}{wanted}{f' ({origin})' if origin else ''}, got {list(tensor.shape)}"


def _check_dtypes(contract: Contract, first: str, like: Tensor, values: dict[str, Value]) -> frozenset[str]:
    """Checks dtype and device of each input against the first activation; returns the float32 master parameters."""
    dtype = like.dtype
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{contract.name}: expected {first} in float32, float16 or bfloat16, got {_name(dtype)}")
    master = set()
    for row in contract.input_rows:
        allowed: tuple[torch.dtype, ...] = (dtype,)
        if row.kind == "parameter" and dtype in SIXTEEN_BIT:
            allowed = (dtype, torch.float32)
        elif row.kind == "bool":
            allowed = (torch.bool,)
        elif row.kind == "index":
            allowed = (torch.int64,)
        for tensor in _elements(contract, row, values[row.name]):
            if tensor is None:
                continue
            if tensor.dtype not in allowed:
                wanted = " or ".join(_name(d) for d in allowed)
                raise ValueError(
                    f"{contract.name}: expected {row.name} in {wanted} ({first} is {_name(dtype)}), "
                    f"got {_name(tensor.dtype)}"
                )
            if tensor.device != like.device:
                raise ValueError(
                    f"{contract.name}: expected {row.name} on {like.device} (where {first} is), got {tensor.device}"
                )
            if row.kind == "parameter" and tensor.dtype != dtype:
                master.add(row.name)
    return frozenset(master)


def _check_attributes(contract: Contract, attributes: dict[str, Any]) -> None:
    for row in contract.attribute_rows:
        value = attributes[row.name]
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if row.choices and item not in row.choices:
                raise ValueError(
                    f"{contract.name}: expected {row.name} to be one of {', '.join(row.choices)}, got {item!r}"
                )
            if row.allowed == "[0, 1)" and not 0.0 <= item < 1.0:
                raise ValueError(f"{contract.name}: expected {row.name} in [0, 1), got {item}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Any value in any argument's place: served, or one sentence that begins with the operator's name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from parity import why_unavailable
from small import B, D, R, S, tensor

from pelt_kernels.ops import (
    LearnedGate,
    LoraBranch,
    Norm,
    Prefix,
    gated_adapter,
    lora_linear,
    masked_weight,
    prefix_attention,
    symmetric_kl,
)
from pelt_kernels.ops.prefix_attention.weights import attention_weights

GATE = LearnedGate(tensor(D), tensor(1), "mean")
BANK = LoraBranch(tensor(3, R, D), tensor(3, 12, R), bank_index=torch.tensor([0, 2]), gate=GATE)
HEADS, TABLE = tensor(B, 4, S, 8), tensor(3, 6, 4, 8)
PREFIX = Prefix(TABLE, TABLE, torch.tensor([0, 2]))


def call(function, **arguments):
    return function, arguments


# A call of each operator that is in order and uses every argument.
CALLS = {
    "gated_adapter": call(
        gated_adapter,
        x=tensor(B, S, D), w_down=tensor(3, R, D), w_up=tensor(D, R), b_down=tensor(3, R),
        b_up=tensor(D), bank_index=torch.tensor([0, 2]), activation="gelu",
        pre_norm=Norm(tensor(D), tensor(D)), post_norm=Norm(tensor(D), tensor(D)), scale=0.5,
        gate=GATE, mask=tensor(B, S, dtype=torch.bool), residual=tensor(B, S, D), dropout_p=0.5,
        seed=3, skip_below=0.1, return_gate=True, backend="eager",
    ),
    "prefix_attention": call(
        prefix_attention,
        q=HEADS, k=HEADS, v=HEADS, prefixes=[PREFIX], gate=tensor(B),
        key_mask=tensor(B, S, dtype=torch.bool), lengths=None, is_causal=True,
        bias=tensor(B, 4, S, S), scale=0.5, dropout_p=0.5, seed=3, return_lse=True,
        backend="eager",
    ),
    "attention_weights": call(
        attention_weights,
        q=HEADS, k=HEADS, prefixes=[PREFIX], gate=tensor(B),
        key_mask=tensor(B, S, dtype=torch.bool), is_causal=True, scale=0.5,
    ),
    "lora_linear": call(
        lora_linear,
        x=tensor(B, S, D), weight=tensor(12, D), bias=tensor(12), branches=[BANK],
        transposed=False, extra_gates=[GATE], mask=tensor(B, S, dtype=torch.bool), dropout_p=0.5,
        seed=3, return_gates=True, backend="eager",
    ),
    "masked_weight": call(
        masked_weight,
        w0=tensor(6, 8), u=tensor(6, R), v=tensor(R, 8), a=tensor(6, R), b=tensor(R, 8),
        row=tensor(6), col=tensor(8), keep=12, beta=0.5, alpha1=0.5, alpha2=0.5, backend="eager",
    ),
    "symmetric_kl": call(
        symmetric_kl,
        z1=tensor(3, 4), z2=tensor(3, 4), mask=tensor(3, dtype=torch.bool), backend="eager",
    ),
}  # fmt: skip


def anything():
    """Values of every kind, by name."""
    empty = torch.zeros(0)
    return {
        "none": None,
        "true": True,
        "an integer": 3,
        "a negative": -1,
        "a large integer": 10**400,
        "a float": 2.5,
        "nan": math.nan,
        "inf": -math.inf,
        "complex": 1j,
        "a word": "nonsense",
        "bytes": b"nonsense",
        "an object": object(),
        "a class": torch.Tensor,
        "a list": [],
        "a nested list": [[tensor(2)]],
        "a tuple of tensors": (tensor(D), tensor(D)),
        "a triple": (None, None, None),
        "a dict": {"k": tensor(2)},
        "an array": np.ones((B, S, D)),
        "a scalar tensor": torch.tensor(1.0),
        "a complex tensor": torch.ones(B, S, D, dtype=torch.complex64),
        "integers": torch.ones(B, S, D, dtype=torch.int64),
        "no elements": empty,
        "many dimensions": torch.ones(1, 1, 1, 1, 1, 1, 1),
        "float8": torch.ones(B, S, D).to(torch.float8_e4m3fn),
        "quantised": torch.quantize_per_tensor(torch.ones(B, S, D), 0.1, 0, torch.qint8),
        "sparse": torch.ones(B, S, D).to_sparse(),
        "sparse rows": torch.ones(6, 8).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "meta": torch.ones(B, S, D, device="meta"),
        "no gate": LearnedGate(None, None),
        "half a norm": Norm(tensor(D), None),
        "a norm of words": Norm(tensor(D), tensor(D), "eps"),
        "a gate of numbers": LearnedGate(1.0, 2.0, "mean"),
        "a gate of lists": LearnedGate(tensor(D), tensor(1), ["mean"]),
        "a branch": BANK,
        "a prefix": PREFIX,
    }


def inside(operator, argument, value):
    """The value in each field of a group, beside the value itself."""
    yield value
    groups = {"branches": BANK, "prefixes": PREFIX, "extra_gates": GATE}
    if argument in groups:
        yield [value]
        for field in groups[argument]._fields:
            yield [groups[argument]._replace(**{field: value})]
    if argument == "gate" and operator == "gated_adapter":
        for field in GATE._fields:
            yield GATE._replace(**{field: value})
    if argument in ("pre_norm", "post_norm"):
        for field in Norm._fields:
            yield Norm(tensor(D), tensor(D))._replace(**{field: value})
    if argument == "bank_index":
        yield (value, None)
        yield (torch.tensor([0, 2]), value)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_expanded_inputs_are_their_copies(backend, need):
    need(backend, why_unavailable("gated_adapter", backend))
    x, weight = torch.randn(1, 1, D).expand(B, S, D), torch.randn(R, 1).expand(R, D)
    y = gated_adapter(x, weight, weight.T, backend=backend)
    copies = (x.contiguous(), weight.contiguous(), weight.T.contiguous())
    of_copies = gated_adapter(*copies, backend=backend)
    # The kernel makes these copies itself. PyTorch adds the terms of a product in another order
    # where a stride is 0, on some processors.
    exact = {"rtol": 0, "atol": 0} if backend == "cpu" else {}
    torch.testing.assert_close(y, of_copies, **exact)


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [on_meta(v) for v in value]
    return type(value)(*map(on_meta, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("operator", [o for o in CALLS if o != "attention_weights"])
def test_shapes_alone_are_served(operator):
    function, arguments = CALLS[operator]
    arguments = {name: on_meta(value) for name, value in arguments.items()}
    with torch.no_grad():
        y = function(**arguments)
    assert (y[0] if isinstance(y, tuple) else y).is_meta


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", CALLS)
def test_any_value_in_any_place(operator):
    function, arguments = CALLS[operator]
    with torch.no_grad():
        function(**arguments)
    refused = 0
    for argument in arguments:
        for kind, plain in anything().items():
            for value in inside(operator, argument, plain):
                try:
                    with torch.no_grad():
                        function(**{**arguments, argument: value})
                except (ValueError, TypeError) as error:
                    sentence = str(error)
                    starts = (f"{operator}: ", "prefix_attention: ")  # weights share its contract
                    assert sentence.startswith(starts), f"{argument} = {kind}: {sentence}"
                    assert "\n" not in sentence and len(sentence) < 400, f"{argument} = {kind}"
                    refused += 1
                except Exception as error:
                    raise AssertionError(
                        f"{argument} = {kind} ({value!r:.60}): {type(error).__name__}: {error}"
                    ) from error
    assert refused > 50

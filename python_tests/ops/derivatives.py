"""How an operator's derivatives are held to its formula's: the kit of the tests of autograd."""

from __future__ import annotations

from functools import cache

import torch
from cases import make_attributes
from closeness import assert_close
from parity import OTHER_DRAWS, SEED, contract_of, inputs_of, operator_of

from pelt_kernels.ops import (
    LearnedGate,
    LoraBranch,
    Prefix,
    gated_adapter,
    lora_linear,
    masked_weight,
    prefix_attention,
    symmetric_kl,
)
from pelt_kernels.ops._values import flatten, lengths_of, unflatten

BACKENDS = ["cpu", "eager"]


def by_backend(operator, case, backend):
    """How an operator is called, with the contract's inputs, as a user does."""
    attributes = make_attributes(contract_of(operator).CONTRACT, case)
    return lambda values: operator_of(operator)(values, attributes, SEED, backend)


def by_formula(operator, case):
    """The reference itself, likewise."""
    module = contract_of(operator)
    named = dict(zip(module.CONTRACT.attribute_names, make_attributes(module.CONTRACT, case)))
    if module.CONTRACT.has_seed:
        named["seed"] = SEED
    return lambda values: module.reference(*values, **named)


def flat(operator, values, function):
    """The function of the floating inputs alone, giving the differentiable outputs; and these
    inputs.
    """
    contract, given, lengths = contract_of(operator).CONTRACT, flatten(values), lengths_of(values)
    at = [i for i, v in enumerate(given) if v is not None and v.is_floating_point()]

    def call(*tensors):
        everything = list(given)
        for i, tensor in zip(at, tensors, strict=True):
            everything[i] = tensor
        outputs = function(unflatten(iter(everything), lengths))
        found = [y for y, r in zip(outputs, contract.public_rows) if r.is_differentiable]
        return tuple(flatten(found))

    return call, [given[i] for i in at]


def ones_like(tensors):
    return [torch.ones_like(tensor) for tensor in tensors]


def double(values):
    """Values in float64, lists too."""
    if isinstance(values, list):
        return [double(value) for value in values]
    return values.double() if values is not None and values.is_floating_point() else values


def check(operator, case, quantity, found):
    """Each tensor of ``found`` is as close to the formula's in float64 as the formula's in float32."""
    formula = by_formula(operator, case)

    @cache
    def pair(draw):
        values = inputs_of(operator, case, "float32", draw=draw)
        baseline = quantity(*flat(operator, values, formula))
        return baseline, quantity(*flat(operator, double(values), formula))

    assert len(found) == len(pair(0)[1])
    for i, value in enumerate(found):
        others = ((pair(n)[0][i], pair(n)[1][i]) for n in range(1, 1 + OTHER_DRAWS))
        baseline, truth = (values[i] for values in pair(0))
        what = f"{operator} {case.id} [{i}]"
        assert_close(value, baseline, truth, torch.float32, what, others)


def public_calls(dtype=torch.float32):
    """Each operator's public function with most of its options, as a function of one tensor of any
    batch size. The numbers are the same in every dtype.
    """
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    a, b, w = draw(4, 16), draw(16, 4), draw(16, 16)
    gate = LearnedGate(draw(16), draw(1))
    table = draw(3, 2, 2, 8)
    factors = [draw(n, m) / 8 for n, m in ((16, 2), (2, 16), (16, 3), (3, 16))]
    sides = torch.zeros(2, 16, dtype=dtype)

    def of_x(x):
        return (x > -1)[..., 0]

    def attention(x):
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        index = (x[:, 0, 0] > 0).long()
        prefixes = [Prefix(table[0], table[1]), Prefix(table, table, index)]
        g = torch.sigmoid(x[:, 0, 0])
        return prefix_attention(heads, heads, heads, prefixes, gate=g, key_mask=of_x(x))

    return {
        "gated_adapter": lambda x: gated_adapter(
            x, a, b, gate=gate, mask=of_x(x), activation="gelu", residual=x.cos()
        ),
        "prefix_attention": attention,
        "lora_linear": lambda x: lora_linear(
            x, w, w[0], [LoraBranch(a, b, gate=gate, scale=2.0)], mask=of_x(x)
        ),
        "masked_weight": lambda x: masked_weight(w * x[0, 0, 0], *factors, *sides, 99),
        "symmetric_kl": lambda x: symmetric_kl(x, x.cos(), of_x(x)),
    }

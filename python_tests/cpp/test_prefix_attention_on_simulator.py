"""prefix_attention's CUDA kernels where the contract's cases do not lead: several tiles of queries
and columns, prefixes that start anywhere between dropout's words, tables with members that are not used.

Closeness is `parity.check`'s, as in the parity test; what is asked for in several ways must give the
same bits.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from cases import Case, make_attributes
from parity import check_in_every_order, inputs_of
from torch import Tensor

from pelt_kernels.ops import Prefix, _native, prefix_attention
from pelt_kernels.ops import _dispatch as dispatch
from pelt_kernels.ops.prefix_attention.contract import CONTRACT, reference

pytestmark = pytest.mark.backend("cuda_sim")
TABLE_IN_FRONT = "bank prefix_k[0], bank prefix_v[0], prefix_index[0]"
TABLE_IN_THE_MIDDLE = "bank prefix_k[1], bank prefix_v[1], prefix_index[1]"
DROPOUT = {"dropout_p": 0.2}
CAUSAL = {"is_causal": True}


def _case(id: str, b: int, h: int, g: int, s: int, n: int, e: int, inputs: str, **more) -> Case:
    sizes = {"B": b, "H": h, "G": g, "S": s, "N": n, "E": e, **more}
    attributes = {"scale": e**-0.5, **sizes.pop("attributes", {})}
    return Case(id, sizes, inputs, attributes)


CASES = [
    # Tiles have 128 queries forward, 64 backward, and 64 or 32 columns; a step has 32 or 16.
    *(
        _case(f"edge_{s}_{n}_{e}", 1, 1, 1, s, n, e, "gate, key_mask", P_i=(p,))
        for s, n, e, p in (
            (127, 63, 64, 1), (128, 64, 64, 64), (129, 65, 64, 63), (257, 31, 64, 33),
            (65, 127, 32, 2), (130, 33, 96, 31), (97, 95, 128, 17),
        )
    ),
    *(
        _case(f"dropout_after_{p}", 1, 2, 1, 70, 75, e, "gate", P_i=(p,),
              attributes={**DROPOUT, **CAUSAL})
        for p, e in ((1, 32), (2, 64), (3, 96), (5, 128))
    ),
    *(
        _case(f"three_prefixes_{e}", 5, 4, 2, 66, 70, e, f"{TABLE_IN_THE_MIDDLE}, gate per head, lengths", P_i=(3, 5, 18),
              A_i=(None, 6, None), attributes=DROPOUT)
        for e in (32, 64, 96, 128)
    ),
    _case("long_prefix", 3, 2, 2, 20, 9, 32, "", P_i=(1024,)),
    _case("long_prefix_in_parts", 6, 1, 1, 40, 9, 32, "gate", P_i=(200,)),
    _case("causal_long", 1, 1, 1, 300, 260, 64, "", P_i=(5,), attributes=CAUSAL),
    _case("causal_cache", 1, 1, 1, 70, 300, 32, "", P_i=(5,), attributes=CAUSAL),
    _case("causal_mask", 2, 2, 1, 150, 150, 64, "key_mask", attributes=CAUSAL),
    _case("plain_then_general", 1, 1, 1, 200, 330, 64, "gate, key_mask", P_i=(30,)),
    # Up to 32 queries: the warps share the columns.
    _case("decode", 2, 4, 2, 1, 300, 64, "gate, key_mask", P_i=(5,), attributes=DROPOUT),
    _case("decode_128", 2, 2, 2, 32, 70, 128, "lengths", P_i=(5,), attributes=CAUSAL),
    _case("decode_nothing_seen", 2, 1, 1, 9, 5, 96, "lengths", attributes=CAUSAL),
    _case("negative_scale", 1, 1, 1, 33, 70, 64, "", attributes={"scale": -0.2}),
    _case("bias_shared_by_heads", 3, 4, 2, 70, 67, 64, "bias shared by all, key_mask", P_i=(7,),
          attributes={**DROPOUT, **CAUSAL}),
    _case("bias_of_each", 2, 2, 2, 70, 130, 96, "bias, lengths", P_i=(7,)),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["bfloat16", "float16-master"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_close_at_every_edge_and_in_every_order(case: Case, precision: str) -> None:
    check_in_every_order("prefix_attention", "cuda_sim", case, precision)


def _tensors() -> dict[str, Tensor]:
    """q, k and v as a model's views; both halves of a prefix as views of one matrix."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    prefix_k, prefix_v = draw(10, 2, 2, 64).unbind(1)
    q, k, v = (
        draw(2, length, heads, 64).bfloat16() for length, heads in ((37, 4), (41, 2), (41, 2))
    )
    return {
        "q": q.transpose(1, 2), "k": k.transpose(1, 2), "v": v.transpose(1, 2),
        "prefix_k": prefix_k, "prefix_v": prefix_v, "gate": draw(2).sigmoid(),
        "bias": draw(1, 4, 37, 41),
    }  # fmt: skip


def _gradients(tensors: dict[str, Tensor], asked: tuple[str, ...]) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_(name in asked) for name, t in tensors.items()}
    out = prefix_attention(
        leaves["q"], leaves["k"], leaves["v"],
        [Prefix(leaves["prefix_k"], leaves["prefix_v"])],
        gate=leaves["gate"], bias=leaves["bias"], dropout_p=0.1, seed=5, backend="cuda_sim",
    )  # fmt: skip
    wanted = [leaves[name] for name in asked]
    return dict(zip(asked, torch.autograd.grad(out.float().square().sum(), wanted)))


def test_a_gradient_does_not_depend_on_which_others_are_asked_for() -> None:
    tensors = _tensors()
    names = tuple(tensors)
    everything = _gradients(tensors, names)
    for asked in (*combinations(names, 1), *combinations(names, 2)):
        for name, grad in _gradients(tensors, asked).items():
            assert torch.equal(grad, everything[name]), (name, asked)


def test_views_give_the_bits_of_their_copies() -> None:
    tensors = _tensors()
    copies = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert not tensors["q"].is_contiguous() and not tensors["prefix_k"].is_contiguous()
    found, expected = (_gradients(some, tuple(tensors)) for some in (tensors, copies))
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def test_the_stride_of_a_single_row_may_be_any_number() -> None:
    """Kernels name the address behind the last row, which has to be aligned, too. Nothing is copied
    for it.
    """
    tensors = {name: tensor.contiguous() for name, tensor in _tensors().items()}
    tensors["q"], tensors["bias"] = tensors["q"][:, :, :1].contiguous(), tensors["bias"][:, :, :1]
    tensors["bias"] = tensors["bias"].contiguous()
    odd = tensors | {"q": tensors["q"].as_strided((2, 4, 1, 64), (256, 64, 67, 1))}
    assert _native.readable_rows(odd["q"]) is odd["q"]
    assert _native.row_strides(odd["q"]) == (256, 64, 0, 1)
    expected = _gradients(tensors, tuple(tensors))
    for name, grad in _gradients(odd, tuple(odd)).items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("far", [(-1, 6), (-(10**12), 10**12)])
def test_an_index_outside_of_a_table_reads_nothing_else(far: tuple[int, int]) -> None:
    """On a GPU no index is checked before the call: it is clamped. Here the check is gone around,
    and the simulator would see a read outside of the table.
    """
    case = _case("table", 2, 2, 2, 9, 11, 32, TABLE_IN_FRONT, P_i=(3,), A_i=(6,))
    found = []
    for index in (far, (0, 5)):
        values = inputs_of("prefix_attention", case, "bfloat16")
        signature = CONTRACT.bind(values, make_attributes(CONTRACT, case))
        named = dict(zip(CONTRACT.input_names, values))
        named["prefix_index"] = [torch.tensor(index)]
        chosen = dispatch.select(signature, "cuda_sim")
        out, lse = chosen.forward(chosen, **named, seed=0)
        needs = {name: name in ("q", "k", "v", "prefix_k") for name in CONTRACT.input_names}
        grads = chosen.backward(chosen, needs, **named, out=out, lse=lse, dout=out, seed=0)
        found.append([out, lse, grads["q"], grads["k"], grads["v"]])
        # No member has such an index, so none gets a gradient.
        assert grads["prefix_k"][0].any() == (index == (0, 5))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "prefix_k", "prefix_v", "gate", "bias"])
def test_nan_and_infinity_spread_as_in_the_reference(where: str, bad: float) -> None:
    """The reference in float32 judges, on the same bfloat16 values. It multiplies a gate into keys,
    where infinities of both signs meet in a score's sum, and the kernels into scores: there only
    what is finite has to agree.
    """
    tensors = {name: tensor.contiguous() for name, tensor in _tensors().items()}
    tensors[where].view(-1)[0] = bad
    found = prefix_attention(
        tensors["q"], tensors["k"], tensors["v"],
        [Prefix(tensors["prefix_k"], tensors["prefix_v"])],
        gate=tensors["gate"], bias=tensors["bias"], return_lse=True, backend="cuda_sim",
    )  # fmt: skip
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    expected = reference(
        exact["q"], exact["k"], exact["v"], [exact["prefix_k"]], [exact["prefix_v"]], [None],
        exact["gate"], None, None, exact["bias"],
        is_causal=False, scale=64**-0.5, dropout_p=0.0, seed=0,
    )  # fmt: skip
    assert 0 < expected[0].isfinite().sum() < expected[0].numel()
    for value, judge in zip(found, expected):
        assert torch.equal(value.isfinite(), judge.isfinite())
        assert where == "gate" or torch.equal(value.isnan(), judge.isnan())

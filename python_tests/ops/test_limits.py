"""What is not finite, and numbers near a dtype's limits, on every backend.

The rule (pelt_kernels/ops/_product.py): what is hidden is not read, so a NaN there changes no bit;
what is not hidden follows IEEE, as the reference does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import parity
import pytest
import torch
from cases import Case, case_of, make_attributes
from cases.gated_adapter import INDEX_OF
from cases.lora_linear import branched
from closeness import assert_close
from parity import PRECISIONS, able, contract_of, inputs_of, run

from pelt_kernels.ops import masked_weight
from pelt_kernels.ops._dispatch import backend_of

NAN, INF = math.nan, math.inf
Named = dict[str, Any]


class Hidden(NamedTuple):
    """A case, where its inputs are hidden, and what of the results may then not change."""

    operator: str
    case: Case
    where: Callable[[Named], Named]
    results: Callable[[Named, Named], Named] = lambda inputs, results: results


def _case(operator: str, name: str, id: str = "", **changes: Any) -> Case:
    found = case_of(operator, name)
    attributes = {**found.attributes, **changes.pop("attributes", {})}
    return replace(found, id=id or name, attributes=attributes, **changes)


def _keys(n: Named) -> Named:
    seen = n["key_mask"]
    if seen is None:
        seen = torch.arange(n["k"].shape[2]) < n["lengths"][:, None]
    hidden = ~seen[:, None, :, None].expand_as(n["k"])
    return {"k": hidden, "v": hidden}


def _unpicked(**index_of: str) -> Callable[[Named], Named]:
    """The members of banks that no index names."""

    def of(bank: Any, index: Any) -> Any:
        if isinstance(bank, list):
            return [of(*pair) for pair in zip(bank, index)]
        hidden = torch.ones_like(bank, dtype=torch.bool)
        hidden[index if index is not None else slice(None)] = False
        return hidden

    return lambda n: {b: of(n[b], n[i]) for b, i in index_of.items() if n[b] is not None}


def _whole(*names: str) -> Callable[[Named], Named]:
    return lambda n: {name: torch.ones_like(n[name], dtype=torch.bool) for name in names}


def _masked_rows(n: Named) -> Named:
    return {"x": ~n["mask"][..., None].expand_as(n["x"])}


def _skipped_rows(n: Named) -> Named:
    skipped = (n["gate"] < 0.5).view(len(n["x"]), -1, 1)
    return {"x": skipped.expand_as(n["x"])}


def _first_branch(n: Named) -> Named:
    return {"a": [torch.full_like(a, not i, dtype=torch.bool) for i, a in enumerate(n["a"])]}


def _beside(column: int) -> Callable[[Named, Named], Named]:
    """What of two branches' results is the second one's alone, whose columns start there."""
    names = ("da[1]", "db[1]", "dgate_weight[1]", "dgate_bias[1]")
    return lambda n, r: {"y": r["y"][..., column:], **{k: r[k] for k in names if k in r}}


def _real_rows(*names: str) -> Callable[[Named, Named], Named]:
    return lambda n, r: {"y": r["y"][n["mask"]], **{k: v for k, v in r.items() if k in names}}


_SKIPPED = "b_down, b_up, gate per row, residual"
_RESIDUAL = {"attributes": {"residual_from": "tensor"}}
_EXTRA = ("extra_gates[0]", "dextra_weight[0]", "dextra_bias[0]")
HIDDEN = [
    *(
        Hidden("prefix_attention", case, _keys)
        for case in (
            _case("prefix_attention", "unipelt"),
            _case("prefix_attention", "all_masked", "keys_alone", fill={}),
            _case("prefix_attention", "unipelt", "causal", attributes={"is_causal": True}),
            *(
                _case("prefix_attention", name)
                for name in ("lengths", "all_masked", "dropout", "t5", "grouped_query")
            ),
        )
    ),
    Hidden(
        "prefix_attention",
        _case("prefix_attention", "control_prefixes"),
        _unpicked(prefix_k="prefix_index", prefix_v="prefix_index"),
    ),
    *(
        Hidden("gated_adapter", _case("gated_adapter", name), _unpicked(**INDEX_OF))
        for name in ("bank_per_sample", "norm_banks")
    ),
    Hidden(
        "gated_adapter",
        _case("gated_adapter", "skip_rows", inputs=_SKIPPED, **_RESIDUAL),
        _skipped_rows,
    ),
    Hidden(
        "gated_adapter", _case("gated_adapter", "unipelt"), _masked_rows, _real_rows("gate_value")
    ),
    Hidden("lora_linear", _case("lora_linear", "unipelt_query"), _masked_rows, _real_rows(*_EXTRA)),
    Hidden(
        "lora_linear",
        Case(
            "extra_gate",
            {"B": 2, "S": 13, "Din": 40, "Dout": 48},
            "bias, extra_weight, extra_bias, mask",
            {"extra_poolings": ["masked_mean"]},
        ),
        _masked_rows,
        _real_rows("dx", *_EXTRA),
    ),
    Hidden(
        "lora_linear",
        _case("lora_linear", "bank_per_sample"),
        _unpicked(a="a_index", b="b_index"),
    ),
    Hidden("lora_linear", _case("lora_linear", "fused_qkv"), _first_branch, _beside(48)),
    *(
        Hidden(
            "lora_linear",
            branched(
                f"two_branches_of_{width}",
                {"B": 2, "S": 5, "Din": 24, "Dout": width, "R_i": (3, 5), "size_i": sizes},
                "bias",
                [1.0, 2.0],
                attributes={"offsets": [0, offset]},
            ),
            _first_branch,
            _beside(sizes[0]),
        )
        for width, sizes, offset in ((29, (11, 12), 13), (32, (11, 12), 13), (64, (20, 40), 20))
    ),
    *(
        Hidden(
            "masked_weight",
            _case("masked_weight", "half", f"without_{factor}", attributes={factor: 0.0}),
            _whole(*names),
        )
        for factor, names in (
            ("beta", ("u", "v")),
            ("alpha1", ("a", "b")),
            ("alpha2", ("row", "col")),
        )
    ),
    *(
        Hidden(
            "symmetric_kl",
            case,
            lambda n: {z: ~n["mask"][:, None].expand_as(n[z]) for z in ("z1", "z2")},
        )
        for case in (
            _case("symmetric_kl", "tokens"),
            Case("few_classes", {"T": 13, "C": 5}, "mask"),
        )
    ),
]


def _named(operator: str, values: list[Any]) -> Named:
    return dict(zip(contract_of(operator).CONTRACT.input_names, values))


def _filled(inputs: Named, hidden: Named, value: float) -> list[Any]:
    """The inputs in order, with ``value`` where they are hidden."""

    def fill(tensor: Any, where: Any) -> Any:
        if isinstance(tensor, list):
            return [fill(*pair) for pair in zip(tensor, where)]
        return None if tensor is None else tensor.masked_fill(where, value)

    return [fill(t, hidden[name]) if name in hidden else t for name, t in inputs.items()]


def _results(operator: str, backend: str, case: Case, precision: str, values: list[Any]) -> Named:
    if backend == "reference":
        return parity._with_reference(operator, case, values)
    if operator != "masked_weight":
        return run(operator, backend, case, precision, values)
    contract = contract_of(operator).CONTRACT  # its public function leaves terms out
    attributes = dict(zip(contract.attribute_names, make_attributes(contract, case)))
    return parity.evaluate(
        operator, case, values, lambda given: [masked_weight(*given, backend=backend, **attributes)]
    )


def _served(operator: str, backend: str, case: Case, need: Any) -> list[str]:
    """Precisions in which a backend serves a case: of 32 bits and of 16, in Triton, which is slow, 16."""
    if backend == "reference":
        return ["float32"]
    need(backend_of(backend), parity.why_unavailable(operator, backend))
    found = [p for p in PRECISIONS if parity.serves(operator, backend, case, p)]
    return list(dict.fromkeys((found[-1 if backend == "triton" else 0], found[-1])))


@pytest.mark.parametrize(
    ("hidden", "backend"),
    [
        pytest.param(h, backend, id=f"{h.operator}-{h.case.id}-{backend}")
        for h in HIDDEN
        for backend in ("reference", *able(h.operator, h.case))
    ],
)
def test_what_is_hidden_is_not_read(hidden, backend, need):
    """Outputs and gradients are the same bits, whatever stands there."""
    operator, case, where, results = hidden
    for precision in _served(operator, backend, case, need):
        inputs = _named(operator, inputs_of(operator, case, precision))

        def of(value, inputs=inputs, precision=precision):
            values = _filled(inputs, where(inputs), value)
            return results(inputs, _results(operator, backend, case, precision, values))

        expected = of(0.0)
        assert all(value.isfinite().all() for name, value in expected.items() if name != "lse")
        for value in (NAN, INF):
            found = of(value)
            wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
            if wrong == ["dextra_weight[0]"] and backend_of(backend) in ("cpu", "cpu_sim"):
                # Where it is not finite the kernels add the rows that count alone, in their order.
                values = _filled(inputs, where(inputs), value)
                baseline, truth = parity.by_reference(operator, case, values)
                (name,), dtype = wrong, PRECISIONS[precision][0]
                assert_close(found[name], baseline[name], truth[name], dtype, name)
                wrong = []
            assert not wrong, f"{precision}, {value}: {wrong}"


class Shown(NamedTuple):
    """A number that is read: an element of an input."""

    operator: str
    case: Case
    name: str
    place: tuple[int, ...]
    value: float


_KL = Case("classes", {"T": 5, "C": 7})
_VOCABULARY = Case("vocabulary", {"T": 3, "C": 600})
SHOWN = [
    Shown("gated_adapter", _case("gated_adapter", "plain"), "x", (1, 3, 5), NAN),
    Shown("gated_adapter", _case("gated_adapter", "plain"), "w_up", (3, 5), NAN),
    Shown("gated_adapter", _case("gated_adapter", "token_gate"), "gate_weight", (3,), NAN),
    Shown("prefix_attention", _case("prefix_attention", "gate_per_head"), "q", (1, 3, 2, 5), NAN),
    Shown("prefix_attention", _case("prefix_attention", "prefix"), "v", (1, 3, 2, 5), NAN),
    Shown("prefix_attention", _case("prefix_attention", "prefix"), "k", (1, 3, 2, 5), INF),
    Shown("lora_linear", _case("lora_linear", "lora"), "x", (1, 3, 5), NAN),
    Shown("lora_linear", _case("lora_linear", "lora"), "x", (1, 3, 5), INF),
    # Outputs alone: the reference has no gradient of a score that is not finite.
    *(
        Shown("masked_weight", _case("masked_weight", case, is_inference=True), name, place, value)
        for case, name, place, value in (
            ("half", "w0", (3, 5), NAN),
            ("half", "w0", (3, 5), -INF),
            ("half", "row", (3,), NAN),
            ("keep_one", "row", (3,), NAN),
        )
    ),
    *(
        Shown("symmetric_kl", case, "z1", (1, 3), value)
        for case in (_KL, _VOCABULARY)
        for value in (NAN, INF, -INF)
    ),
]


@pytest.mark.parametrize(
    ("shown", "backend"),
    [
        pytest.param(s, backend, id=f"{s.operator}-{s.case.id}-{s.name}-{s.value}-{backend}")
        for s in SHOWN
        for backend in able(s.operator, s.case)
    ],
)
def test_what_is_read_follows_the_formula(shown, backend, need):
    """NaN and infinities stand where the reference has them, in outputs and gradients."""
    operator, case, name, place, value = shown
    for precision in _served(operator, backend, case, need):

        def draw(n, precision=precision):
            inputs = _named(operator, inputs_of(operator, case, precision, draw=n))
            inputs[name][place] = value
            if name == "k":  # which no query sees: its gradients are numbers
                inputs["q"] = -inputs["q"].abs() - 0.125
            return list(inputs.values())

        parity.check(operator, backend, case, precision, draw)


# ---- classes that do not exist ----


@pytest.mark.parametrize("classes", [3, 40, 1030])
@pytest.mark.parametrize("absent", ["z1 z2", "z1", "z2"])
@pytest.mark.parametrize("backend", able("symmetric_kl", Case("absent", {"T": 4, "C": 3})))
def test_a_class_that_does_not_exist(backend, absent, classes, need):
    """On both sides it counts 0, on one the divergence is infinite; gradients are finite."""
    case = Case("absent", {"T": 4, "C": classes})
    for precision in _served("symmetric_kl", backend, case, need):

        def draw(n, precision=precision):
            inputs = _named("symmetric_kl", inputs_of("symmetric_kl", case, precision, draw=n))
            for name in absent.split():
                inputs[name][1::2, -1] = -INF
            return list(inputs.values())

        results = parity.check("symmetric_kl", backend, case, precision, draw)
        assert results["loss"].isfinite() == (absent == "z1 z2")
        assert results["dz1"].isfinite().all() and results["dz2"].isfinite().all()


def test_a_class_that_does_not_exist_is_as_one_that_is_not_listed():
    z1, z2 = torch.tensor([[1.0, 2.0, -INF]]), torch.tensor([[0.5, 1.0, -INF]])
    (loss,), (listed,) = (
        contract_of("symmetric_kl").reference(*z, None) for z in ((z1, z2), (z1[:, :2], z2[:, :2]))
    )
    assert torch.equal(loss, listed) and loss.item() == pytest.approx(0.02715, abs=1e-5)


# ---- large numbers ----


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (backend, name)
        for name in ("prefix", "dropout", "t5", "head_96")
        for backend in able("prefix_attention", case_of("prefix_attention", name), "float16")
    ],
)
def test_float16_scores_are_scaled_before_they_are_large(backend, name, need):
    """Products of 130 000, twice float16's largest number; with a scale of 1 of 64 000."""
    need(backend_of(backend), parity.why_unavailable("prefix_attention", backend))
    case = _case("prefix_attention", name)
    n = _named("prefix_attention", inputs_of("prefix_attention", case, "float16"))
    size = 64000.0 if case.attributes["scale"] == 1.0 else 130000.0
    for tensor in (n["q"], n["k"], *n["prefix_k"]):
        tensor.fill_((size / n["q"].shape[-1]) ** 0.5)
    n["k"][..., 3:5, :] *= 0.5
    results = run("prefix_attention", backend, case, "float16", list(n.values()))
    assert all(value.isfinite().all() for value in results.values())


LARGE = [
    ("gated_adapter", "plain", "x", {"float16": 60000.0, "bfloat16": 1e30, "float32": 1e30}),
    ("masked_weight", "half", "w0", {"float16": 60000.0, "bfloat16": 1e18, "float32": 1e18}),
    ("symmetric_kl", "tokens", "z1", {"float16": 60000.0, "bfloat16": 1e30, "float32": 1e30}),
    ("symmetric_kl", "classes", "z2", {"float16": -60000.0, "bfloat16": -1e30, "float32": -1e30}),
]


@pytest.mark.parametrize(
    ("operator", "name", "large", "sizes", "backend"),
    [
        pytest.param(*row, backend, id=f"{row[0]}-{row[1]}-{row[2]}-{backend}")
        for row in LARGE
        for backend in able(row[0], case_of(*row[:2]))
    ],
)
def test_large_numbers(operator, name, large, sizes, backend, need):
    """An output is as close as the rule asks where some of an input is near the largest number."""
    case = replace(case_of(operator, name), is_inference=True)
    for precision in _served(operator, backend, case, need):
        size = sizes[precision.removesuffix("-master")]

        def draw(n, precision=precision, size=size):
            inputs = _named(operator, inputs_of(operator, case, precision, draw=n))
            inputs[large].view(-1)[::7] = size
            if operator == "gated_adapter":  # whose products shall not be too large
                for weight in ("w_down", "w_up"):
                    inputs[weight] *= 2.0**-6
            return list(inputs.values())

        parity.check(operator, backend, case, precision, draw)

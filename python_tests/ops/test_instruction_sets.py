"""Instruction sets as forms of the CPU kernels: their order, what is said of them, and that the one
that was asked for runs.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from cases import case_of
from parity import call_of, contract_of, run

from pelt_kernels.ops import OPERATORS, BackendError, _dispatch, gated_adapter
from pelt_kernels.ops import _native as native
from pelt_kernels.ops.gated_adapter import native as gated_adapter_native

CASES = {
    "gated_adapter": "unipelt",
    "prefix_attention": "unipelt",
    "lora_linear": "unipelt",
    "masked_weight": "pst",
    "symmetric_kl": "tokens",
}
WITH_TILES = ("gated_adapter", "prefix_attention", "lora_linear")


@pytest.fixture
def module_with(monkeypatch):
    """module_with(names, notes): a compiled module that lists these instruction sets, oldest first."""

    def module_with(names, notes=()):
        module = SimpleNamespace(
            best_cpu_isa=lambda: names[-1], cpu_isas=lambda: names, cpu_isa_notes=lambda: notes
        )
        monkeypatch.setattr(native, "_load", lambda name: (module, ""))
        for function in (native.instruction_sets, native.processor):
            function.cache_clear()

    yield module_with
    monkeypatch.undo()
    for function in (native.instruction_sets, native.processor):
        function.cache_clear()


def test_the_best_goes_first_and_tiles_go_last(module_with):
    module_with(["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
    vectors = ("avx512_bf16", "avx512", "avx2", "baseline")
    assert native.cpu_forms() == vectors
    assert native.cpu_forms(has_tiles=True) == (*vectors, "amx")
    module_with(["baseline", "avx2"])
    assert native.cpu_forms(has_tiles=True) == ("avx2", "baseline")


@pytest.mark.parametrize(
    ("vendor", "names", "kind"),
    [
        ("GenuineIntel", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"], "Intel amx"),
        ("AuthenticAMD", ["baseline", "avx2"], "AMD avx2"),
        ("HygonGenuine", ["baseline", "avx2"], "HygonGenuine avx2"),
        ("", ["baseline"], "aarch64 baseline"),
    ],
)
def test_a_kind_of_processor_is_its_maker_and_its_newest_set(
    vendor, names, kind, module_with, monkeypatch
):
    module_with(names)
    monkeypatch.setattr(native, "cpu_info", lambda field: vendor)
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    assert native.processor() == kind


def test_without_a_compiled_module_there_are_none(monkeypatch, module_with):
    module_with([])
    for module in (None, SimpleNamespace(cpu_isas=lambda: ["baseline"])):  # absent, older
        native.instruction_sets.cache_clear()
        monkeypatch.setattr(native, "_load", lambda name, module=module: (module, "absent"))
        assert native.instruction_sets() == ()


def test_what_the_system_refuses_is_said_once(module_with, caplog):
    caplog.set_level("INFO", "pelt_kernels")
    module_with(["baseline"], ["the processor has tiles, but the kernel refused them"])
    for _ in range(3):
        native.cpu_forms()
    assert caplog.messages == ["cpu: the processor has tiles, but the kernel refused them"]


def test_a_set_that_the_processor_does_not_run_is_refused_in_a_sentence(need, monkeypatch):
    need("cpu", native.why_not("_C"))
    monkeypatch.setattr(gated_adapter_native, "FORMS", {"cpu": ("avx2", "baseline")})
    x = torch.zeros(3, 16)
    sentence = (
        r"^gated_adapter: backend 'cpu:amx' was asked for but it expects one of the instruction"
        r" sets that it has kernels for and this processor runs \(avx2, baseline\), not 'amx'\."
        r"  Able: cpu,"
    )
    with pytest.raises(BackendError, match=sentence):
        gated_adapter(x, x[:, :16], x.T.contiguous(), backend="cpu:amx")


@pytest.mark.parametrize("operator", WITH_TILES)
def test_tiles_multiply_bfloat16_only(operator, need):
    need("cpu_sim", native.why_not("_C_sim"))
    case = case_of(operator, CASES[operator])
    found = {
        precision: _dispatch._supports(
            "cpu_sim", call_of(operator, case, precision, "cpu"), native.TILES, True
        )
        for precision in ("float32", "bfloat16", "bfloat16-master")
    }
    assert "its tiles multiply bfloat16" in found["float32"]
    assert not found["bfloat16"] and not found["bfloat16-master"]


def test_speed_decides_between_the_best_set_and_tiles(monkeypatch):
    forms = ("avx512_bf16", "avx512", "avx2", "baseline", "amx")
    monkeypatch.setattr(gated_adapter_native, "FORMS", {"cpu": forms})
    assert _dispatch.requests_of("gated_adapter", "cpu") == ["cpu:avx512_bf16", "cpu:amx"]
    assert _dispatch.every_request("gated_adapter", "cpu") == [f"cpu:{form}" for form in forms]
    monkeypatch.setattr(gated_adapter_native, "FORMS", {})
    assert _dispatch.requests_of("gated_adapter", "cpu") == ["cpu"]
    for operator in ("prefix_attention", "lora_linear"):
        requests = _dispatch.every_request(operator, "cuda")
        assert _dispatch.requests_of(operator, "cuda") == requests and len(requests) == 2


@pytest.mark.parametrize(
    ("operator", "asked"),
    [(o, r) for o in OPERATORS for r in _dispatch.every_request(o, "cpu")],
)
def test_the_set_that_was_asked_for_runs(operator, asked, need, monkeypatch):
    """The kernels' description of a call, forward's and backward's, names it."""
    need("cpu", native.why_not("_C"))
    compiled, seen = native.library("_C"), []

    def spied(thing):
        if not isinstance(thing, type):
            return thing

        class Spied(thing):
            def __init__(self, **named):
                seen.append(named["form"])
                super().__init__(**named)

        return Spied

    spies = ModuleType("spies")
    for name in dir(compiled):
        setattr(spies, name, spied(getattr(compiled, name)))
    monkeypatch.setattr(native, "library", lambda name: spies)
    contract_of(operator).CONTRACT._signatures.clear()
    case = case_of(operator, CASES[operator])
    run(operator, asked, case, "bfloat16")
    contract_of(operator).CONTRACT._signatures.clear()
    assert set(seen) == {asked.partition(":")[2]}

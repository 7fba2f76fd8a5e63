"""The modules of the base model keep their meaning under a method: hooks, classes, own forwards; or
the model is refused before it is touched, with the module's name.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from every_method import COMPOSITES, EXPERTS, METHODS
from torch import nn
from torch.nn.utils import parametrizations, prune

from pelt_kernels.methods import AdaMixConfig, LoraConfig, PrefixTuningConfig, PSTConfig
from pelt_kernels.models import get_pelt_model
from pelt_kernels.nn import LoRALinear

LAYER = "bert.encoder.layer.1"
QUERY = LAYER + ".attention.self.query"
FFN_OUT = LAYER + ".output.dense"
NORM = LAYER + ".output.LayerNorm"
LORA = LoraConfig(r=4)
EVERY_LINEAR = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
LINEAR_METHODS = {
    "lora": LoraConfig(r=4, targets=EVERY_LINEAR),
    "pst": PSTConfig(sparsity=0.0, r1=3, r2=2),
    "adamix": AdaMixConfig(reduction_factor=8),
    "adamix-lora": EXPERTS,
    "unipelt": METHODS["unipelt"],
}


class Half(nn.Linear):
    """Another formula from the same parameters."""

    def forward(self, x):
        return super().forward(x) * 0.5


class Plain(nn.Linear):
    """Another class, the same formula."""


class Packed(torch.Tensor):
    """A tensor class that serves torch's own operators, as quantised weights do, and no others."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            raise NotImplementedError(str(func))
        out = func(*(a.inner if isinstance(a, Packed) else a for a in args), **(kwargs or {}))
        return Packed(out) if func is torch.ops.aten.detach.default else out


class Doubled(nn.Module):
    """A parametrization whose original is the weight as it was."""

    def forward(self, weight):
        return 2 * weight


def put(model, name, made):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, made)


def as_class(model, name, cls):
    old = model.get_submodule(name)
    made = cls(old.in_features, old.out_features)
    made.load_state_dict(old.state_dict())
    put(model, name, made.eval())


def watch(module, seen, name):
    def kept(_, args, output):
        seen.append((name, args[0].detach().clone(), output.detach().clone()))

    return module.register_forward_hook(kept)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_a_lora_linear_see_the_base_output(when, make_base, make_batch, randomise):
    base, batch, seen = make_base(), make_batch(), []
    query = base.get_submodule(QUERY)
    handle = watch(query, seen, "query") if when == "before" else None
    model = randomise(get_pelt_model(base, LORA))
    unhooked = None
    if handle is None:
        unhooked = model(**batch).logits
        handle = watch(query, seen, "query")
    logits = model(**batch).logits
    ((_, x, y),) = seen
    assert torch.equal(y, nn.functional.linear(x, query.weight, query.bias))
    with model.disable_adapter():
        model(**batch)
    assert len(seen) == 2
    handle.remove()
    plain = model(**batch).logits
    assert len(seen) == 2
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)
    assert unhooked is None or torch.equal(unhooked, plain)


@pytest.mark.parametrize("method", LINEAR_METHODS)
def test_hooks_fire_once_a_forward_under_every_method(method, make_base, make_batch):
    base, batch, seen = make_base(), make_batch(with_labels=False), []
    expected = base(**batch).logits
    for name in (QUERY, FFN_OUT, NORM):
        watch(base.get_submodule(name), seen, name)
        base.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.append((name + " before", *args, args[0]))
        )
    base(**batch)
    order = [name for name, _, _ in seen]
    assert len(order) == 6
    seen.clear()
    model = get_pelt_model(base, LINEAR_METHODS[method]).eval()
    logits = model(**batch).logits
    assert [name for name, _, _ in seen] == order
    if method in ("lora", "pst", "adamix-lora"):
        assert torch.equal(logits, expected)


def test_a_hook_on_the_norm_sees_the_output_of_the_layer(make_base, make_batch, randomise):
    base, batch, seen = make_base(), make_batch(with_labels=False), []
    model = randomise(get_pelt_model(base, METHODS["adapter"]))
    plain = model(**batch, output_hidden_states=True)
    norm = model._injection.replacements[-1].original
    watch(norm, seen, "norm")
    hooked = model(**batch, output_hidden_states=True)
    assert torch.equal(hooked.logits, plain.logits)
    ((_, y, out),) = seen
    assert torch.equal(out, hooked.hidden_states[-1])
    assert torch.equal(out, norm(y))


def test_backward_hooks_fire(make_base, make_batch):
    base, seen = make_base(), []
    query = base.get_submodule(QUERY)
    query.register_full_backward_hook(lambda module, gx, gy: seen.append(("after", gy[0].shape)))
    query.register_full_backward_pre_hook(lambda module, gy: seen.append(("before", gy[0].shape)))
    model = get_pelt_model(base, METHODS["unipelt"]).train()
    model(**make_batch()).loss.backward()
    assert [name for name, _ in seen] == ["before", "after"]


def test_a_hook_that_changes_the_output_does_so_with_a_method_too(make_base, make_batch):
    base, batch = make_base(), make_batch(with_labels=False)
    query = base.get_submodule(QUERY)
    query.register_forward_hook(lambda module, args, output: output + 1)
    query.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    expected = base(**batch).logits
    for config in (LORA, EXPERTS, LINEAR_METHODS["pst"]):
        model = get_pelt_model(copy.deepcopy(base), config).eval()
        assert torch.equal(model(**batch).logits, expected)


def test_a_forward_put_on_a_module_is_used(make_base, make_batch):
    base, batch = make_base(), make_batch(with_labels=False)
    for name in (QUERY, FFN_OUT, NORM):
        module = base.get_submodule(name)
        module.forward = lambda x, own=module.forward: own(x) * 0.5
    expected = base(**batch).logits
    for method in ("lora", "adamix-lora", "pst"):
        model = get_pelt_model(base, LINEAR_METHODS[method]).eval()
        assert torch.equal(model(**batch).logits, expected)
        assert model.remove() is base
        assert torch.equal(base(**batch).logits, expected)
    model = get_pelt_model(base, METHODS["adapter"])
    for module in model.modules():
        if hasattr(module, "w_up"):
            nn.init.zeros_(module.w_up)
    norm = base.get_submodule(NORM)
    s = torch.randn(2, 3, 32)
    assert torch.equal(norm(s), norm.original.module.forward(s))


@pytest.mark.parametrize("linear", [Half, Plain])
@pytest.mark.parametrize("method", ["lora", "pst", "adamix-lora"])
def test_subclasses_of_linear_start_as_the_base(linear, method, make_base, make_batch, randomise):
    base, batch = make_base(), make_batch(with_labels=False)
    for name in (QUERY, FFN_OUT):
        as_class(base, name, linear)
    expected = base(**batch).logits
    model = get_pelt_model(base, LINEAR_METHODS[method]).eval()
    assert torch.equal(model(**batch).logits, expected)
    twin = copy.deepcopy(randomise(model))
    logits = model(**batch).logits
    assert not torch.equal(logits, expected)
    assert torch.equal(twin(**batch).logits, logits)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, _with_head_of(model, expected, batch))
    model.remove()
    assert torch.equal(base(**batch).logits, expected)
    assert type(base.get_submodule(QUERY)) is linear


def _with_head_of(model, expected, batch):
    """The base's logits with the trained head, which `disable_adapter` leaves in place."""
    with torch.no_grad():
        pooled = model.base_model.bert(**batch).pooler_output
        return model.base_model.classifier(pooled)


def test_an_own_forward_follows_what_its_model_becomes(make_base, make_batch):
    base, batch = make_base(), make_batch(with_labels=False)
    as_class(base, QUERY, Half)
    model = get_pelt_model(base, LORA).double()
    logits = model(**batch).logits
    assert logits.dtype == torch.float64
    weights = {n: p.detach() * 1.5 for n, p in model.named_parameters()}
    assert not torch.equal(torch.func.functional_call(model, weights, (), batch).logits, logits)
    assert torch.equal(model(**batch).logits, logits)


def test_what_an_own_forward_makes_of_a_weight_is_not_merged(make_base, make_batch, randomise):
    base, batch = make_base(), make_batch(with_labels=False)
    as_class(base, QUERY, Half)
    model = randomise(get_pelt_model(base, LORA))
    logits = model(**batch).logits
    with pytest.raises(ValueError, match="merging: expected a Linear with nn.Linear's own.*Half"):
        model.export_dense()
    assert torch.equal(model(**batch).logits, logits)
    base = make_base()
    as_class(base, QUERY, Half)
    model = randomise(get_pelt_model(base, LINEAR_METHODS["pst"]))
    logits = model(**batch).logits
    assert torch.equal(model.export_dense()(**batch).logits, logits)


def _peft(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["layer.1.attention.self.query"]))


def _packed(model):
    query = model.get_submodule(QUERY)
    query.weight = nn.Parameter(Packed(query.weight.detach()), requires_grad=False)


def _int8(model):
    query = model.get_submodule(QUERY)
    query.weight = nn.Parameter(query.weight.detach().to(torch.int8), requires_grad=False)


def _float8(model):
    query = model.get_submodule(QUERY)
    query.weight = nn.Parameter(query.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def _dynamic(model):
    quantized = importlib.import_module("torch.ao.nn.quantized.dynamic")
    put(model, QUERY, quantized.Linear(32, 32))


def _of_query(change):
    return lambda model: change(model.get_submodule(QUERY))


NOT_PLAIN = {
    "peft": (_peft, r"another method put around a Linear; .*merge_and_unload"),
    "tensor class": (_packed, "tensor class Packed; .*without quantization"),
    "int8": (_int8, "a weight of torch.int8"),
    "float8": (_float8, "a weight of torch.float8"),
    "quantised module": (_dynamic, "Linear of torch.ao.*without quantization"),
    "weight_norm": (_of_query(parametrizations.weight_norm), r"original1.*remove_parametrizations"),
    "spectral_norm": (_of_query(parametrizations.spectral_norm), "original.*parametrization"),
    "old weight_norm": (_of_query(nn.utils.weight_norm), "weight_g, weight_v.*remove_weight_norm"),
    "pruned": (_of_query(lambda m: prune.l1_unstructured(m, "weight", 0.5)), "weight_orig.*prune"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "pst", "adamix-lora", "unipelt"])
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_no_module_can_stand_for_is_refused_by_name(kind, method, make_base, make_batch):
    change, reason = NOT_PLAIN[kind]
    base = make_base()
    change(base)
    if kind == "tensor class":
        base(**make_batch())
    before = [(name, id(module)) for name, module in base.named_modules()]
    where = rf"expected {QUERY} as an nn.Linear with .*{reason}"
    with pytest.raises(ValueError, match=where) as raised:
        get_pelt_model(base, LINEAR_METHODS[method])
    assert "\n" not in str(raised.value)
    assert before == [(name, id(module)) for name, module in base.named_modules()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["peft", "weight_norm", "old weight_norm", "pruned"])
def test_parts_that_replace_none_of_them_are_served(kind, make_base, make_batch, randomise):
    base, batch = make_base(), make_batch(with_labels=False)
    NOT_PLAIN[kind][0](base)
    expected = base(**batch).logits
    model = randomise(get_pelt_model(base, PrefixTuningConfig(prefix_length=3)))
    assert not torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.remove()(**batch).logits, expected)


@pytest.mark.parametrize("method", ["lora", "pst", "unipelt", *COMPOSITES])
def test_a_parametrization_put_on_afterwards_is_asked_for_back(method, make_base, make_batch):
    base, batch = make_base(), make_batch(with_labels=False)
    expected = base(**batch).logits
    model = get_pelt_model(base, {**LINEAR_METHODS, **COMPOSITES}[method])
    replaced = model._injection.replacements[0].adapted
    nn.utils.parametrize.register_parametrization(replaced, "weight", Doubled())
    for leave in (model.remove, lambda: model.disable_adapter().__enter__()):
        with pytest.raises(ValueError, match="got weight computed from others; take the param"):
            leave()
    nn.utils.parametrize.remove_parametrizations(replaced, "weight", leave_parametrized=False)
    assert torch.equal(model.remove()(**batch).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_an_offloaded_base_is_refused(method, make_base, make_batch):
    accelerate = pytest.importorskip("accelerate")
    base, batch = make_base(), make_batch(with_labels=False)
    expected = base(**batch).logits
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="weights are in memory, got bert.*remove_hook_from_sub"):
        get_pelt_model(base, METHODS[method])
    assert torch.equal(base(**batch).logits, expected)


def test_a_linear_alone_is_checked_too():
    with pytest.raises(TypeError, match="LoRALinear: expected base .*original0"):
        LoRALinear(parametrizations.weight_norm(nn.Linear(4, 4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pst_serves_a_model_that_became_sixteen_bit(dtype, make_base, make_batch):
    batch = make_batch(with_labels=False)
    model = get_pelt_model(make_base(), LINEAR_METHODS["pst"]).to(dtype)
    assert torch.equal(model(**batch).logits, make_base(dtype=dtype)(**batch).logits)

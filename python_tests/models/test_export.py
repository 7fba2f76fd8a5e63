"""A plain model out of a tuned one: the same logits, or one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from every_method import EXPERTS, METHODS, PRUNED
from families import ENCODERS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as to_torch,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as from_torch,
)

from pelt_kernels.methods import (
    BottleneckAdapterConfig,
    CompositeConfig,
    LoraConfig,
    PrefixTuningConfig,
    PSTConfig,
    UniPELTConfig,
    parts_of,
)
from pelt_kernels.models import (
    PeltModel,
    get_pelt_model,
    load_exported,
    matrices_of,
    save_exported,
    sparse_weights,
)
from pelt_kernels.models.sparse_files import HEADER, SPARSE_FILE

MERGEABLE = {
    "lora": LoraConfig(r=4, targets=("query", "attention_output", "ffn_in")),
    "adamix-lora": EXPERTS,
    "pst": METHODS["pst"],
    "bitfit": METHODS["bitfit"],
    "head": METHODS["head"],
    "full": METHODS["full"],
    "lora-pst-bitfit": CompositeConfig(
        lora=LoraConfig(r=4, targets=("key", "value")), pst=PRUNED, bitfit=True
    ),
    "adamix-pst": CompositeConfig(adamix=EXPERTS, pst=PRUNED),
}


def is_loaded_by_transformers(plain, folder, batch):
    """Its logits after a round trip through transformers' own files."""
    plain.save_pretrained(folder)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return loaded(**batch).logits


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("method", MERGEABLE)
def test_the_exported_folder_gives_the_same_logits(
    method, family, make_base, make_batch, randomise, tmp_path
):
    batch = make_batch(with_labels=False)
    model = randomise(get_pelt_model(make_base(family), MERGEABLE[method]), std=0.1).eval()
    model.set_progress(1.0)
    with torch.no_grad():
        expected = model(**batch).logits
    assert model.why_not_dense() == ""
    plain = model.export_dense()
    assert type(plain) is type(make_base(family))
    assert not [name for name, _ in plain.named_modules() if "lora" in name or "experts" in name]
    found = is_loaded_by_transformers(plain, tmp_path, batch)
    if parts_of(MERGEABLE[method]).lora or parts_of(MERGEABLE[method]).mixture:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="inside disable_adapter"):
        model.export_dense()


def test_a_merged_weight_is_the_exact_sum_rounded_once(make_base, randomise):
    base = make_base()
    model = randomise(get_pelt_model(base, LoraConfig(r=4, alpha=3.0)))
    adapted = model.get_submodule("base_model.bert.encoder.layer.0.attention.self.query")
    exact = adapted.weight.double() + 0.75 * adapted.lora_b.double() @ adapted.lora_a.double()
    model.export_dense()
    found = base.bert.encoder.layer[0].attention.self.query
    assert type(found) is torch.nn.Linear and torch.equal(found.weight, exact.float())


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_every_matrix_has_the_asked_number_of_zeros(sparsity, make_base, randomise):
    model = randomise(get_pelt_model(make_base(), replace(METHODS["pst"], sparsity=sparsity)))
    model.set_progress(1.0)
    density = model.density()
    found = matrices_of(model.export_dense())
    assert len(found) == 2 * 6 and [matrix.layer for matrix in found] == [0] * 6 + [1] * 6
    for matrix in found:
        assert matrix.zeros == int(matrix.entries * sparsity)
        assert matrix.density == pytest.approx(density[matrix.name])


REFUSED = {
    "gated LoRA, whose scale": LoraConfig(gated=True),
    "gated LoRA, whose": UniPELTConfig(
        adapter=BottleneckAdapterConfig(bottleneck=4), prefix=PrefixTuningConfig(mid=4)
    ),
    "an adapter, which is not linear": METHODS["adapter"],
    "a prefix, whose keys": METHODS["prefix"],
    "AdaMix's adapters, which are not linear; merge_experts": METHODS["adamix"],
    "an adapter, which": METHODS["composite-pst"],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_no_weight_can_hold_is_refused_and_left_alone(sentence, make_base, make_batch):
    model, batch = get_pelt_model(make_base(), REFUSED[sentence]).eval(), make_batch()
    expected = model(**batch).logits
    with pytest.raises(ValueError, match=f"export_dense: expected parts .* got {sentence}") as said:
        model.export_dense()
    assert "\n" not in str(said.value)
    assert torch.equal(model(**batch).logits, expected)


def test_sixteen_bit_weights_take_no_update(make_base, make_batch):
    model = get_pelt_model(make_base(dtype=torch.bfloat16), LoraConfig(r=4)).eval()
    with pytest.raises(ValueError, match=r"got torch.bfloat16, .* load the base model in float32"):
        model.export_dense()
    model(**make_batch())
    half = get_pelt_model(make_base(dtype=torch.bfloat16), METHODS["pst"]).eval()
    half.set_progress(1.0)
    batch = make_batch(with_labels=False)
    expected = half(**batch).logits
    assert torch.equal(half.export_dense()(**batch).logits, expected)


def test_only_pst_has_a_density(make_base):
    with pytest.raises(ValueError, match="density: expected the method 'pst', alone or as a part"):
        get_pelt_model(make_base(), METHODS["head"]).density()


def pruned_model(make_base, randomise, sparsity, targets=("ffn_in", "ffn_out")):
    """A plain model, exported from PST, and the names of its pruned Linears."""
    config = PSTConfig(sparsity=sparsity, r1=2, r2=2, targets=targets)
    model = randomise(get_pelt_model(make_base(), config))
    model.set_progress(1.0)
    names = list(model.density())
    return model.export_dense(), names


def test_csr_is_smaller_and_gives_the_same_model(make_base, make_batch, randomise, tmp_path):
    plain, names = pruned_model(make_base, randomise, 0.9)
    batch = make_batch(with_labels=False)
    save_exported(plain, tmp_path / "csr", names, "csr")
    save_exported(plain, tmp_path / "dense", names, "dense")
    again = load_exported(tmp_path / "csr")
    assert type(again) is type(plain)
    assert again.config.architectures == ["BertForSequenceClassification"]
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again(**batch).logits, plain(**batch).logits)
    sizes = [
        path.stat().st_size
        for path in (tmp_path / "csr" / SPARSE_FILE, tmp_path / "dense" / "model.safetensors")
    ]
    assert sizes[0] < 0.8 * sizes[1]
    weights = sparse_weights(tmp_path / "csr")
    assert set(weights) == {f"{name}.weight" for name in names}
    for name, weight in weights.items():
        dense = plain.get_parameter(name)
        assert weight.layout == torch.sparse_csr and torch.equal(weight.to_dense(), dense)
        x = torch.randn(dense.shape[1], 3)
        torch.testing.assert_close(weight @ x, dense @ x)


def two_of_four(plain, names):
    """Two of four neighbours stay, different ones in each group; in some groups one or none."""
    generator = torch.Generator().manual_seed(3)
    for name in names:
        groups = plain.get_parameter(f"{name}.weight").data.view(-1, 4)
        groups.copy_(torch.randn(groups.shape, generator=generator))
        order = torch.rand(groups.shape, generator=generator).argsort(dim=1)
        groups.scatter_(1, order[:, :2], 0.0)
        groups[::5] *= torch.tensor([0.0, 0.0, 1.0, 1.0])
        groups[::7] = 0.0


def test_two_of_four_gives_the_same_model_and_is_torchs_pattern(
    make_base, make_batch, randomise, tmp_path
):
    plain, names = pruned_model(make_base, randomise, 0.5)
    two_of_four(plain, names)
    save_exported(plain, tmp_path, names, "2:4")
    again = load_exported(tmp_path)
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    batch = make_batch(with_labels=False)
    assert torch.equal(again(**batch).logits, plain(**batch).logits)
    for name in names:
        half = torch.zeros(64, 64, dtype=torch.float16)  # torch takes multiples of 32 and 64
        weight = plain.get_parameter(f"{name}.weight").half()
        half[: weight.shape[0], : weight.shape[1]] = weight
        assert torch.equal(from_torch(*to_torch(half)), half)


def test_pst_itself_can_end_in_two_of_four(make_base, randomise, tmp_path):
    """Where the weights already lie so, the lowest half of the scores are those zeros."""
    base = make_base()
    names = [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]
    two_of_four(base, names)
    model = get_pelt_model(base, PSTConfig(sparsity=0.5, targets=("ffn_in",)))
    model.set_progress(1.0)
    assert list(model.density()) == names
    save_exported(model.export_dense(), tmp_path, names, "2:4")
    assert matrices_of(load_exported(tmp_path))[4].density < 0.5


def test_forms_that_do_not_fit_are_refused_with_the_numbers(make_base, randomise, tmp_path):
    plain, names = pruned_model(make_base, randomise, 0.5)
    with pytest.raises(
        ValueError, match=r"2:4 expects at most 2 .* got more in [\d,]+ of 1,536 su"
    ):
        save_exported(plain, tmp_path / "out", names, "2:4")
    with pytest.raises(
        ValueError, match=r"csr expects fewer bytes than the 24,576 .* density of 0"
    ):
        save_exported(plain, tmp_path / "out", names, "csr")
    for form in ("csr", "2:4"):
        with pytest.raises(ValueError, match=f"{form} expects matrices that PST pruned"):
            save_exported(plain, tmp_path / "out", [], form)
    with pytest.raises(ValueError, match="format to be one of dense, 2:4, csr, got 'coo'"):
        save_exported(plain, tmp_path / "out", names, "coo")
    assert not (tmp_path / "out").exists()


def test_damaged_and_missing_files_are_refused(make_base, randomise, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"expected {SPARSE_FILE} in"):
        load_exported(tmp_path)
    plain, names = pruned_model(make_base, randomise, 0.9)
    save_exported(plain, tmp_path, names, "csr")
    content = (tmp_path / SPARSE_FILE).read_bytes()
    (tmp_path / SPARSE_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_exported(tmp_path)
    flipped = bytearray(content)
    flipped[-5] ^= 1  # of the last tensor
    (tmp_path / SPARSE_FILE).write_bytes(flipped)
    with pytest.raises(ValueError, match="the tensors are not those that were written"):
        load_exported(tmp_path)
    (tmp_path / SPARSE_FILE).write_bytes(content)
    with safe_open(tmp_path / SPARSE_FILE, "pt") as file:
        header = json.loads(file.metadata()[HEADER])
    tensors = load_file(tmp_path / SPARSE_FILE)
    name = f"{names[0]}.weight"
    for change, sentence in {
        "model": (["BertModel"], "expected model as text, got"),
        "form": ({}, "expected a header with the form 2:4 or csr"),
        "shapes": ({name: [1, "2"]}, f"expected shapes.{name} as two whole numbers"),
    }.items():
        value, words = sentence
        metadata = {HEADER: json.dumps(header | {change: value})}
        save_file(tensors, tmp_path / SPARSE_FILE, metadata)
        with pytest.raises(ValueError, match=words):
            load_exported(tmp_path)
    metadata = {HEADER: json.dumps(header | {"shapes": header["shapes"] | {name: [3, 5]}})}
    save_file(tensors, tmp_path / SPARSE_FILE, metadata)
    with pytest.raises(ValueError, match="does not fit together"):
        load_exported(tmp_path)
    del tensors[f"{name}.values"]
    save_file(tensors, tmp_path / SPARSE_FILE, {HEADER: json.dumps(header)})
    with pytest.raises(ValueError, match=f"{name}.values is missing"):
        load_exported(tmp_path)


def test_equal_sparse_models_are_equal_files(make_base, randomise, tmp_path):
    contents = []
    for number in range(3):
        torch.manual_seed(0)
        plain, names = pruned_model(make_base, randomise, 0.9)
        save_exported(plain, tmp_path / str(number), names, "csr")
        contents.append((tmp_path / str(number) / SPARSE_FILE).read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_an_adapter_saved_and_loaded_exports_the_same(make_base, make_batch, randomise, tmp_path):
    batch = make_batch(with_labels=False)
    model = randomise(get_pelt_model(make_base(), MERGEABLE["lora-pst-bitfit"]), std=0.1).eval()
    model.set_progress(1.0)
    model.save_pretrained(tmp_path)
    expected = model.export_dense()(**batch).logits
    again = PeltModel.from_pretrained(make_base(), tmp_path).export_dense()
    assert torch.equal(again(**batch).logits, expected)

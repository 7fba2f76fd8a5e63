"""A plain model on disk whose pruned matrices are stored by their entries that are not 0.

transformers reads neither form, so the weights have a file name of their own and `load_exported`
gives the model back, bit for bit. A folder written as ``dense`` is transformers' own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tensor_files import DIGEST, digest, read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMS = ("dense", "2:4", "csr")
SPARSE_FILE = "sparse_model.safetensors"
HEADER = "pelt_kernels_sparse"
PIECES = {"csr": ("crow_indices", "col_indices", "values"), "2:4": ("values", "places")}
GROUP, KEPT = 4, 2  # of 2:4: at most two entries in four neighbours


def save_exported(
    model: PreTrainedModel, directory: str | os.PathLike[str], pruned: Sequence[str], form: str
) -> None:
    """Writes a plain model: config.json and its weights.

    ``dense``: as transformers does. ``csr``: each pruned matrix as torch's CSR, crow_indices and
    col_indices in int32. ``2:4``: of each four neighbours of a row two values, and the places of
    both, two bits each, two groups to a byte.

    Args:
        pruned: the names of the pruned Linears; the other tensors are stored as they are.
        form: dense, 2:4 or csr.

    Raises:
        ValueError: an unknown form, no pruned matrix, a pattern that is not 2:4, or a density at
            which CSR would be larger than the matrices themselves; with the numbers.
    """
    if form not in FORMS:
        raise ValueError(f"export: expected format to be one of {', '.join(FORMS)}, got {form!r}")
    if form == "dense":
        model.save_pretrained(directory)
        return
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in pruned}
    why_not = why_not_sparse(weights, form)
    if why_not:
        raise ValueError(f"export: {why_not}")
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in weights:
                made = _to_csr(tensor) if form == "csr" else _to_two_of_four(tensor)
                tensors.update({f"{name}.{piece}": value for piece, value in made.items()})
            else:
                tensors[name] = tensor.contiguous()
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(target)
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    # Tied tensors are written once for each of their names, each with its own memory.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    header = {"form": form, "model": type(model).__name__, "shapes": shapes}
    write_tensors(target / SPARSE_FILE, tensors, HEADER, header)


def load_exported(directory: str | os.PathLike[str]) -> PreTrainedModel:
    """The plain model of a folder that `save_exported` wrote as 2:4 or csr, with dense weights, in
    evaluation.

    Raises:
        FileNotFoundError: no such file. ValueError: a damaged one.
    """
    import transformers

    tensors, header = _read(directory)
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    model_class = getattr(transformers, header["model"], None)
    if not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        raise ValueError(
            f"load_exported: expected {directory} to hold a model of transformers, got "
            f"{header['model']!r}"
        )
    model: PreTrainedModel = model_class(config).eval()
    try:
        # Their dtype is the model's.
        model.load_state_dict(_dense_state(tensors, header), assign=True)
    except RuntimeError as error:  # torch's for indices and shapes that do not go together
        first = str(error).splitlines()[0]
        raise ValueError(f"load_exported: {directory} does not fit together ({first})") from error
    model.tie_weights()
    return model


def _dense_state(tensors: Mapping[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    state = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(name.startswith(f"{matrix}.") for matrix in header["shapes"])
    }
    for name, shape in header["shapes"].items():
        pieces = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}.")
        }
        state[name] = (
            _from_csr(pieces, shape).to_dense()
            if header["form"] == "csr"
            else _from_two_of_four(pieces, shape)
        )
    return state


def sparse_weights(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The pruned matrices of a folder written as csr, as torch's sparse CSR tensors by name.

    Raises:
        FileNotFoundError: no such file. ValueError: a damaged one, or one of another form.
    """
    tensors, header = _read(directory)
    if header["form"] != "csr":
        raise ValueError(f"sparse_weights: expected {directory} as csr, got {header['form']!r}")
    return {
        name: _from_csr({piece: tensors[f"{name}.{piece}"] for piece in PIECES["csr"]}, shape)
        for name, shape in header["shapes"].items()
    }


def why_not_sparse(weights: Mapping[str, Tensor], form: str) -> str:
    """Why matrices cannot be stored in a form, with the numbers, or nothing."""
    if not weights:
        return f"{form} expects matrices that PST pruned, got a model without any; use dense"
    if form == "csr":
        stored = sum(_csr_bytes(weight) for weight in weights.values())
        dense = sum(weight.nbytes for weight in weights.values())
        if stored < dense:
            return ""
        entries = sum(weight.numel() for weight in weights.values())
        kept = sum(int((weight != 0).sum()) for weight in weights.values())
        return (
            f"csr expects fewer bytes than the {dense:,} of the pruned matrices themselves, got "
            f"{stored:,} at a density of {kept / entries:.3f}; use dense, or a higher sparsity"
        )
    over: dict[str, tuple[int, int]] = {}
    for name, weight in weights.items():
        if weight.shape[1] % GROUP:
            return f"2:4 expects rows of a multiple of 4 entries, got {weight.shape[1]} in {name}"
        groups = (weight != 0).view(-1, GROUP).sum(dim=1)
        over[name] = (int((groups > KEPT).sum()), len(groups))
    wrong, of = (sum(numbers) for numbers in zip(*over.values(), strict=True))
    if not wrong:
        return ""
    worst = max(over, key=lambda name: over[name][0])
    return (
        "2:4 expects at most 2 entries that are not 0 in each 4 neighbours of a row, got more in "
        f"{wrong:,} of {of:,} such groups (most in {worst}: {over[worst][0]:,} of "
        f"{over[worst][1]:,}); use dense or csr"
    )


def _csr_bytes(weight: Tensor) -> int:
    kept = int((weight != 0).sum())
    return kept * (weight.element_size() + 4) + 4 * (weight.shape[0] + 1)


def _to_csr(weight: Tensor) -> dict[str, Tensor]:
    is_kept = weight != 0
    ends = is_kept.sum(dim=1).cumsum(dim=0).to(torch.int32)
    return {
        "crow_indices": torch.cat([ends.new_zeros(1), ends]),
        "col_indices": is_kept.nonzero()[:, 1].to(torch.int32),
        "values": weight[is_kept],
    }


def _from_csr(pieces: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    return torch.sparse_csr_tensor(
        pieces["crow_indices"],
        pieces["col_indices"],
        pieces["values"],
        size=tuple(shape),
        check_invariants=True,
    )


def _to_two_of_four(weight: Tensor) -> dict[str, Tensor]:
    """values [n, k / 2], and places: one byte for two groups, the first group in the low half."""
    groups = weight.view(len(weight), -1, GROUP)
    # Of a group with fewer than two entries the free slots keep zeros, and their places.
    places = (groups != 0).to(torch.uint8).argsort(dim=2, descending=True, stable=True)
    places = places[..., :KEPT].sort(dim=2).values
    halves = places[..., 0] | places[..., 1] << 2
    if halves.shape[1] % 2:
        halves = torch.nn.functional.pad(halves, (0, 1))
    packed = halves[:, 0::2] | halves[:, 1::2] << 4
    values = groups.gather(2, places).flatten(1)
    return {"values": values, "places": packed.to(torch.uint8)}


def _from_two_of_four(pieces: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    values, packed = pieces["values"], pieces["places"].long()
    halves = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, : shape[1] // GROUP]
    places = torch.stack([halves & 3, halves >> 2], dim=2)
    groups = values.new_zeros(shape[0], shape[1] // GROUP, GROUP)
    return groups.scatter(2, places, values.view(*places.shape)).view(*shape)


def _read(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = Path(directory) / SPARSE_FILE
    tensors, header = read_tensors(path, "load_exported", HEADER)
    wrong = _why_not_ours(header, tensors)
    if wrong:
        raise ValueError(f"load_exported: {path} is damaged or of another program ({wrong})")
    return tensors, header


def _why_not_ours(header: Any, tensors: Mapping[str, Tensor]) -> str:
    """What of a header is not as `save_exported` writes it, or nothing."""
    if not isinstance(header, dict) or header.get("form") not in FORMS[1:]:
        return "expected a header with the form 2:4 or csr"
    if not isinstance(header.get("model"), str):
        return f"expected model as text, got {header.get('model')!r:.80}"
    shapes = header.get("shapes")
    if not isinstance(shapes, dict):
        return f"expected shapes as an object, got {shapes!r:.80}"
    for name, shape in shapes.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
            return f"expected shapes.{name} as two whole numbers, got {shape!r:.80}"
        missing = [piece for piece in PIECES[header["form"]] if f"{name}.{piece}" not in tensors]
        if missing:
            return f"{name}.{missing[0]} is missing"
    # Files from before the digest have none.
    if DIGEST in header and header[DIGEST] != digest(tensors):
        return "the tensors are not those that were written"
    return ""

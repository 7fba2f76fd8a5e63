"""A trained adapter written as a plain model, or as the smallest adapter it can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..methods import parts_of
from ..models import FAMILIES, Matrix, matrices_of, save_exported
from ..models.pruning import pruned_linears
from ..models.sparse_files import FORMS
from .errors import RunError, UsageError, check_choice, reason
from .predictor import Card, load_tuned
from .problems import PROBLEMS
from .storage import replacing, require_writable, share, write_json

FILE = "export.json"
ADAPTER, PEFT = "adapter", "peft"
EXPORT_FORMS = (*FORMS, ADAPTER, PEFT)


@dataclass(frozen=True)
class Exported:
    """What was written: its form, why it is not a plain model where it could not be one, and the
    Linears of each layer with their zeros (none for an adapter).
    """

    form: str
    why_adapter: str
    matrices: list[Matrix]
    bytes: int


def export(
    folder: Path, output: Path, form: str | None = None, model: str | None = None
) -> Exported:
    """Writes the adapter in `folder` to `output`, whole or not at all.

    ``dense``, ``2:4`` and ``csr`` are plain models (`pelt_kernels.models.save_exported`) with their
    tokenizer: experts averaged, PST's pruned weights, LoRA added to the weights. ``adapter`` is an
    adapter again, with its experts merged into one and its prefixes' reparametrisation computed.

    Args:
        form: None is dense; for AdaMix's adapters, which no plain model can hold, it is adapter.
        model: the base model where it is not the one named in the adapter's card.

    Raises:
        UsageError: no adapter there, an output that is there already, or a form that does not fit.
        RunError: a damaged adapter, or an output that cannot be written.
    """
    if form is not None:
        check_choice("format", form, EXPORT_FORMS)
    card = Card.load(folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"output: {output} is there already; name another folder")
    name = model or card.model
    tuned = load_tuned(folder, card, name)
    if parts_of(tuned.method_config).mixture is not None:
        tuned.merge_experts()
    refusal = tuned.why_not_dense()
    if form is None:
        mixture = parts_of(tuned.method_config).mixture
        form = ADAPTER if mixture is not None and mixture.kind == "adapter" else "dense"
    if form not in (ADAPTER, PEFT) and refusal:
        raise UsageError(
            f"export: expected parts that the weights of a plain model can hold, got {refusal}; "
            f"--format {ADAPTER} writes an adapter for inference"
        )
    require_writable(output.parent)
    method = tuned.method_config
    pruned = list(pruned_linears(tuned.base_model))
    matrices: list[Matrix] = []
    try:
        with replacing(output) as partial:
            partial.mkdir()
            if form == ADAPTER:
                tuned.save_pretrained(partial, collapse_prefix=True)
                card.save(partial)
            elif form == PEFT:
                tuned.save_pretrained(partial, format="peft")
                PROBLEMS[card.problem].tokenizer(name).save_pretrained(partial)
            else:
                plain = tuned.export_dense()
                if card.labels:
                    plain.config.id2label = dict(enumerate(card.labels))
                    plain.config.label2id = {label: i for i, label in enumerate(card.labels)}
                if plain.config.model_type in FAMILIES:
                    matrices = matrices_of(plain)
                save_exported(plain, partial, pruned, form)
                PROBLEMS[card.problem].tokenizer(name).save_pretrained(partial)
            write_json(partial / FILE, _described(form, method.to_dict(), matrices))
            share(partial)
    except ValueError as error:
        raise UsageError(reason(error)) from error
    except SafetensorError as error:
        raise RunError(f"{output} cannot be written: {reason(error)}") from error
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Exported(form, refusal if form == ADAPTER else "", matrices, size)


def _described(form: str, method: dict[str, Any], matrices: list[Matrix]) -> dict[str, Any]:
    rows = [matrix._asdict() | {"density": matrix.density} for matrix in matrices]
    return {"format": form, "method_config": method, "matrices": rows}

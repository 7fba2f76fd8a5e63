"""Control Prefixes: prefixes that depend on a sentence's attributes (Clive et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._config import (
    Counts,
    check,
    check_choice,
    check_int,
    set_counts,
    set_layers,
    set_tokens,
)
from .prefix import PrefixTuningConfig

STARTS = ("normal", "torch")
SITES = ("encoder", "decoder", "cross")


@dataclass(frozen=True, kw_only=True)
class ControlPrefixesConfig(PrefixTuningConfig):
    """A general prefix P for every sentence, and for each of its attributes the prefix of its
    label: ``K' = [C_an[y_n] ; ... ; C_a1[y_1] ; P ; K]``, and V' alike.

    Each kind of attention (an encoder's, a decoder's own, a decoder's over the encoder) has its
    general prefix, its attributes' prefixes and one reparametrisation that all of them go through
    (`pelt_kernels.nn.PrefixAttention`). Labels are an input of the model, see `PeltModel.forward`:
    ``model(input_ids, attributes={"source": labels})``, and `generate` takes them, too.

    The paper's figures, which are the defaults: 50 general prefixes (48 for WebNLG and XSum) and 2
    of each label, 800 hidden units. Its dropout on prefixes is 0 in every setting and is left out.
    Other than in the authors' code, beams keep the prefixes of their own sentence.

    Attributes:
        prefix_length: P; 0 is allowed.
        mid: the width of the reparametrisation; None: the prefixes themselves are the parameters.
        attributes: how many labels each attribute has, such as ``{"source": 6, "category": 17}``;
            at most three. A later one stands in front. Without any it is prefix tuning.
        attribute_length: how many prefixes a label has.
        lengths: the same for single attributes, such as ``{"category": 3}``.
        unseen: how many of an attribute's last labels no training sentence has. Their embeddings
            start as zeros, and as nothing else writes to them they stay so.
        start: ``torch``: embeddings ~ N(0, 1) and PyTorch's own start of Linears, as the authors'
            code; ``normal``: N(0, 0.02), biases 0.
        skip_layers: layers without a prefix in any attention; a decoder's are counted on from its
            encoder's.
        skip_encoder, skip_decoder, skip_cross: layers without a prefix in one kind of attention,
            each counted from 0; with all of its layers that kind has none.
        trainable_tokens: words whose embeddings are trained, too, by id, see `Parts`.
        gated, gate_pooling: as in `PrefixTuningConfig`; the gate scales every prefix.

    Raises:
        ValueError: a field outside its range.
    """

    method: ClassVar[str] = "control_prefixes"

    prefix_length: int = 50
    mid: int | None = 800
    attributes: Counts = ()
    attribute_length: int = 2
    lengths: Counts = ()
    unseen: Counts = ()
    start: str = "torch"
    skip_encoder: tuple[int, ...] = ()
    skip_decoder: tuple[int, ...] = ()
    skip_cross: tuple[int, ...] = ()
    trainable_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "attribute_length", 1)
        set_counts(self, "attributes", 1)
        set_counts(self, "lengths", 1)
        set_counts(self, "unseen", 0)
        check_choice(self, "start", STARTS)
        for site in SITES:
            set_layers(self, f"skip_{site}")
        set_tokens(self, "trainable_tokens")
        labels = dict(self.attributes)
        check(len(labels) <= 3, self, "attributes", "as at most three")
        are_names = all(name.isidentifier() for name in labels)
        check(are_names, self, "attributes", "with names of letters, digits and underscores")
        for field in ("lengths", "unseen"):
            are_known = all(name in labels for name in dict(getattr(self, field)))
            check(
                are_known, self, field, f"for attributes ({', '.join(labels) or 'there are none'})"
            )
        are_fewer = all(count <= labels[name] for name, count in dict(self.unseen).items())
        check(are_fewer, self, "unseen", "as no more labels than an attribute has")

    def tables(self) -> dict[str, tuple[int, int]]:
        """The number of labels and the length of each attribute's prefixes, by name."""
        lengths = dict(self.lengths)
        return {
            name: (labels, lengths.get(name, self.attribute_length))
            for name, labels in dict(self.attributes).items()
        }

    def unseen_labels(self) -> dict[str, tuple[int, ...]]:
        """The labels that no training sentence has, by attribute."""
        labels = dict(self.attributes)
        return {
            name: tuple(range(labels[name] - count, labels[name]))
            for name, count in dict(self.unseen).items()
        }

    def skips(self, site: str, number: int, in_stack: int) -> bool:
        """As of prefix tuning, and by the kind's own list, which counts the layers of its stack."""
        own: tuple[int, ...] = getattr(self, f"skip_{site}")
        return in_stack in own or super().skips(site, number, in_stack)

"""The learned prefixes of a model's attention layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..ops import Prefix, prefix_attention
from ..ops._values import is_autocast
from ..ops.prefix_attention.contract import MAX_SEGMENTS
from ..ops.prefix_attention.weights import attention_weights

STARTS = ("normal", "torch")


class PrefixAttention(nn.Module):
    """``out_i = softmax( scale · Q [g·Pk_i ; K]ᵀ + bias ) [g·Pv_i ; V]`` for the layers i of a
    model, with learned Pk, Pv.

    The prefixes of all layers come from one reparametrisation (Li and Liang 2021; UniPELT's form):

        [Pk_0, Pv_0, Pk_1, Pv_1, ...] = W2 tanh( W1 E + b1 ) + b2
        with E [P, width], W1 [mid, width], W2 [2·L·G·E, mid]

    It depends on its parameters only, so `collapse` replaces it by the table [L, 2, P, G, E] that
    it computes. W2 is stored as one tensor [2·G·E, mid] for each layer: a layer then computes only
    its own rows, inside its own gradient checkpoint, and no layer's gradient is padded to the size
    of the whole W2. With ``mid=None`` the table itself is learned.

    Control Prefixes (Clive et al. 2022): an attribute a of a sentence, one of R_a labels, has a
    prefix C_a of length P_a for each label. They come from an embedding [R_a · P_a, width] through
    the same W1 and W2, and a sentence with label y takes the rows y · P_a to (y + 1) · P_a - 1.
    Attention sees ``[C_an ; ... ; C_a1 ; P ; K]``: a later attribute in front of an earlier one.

    Always computed in the parameters' own dtype, autocast or not, so that a collapsed prefix gives
    the same numbers.

    Args:
        num_layers: L, the number of layers that have a prefix.
        prefix_length: P >= 0.
        num_heads, head_size: G, the heads of keys and values, and their size E.
        mid: the width of the reparametrisation, or None.
        width: of the embeddings, a model's D; None: G · E.
        attributes: by name, the number of labels R_a and the length P_a; at most three.
        unseen: by name of an attribute, labels that no training sentence has. Their embeddings
            start as zeros and are parameters as all others: they stay zeros as long as no sentence
            has them, and such a label is one of which nothing is known. With the start "normal" its
            prefix is zeros at first, and then what the biases make of it.
        has_gates: one learned gate ``sigmoid(b)`` for each layer, b = 0 at the start (`gate`).
        start: "normal": every weight ~ N(0, 0.02), biases 0. "torch": PyTorch's own, which the
            code of Control Prefixes has: embeddings and tables ~ N(0, 1), W1, W2 and their biases
            uniform within ±1/sqrt(fan_in).

    Raises:
        ValueError: a size below 1 (P: below 0), a name that is no identifier, too many attributes,
            an unseen label that is none, or an unknown start.
    """

    def __init__(
        self,
        num_layers: int,
        prefix_length: int,
        num_heads: int,
        head_size: int,
        *,
        mid: int | None = 512,
        width: int | None = None,
        attributes: Mapping[str, tuple[int, int]] | None = None,
        unseen: Mapping[str, Sequence[int]] | None = None,
        has_gates: bool = False,
        start: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (
            min(num_layers, num_heads, head_size) < 1
            or prefix_length < 0
            or (mid is not None and mid < 1)
        ):
            raise ValueError(
                "PrefixAttention: expected num_layers, num_heads, head_size, mid >= 1 and "
                f"prefix_length >= 0, got {num_layers}, {num_heads}, {head_size}, {mid} and "
                f"{prefix_length}"
            )
        if width is not None and width < 1:
            raise ValueError(f"PrefixAttention: expected width >= 1 or None, got {width}")
        if start not in STARTS:
            raise ValueError(
                f"PrefixAttention: expected start to be one of {', '.join(STARTS)}, got {start!r}"
            )
        self.num_layers, self.prefix_length = num_layers, prefix_length
        self.num_heads, self.head_size = num_heads, head_size
        self.attributes = dict(attributes or {})
        self.unseen = {name: tuple(labels) for name, labels in (unseen or {}).items()}
        _check_attributes(self.attributes, self.unseen)
        self.start = start
        columns = num_heads * head_size
        width = columns if width is None else width

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        if mid is None:
            self.table = parameter(num_layers, 2, prefix_length, num_heads, head_size)
            for name, (labels, length) in self.attributes.items():
                table = parameter(num_layers, 2, labels, length, num_heads, head_size)
                self.register_parameter(f"table_{name}", table)
        else:
            self.embedding = nn.Embedding(prefix_length, width, device=device, dtype=dtype)
            for name, (labels, length) in self.attributes.items():
                self.register_parameter(f"embedding_{name}", parameter(labels * length, width))
            self.down = nn.Linear(width, mid, device=device, dtype=dtype)
            self.up_weight = nn.ParameterList(
                [parameter(2 * columns, mid) for _ in range(num_layers)]
            )
            self.up_bias = nn.ParameterList([parameter(2 * columns) for _ in range(num_layers)])
        if has_gates:
            self.gate_bias = parameter(num_layers)
        self.reset_parameters()

    @property
    def columns(self) -> int:
        """How many keys a sentence has in front of its tokens'."""
        return self.prefix_length + sum(length for _, length in self.attributes.values())

    @property
    def is_collapsed(self) -> bool:
        """True where the tables are the parameters and there is no reparametrisation."""
        return "table" in self._parameters

    @property
    def collapsed_numbers(self) -> int:
        """How many numbers it holds after `collapse`: the tables, and the gates."""
        rows = self.prefix_length + sum(math.prod(sizes) for sizes in self.attributes.values())
        of_each = 2 * rows * self.num_heads * self.head_size + ("gate_bias" in self._parameters)
        return self.num_layers * of_each

    def reset_parameters(self) -> None:
        """Every parameter as `start` says; rows of unseen labels and gates' biases are zeros."""
        if "gate_bias" in self._parameters:
            nn.init.zeros_(self.gate_bias)
        rows_std = 0.02 if self.start == "normal" else 1.0
        if self.is_collapsed:
            nn.init.normal_(self.table, std=rows_std)
        else:
            nn.init.normal_(self.embedding.weight, std=rows_std)
            pairs = [(self.down.weight, self.down.bias), *zip(self.up_weight, self.up_bias)]
            for weight, bias in pairs:
                if self.start == "normal":
                    nn.init.normal_(weight, std=0.02)
                    nn.init.zeros_(bias)
                else:
                    bound = 1 / math.sqrt(weight.shape[1])
                    nn.init.uniform_(weight, -bound, bound)
                    nn.init.uniform_(bias, -bound, bound)
        for name, (labels, length) in self.attributes.items():
            rows = self._own(name)
            nn.init.normal_(rows, std=rows_std)
            unseen = list(self.unseen.get(name, ()))
            if self.is_collapsed:
                rows.detach()[:, :, unseen] = 0
            else:
                rows.detach().view(labels, length, -1)[unseen] = 0

    def _own(self, attribute: str) -> nn.Parameter:
        """What an attribute alone has: its table, or its embedding."""
        form = "table" if self.is_collapsed else "embedding"
        parameter: nn.Parameter = getattr(self, f"{form}_{attribute}")
        return parameter

    def gate(self, layer: int) -> Tensor:
        """The layer's learned gate ``sigmoid(b)``, [1]."""
        return torch.sigmoid(self.gate_bias[layer : layer + 1])

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Pk and Pv [P, G, E] of one layer, counted among the layers that have a prefix."""
        return self._prefixes(layer)[0]

    def _prefixes(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of one layer: the general prefix's [P, G, E], then each attribute's
        [R_a, P_a, G, E].
        """
        shapes = [(self.prefix_length,), *self.attributes.values()]
        if self.is_collapsed:
            tables = [self.table, *map(self._own, self.attributes)]
            return [(table[layer, 0], table[layer, 1]) for table in tables]
        embeddings = [self.embedding.weight, *map(self._own, self.attributes)]
        joined = embeddings[0] if len(embeddings) == 1 else torch.cat(embeddings)
        if is_autocast(joined.device):
            with torch.autocast(joined.device.type, enabled=False):
                rows = self._rows(joined, layer)
        else:  # the usual case, in which the block would take longer than a product in it
            rows = self._rows(joined, layer)
        rows = rows.view(len(rows), 2, self.num_heads, self.head_size)
        if len(shapes) == 1:
            keys, values = rows.unbind(1)
            return [(keys, values)]
        keys_values = []
        for part, shape in zip(rows.split([math.prod(shape) for shape in shapes]), shapes):
            keys, values = part.unbind(1)
            keys_values.append((keys.unflatten(0, shape), values.unflatten(0, shape)))
        return keys_values

    def _rows(self, embeddings: Tensor, layer: int) -> Tensor:
        """Keys and values [ΣP, 2·G·E] of one layer, from the embeddings."""
        hidden = torch.tanh(self.down(embeddings))
        return nn.functional.linear(hidden, self.up_weight[layer], self.up_bias[layer])

    def segments(self, layer: int, labels: Mapping[str, Tensor] | None = None) -> list[Prefix]:
        """What `prefix_attention` takes for one layer: ``[C_an ; ... ; C_a1 ; P]``.

        Args:
            layer: counted among the layers that have a prefix.
            labels: of each sentence, by attribute, int64 [B].

        Raises:
            ValueError: labels for other attributes than there are.
        """
        labels = labels or {}
        if set(labels) != set(self.attributes):
            raise ValueError(
                "PrefixAttention: expected labels for the attributes "
                f"{', '.join(self.attributes) or '(none)'}, got {', '.join(labels) or 'none'}"
            )
        general, *tables = self._prefixes(layer)
        segments = [Prefix(*general)]
        for name, table in zip(self.attributes, tables):
            segments.insert(0, Prefix(*table, labels[name]))
        return segments

    @torch.no_grad()
    def as_tables(self) -> dict[str, Tensor]:
        """The prefixes of all layers as `collapse` would store them, by its parameters' names:
        ``table`` [L, 2, P, G, E] and, for each attribute, ``table_NAME`` [L, 2, R_a, P_a, G, E].
        """
        names = ["table", *(f"table_{name}" for name in self.attributes)]
        layers = [self._prefixes(layer) for layer in range(self.num_layers)]
        return {
            name: torch.stack([torch.stack(prefixes[i]) for prefixes in layers])
            for i, name in enumerate(names)
        }

    def collapse(self) -> None:
        """Replaces the reparametrisation by its tables: same attention; there is no way back."""
        if self.is_collapsed:
            return
        requires_grad = self.embedding.weight.requires_grad
        tables = self.as_tables()
        del self.embedding, self.down, self.up_weight, self.up_bias
        for name in self.attributes:
            delattr(self, f"embedding_{name}")
        for name, table in tables.items():
            self.register_parameter(name, nn.Parameter(table, requires_grad=requires_grad))

    def forward(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        labels: Mapping[str, Tensor] | None = None,
        gate: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        bias: Tensor | None = None,
        scale: float | Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Attention of one layer: q [B, H, S, E], k and v [B, G, N, E], labels as `segments` takes
        them, gate [B], key_mask [B, N] bool, bias [B or 1, H or 1, S, N], which is 0 on prefixes ->
        like q. Causal: the last query sees the last key, and every query the prefix.

        dropout_p is the attention module's own: 0 outside of training.
        """
        out = prefix_attention(
            q,
            k,
            v,
            self.segments(layer, labels),
            gate=gate,
            key_mask=key_mask,
            is_causal=is_causal,
            bias=bias,
            scale=scale,
            dropout_p=dropout_p,
        )
        assert isinstance(out, Tensor)
        return out

    def weights(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        *,
        labels: Mapping[str, Tensor] | None = None,
        gate: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        bias: Tensor | None = None,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """The probabilities [B, H, S, P + N] of `forward` before dropout, prefix columns first, in
        the order of `segments`, for inspection: `forward` never stores them.
        """
        return attention_weights(
            q,
            k,
            self.segments(layer, labels),
            gate=gate,
            key_mask=key_mask,
            is_causal=is_causal,
            bias=bias,
            scale=scale,
        )

    def extra_repr(self) -> str:
        form = "table" if self.is_collapsed else f"mid={self.down.out_features}"
        of_labels = "".join(
            f", {name}={labels}x{length}" for name, (labels, length) in self.attributes.items()
        )
        return (
            f"layers={self.num_layers}, prefix_length={self.prefix_length}{of_labels}, "
            f"heads={self.num_heads}, head_size={self.head_size}, {form}"
        )


def _check_attributes(
    attributes: Mapping[str, tuple[int, int]], unseen: Mapping[str, Sequence[int]]
) -> None:
    """Raises ValueError for what no attribute or none of its labels can be."""
    if len(attributes) >= MAX_SEGMENTS:
        raise ValueError(
            f"PrefixAttention: expected at most {MAX_SEGMENTS - 1} attributes, got "
            f"{len(attributes)} ({', '.join(attributes)})"
        )
    for name, (labels, length) in attributes.items():
        if not name.isidentifier() or min(labels, length) < 1:
            raise ValueError(
                "PrefixAttention: expected attributes as name: (labels >= 1, length >= 1), the "
                f"name an identifier, got {name!r}: ({labels}, {length})"
            )
    for name, rows in unseen.items():
        labels = attributes[name][0] if name in attributes else 0
        if not all(0 <= row < labels for row in rows) or not labels:
            raise ValueError(
                f"PrefixAttention: expected unseen labels of {name!r} among the {labels} that it "
                f"has, got {list(rows)}"
            )

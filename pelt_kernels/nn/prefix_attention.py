"""The learned prefixes of a model's attention layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import Prefix, prefix_attention
from ..ops.prefix_attention.weights import attention_weights


class PrefixAttention(nn.Module):
    """``out_i = softmax( scale · Q [g·Pk_i ; K]ᵀ ) [g·Pv_i ; V]`` for the layers i of a model, with
    learned Pk, Pv.

    The prefixes of all layers come from one reparametrisation (Li and Liang 2021; UniPELT's form):

        [Pk_0, Pv_0, Pk_1, Pv_1, ...] = W2 tanh( W1 E + b1 ) + b2
        with E [P, D], W1 [mid, D], W2 [2·L·D, mid]

    It depends on its parameters only, so `collapse` replaces it by the table [L, 2, P, H, E] that
    it computes. W2 is stored as one tensor [2·D, mid] for each layer: a layer then computes only
    its own rows, inside its own gradient checkpoint, and no layer's gradient is padded to the size
    of the whole W2. Everything starts as N(0, 0.02), biases as 0. With ``mid=None`` the
    table itself is learned.

    Always computed in the parameters' own dtype, autocast or not, so that a collapsed prefix gives
    the same numbers.

    Args:
        num_layers: L, the number of layers that have a prefix.
        prefix_length: P >= 0.
        num_heads, head_size: H and E, with D = H · E.
        mid: the width of the reparametrisation, or None.

    Raises:
        ValueError: a size below 1 (P: below 0).
    """

    def __init__(
        self,
        num_layers: int,
        prefix_length: int,
        num_heads: int,
        head_size: int,
        *,
        mid: int | None = 512,
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
        self.num_layers, self.prefix_length = num_layers, prefix_length
        self.num_heads, self.head_size = num_heads, head_size
        width = num_heads * head_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        if mid is None:
            self.table = parameter(num_layers, 2, prefix_length, num_heads, head_size)
        else:
            self.embedding = nn.Embedding(prefix_length, width, device=device, dtype=dtype)
            self.down = nn.Linear(width, mid, device=device, dtype=dtype)
            self.up_weight = nn.ParameterList(
                [parameter(2 * width, mid) for _ in range(num_layers)]
            )
            self.up_bias = nn.ParameterList([parameter(2 * width) for _ in range(num_layers)])
        self.reset_parameters()

    @property
    def is_collapsed(self) -> bool:
        """True where the table is the parameter and there is no reparametrisation."""
        return "table" in self._parameters

    def reset_parameters(self) -> None:
        """Every weight ~ N(0, 0.02), every bias = 0."""
        if self.is_collapsed:
            nn.init.normal_(self.table, std=0.02)
            return
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        for weight, bias in zip(self.up_weight, self.up_bias):
            nn.init.normal_(weight, std=0.02)
            nn.init.zeros_(bias)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Pk and Pv [P, H, E] of one layer, counted among the layers that have a prefix."""
        if self.is_collapsed:
            return self.table[layer, 0], self.table[layer, 1]
        with torch.autocast(self.embedding.weight.device.type, enabled=False):
            hidden = torch.tanh(self.down(self.embedding.weight))
            rows = nn.functional.linear(hidden, self.up_weight[layer], self.up_bias[layer])
        keys, values = rows.view(self.prefix_length, 2, self.num_heads, self.head_size).unbind(1)
        return keys, values

    def as_table(self) -> Tensor:
        """The prefixes of all layers [L, 2, P, H, E], detached from the reparametrisation."""
        with torch.no_grad():
            return torch.stack(
                [torch.stack(self.keys_values(layer)) for layer in range(self.num_layers)]
            )

    def collapse(self) -> None:
        """Replaces the reparametrisation by its table: same attention; there is no way back."""
        if self.is_collapsed:
            return
        requires_grad = self.embedding.weight.requires_grad
        table = self.as_table()
        del self.embedding, self.down, self.up_weight, self.up_bias
        self.table = nn.Parameter(table, requires_grad=requires_grad)

    def forward(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        gate: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Attention of one layer: q [B, H, S, E], k and v [B, H, N, E], gate [B], key_mask [B, N]
        bool -> like q. Causal: the last query sees the last key, and every query the prefix.

        dropout_p is the attention module's own: 0 outside of training.
        """
        keys, values = self.keys_values(layer)
        out = prefix_attention(
            q,
            k,
            v,
            (Prefix(keys, values),),
            gate=gate,
            key_mask=key_mask,
            is_causal=is_causal,
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
        gate: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """The probabilities [B, H, S, P + N] of `forward` before dropout, prefix columns first, for
        inspection: `forward` never stores them.
        """
        keys, values = self.keys_values(layer)
        return attention_weights(
            q,
            k,
            (Prefix(keys, values),),
            gate=gate,
            key_mask=key_mask,
            is_causal=is_causal,
            scale=scale,
        )

    def extra_repr(self) -> str:
        form = "table" if self.is_collapsed else f"mid={self.down.out_features}"
        return (
            f"layers={self.num_layers}, prefix_length={self.prefix_length}, "
            f"heads={self.num_heads}, head_size={self.head_size}, {form}"
        )

"""Adapters and prefixes that a network writes from embeddings of task, layer and block."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..ops import Norm, gated_adapter

EPS = 1e-6  # of the hyper-embedding's LayerNorm and of the adapter's
STD = 0.01  # of every Linear of a hypernetwork at the start


class StackSizes(NamedTuple):
    """A stack of layers as weights are written for it: L, D, how many attentions of a layer have a
    prefix (2 where one is over an encoder), and the G heads of size E of their keys.
    """

    num_layers: int
    hidden_size: int
    attention_blocks: int
    num_heads: int
    head_size: int


class HyperRows(NamedTuple):
    """What a batch's weights are written from: embeddings of n entries, which are tasks, or samples
    where an image has a part in them.
    """

    adapter: Tensor  # [n, Z]
    prefix: Tensor  # [n, P, Z]


class AdapterWeights(NamedTuple):
    """An adapter whose weights were made elsewhere: a bank of n, or one without the first
    dimension. scale is λ [].
    """

    w_down: Tensor  # [n, R, D]
    b_down: Tensor  # [n, R]
    w_up: Tensor  # [n, D, R]
    b_up: Tensor  # [n, D]
    norm_weight: Tensor  # [n, D]
    norm_bias: Tensor  # [n, D]
    scale: Tensor

    def only(self) -> AdapterWeights:
        """The member of a bank of one."""
        *members, scale = self
        return AdapterWeights._make([*(member[0] for member in members), scale])

    def chosen(self, index: Tensor) -> AdapterWeights:
        """The members at an index [m], without waiting for its values."""
        *banks, scale = self
        return AdapterWeights._make([*(bank.index_select(0, index) for bank in banks), scale])


class PrefixWeights(NamedTuple):
    """Keys and values [n, P, G, E] that were made elsewhere, or [P, G, E]."""

    keys: Tensor
    values: Tensor

    def only(self) -> PrefixWeights:
        """The member of tables of one."""
        return PrefixWeights(self.keys[0], self.values[0])

    def chosen(self, index: Tensor) -> PrefixWeights:
        """The members at an index [m], without waiting for its values."""
        return PrefixWeights(self.keys.index_select(0, index), self.values.index_select(0, index))


class HyperEmbedding(nn.Module):
    """``I = LN( W2 relu( W1 [z; l; b] + c1 ) + c2 )``, z, l, b [..., Z] -> I [..., I], of a task, a
    layer and a block.
    """

    def __init__(self, embedding_size: int, mid: int, size: int, **placement: Any) -> None:
        super().__init__()
        self.down = nn.Linear(3 * embedding_size, mid, **placement)
        self.up = nn.Linear(mid, size, **placement)
        self.norm = nn.LayerNorm(size, EPS, **placement)

    def forward(self, task: Tensor, layer: Tensor, block: Tensor) -> Tensor:
        joined = torch.cat([task, layer.expand_as(task), block.expand_as(task)], -1)
        embedding: Tensor = self.norm(self.up(torch.relu(self.down(joined))))
        return embedding


class HyperNetwork(nn.Module):
    """Writes every adapter and prefix of one stack of layers from hyper-embeddings
    ``I = h(z, l, b)``:

        W_down = I A1 + a1 as [R, D],   W_up = I A2 + a2 as [D, R],   and so the biases
        and the weight and bias of the adapter's LayerNorm
        Pk_p = I_p K + k,   Pv_p = I_p V + v   for each position p of a prefix

    with A1 ... V shared by all layers, blocks and tasks, one learned λ for each layer, and
    embeddings l of layers and b of blocks. A prefix has P of each embedding, an adapter one. Linear
    weights start as N(0, 0.01), biases as 0, embeddings as N(0, 1), λ as 1; the LayerNorm's weight
    comes without + 1, so that an adapter gives nearly 0 at the start.

    What is written depends on the entries z only, never on the text, so a batch has it written once
    for each of its tasks (`HyperRows`), or for each sample where an image has a part in z. Always
    computed in the parameters' own dtype, autocast or not.

    Args:
        stack: the sizes of the layers.
        prefix_length: P; 0: no prefixes. bottleneck: R; 0: no adapters.
        embedding_size, mid, size: of z, l and b; of the hidden layer of h; of I.

    Raises:
        ValueError: a size below 1, or neither adapters nor prefixes.

    Papers: Zhang et al., "HyperPELT: Unified Parameter-Efficient Language Model Tuning for Both
    Language and Vision-and-Language Tasks", 2022; sizes and starts that it does not give are those
    of Mahabadi et al., "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared
    Hypernetworks", ACL 2021.
    """

    def __init__(
        self,
        stack: StackSizes,
        *,
        prefix_length: int,
        bottleneck: int,
        embedding_size: int = 64,
        mid: int = 128,
        size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (*stack, embedding_size, mid, size)
        if min(sizes) < 1 or not (prefix_length or bottleneck):
            raise ValueError(
                "HyperNetwork: expected sizes >= 1 and prefix_length or bottleneck >= 1, got "
                f"{', '.join(map(str, sizes))} and {prefix_length}, {bottleneck}"
            )
        self.stack, self.prefix_length, self.bottleneck = stack, prefix_length, bottleneck
        placement: dict[str, Any] = {"device": device, "dtype": dtype}

        def embedding(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, embedding_size, **placement))

        def generator(width: int) -> nn.Linear:
            return nn.Linear(size, width, **placement)

        self.controller = HyperEmbedding(embedding_size, mid, size, **placement)
        num_layers, d, blocks, heads, head_size = stack
        r = bottleneck
        if bottleneck:
            self.layer_embedding, self.ffn_embedding = embedding(num_layers), embedding()
            self.w_down, self.b_down = generator(r * d), generator(r)
            self.w_up, self.b_up = generator(d * r), generator(d)
            self.norm_weight, self.norm_bias = generator(d), generator(d)
            self.scale = nn.Parameter(torch.empty(num_layers, **placement))
        if prefix_length:
            self.prefix_layer_embedding = embedding(num_layers, prefix_length)
            self.attention_embedding = embedding(blocks, prefix_length)
            self.keys, self.values = (generator(heads * head_size) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linears N(0, 0.01) with biases 0, embeddings N(0, 1), LayerNorm (1, 0), λ = 1."""
        for name, parameter in self.named_parameters():
            if name == "scale" or name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=1.0 if "embedding" in name else STD)

    def adapter(self, layer: int, rows: HyperRows) -> AdapterWeights:
        """The adapters beside one layer's FFN, a bank over the rows' entries."""
        n, r = rows.adapter.shape[0], self.bottleneck
        with torch.autocast(rows.adapter.device.type, enabled=False):
            embedding = self.controller(
                rows.adapter, self.layer_embedding[layer], self.ffn_embedding
            )
            w_down, w_up = self.w_down(embedding), self.w_up(embedding)
            return AdapterWeights(
                w_down.view(n, r, -1),
                self.b_down(embedding),
                w_up.view(n, -1, r),
                self.b_up(embedding),
                self.norm_weight(embedding),
                self.norm_bias(embedding),
                self.scale[layer],
            )

    def prefix(self, layer: int, block: int, rows: HyperRows) -> PrefixWeights:
        """Keys and values in front of one attention's own, tables over the rows' entries."""
        shape = (rows.prefix.shape[0], self.prefix_length, *self.stack[-2:])
        with torch.autocast(rows.prefix.device.type, enabled=False):
            embedding = self.controller(
                rows.prefix, self.prefix_layer_embedding[layer], self.attention_embedding[block]
            )
            return PrefixWeights(
                self.keys(embedding).view(shape), self.values(embedding).view(shape)
            )


class TaskEmbeddings(nn.Module):
    """The embeddings z of tasks, for all stacks of a model, and what an image adds to them:
    ``z' = z + U2 relu( U1 mean(v) + u1 ) + u2`` with v [B, C cells, F] features of an image, a part
    for the adapter and one for each position of a prefix.

    Args:
        num_tasks: how many. prefix_length: P. embedding_size, mid: as of a `HyperNetwork`.
        features: F, the width of an image's features; None: no images.
    """

    def __init__(
        self,
        num_tasks: int,
        prefix_length: int,
        embedding_size: int = 64,
        *,
        features: int | None = None,
        mid: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (num_tasks, prefix_length, embedding_size)
        self.adapter = nn.Parameter(torch.empty(num_tasks, embedding_size, **placement))
        self.prefix = nn.Parameter(torch.empty(shape, **placement))
        self.from_image: nn.Sequential | None = None
        if features is not None:
            self.from_image = nn.Sequential(
                nn.Linear(features, mid, **placement),
                nn.ReLU(),
                nn.Linear(mid, (1 + prefix_length) * embedding_size, **placement),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings N(0, 1); the image's Linears as `torch.nn.Linear` starts, because its part
        stands beside embeddings of size 1.
        """
        nn.init.normal_(self.adapter)
        nn.init.normal_(self.prefix)
        for linear in self.from_image or ():
            if isinstance(linear, nn.Linear):
                linear.reset_parameters()

    def forward(self, entries: Tensor, features: Tensor | None = None) -> HyperRows:
        """The rows of tasks int64 [n]; with features [n, C, F] of samples that have these tasks."""
        rows = HyperRows(self.adapter[entries], self.prefix[entries])
        if features is None:
            return rows
        assert self.from_image is not None
        with torch.autocast(features.device.type, enabled=False):
            pooled = features.to(self.adapter.dtype).mean(1)
            part = self.from_image(pooled).view(features.shape[0], -1, self.adapter.shape[-1])
        return HyperRows(rows.adapter + part[:, 0], rows.prefix + part[:, 1:])


def generated_adapter(
    x: Tensor,
    weights: AdapterWeights,
    index: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    residual: Tensor | None = None,
) -> Tensor:
    """``y = residual + λ LN( W_up φ( W_down x + b_down ) + b_up )`` by an adapter that was made
    elsewhere: x and residual [B, S, D], index [B] into its bank, None where it is a single one.
    """
    y = gated_adapter(
        x,
        weights.w_down,
        weights.w_up,
        b_down=weights.b_down,
        b_up=weights.b_up,
        bank_index=index,
        activation=activation,
        post_norm=Norm(weights.norm_weight, weights.norm_bias, EPS),
        scale=weights.scale,
        residual=residual,
    )
    return cast(Tensor, y)

"""Words whose embeddings are trained while the rest of the table stays as it is.

Their rows are a parameter of their own beside the table: the table's rows are never written, and no
gradient and no optimizer state is made for it. What reads the table reads these rows instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .vocabulary import vocabulary_of, word_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Under which the modules that read the table hold the rows that stand for some of it.
TOKENS_ATTRIBUTE = "_pelt_tokens"


class TrainedTokens(nn.Module):
    """``table[id]`` and, where the head is tied to the table, ``logits[id] = h · table[id]``, with
    rows of its own for some ids.

    The rows start as the table's. `attach` puts them beside it, `detach` takes them away, which
    leaves the model as it was. A head with a weight of its own keeps that; the rows are then those
    of the input only.

    Args:
        model: a model whose word embeddings are a parameter of it.
        ids: of the words; negative ones count from the last.

    Raises:
        ValueError: an id that the table does not have, the same word twice, or a module that reads
            the table in another way than nn.Embedding and nn.Linear do.
    """

    ids: Tensor

    def __init__(self, model: PreTrainedModel, ids: tuple[int, ...]) -> None:
        super().__init__()
        _, table = word_embeddings(model)
        self.words = vocabulary_of(model)
        found = sorted(word + self.words if word < 0 else word for word in ids)
        if found[0] < 0 or found[-1] >= self.words or len(set(found)) < len(found):
            raise ValueError(
                "get_pelt_model: expected trainable_tokens as different words of the "
                f"{self.words} of {type(model).__name__}, got {list(ids)}; "
                "model.resize_token_embeddings adds words"
            )
        index = torch.tensor(found, device=table.device)
        self.register_buffer("ids", index, persistent=False)
        # As all new parameters: float32 beside 16-bit weights, which would lose small updates.
        is_sixteen_bit = table.dtype in (torch.float16, torch.bfloat16)
        rows = table.detach()[index]
        self.weight = nn.Parameter(rows.float() if is_sixteen_bit else rows)
        self._embeddings, self._heads = _readers_of(model, table)
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Whatever reads the table reads these rows, too."""
        for module in (*self._embeddings, *self._heads):
            # A note and no child: the rows belong to the PeltModel alone.
            object.__setattr__(module, TOKENS_ATTRIBUTE, self)
        for module in self._embeddings:
            self._handles.append(module.register_forward_hook(put_rows, with_kwargs=True))
        for module in self._heads:
            self._handles.append(module.register_forward_hook(put_logits))

    def detach(self) -> None:
        """The table is read as it is."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in (*self._embeddings, *self._heads):
            module.__dict__.pop(TOKENS_ATTRIBUTE, None)

    @torch.no_grad()
    def write_into(self, model: PreTrainedModel) -> None:
        """Writes the rows into the table, for a model that goes on without this one."""
        _, table = word_embeddings(model)
        table.index_copy_(0, self.ids, self.weight.to(table.dtype))

    def check_words(self, words: int) -> None:
        """Raises ValueError where the table has another number of words than it had."""
        if words != self.words:
            raise ValueError(
                f"trainable_tokens: expected the {self.words} words that the model had when the "
                f"method was put in, got {words}; resize_token_embeddings before get_pelt_model"
            )

    def extra_repr(self) -> str:
        return f"words={len(self.ids)} of {self.words}"


def put_rows(
    embedding: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Forward hook of an embedding: its output [..., D] with the trained rows at their words."""
    tokens: TrainedTokens = getattr(embedding, TOKENS_ATTRIBUTE)
    tokens.check_words(len(embedding.weight))
    words = args[0] if args else next(iter(kwargs.values()))
    places = torch.searchsorted(tokens.ids, words).clamp_(max=len(tokens.ids) - 1)
    rows = nn.functional.embedding(places, tokens.weight).to(output.dtype)
    scale: Tensor | float | None = getattr(embedding, "embed_scale", None)
    if scale is not None:  # a number in BART, a tensor in Gemma
        rows = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
    return torch.where((tokens.ids[places] == words)[..., None], rows, output)


def put_logits(head: nn.Linear, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a tied head: the logits [..., V], with those of the trained words in them."""
    tokens: TrainedTokens = getattr(head, TOKENS_ATTRIBUTE)
    tokens.check_words(len(head.weight))
    bias = None if head.bias is None else head.bias[tokens.ids]
    logits = nn.functional.linear(args[0], tokens.weight.to(args[0].dtype), bias)
    # In place: a copy of all logits would be the largest tensor of a step.
    return output.index_copy_(-1, tokens.ids, logits.to(output.dtype))


def _readers_of(
    model: PreTrainedModel, table: Tensor
) -> tuple[list[nn.Embedding], list[nn.Linear]]:
    """The modules that read the table: embeddings, and the heads that are tied to it."""
    embeddings: list[nn.Embedding] = []
    heads: list[nn.Linear] = []
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not table:
            continue
        is_plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        if isinstance(module, nn.Embedding) and is_plain and module.max_norm is None:
            embeddings.append(module)
        elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            heads.append(module)
        else:
            raise ValueError(
                "get_pelt_model: expected the word embeddings with trainable_tokens to be read by "
                f"nn.Embedding without max_norm and nn.Linear, got {type(module).__name__} ({name})"
            )
    return embeddings, heads

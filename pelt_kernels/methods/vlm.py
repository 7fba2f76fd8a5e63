"""VLM: one language model with an adapter of each task (Lin et al., Findings of EMNLP 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._config import MethodConfig, check, set_tasks, set_tokens


@dataclass(frozen=True, kw_only=True)
class VLMConfig(MethodConfig):
    """An adapter of each task as the last thing in a layer, after the residual of its FFN:
    ``x + W_up[t] relu( W_down[t] LN[t](x) + b_down[t] ) + b_up[t]`` with t the task of a sample and
    a LayerNorm of each task with the model's own epsilon (`pelt_kernels.nn.TaskAdapters`).

    A batch may mix tasks, and they may have bottlenecks of their own. The paper's: 300 for
    translation and question answering, 100 for summaries and dialogue, 10 for text from data. The
    task -1 passes the adapters by.

    The paper's task embeddings are words of their own for each task, which stand in the text and,
    as ``token_type_ids``, as segments: GPT-2 looks both up in one table. Add the words to the
    tokenizer, `resize_token_embeddings`, and name their ids as `trainable_tokens`.

    Other than the authors' code: the base model has no gradients at all, where theirs clips over
    gradients of the base that nothing ever clears; and the attention's and the FFN's weights stay
    frozen in training on several tasks together, where their script trains all of them.

    Attributes:
        tasks: their names, in the order of their numbers.
        bottlenecks: one for all tasks, or one for each.
        trainable_tokens: words whose embeddings are trained, too, by id, see `Parts`.

    Raises:
        ValueError: a field outside its range.
    """

    method: ClassVar[str] = "vlm"

    tasks: tuple[str, ...] = ("main",)
    bottlenecks: tuple[int, ...] = (100,)
    trainable_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        set_tasks(self)
        are_sizes = (
            isinstance(self.bottlenecks, (list, tuple))
            and len(self.bottlenecks) in (1, len(self.tasks))
            and all(
                isinstance(size, int) and not isinstance(size, bool) and size >= 1
                for size in self.bottlenecks
            )
        )
        words = f"as whole numbers >= 1, one for all tasks or one for each ({len(self.tasks)})"
        check(are_sizes, self, "bottlenecks", words)
        object.__setattr__(self, "bottlenecks", tuple(self.bottlenecks))
        set_tokens(self, "trainable_tokens")

    def bottleneck_of_each(self) -> tuple[int, ...]:
        """One bottleneck for each task."""
        if len(self.bottlenecks) == len(self.tasks):
            return self.bottlenecks
        return self.bottlenecks * len(self.tasks)

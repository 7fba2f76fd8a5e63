"""How many tokens of a text and of a target a run keeps, and whether its model has room."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..models.slots import longest_input
from .base_model import load_config, longest_text
from .config import TrainConfig
from .encode import Form
from .errors import UsageError
from .tasks import GENERATION, Task
from .texts import target_ids

DEFAULT_MAX_LENGTH = 128


def with_lengths(config: TrainConfig, tokenizer: Any, task: Task) -> TrainConfig:
    """The config with the lengths at which texts, and targets where they are written, are cut.
    Raises UsageError where the model has no room for them.
    """
    if task.problem != GENERATION:
        return replace(config, max_length=_text_length(config, tokenizer, task))
    is_causal = not load_config(config.model).is_encoder_decoder
    target = _target_length(config, tokenizer, task, is_causal)
    longest = longest_text(config.model, tokenizer)
    room = longest - target - 1 if is_causal else longest
    length = min(DEFAULT_MAX_LENGTH, room) if config.max_length is None else config.max_length
    if length > room:
        beside = f" beside a target of {target} and an end between them" if is_causal else ""
        raise UsageError(
            f"max-length: {config.model} reads at most {room} tokens{beside}, not {length}"
        )
    special = 0 if is_causal else tokenizer.num_special_tokens_to_add()
    if length < special + 1:
        raise UsageError(f"max-length: expected at least {special + 1}, got {length}")
    return replace(config, max_length=length, max_target_length=target)


def _target_length(config: TrainConfig, tokenizer: Any, task: Task, is_causal: bool) -> int:
    """The config's number, else the longest target of training and dev. Raises UsageError for one
    that is longer than the model writes: beside one token of the source, where it reads that, too.
    """
    if is_causal:
        most = longest_text(config.model, tokenizer) - 2
    else:
        most = longest_input(load_config(config.model)) or tokenizer.model_max_length
    if config.max_target_length is not None:
        if config.max_target_length > most:
            raise UsageError(
                f"max-target-length: {config.model} writes at most {most} tokens, not "
                f"{config.max_target_length}"
            )
        return config.max_target_length
    examples = [*task.train, *task.dev]
    form = Form(tokenizer, 0, is_causal=is_causal)
    lengths = [len(ids) for ids in target_ids([str(e.label) for e in examples], form)]
    longest = max(lengths)
    if longest > most:
        origin = examples[lengths.index(longest)].origin
        raise UsageError(
            f"{origin}: the target has {longest} tokens with its end, and {config.model} writes at "
            f"most {most}; --max-target-length cuts targets"
        )
    return longest


def _text_length(config: TrainConfig, tokenizer: Any, task: Task) -> int:
    """Tokens at which texts are cut: the config's number, if the model reads that many and there is
    room beside the special tokens.
    """
    longest = longest_text(config.model, tokenizer)
    length = min(DEFAULT_MAX_LENGTH, longest) if config.max_length is None else config.max_length
    if length > longest:
        raise UsageError(f"max-length: {config.model} reads at most {longest} tokens, not {length}")
    special = tokenizer.num_special_tokens_to_add(pair=task.has_pairs)
    texts = 1 + task.has_pairs
    if length < special + texts:
        raise UsageError(
            f"max-length: expected at least {special + texts} ({special} special tokens and one "
            f"token {'of each text' if task.has_pairs else 'of the text'}), got {length}"
        )
    return length

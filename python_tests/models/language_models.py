"""T5, BART and GPT-2 in tests that give them pairs of texts."""

from __future__ import annotations

import torch
from families import PAD, WORDS, make_writer

FAMILIES = ("t5", "bart", "gpt2")
START, END = 2, 3


def make_language_model(family, dtype=torch.float32, std=0.2, words=WORDS, **changes):
    """A tiny model in eval mode; BART's and GPT-2's weights start with this deviation, T5's by
    their sizes.
    """
    changes |= {"bart": {"init_std": std}, "gpt2": {"initializer_range": std}}.get(family, {})
    return make_writer(family, vocab_size=words, **changes).to(dtype)


def make_pairs(family, lengths=(8, 4, 6), targets=5):
    """input_ids, attention_mask and labels of some texts; GPT-2 is padded on the left, and its
    labels are its own words.
    """
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(6, WORDS, (len(lengths), width), generator=generator)
    seen = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    if family == "gpt2":
        seen = seen.flip(1)
    batch = {"input_ids": torch.where(seen, ids, PAD), "attention_mask": seen.long()}
    if family == "gpt2":
        return batch | {"labels": torch.where(seen, ids, -100)}
    return batch | {"labels": torch.randint(6, WORDS, (len(lengths), targets), generator=generator)}

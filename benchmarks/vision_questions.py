"""HyperPELT with images, end to end: questions about coloured shapes that a person can check.

    python -m benchmarks.vision_questions [--seed 0] [--pictures 2000] [--steps 600] [--show FILE]

Three stages: a ViT learns colours and shapes and is frozen; a T5 learns to answer the questions
from a description in words and is frozen; HyperPELT then answers them from pictures alone, whose
features [B, 49, 64] (7 x 7 cells) have a part in the embeddings that adapters and prefixes are
written from. Prints the share of right answers to questions about pictures that were not seen, and
of the same model with the features of other pictures, which is what it knows without looking.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from pelt_kernels.methods import HyperPELTConfig
from pelt_kernels.models import PeltModel, get_pelt_model

COLOURS = {
    "red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.9, 0.1),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
TASKS = ("colour", "shape")
SIZE = 28  # pixels; cells of 4 make 7 x 7 of them
PAD, END = 0, 1
WORDS = ["<pad>", "</s>", "what", "is", "it", "?", "a", *TASKS, *COLOURS, *SHAPES]
IDS = {word: number for number, word in enumerate(WORDS)}


class Pictures(NamedTuple):
    """Pictures [N, 3, 28, 28] from 0 to 1, and the number of each one's colour and shape [N]."""

    pixels: Tensor
    colours: Tensor
    shapes: Tensor


def draw_pictures(count: int, seed: int, noise: float = 0.1) -> Pictures:
    """One shape of one colour at a random place on a noisy grey ground."""
    draw = torch.Generator().manual_seed(seed)
    colours = torch.randint(len(COLOURS), (count,), generator=draw)
    shapes = torch.randint(len(SHAPES), (count,), generator=draw)
    radius = 5 + 4 * torch.rand(count, 1, 1, generator=draw)
    centre = radius + (SIZE - 2 * radius) * torch.rand(count, 2, 1, generator=draw)
    axis = torch.arange(SIZE) + 0.5
    x = (axis - centre[:, :1])[:, None, :].expand(-1, SIZE, -1, -1).reshape(count, SIZE, SIZE)
    y = (axis - centre[:, 1:]).view(count, SIZE, 1).expand(-1, -1, SIZE)
    inside = torch.stack(
        [
            x.square() + y.square() <= radius.square(),
            torch.maximum(x.abs(), y.abs()) <= 0.85 * radius,
            (y >= -0.8 * radius) & (y <= 0.8 * radius) & (x.abs() <= 0.55 * (0.8 * radius + y)),
            (torch.minimum(x.abs(), y.abs()) <= 0.28 * radius)
            & (torch.maximum(x.abs(), y.abs()) <= radius),
        ]
    )[shapes, torch.arange(count)]
    paint = torch.tensor(list(COLOURS.values()))[colours]
    pixels = torch.full((count, 3, SIZE, SIZE), 0.5)
    pixels = torch.where(inside[:, None], paint[..., None, None], pixels)
    pixels = pixels + noise * torch.randn(pixels.shape, generator=draw)
    return Pictures(pixels.clamp(0, 1), colours, shapes)


def answers(pictures: Pictures, tasks: Tensor) -> Tensor:
    """Labels [N, 2] of a T5: the word that answers a picture's question, and the end."""
    first_colour, first_shape = IDS["red"], IDS["circle"]
    word = torch.where(tasks == 0, first_colour + pictures.colours, first_shape + pictures.shapes)
    return torch.stack([word, torch.full_like(word, END)], 1)


def questions(tasks: Tensor) -> Tensor:
    """``what colour is it ?`` or ``what shape is it ?`` [N, 6]."""
    start = torch.tensor([[IDS[word] for word in ("what", "colour", "is", "it", "?")] + [END]])
    ids = start.repeat(len(tasks), 1)
    ids[:, 1] += tasks
    return ids


def described(pictures: Pictures, tasks: Tensor) -> Tensor:
    """``a red circle what colour is it ?`` [N, 9]: the picture in words."""
    colour, shape = IDS["red"] + pictures.colours, IDS["circle"] + pictures.shapes
    words = torch.stack([torch.full_like(colour, IDS["a"]), colour, shape], 1)
    return torch.cat([words, questions(tasks)], 1)


def make_eye(width: int = 64, layers: int = 3) -> ViTModel:
    """A small ViT with 7 x 7 cells."""
    config = ViTConfig(
        image_size=SIZE, patch_size=4, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=2 * width,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def make_reader(width: int = 64, layers: int = 2) -> T5ForConditionalGeneration:
    """A small T5."""
    config = T5Config(
        vocab_size=len(WORDS), d_model=width, d_kv=16, num_heads=4, d_ff=2 * width,
        num_layers=layers, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END,
        dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def cells(eye: ViTModel, pixels: Tensor) -> Tensor:
    """Features [N, 49, width] of pictures, without gradients."""
    eye.eval()
    with torch.no_grad():
        parts = [eye(part).last_hidden_state[:, 1:] for part in pixels.split(256)]
    return torch.cat(parts)


def teach_eye(eye: ViTModel, pictures: Pictures, steps: int, batch: int = 64) -> nn.Linear:
    """Trains the ViT to tell colours and shapes from the mean of its cells; what tells them."""
    heads = nn.Linear(eye.config.hidden_size, len(COLOURS) + len(SHAPES))

    def loss(chosen: Tensor) -> Tensor:
        features = eye(pictures.pixels[chosen]).last_hidden_state[:, 1:].mean(1)
        colour, shape = heads(features).split([len(COLOURS), len(SHAPES)], -1)
        return nn.functional.cross_entropy(
            colour, pictures.colours[chosen]
        ) + nn.functional.cross_entropy(shape, pictures.shapes[chosen])

    eye.train()
    descend(
        [*eye.parameters(), *heads.parameters()], loss, len(pictures.pixels), steps, batch, 1e-3
    )
    return heads


def descend(
    parameters: list[Any],
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    steps: int,
    batch: int,
    rate: float,
) -> float:
    """AdamW for some steps over random batches, with a warm-up and a cosine; the last loss."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    value = math.nan
    for step in range(steps):
        share = min(1.0, (step + 1) / max(1, steps // 20))
        for group in optimizer.param_groups:
            group["lr"] = rate * share * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(torch.randint(count, (batch,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        value = loss.item()
    return value


def teach_reader(
    reader: T5ForConditionalGeneration, pictures: Pictures, steps: int, batch: int = 64
) -> float:
    """Trains the T5 to answer from descriptions."""

    def loss(chosen: Tensor) -> Tensor:
        some = Pictures(*(part[chosen] for part in pictures))
        tasks = torch.randint(len(TASKS), (len(chosen),))
        value: Tensor = reader(input_ids=described(some, tasks), labels=answers(some, tasks)).loss
        return value

    reader.train()
    return descend(list(reader.parameters()), loss, len(pictures.pixels), steps, batch, 3e-3)


def method(features: int) -> HyperPELTConfig:
    """HyperPELT for both questions, in sizes for the small T5."""
    return HyperPELTConfig(tasks=TASKS, bottleneck=8, prefix_length=4, features=features)


def teach_looking(
    model: PeltModel, pictures: Pictures, features: Tensor, steps: int, batch: int = 64
) -> float:
    """Trains HyperPELT to answer from features of pictures; a batch mixes both questions."""

    def loss(chosen: Tensor) -> Tensor:
        some = Pictures(*(part[chosen] for part in pictures))
        tasks = torch.randint(len(TASKS), (len(chosen),))
        value: Tensor = model(
            input_ids=questions(tasks), labels=answers(some, tasks), tasks=tasks,
            image_features=features[chosen],
        ).loss  # fmt: skip
        return value

    model.train()
    trained = list(model.trained_parameters().values())
    return descend(trained, loss, len(pictures.pixels), steps, batch, 3e-3)


def written(model: PeltModel, features: Tensor, task: int) -> Tensor:
    """The word that the model writes for each picture, by its number [N]."""
    model.eval()
    tasks = torch.full((len(features),), task)
    with torch.no_grad():
        out = model.generate(
            input_ids=questions(tasks), tasks=tasks, image_features=features, max_new_tokens=2,
            do_sample=False,
        )  # fmt: skip
    words: Tensor = out[:, 1]
    return words


def scores(model: PeltModel, pictures: Pictures, features: Tensor) -> list[float]:
    """The share of right answers to each question."""
    found = []
    for task in range(len(TASKS)):
        tasks = torch.full((len(features),), task)
        right = answers(pictures, tasks)[:, 0]
        found.append((written(model, features, task) == right).float().mean().item())
    return found


def show(path: Path, pictures: Pictures, colours: Tensor, shapes: Tensor) -> None:
    """A picture of pictures with the answers that were written, for a person to check."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 8, figsize=(12, 5))
    for axis, pixels, colour, shape in zip(axes.flat, pictures.pixels, colours, shapes):
        axis.imshow(pixels.permute(1, 2, 0))
        axis.set_title(f"{WORDS[colour]} {WORDS[shape]}", fontsize=8)
        axis.axis("off")
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> int:
    """Runs the three stages and prints what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument(
        "--steps", type=int, default=600, help="of each stage; the ViT's are 3 times as many"
    )
    parser.add_argument("--show", type=Path, help="file for pictures with their answers")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    seen = draw_pictures(options.pictures, options.seed + 1)
    unseen = draw_pictures(500, options.seed + 2)
    eye, reader = make_eye(), make_reader()
    started = time.perf_counter()

    def report(sentence: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {sentence}", flush=True)

    heads = teach_eye(eye, seen, 3 * options.steps)
    features, new_features = cells(eye, seen.pixels), cells(eye, unseen.pixels)
    told = heads(new_features.mean(1)).split([len(COLOURS), len(SHAPES)], -1)
    right = [
        (part.argmax(-1) == truth).float().mean().item()
        for part, truth in zip(told, (unseen.colours, unseen.shapes))
    ]
    report(
        f"features {list(features.shape)}; the ViT itself tells {right[0]:.3f} of the colours and "
        f"{right[1]:.3f} of the shapes"
    )
    report(f"loss of the T5 on descriptions: {teach_reader(reader, seen, options.steps):.4f}")
    model = get_pelt_model(reader.eval(), method(features.shape[-1]))
    trained, total = model.get_nb_trainable_parameters()
    report(f"HyperPELT: {trained:,} of {total:,} parameters are trained")
    before = scores(model, unseen, new_features)
    loss = teach_looking(model, seen, features, options.steps)
    report(f"loss of HyperPELT on pictures: {loss:.4f}")
    blind = scores(model, unseen, new_features.roll(1, 0))
    for task, name in enumerate(TASKS):
        after = scores(model, unseen, new_features)[task]
        report(
            f"{name}: {after:.3f} right on 500 new pictures; before training {before[task]:.3f}, "
            f"with features of other pictures {blind[task]:.3f}"
        )
    if options.show is not None:
        show(options.show, unseen, *(written(model, new_features[:24], task) for task in (0, 1)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

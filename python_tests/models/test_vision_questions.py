"""HyperPELT with pictures, end to end in small: a ViT's features decide what a T5 writes."""

from __future__ import annotations

import torch

from benchmarks.vision_questions import (
    COLOURS,
    IDS,
    SHAPES,
    SIZE,
    WORDS,
    answers,
    cells,
    descend,
    described,
    draw_pictures,
    make_eye,
    make_reader,
    method,
    questions,
    scores,
    teach_looking,
    written,
)
from pelt_kernels.models import get_pelt_model


def words_of(rows):
    return [" ".join(WORDS[word] for word in row) for row in rows]


def test_pictures_and_questions_say_what_they_show():
    pictures = draw_pictures(64, 0, noise=0.0)
    assert pictures.pixels.shape == (64, 3, SIZE, SIZE)
    paint = torch.tensor(list(COLOURS.values()))
    for pixels, colour, shape in zip(*pictures):
        is_painted = (pixels == paint[colour][:, None, None]).all(0)
        assert torch.equal(is_painted, (pixels != 0.5).any(0)) and is_painted.sum() > 12
        height, width = (int(is_painted.any(axis).sum()) for axis in (1, 0))
        filled = (is_painted.sum() / (height * width)).item()
        low, high = {"circle": (0.7, 0.85), "square": (1.0, 1.0), "triangle": (0.4, 0.65),
                     "cross": (0.35, 0.6)}[SHAPES[shape]]  # fmt: skip
        assert low <= filled <= high, (SHAPES[shape], filled)
    first = pictures._replace(colours=torch.tensor([1, 3]), shapes=torch.tensor([2, 0]))
    tasks = torch.tensor([0, 1])
    assert words_of(questions(tasks)) == [
        "what colour is it ? </s>", "what shape is it ? </s>",
    ]  # fmt: skip
    assert words_of(described(first, tasks))[0] == "a green triangle what colour is it ? </s>"
    assert words_of(answers(first, tasks)) == ["green </s>", "circle </s>"]


def test_a_few_steps_of_looking():
    """Two colours, and features that tell them apart: the words follow the features."""
    torch.manual_seed(0)
    pictures = draw_pictures(64, 0)
    eye, reader = make_eye(width=16, layers=1), make_reader(width=32, layers=1)
    features = cells(eye, pictures.pixels)
    assert features.shape == (64, 49, 16) and not features.requires_grad
    model = get_pelt_model(reader, method(16))
    frozen = {name: value.clone() for name, value in model.base_model.named_parameters()
              if f"base_model.{name}" not in model.trained_parameters()}  # fmt: skip

    def loss(chosen):
        tasks = torch.zeros_like(chosen)
        some = pictures._replace(colours=pictures.colours[chosen], shapes=pictures.shapes[chosen])
        return model(
            input_ids=questions(tasks), labels=answers(some, tasks), tasks=tasks,
            image_features=features[chosen],
        ).loss  # fmt: skip

    with torch.no_grad():
        first = loss(torch.arange(64)).item()
    last = teach_looking(model, pictures, features, steps=12, batch=16)
    assert last < 0.8 * first
    for name, value in frozen.items():
        assert torch.equal(dict(model.base_model.named_parameters())[name], value), name
    # One picture each of two colours, learned by heart: what is written follows the features.
    two = torch.stack([(pictures.colours == colour).nonzero()[0, 0] for colour in (0, 2)])
    descend(list(model.trained_parameters().values()), lambda _: loss(two), 64, 40, 2, 5e-3)
    red, blue = IDS["red"], IDS["blue"]
    assert written(model, features[two], 0).tolist() == [red, blue]
    assert written(model, features[two.flip(0)], 0).tolist() == [blue, red]
    shares = scores(model, pictures._replace(colours=pictures.colours[two],
                                             shapes=pictures.shapes[two]), features[two])  # fmt: skip
    assert shares[0] == 1.0

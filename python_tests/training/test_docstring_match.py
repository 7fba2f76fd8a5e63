"""The embedded task: what is collected, how it is split, and that nothing gives the answer away."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from pelt_kernels.training import RunError
from pelt_kernels.training.tasks import docstring_match
from pelt_kernels.training.tasks.docstring_match import collect, load, split_name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("get_content_charset", "get content charset"),
        ("HTTPSConnection", "https connection"),
        ("BaseHTTPRequestHandler", "base http request handler"),
        ("_private", "private"),
        ("sha256", "sha 256"),
        ("_", ""),
    ],
)
def test_names_are_split_into_words(name: str, words: str) -> None:
    assert split_name(name) == words


def make_library(root: Path, files: int = 30, functions: int = 4) -> Path:
    for number in range(files):
        body = "".join(
            f"def action_{'abcdefgh'[index]}_{'klmnopqrst'[number % 10]}():\n"
            f'    """Does thing {index} of file {number} quite well.\n\n    More about it."""\n\n'
            for index in range(functions)
        )
        (root / f"module_{number}.py").write_text(body)
    return root


def test_collects_first_paragraphs_of_functions_methods_and_classes(tmp_path: Path) -> None:
    source = '''
        raise RuntimeError("this source must be parsed and never run")

        class Reader:
            """Reads one thing
            after another.

            A second paragraph."""

            def __init__(self):
                """Makes a reader of things from files."""

            async def read_all(self):
                """Gives   back all things at once."""

            def short(self):
                """Too short to tell."""
    '''
    (tmp_path / "reading.py").write_text(textwrap.dedent(source))
    (tmp_path / "broken.py").write_text("def (")
    for left_out in ("test", "tests", "site-packages", "idlelib"):
        (tmp_path / left_out).mkdir()
        (tmp_path / left_out / "inside.py").write_text(textwrap.dedent(source))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text('def f():\n    """One two three four five."""\n')
    assert collect(tmp_path) == {
        "package/inner.py": [("f", "One two three four five.")],
        "reading.py": [
            ("read all", "Gives back all things at once."),
            ("reader", "Reads one thing after another."),
        ],
    }


def test_no_docstring_stands_in_two_parts(tmp_path: Path) -> None:
    make_library(tmp_path)
    shared = "Does one thing that stands in many files."
    for number in range(8):
        with (tmp_path / f"module_{number}.py").open("a") as file:
            file.write(f'def shared_{"abcdefgh"[number]}():\n    """{shared}"""\n')
    task = load(tmp_path)
    parts = [{example.pair for example in part} for part in (task.train, task.dev, task.test)]
    assert all(parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert sum(shared in part for part in parts) == 1


def test_half_are_true_and_the_rest_name_another_function_of_the_file(tmp_path: Path) -> None:
    true = {pair: file for file, pairs in collect(make_library(tmp_path)).items() for pair in pairs}
    names = {file: {name for name, _ in pairs} for file, pairs in collect(tmp_path).items()}
    file_of = {docstring: file for (_, docstring), file in true.items()}
    task = load(tmp_path)
    for part in (task.train, task.dev, task.test):
        labels = [example.label for example in part]
        assert abs(labels.count("yes") - labels.count("no")) <= 1
        for example in part:
            assert ((example.text, example.pair) in true) == (example.label == "yes")
            assert example.text in names[file_of[example.pair]]


def test_a_name_with_the_same_docstring_is_no_wrong_answer(tmp_path: Path) -> None:
    make_library(tmp_path)
    twins = "".join(
        f'def {name}():\n    """Two functions share this very docstring."""\n\n'
        for name in ("alpha", "beta")
    )
    (tmp_path / "twins.py").write_text(twins)
    task = load(tmp_path)
    everything = (*task.train, *task.dev, *task.test)
    assert not [example for example in everything if example.text in ("alpha", "beta")]


def test_equal_sources_give_equal_tasks_wherever_they_lie(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        make_library(folder)
    assert load(one).fingerprint == load(two).fingerprint
    (two / "module_3.py").write_text("")
    assert load(one).fingerprint != load(two).fingerprint


def test_without_source_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the source of the standard library"):
        load(tmp_path)


def test_the_standard_library_gives_thousands_of_pairs() -> None:
    task = load()
    assert (len(task.dev), len(task.test)) == pytest.approx((500, 1000), rel=0.05)
    assert len(task.train) >= 2000
    assert task.has_pairs and task.labels == docstring_match.LABELS
    assert len(task.draw_train(1000, seed=0)) == 1000
    assert task.draw_train(50, seed=0) == task.draw_train(50, seed=0) != task.draw_train(50, seed=1)

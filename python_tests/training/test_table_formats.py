"""Tables that are compressed, and Parquet."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import rows, write_tsv

from pelt_kernels.training import UsageError, load_task
from pelt_kernels.training.tasks import Columns, read_examples


def test_a_compressed_file_is_the_file(tmp_path: Path) -> None:
    plain = write_tsv(tmp_path / "a.tsv", rows(20, seed=1))
    packed = tmp_path / "a.tsv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_task(str(packed)).fingerprint == load_task(str(plain)).fingerprint
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"a.tsv.gz: cannot be read \(Compressed file ended"):
        load_task(str(packed))
    packed.write_text("text\tlabel\n")
    with pytest.raises(UsageError, match=r"a.tsv.gz: cannot be read \(Not a gzipped file"):
        load_task(str(packed))
    with pytest.raises(UsageError, match=r"ending in .csv, .tsv, .jsonl, .parquet, got '.txt'"):
        read_examples(write_tsv(tmp_path / "a.txt", []), Columns(), needs_label=True)


@pytest.fixture(scope="module")
def datasets() -> Any:
    return pytest.importorskip("datasets")


def test_a_parquet_file_is_read_by_its_names(datasets: Any, tmp_path: Path) -> None:
    table = rows(20, seed=1)
    kind = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    values = {"text": [text for text, _ in table], "label": [int(label) for _, label in table]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(values, features=kind).to_parquet(path)
    task = load_task(str(path))
    assert task.labels == ("bad", "good") and len(task.train + task.dev + task.test) == 20
    found = read_examples(path, Columns(), needs_label=True)
    assert [(e.text, e.label) for e in found] == [(t, ["bad", "good"][int(n)]) for t, n in table]
    values["text"][3] = " "
    datasets.Dataset.from_dict(values).to_parquet(path)
    with pytest.raises(UsageError, match="row 4 of .*a.parquet: the text is empty"):
        load_task(str(path))
    path.write_text("text\tlabel\n")
    with pytest.raises(UsageError, match="a.parquet: cannot be read as Parquet"):
        load_task(str(path))


def test_parquet_needs_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"to read .*a.parquet, install .*pip install datasets"):
        load_task(str(tmp_path / "a.parquet"))

"""`benchmarks.predictions`: what is counted again and what stays, and the page that is written."""

from __future__ import annotations

import pytest

from benchmarks import counters, predictions, shapes
from benchmarks.rows import read, write

SMALL = shapes.COUNTED["symmetric_kl"]


def row(issued, us, *, case="T1", direction="forward", request="cuda_sim", commit="abc"):
    """As `benchmarks.counters` makes them."""
    pipes = dict.fromkeys(predictions.pipes.PIPES, us / 2)
    return {
        "op": "symmetric_kl", "case": case, "dtype": "bfloat16", "direction": direction,
        "request": request, "launches": 2, "issued": issued, "cache_bytes": 64, "memory_bytes": 32,
        "least_bytes": 16, "wavefronts": 8, "mma": 0, "commit": commit,
        "bounds": {gpu: {"us": us, "by": "issue", "pipes": pipes} for gpu in predictions.GPUS},
    }  # fmt: skip


def test_the_page_begins_with_what_it_is():
    page = predictions.page([row(1000, 4.0)], [])
    first = page.split("\n\n")[1]
    assert "not a measurement" in first and "no GPU has run" in first
    assert "After over before" not in page and "→" not in page.partition("## symmetric_kl")[2]


def test_before_and_after_stand_in_one_cell():
    page = predictions.page([row(4000, 4.0), row(10, 1.0, case="gone")], [row(1000, 1.0)])
    assert "| T1 | forward | – | 2 | 4,000 → 1,000 | 64 | 32 | 16 | 8 | 0 |" in page
    assert f"| T1 | forward | – | {' | '.join(['2.0 → 0.5'] * 8)} | 4.0 → 1.0 | issue |" in page
    assert "| `symmetric_kl` | forward | 1 | 0.25x | 0.25x | 0.25x | 0.25x |" in page
    assert "| gone | forward | – | 2 | 10 |" in page


def test_a_form_is_a_row_of_its_own():
    pairs = predictions.paired([row(4, 4.0)], [row(4, 4.0, request="cuda_sim:single")])
    assert [(pair.before is None, pair.after is None) for pair in pairs.values()] == [
        (False, True),
        (True, False),
    ]


@pytest.mark.backend("cuda_sim")
def test_rows_of_this_commit_stay_and_others_are_counted_anew(tmp_path, monkeypatch, capsys):
    path = tmp_path / "counters_after.jsonl"
    monkeypatch.setattr(predictions, "RESULTS", tmp_path)
    monkeypatch.setattr(predictions, "PAGE", tmp_path / "page.md")
    monkeypatch.setitem(shapes.CASES, "symmetric_kl", [SMALL])
    for module in (predictions, counters):
        monkeypatch.setattr(module, "commit", lambda: "now")
    gone = row(1, 1.0, case="gone")
    other = {**row(1, 1.0, case="gone"), "op": "masked_weight"}
    write(path, [gone, {**row(1, 1.0, case=SMALL.id), "commit": "old"}, other])
    assert predictions.main(["--count", "after", "--op", "symmetric_kl"]) == 0
    rows = read(path)
    assert [row["op"] for row in rows] == ["masked_weight", "symmetric_kl", "symmetric_kl"]
    assert all(row["issued"] > 100 and row["commit"] == "now" for row in rows[1:])
    assert "symmetric_kl" in capsys.readouterr().out
    assert predictions.main(["--count", "after", "--op", "symmetric_kl"]) == 0
    assert capsys.readouterr().out == "" and read(path) == rows
    assert predictions.main([]) == 0
    assert "## symmetric_kl" in (tmp_path / "page.md").read_text()


def test_large_cases_are_left_out(monkeypatch):
    monkeypatch.setattr(predictions, "LARGEST", 0)
    assert not list(predictions.counted_cases("symmetric_kl"))


def test_an_operator_that_there_is_not(capsys):
    assert predictions.main(["--count", "after", "--op", "adapter"]) == 2
    assert "no operator 'adapter'" in capsys.readouterr().err


def test_what_cuobjdump_says():
    sass = """
        Function : _Z5first
        /*0000*/                   LDG.E.128 R4, [R2.64] ;    /* 0x0 */
                                                              /* 0x1 */
        /*0010*/              @!P0 BRA `(.L_1) ;              /* 0x2 */
        Function : _Z6second
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
    """
    codes = predictions.codes_in(sass)
    assert codes["_Z5first"] == {"all": 2, "LDG": 1, "BRA": 1}
    assert codes["_Z6second"]["HMMA"] == 1
    usage = " Function _Z5first:\n  REG:40 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:532 TEXTURE:0\n"
    assert predictions.resources_in(usage)["_Z5first"]["REG"] == 40
    assert predictions.resources_in(usage)["_Z5first"]["CONSTANT"] == 532

"""`benchmarks.run --check`: which figure counts, what it has to reach, and how the command ends. The
timings are made up.
"""

from __future__ import annotations

import pytest

from benchmarks import check, run, timing

ONE = ["--check", "--op", "symmetric_kl", "--device", "cpu", "--cases", "T512-C2-tokens",
       "--dtypes", "float32"]  # fmt: skip


def made_up(*ratios):
    """Medians of one measurement after the other, and the seconds that were asked for."""
    asked, left = [], list(ratios)

    def times(seconds):
        asked.append(seconds)
        return {"plain": left.pop(0), "": 1.0, "eager": 1.0, "cpu:fast": 1.0}

    return times, asked


@pytest.mark.parametrize(
    ("request_", "bar"), [("", 0.97), ("cpu", 0.97), ("cpu:fast", 0.97), ("eager", 0.95)]
)
def test_the_bar_follows_from_the_request(request_, bar):
    assert check.bar_of(request_) == bar


def test_a_case_at_the_bar_is_measured_once():
    times, asked = made_up(0.97)
    ratio = check.ratio_of(times, "", 0.5)
    assert ratio.passes and ratio.first is None and asked == [0.5]
    assert str(ratio).strip() == "0.97x of plain"


def test_a_case_below_the_bar_is_measured_again_for_longer_and_may_pass():
    times, asked = made_up(0.9, 1.1)
    ratio = check.ratio_of(times, "cpu:fast", 0.5)
    assert ratio.passes and (ratio.value, ratio.first) == (1.1, 0.9)
    assert asked == [0.5, check.MORE * 0.5]
    assert "1.10x of plain at the second measurement" in str(ratio) and "first 0.900x" in str(ratio)


def test_the_second_measurement_counts_when_it_is_worse_too():
    ratio = check.ratio_of(made_up(0.9, 0.5)[0], "", 0.5)
    assert not ratio.passes and ratio.value == 0.5 and "BELOW 0.97x (0.500x)" in str(ratio)


def test_what_is_no_number_does_not_pass():
    assert not check.ratio_of(made_up(float("nan"), float("nan"))[0], "", 0.5).passes


def test_the_fallback_has_its_own_bar():
    assert check.ratio_of(made_up(0.96)[0], "eager", 0.5).passes
    assert not check.ratio_of(made_up(0.96, 0.96)[0], "", 0.5).passes


def with_speed(monkeypatch, speed):
    """Every contender takes a second, and `plain` as many as it is slower."""
    monkeypatch.setattr(
        timing,
        "interleaved",
        lambda functions, *_: {name: [speed if name == "plain" else 1.0] for name in functions},
    )


@pytest.mark.parametrize(("speed", "code"), [(1.2, 0), (0.96, 1)])
def test_the_command_ends_with_what_it_found(speed, code, monkeypatch, capsys):
    with_speed(monkeypatch, speed)
    assert run.main(ONE) == code
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("symmetric_kl")]
    assert [line.split()[3] for line in lines] == ["forward", "forward+backward"]
    assert f"{0 if code else 2} of 2 pass" in shown.out
    assert shown.err.count("does not pass") == (2 if code else 0)


def test_a_request_is_checked_in_the_place_of_the_dispatch(monkeypatch, capsys):
    with_speed(monkeypatch, 0.96)
    assert run.main([*ONE, "--backend", "eager"]) == 0
    assert capsys.readouterr().out.count("eager") == 2


def test_what_is_not_close_does_not_pass(monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("loss: error 1, allowed 0")

    monkeypatch.setattr(check.parity, "check", refuse)
    assert run.main([*ONE, "--backend", "eager"]) == 1
    assert "by eager is not close enough: loss: error 1" in capsys.readouterr().err


def test_nothing_to_check_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(check, "peers_of", lambda *_: {})
    assert run.main(ONE) == 2
    shown = capsys.readouterr()
    assert "not checked: plain does not serve it" in shown.out and "nothing to check" in shown.err


def test_a_refused_request_is_told_and_not_counted(capsys):
    assert run.main([*ONE, "--backend", "cuda"]) == 2
    assert "not checked: it serves cuda tensors, not cpu" in capsys.readouterr().out


def test_a_check_writes_no_rows(tmp_path, capsys):
    assert run.main([*ONE, "--json", str(tmp_path / "rows.jsonl")]) == 2
    assert "--check: writes no rows" in capsys.readouterr().err

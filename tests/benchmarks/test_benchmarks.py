"""The benchmarks at tiny sizes, from the command line to the chart, and their judgement; no absolute times."""

import csv
import dataclasses
import sys

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.harness import Result
from benchmarks.targets import judge
from benchmarks.token_statistics import RACES

TINY = ["--rows", "16", "--vocabulary", "256", "--repeats", "2", "--dtype", "float32"]


@pytest.mark.long
def test_every_race_from_the_command_line_to_csv_and_chart(tmp_path, capsys):
    main([*TINY, "bfloat16", "--contestants", "fused", "eager", "--output", str(tmp_path)])
    with (tmp_path / "benchmarks.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [field.name for field in dataclasses.fields(Result)]
    assert {line["race"] for line in lines} == {"table", "threads", "ignored", "few-rows", "growth", "sequence"}
    seen = {(line["contestant"], line["direction"]) for line in lines if line["race"] == "table"}
    directions = ("forward", "backward", "both")
    assert seen == {("limit", "limit")} | {(name, d) for name in ("fused", "eager") for d in directions}
    for line in lines:
        assert 0 < float(line["fastest_ms"]) <= float(line["median_ms"]) <= float(line["slowest_ms"])
        assert float(line["gigabytes_per_second"]) > 0
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for text in ("over the read limit", "faster than eager", "memory beyond", "two threads over one", "rows ignored"):
        assert text in shown


@pytest.mark.long
def test_both_is_the_sum_of_its_steps_and_the_limit_is_100_percent(tmp_path):
    results = main([*TINY, "--races", "table", "--contestants", "fused", "--repeats", "1", "--output", str(tmp_path)])
    times = {(r.contestant, r.direction): r for r in results}
    assert times["fused", "both"].median_ms > times["fused", "backward"].median_ms
    assert times["limit", "limit"].percent_of_limit == pytest.approx(100)
    moved = {d: r.gigabytes_per_second * r.median_ms for (_, d), r in times.items()}
    assert moved["backward"] == pytest.approx(2 * moved["forward"])
    assert moved["both"] == pytest.approx(3 * moved["forward"])
    assert moved["limit"] == pytest.approx(moved["forward"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "0"], "--rows must be above 0"),
        (["--vocabulary", "8", "-1"], "--vocabulary must be above 0"),
        (["--contestants", "eager"], "must hold fused"),
        (["--contestants", "fused", "fast"], "invalid choice: 'fast'"),
        (["--races", "sack"], "invalid choice: 'sack'"),
        (["--output", __file__], "not a folder"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_bad_option_gets_one_clear_error(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_trl_is_asked_for_but_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    with pytest.raises(SystemExit):
        main(["--contestants", "fused", "trl"])
    assert "pip install 'lit-did[trl]'" in capsys.readouterr().err


@pytest.mark.long
def test_without_a_compiler_all_but_the_limit_is_raced(monkeypatch, tmp_path, capsys):
    def no_compiler():
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr("benchmarks.read_limit.load", no_compiler)
    results = main([*TINY, "--races", "table", "--contestants", "fused", "eager", "--output", str(tmp_path)])
    assert {r.contestant for r in results} == {"fused", "eager"}
    shown = capsys.readouterr().out
    assert "The read limit and the targets that need it are left out: there is no compiler." in shown
    assert "over the read limit" not in shown


def made_up(contestant: str, direction: str, median_ms: float, **others) -> Result:
    values = dict.fromkeys((field.name for field in dataclasses.fields(Result)), 0.0)
    values |= {"race": "table", "device": "cpu", "threads": 2, "dtype": "float32", "rows": 8, "vocabulary": 64}
    return Result(**(values | {"contestant": contestant, "direction": direction, "median_ms": median_ms} | others))


def verdicts(*results: Result) -> dict[str, bool]:
    return {verdict.text: verdict.met for verdict in judge(results)}


def test_targets_on_the_cpu_at_their_bounds():
    forward = "forward over the read limit", "forward faster than eager", "forward faster than compile"
    both = "forward + backward faster than eager", "forward + backward faster than compile"
    others = made_up("limit", "limit", 1), made_up("eager", "forward", 90), made_up("compile", "forward", 8)
    others += made_up("eager", "both", 200), made_up("compile", "both", 20)
    ours = made_up("fused", "forward", 2), made_up("fused", "both", 10)
    assert all(verdicts(*others, *ours)[name] for name in forward + both)
    slower = made_up("fused", "forward", 2.02), made_up("fused", "both", 10.1)
    assert not any(verdicts(*others, *slower)[name] for name in forward + both)

    def half(median_ms: float) -> dict[str, bool]:
        return verdicts(
            *(dataclasses.replace(r, dtype="bfloat16") for r in (*others, made_up("fused", "forward", median_ms)))
        )

    # bfloat16 has bounds of its own: 1.8 for the limit, 3.5 for compile.
    assert half(1.8)["forward over the read limit"]
    assert not half(1.82)["forward over the read limit"]
    assert half(2.2)["forward faster than compile"]
    # Another size, or a contestant that did not run, is nothing to compare with.
    assert not verdicts(*ours, *(dataclasses.replace(r, vocabulary=65) for r in others)).keys() & {*forward, *both}


def test_targets_of_memory_threads_and_ignored_rows():
    name = "fused: memory beyond the outputs"
    assert verdicts(made_up("fused", "forward", 1, extra_mib=0.99))[name]
    assert not verdicts(made_up("fused", "forward", 1, extra_mib=1.01))[name]
    assert not verdicts(made_up("fused", "forward", 1, extra_mib=float("nan")))[name]
    one = made_up("fused", "forward", 1.8, race="threads", threads=1)
    two = made_up("fused", "forward", 1.0, race="threads")
    assert verdicts(one, two)["two threads over one, forward"]
    assert not verdicts(one, dataclasses.replace(two, median_ms=1.1))["two threads over one, forward"]
    none = made_up("fused", "both", 1.0, race="ignored")
    most = made_up("fused", "both", 0.4, race="ignored", ignored=0.6)
    name = "60% of the rows ignored, forward + backward: time over that with none ignored"
    assert verdicts(none, most)[name]
    assert not verdicts(none, dataclasses.replace(most, median_ms=0.42))[name]


def test_targets_on_cuda():
    on = {"device": "cuda", "dtype": "bfloat16", "vocabulary": 32768}
    fast = [made_up("fused", "forward", 1, percent_of_limit=90, **on)]
    fast += [made_up("fused", "backward", 1, percent_of_limit=80, **on)]
    assert list(verdicts(*fast).values()) == [True, True]
    assert not any(verdicts(*(dataclasses.replace(r, percent_of_limit=r.percent_of_limit - 1) for r in fast)).values())
    assert not verdicts(*(dataclasses.replace(r, vocabulary=1024) for r in fast))


def test_an_interrupted_run_keeps_what_was_finished(monkeypatch, tmp_path, capsys):
    def interrupted(plan):
        yield made_up("fused", "forward", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setitem(RACES, "table", interrupted)
    main([*TINY, "--races", "table", "--contestants", "fused", "--output", str(tmp_path)])
    assert "The run was interrupted" in capsys.readouterr().out
    with (tmp_path / "benchmarks.csv").open() as file:
        assert [line["contestant"] for line in csv.DictReader(file)] == ["fused"]

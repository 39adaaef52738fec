"""The linear benchmark at tiny sizes: its truth, its contestants, its judgement; no absolute times."""

from __future__ import annotations

import csv
import dataclasses
import sys

import pytest
import torch

from benchmarks import linear
from benchmarks.harness import Result

CASE = linear.Case(tokens=64, hidden=32, vocabulary=512, dtype=torch.float32)
TINY = ["--tokens", "64", "--cases", "32x512xfloat32", "--repeats", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def inputs() -> linear.Inputs:
    return linear.Inputs(CASE)


def test_the_truth_is_that_of_autograd_in_float64(inputs):
    names = ("policy_hidden", "policy_weight", "reference_hidden", "reference_weight")
    hidden, weight, *reference = (getattr(inputs, name).double().requires_grad_() for name in names)
    rows = torch.arange(CASE.tokens)
    both = [(x @ w.T).log_softmax(-1)[rows, inputs.labels] for x, w in ((hidden, weight), reference)]
    log_ratio = (both[0] - both[1]).view(linear.SEQUENCES, -1).sum(-1)
    chosen, rejected = log_ratio.chunk(2)
    loss = -torch.nn.functional.logsigmoid(linear.BETA * (chosen - rejected)).mean()
    expected = log_ratio, *torch.autograd.grad(loss, (hidden, weight))
    for value, other in zip(inputs.truth, expected, strict=True):
        assert value.dtype == torch.float32
        # Sums of some hundred float32 terms: a relative error of 1e-6; the case's largest values are of order 1.
        assert (value - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("name", [name for name in linear.default() if name != linear.PRODUCTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contestant_passes_its_check(name, dtype):
    inputs = linear.Inputs(dataclasses.replace(CASE, dtype=dtype))
    runner = linear.runner(name, inputs)
    (step,) = runner.steps
    runner.verify(step(runner.prepare()))


@pytest.mark.parametrize(("wrong", "words"), [(0, "log-ratio"), (1, "hidden's gradient"), (2, "weight's gradient")])
def test_a_wrong_contestant_is_refused(inputs, wrong, words):
    returned = [value.clone() for value in inputs.truth]
    returned[wrong].view(-1)[0] += 0.01 * returned[wrong].norm()
    with pytest.raises(RuntimeError, match=f"eager is wrong: its {words} is off by 1 percent"):
        inputs.verify("eager", returned)


def test_a_contestant_that_does_not_fit_is_left_out(inputs, monkeypatch, capsys):
    def too_large(inputs):
        def function(state):
            raise torch.OutOfMemoryError

        return function

    monkeypatch.setitem(linear.MAKERS, "eager", too_large)
    assert [name for name in ("lit_did", "eager") if linear.fits(name, inputs)] == ["lit_did"]
    assert "eager is left out of hidden 32, 64 x 512 float32" in capsys.readouterr().out


def test_nothing_stands_in_for_liger_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: None)
    assert linear.LIGERS_WAY in linear.default()
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: name == "liger_kernel")
    assert linear.LIGERS_WAY not in linear.default()
    assert linear.LIGER in linear.default()


@pytest.mark.long
def test_from_the_command_line_to_the_csv(tmp_path, capsys, monkeypatch):
    # The start of a process takes seconds.
    monkeypatch.setattr(linear, "in_own_process", lambda threads, function, *arguments: function(*arguments))
    monkeypatch.setattr(linear, "CASES", ["32x512xfloat32"])  # what is judged
    monkeypatch.setattr(linear, "TOKENS", 64)
    linear.main([*TINY, "--contestants", "lit_did", "eager", "--output", str(tmp_path)])
    with (tmp_path / "linear.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [field.name for field in dataclasses.fields(Result)]
    assert [line["contestant"] for line in lines] == ["lit_did", "eager"]
    assert all(0 < float(line["fastest_ms"]) <= float(line["median_ms"]) for line in lines)
    assert "memory over that of eager" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "60"], "a multiple of 8"),
        (["--cases", "32x512"], "but got 32x512"),
        (["--cases", "32x512xfloat31"], "must look like 576x49152xfloat32"),
        (["--contestants", "eager"], "must hold lit_did"),
        pytest.param(
            ["--device", "cuda"],
            "torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="There is one."),
        ),
    ],
)
def test_a_bad_option_gets_one_clear_error(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        linear.main([*TINY, *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_liger_is_asked_for_but_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", None)
    with pytest.raises(SystemExit):
        linear.main([*TINY, "--contestants", "lit_did", "liger"])
    assert "pip install --no-deps liger-kernel" in capsys.readouterr().err


def test_the_targets_are_those_that_were_set():
    def result(contestant: str, median_ms: float, peak_mib: float, case: str = linear.CASES[0]) -> Result:
        sizes = {"rows": 816, "vocabulary": 49152, "ignored": 0.0, "repeats": 5, "threads": 2}
        figures = dict.fromkeys(("fastest_ms", "slowest_ms", "gigabytes_per_second", "percent_of_limit"), 0.0)
        return Result(
            race=linear._case(case, linear.TOKENS).name,
            contestant=contestant,
            direction="both",
            device="cpu",
            dtype="float32",
            median_ms=median_ms,
            peak_mib=peak_mib,
            extra_mib=0.0,
            **sizes,
            **figures,
        )

    others = {"products": 1 / 1.5, "trl": 1.7, "trl, as DPOTrainer": 1.7, "liger": 2.5, "eager": 1.4}
    others["eager, all statistics"] = 1.4
    met = [result("lit_did", 100, 25), *(result(name, 100 * ratio, 100) for name, ratio in others.items())]
    verdicts = linear.judge(met)
    assert len(verdicts) == 8
    assert all(verdict.met for verdict in verdicts)
    missed = [result("lit_did", 102, 26), *met[1:]]
    assert not any(verdict.met for verdict in linear.judge(missed))
    assert not linear.judge([result("lit_did", 100, 25, "32x1000xfloat32"), result("trl", 1, 1, "32x1000xfloat32")])

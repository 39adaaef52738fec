"""`lit-did experiment`: what it prints and writes, whole or not at all, and its answers to bad input."""

from __future__ import annotations

import importlib

import pytest
from scipy import stats

from lit_did.cli.errors import InputError
from lit_did.experiments import EXPERIMENTS, dynamics, tempered
from lit_did.experiments import __main__ as command
from lit_did.experiments.reporting import Options, Report, Table, mean_and_half_width, points, render, sign, summary


@pytest.fixture
def small(monkeypatch):
    """`dynamics` in a fraction of a second: this file is about all around it."""
    for name, value in {"STEPS": 3, "QUICK_GRADIENT_STEPS": 5, "QUICK_COMPLETIONS": 8}.items():
        monkeypatch.setattr(dynamics, name, value)
    change = dict.fromkeys(tempered.CHANGES, 0.0)
    monkeypatch.setattr(
        tempered, "rows", lambda options: [{"target": "t", "seed": s, "of": "o", **change} for s in options.all_seeds()]
    )


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def test_every_experiment_is_there():
    for name, experiment in EXPERIMENTS.items():
        module = importlib.import_module(f"lit_did.experiments.{name}")
        assert callable(module.run)
        assert experiment.question
        assert command.parse_arguments([name]).seeds == experiment.seeds >= 3
        assert command.parse_arguments([name, "--quick"]).seeds == 2
        assert command.parse_arguments([name, "--quick", "--seeds", "4"]).seeds == 4


def test_same_seed_same_bytes(small, tmp_path):
    for folder, seed in (("first", 1), ("second", 1), ("third", 2)):
        assert run("dynamics", "--quick", "--quiet", "--seeds", 2, "--seed", seed, "--output", tmp_path / folder) == 0
    for path in sorted((tmp_path / "first").iterdir()):
        same = path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
        assert same, path
        assert path.read_bytes() != (tmp_path / "third" / path.name).read_bytes(), path


def test_prints_and_overwrites(small, tmp_path, capsys):
    output = tmp_path / "new" / "out"
    for _ in range(2):
        assert run("dynamics", "--quick", "--seeds", 2, "--output", output) == 0
    printed = capsys.readouterr().out
    assert "lit-did experiment dynamics --quick --seeds 2 --seed 0" in printed
    assert "log pi - log rho" in printed
    assert "Numbers: the lower to the higher of 2 seeds" in printed
    assert "Found: the chosen log-likelihood stayed below its start at every step of all 32 runs" in printed
    assert str(output / "dynamics.csv") in printed
    assert list(output.parent.iterdir()) == [output]  # no working folder is left


def test_failures_leave_nothing(small, tmp_path, capsys, monkeypatch):
    arguments = ["dynamics", "--quick", "--seeds", 2, "--output", tmp_path / "out"]

    def fail(error: BaseException):
        def draw(*_):
            raise error

        monkeypatch.setattr(dynamics, "_draw", draw)  # the tables are written by then

    fail(RuntimeError("no ink"))
    with pytest.raises(RuntimeError, match="no ink"):
        run(*arguments)
    assert list(tmp_path.iterdir()) == []
    fail(KeyboardInterrupt())
    assert run(*arguments) == 130
    assert "Stopped; nothing was written." in capsys.readouterr().err
    fail(InputError("Expected ink."))
    assert run(*arguments) == 2
    assert capsys.readouterr().err == "error: Expected ink.\n"
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output, message in ((tmp_path / "file", "to be a folder"), (tmp_path / "file" / "out", "that can be made")):
        assert run("dynamics", "--output", output) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""


def test_missing_extras(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "matplotlib" else "found")
    assert run("dynamics", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err == "error: experiments need matplotlib: pip install 'lit-did[demo]'.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: NAME"),
        (["rewards"], "argument NAME: invalid choice: 'rewards'"),
        (["reward", "--seeds", "1"], "--seeds: expected a whole number from 2 to 1000, but got 1"),
        (["reward", "--seeds", "x"], "--seeds: invalid int value: 'x'"),
        (["reward", "--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295, but got -1"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_intervals_are_scipys():
    values = [0.3, 1.2, -0.7, 0.9]
    mean, half_width = mean_and_half_width(values)
    expected = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values))
    assert (mean - half_width, mean + half_width) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.15, 0.19], "0.150 to 0.190"),  # no mean ± 0.25, the interval of two
        ([-10.0, 30.0], "-10 to 30"),
        ([-0.001, 0.2], "0.00 to 0.20"),  # no -0.00
        ([2.5, 2.5, 2.5], "2.5"),
        ([0.5, 0.7, 0.6], "0.60 ± 0.25"),
        ([-50.0, 20.0, 100.0], "20 ± 190"),  # not 1.9e+02
        ([7.1e-14, 7.2e-14, 7.3e-14], "(7.20 ± 0.25)e-14"),
        ([0.0961, 0.1, 0.1039], "0.100 ± 0.010"),  # 0.0097, which rounds up
        ([12300.0, 12400.0, 12350.0], "(1.235 ± 0.012)e+04"),
        ([float("nan"), 1.0, 2.0], "nan"),
        ([float("inf"), 1.0, 2.0], "inf"),
    ],
)
def test_replicates_in_a_cell(values, shown):
    assert summary(values) == shown


def test_signs():
    assert [sign(values) for values in ([1.0, 2.0], [-1.0, 2.0], [-1.0, -2.0])] == [1, 0, -1]
    # Student's t with two degrees of freedom: half of the interval is 4.3 standard errors, 2.48 here.
    assert [sign([x - 1, x, x + 1]) for x in (2.4, 2.5, -2.5)] == [0, 1, -1]


def test_tables_show_all_replicates():
    rows = [
        {"loss": loss, "size": size, "seed": seed, "js": size * seed + (loss == "b")}
        for loss in "ab"
        for size in (1, 2)
        for seed in (1, 3)
    ]
    table = Table("x", "A title", rows, ("loss",), ("js",), "size")
    hidden = Table("y", "Only written", rows)
    report = Report([table, hidden], lambda figure: None, (1, 1), ["E_rho[log pi]"], "that b is larger.")
    text = render(report, "the header")
    assert text.startswith("the header\n")
    assert "A title" in text
    assert "Only written" not in text
    assert text.endswith("E_rho[log pi]\n\nFound: that b is larger.")
    lines = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["a", "1.0 to 3.0", "2.0 to 6.0"],
        ["b", "2.0 to 4.0", "3.0 to 7.0"],
    ]
    assert points(table, "js", "size", loss="b") == ([1.0, 2.0], [3.0, 5.0], [2.0, 3.0], [4.0, 7.0])
    assert points(table, "js", "size", loss="b").bars == ([1.0, 2.0], [1.0, 2.0])


def test_seeds_count_on():
    assert list(Options(seeds=3, seed=7).all_seeds()) == [7, 8, 9]

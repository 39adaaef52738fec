"""`lit-did`: one screen with all commands, one line for what a user can mend, and the exit codes."""

from __future__ import annotations

import importlib
import inspect
import os
import sys

import pytest
import torch

from lit_did.cli import bench, main
from lit_did.cli.errors import InputError, run_command
from lit_did.cli.functions import call
from lit_did.cli.output import Finished, make_parent
from lit_did.writing import whole_file, whole_folder
from tests.processes import run_program

NAMES = [name for group in main.COMMANDS.values() for name in group]


def test_all_commands_are_on_one_screen(capsys):
    assert main.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 110
    for name in NAMES:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name


@pytest.mark.parametrize("name", NAMES)
def test_every_command_exists(name):
    (command,) = (group[name] for group in main.COMMANDS.values() if name in group)
    module, _, function = command.function.partition(":")
    assert list(inspect.signature(getattr(importlib.import_module(module), function)).parameters) == ["arguments"]


def test_the_package_runs_as_the_command():
    assert run_program(sys.executable, "-m", "lit_did", "--version").startswith("lit-did ")
    assert "extension" in run_program(sys.executable, "-m", "lit_did", "doctor")


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    assert main.main(["entropi"]) == 2
    assert capsys.readouterr().err == "error: Expected a command of lit-did, but got entropi. Did you mean entropy?\n"
    assert main.main(["xyzzy"]) == 2
    assert capsys.readouterr().err.endswith("`lit-did` shows all commands.\n")


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "error", [InputError("a\n b"), FileNotFoundError("a b"), FloatingPointError("a b"), ModuleNotFoundError("a b")]
)
def test_what_a_user_can_mend_is_one_line(error, capsys):
    assert run_command(raising(error)) == 2
    assert capsys.readouterr().err == "error: a b\n"


def test_notes_of_an_error_follow_it(capsys):
    error = IsADirectoryError("a")
    error.add_note("b\nc")
    assert run_command(raising(error)) == 2
    assert capsys.readouterr().err == "error: a b c\n"


def test_faults_of_the_program_keep_their_traceback(monkeypatch, capsys):
    with pytest.raises(ValueError, match="Expected"):  # raised outside the package
        run_command(raising(ValueError("Expected `x` to be y")))
    assert run_command(lambda: make_model_error()) == 2
    assert "Expected `policy`" in capsys.readouterr().err
    monkeypatch.setenv("LIT_DID_TRACEBACK", "1")
    with pytest.raises(InputError):
        run_command(raising(InputError("a")))


def make_model_error():
    from lit_did.models import PolicyAndReference

    PolicyAndReference("a name")


def test_an_interrupt_has_its_own_status(capsys):
    assert run_command(raising(KeyboardInterrupt()), stopped="Stopped here.") == 130
    assert capsys.readouterr().err == "Stopped here.\n"
    with pytest.raises(SystemExit, match="3"):
        run_command(raising(SystemExit(3)))


def test_bench_outside_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "PACKAGE", tmp_path / "site-packages" / "lit_did")
    with pytest.raises(InputError, match="installed from a clone"):
        bench.main([])


def table(pairs: str, *, policy: str, beta: float = 0.1, quiet: bool = False) -> tuple:
    """Writes a table.

    Args:
        pairs: The pairs.
        policy: The policy.
        beta: The temperature.
        quiet: Without a progress bar.
    """
    return pairs, policy, beta, quiet


def test_a_function_is_a_command(tmp_path, capsys):
    (tmp_path / "o.yaml").write_text("beta: 0.5\n")
    assert call(table, "table", ["p", "--policy", "m"]) == ("p", "m", 0.1, False)
    arguments = ["-c", str(tmp_path / "o.yaml"), "p", "--policy", "m", "--quiet"]
    assert call(table, "table", arguments) == ("p", "m", 0.5, True)
    with pytest.raises(SystemExit, match="0"):
        call(table, "table", ["--help"])
    printed = capsys.readouterr().out
    assert "usage: lit-did table" in printed
    assert "Writes a table." in printed
    assert "The temperature. (type: float, default: 0.1)" in " ".join(printed.split())


@pytest.mark.parametrize("arguments", [["p"], ["--policy", "m"], ["p", "--policy", "m", "--beta", "x"]])
def test_a_command_line_that_cannot_be_used(arguments):
    with pytest.raises(InputError, match=r"policy|pairs|beta"):
        call(table, "table", arguments)


# -----------------------------------------------------------------------------------------------------------
# What commands write
# -----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.csv"
    with whole_file(path) as beside:
        beside.write_text("one")
        assert beside.suffix == ".csv"
        assert not path.exists()
    with pytest.raises(IsADirectoryError), whole_file(path) as beside:
        beside.write_bytes(tmp_path.read_bytes())
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a", "before"])
def test_a_folder_is_written_whole_or_not_at_all(tmp_path, name):
    path = tmp_path / "new" / name
    for text in ("one", "two"):
        with whole_folder(path) as beside:
            beside.mkdir()
            (beside / text).write_text(text)
        with pytest.raises(FileNotFoundError), whole_folder(path) as beside:
            (beside / "no folder" / text).write_text(text)
        assert [file.name for file in path.iterdir()] == [text]
        assert list(path.parent.iterdir()) == [path]


def test_outputs_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for path, what in ((tmp_path / "file", "folder"), (tmp_path, "file"), (tmp_path / "file" / "x", "file")):
        with pytest.raises(InputError, match=f"Expected --output to be a {what}"):
            make_parent(path, what=what)
    make_parent(tmp_path / "new" / "x", what="file")
    assert (tmp_path / "new").is_dir()


def test_a_killed_run_goes_on_with_the_same_floats(tmp_path):
    path, value = tmp_path / "record", {"x": [0.1 + 0.2, float("inf"), 1e-320]}
    with Finished(path, {"seed": 0}) as finished:
        finished.add(value)
        finished.add(2)
    for cut in (1, 2):  # of the last line: its end alone, and half of it
        path.write_bytes(path.read_bytes()[:-cut])
        with Finished(path, {"seed": 0}) as finished:
            assert finished.results == [value]
            finished.add(2)
        with Finished(path, {"seed": 0}) as finished:
            assert finished.results == [value, 2]
    path.write_bytes(path.read_bytes()[:3])
    with Finished(path, {"seed": 1}) as finished:
        assert finished.results == []
    with Finished(path, {"seed": 1}) as finished:
        finished.remove()
    assert not path.exists()


def test_a_record_of_something_else_is_refused(tmp_path):
    path = tmp_path / "record"
    with Finished(path, {"seed": 0, "policy": "a"}) as finished:
        finished.add(1)
    with pytest.raises(InputError, match=r"Expected seed to be 0, as in the run .*but got 1\. Run it with the same"):
        Finished(path, {"seed": 1, "policy": "a"})
    with pytest.raises(InputError, match="Expected policy to be 'a'"):
        Finished(path, {"seed": 0})
    path.write_text("not JSON\n")
    with pytest.raises(InputError, match="it does not"):
        Finished(path, {"seed": 0})
    assert path.read_text() == "not JSON\n"


def test_a_record_without_results_is_written_again(tmp_path):
    for seed in (0, 1):
        with Finished(tmp_path / "record", {"seed": seed}):
            pass
    with Finished(tmp_path / "record", {"seed": 1}) as finished:
        finished.add(2)
    with Finished(tmp_path / "record", {"seed": 1}) as finished:
        assert finished.results == [2]


def test_a_record_of_an_output_that_is_whole_is_dropped(tmp_path):
    path, output = tmp_path / "record", tmp_path / "output"
    for newer, kept in ((path, [1]), (output, [])):
        with Finished(path, {}) as finished:
            finished.add(1)
        output.write_text("")
        os.utime(newer, (2e9, 2e9))
        with Finished(path, {"other": 1} if newer == output else {}, output) as finished:
            assert finished.results == kept
        path.unlink()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee"), 2),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 2),
        (MemoryError(), 2),
        (RuntimeError("another"), None),
    ],
)
def test_out_of_memory_is_one_line(capsys, error, status):
    def command():
        raise error

    if status is None:
        with pytest.raises(RuntimeError, match="another"):
            run_command(command)
        return
    assert run_command(command) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Out of memory. Make the batch size or the longest sequence smaller,")
    assert line.endswith(str(error).splitlines()[0] if str(error) else "device.")


def test_two_runs_do_not_share_a_record(tmp_path):
    with Finished(tmp_path / "record", {}), pytest.raises(InputError, match="no other run"):
        Finished(tmp_path / "record", {})
    Finished(tmp_path / "record", {}).__exit__(None, None, None)

"""`lit-did score`: the table, a kill in the middle, and one line for what a user can mend."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_did.cli import output, score
from lit_did.cli.main import main
from lit_did.scoring import score_pairs
from tests.processes import run_program

N = 7
ROWS = [
    {"prompt": f"Question {i}?", "chosen": "yes " * (1 + i % 4), "rejected": "no " * (5 - i % 5), "src": {"n": i}}
    for i in range(N)
]


@pytest.fixture
def arguments(tmp_path, models, monkeypatch):
    """A command line in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return [
        *("score", "pairs.jsonl", "--policy", str(models[0]), "--reference", str(models[1])),
        *("--batch_size", "2", "--device", "cpu"),
    ]


def test_writes_the_table_of_score_pairs(arguments, models, tmp_path, capsys):
    pytest.importorskip("pandas")
    assert main([*arguments, "--beta", "0.5", "--texts"]) == 0
    printed = capsys.readouterr().out
    assert f"{N} pairs of {N} rows" in printed
    assert "Written: pairs.scores.csv" in printed
    options = {"beta": 0.5, "texts": True, "batch_size": 2, "progress": False, "device": "cpu"}
    frame = score_pairs("pairs.jsonl", models[0], models[1], **options)
    with open("pairs.scores.csv", newline="") as file:
        written = list(csv.DictReader(file))
    cells = [{**row, "src": json.dumps(row["src"])} for row in frame.to_dict("records")]
    assert written == [{name: str(value) for name, value in row.items()} for row in cells]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.scores.csv"]


def test_parquet_and_quiet(arguments, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main([*arguments, "--output", "new/scores.parquet", "--quiet"]) == 0
    assert capsys.readouterr().out == "Written: new/scores.parquet\n"
    table = parquet.read_table("new/scores.parquet").to_pydict()
    assert table["index"] == list(range(N))
    assert [json.loads(value) for value in table["src"]] == [row["src"] for row in ROWS]


def test_a_finished_table_is_kept(arguments, tmp_path, capsys):
    (tmp_path / "pairs.scores.csv").write_text("precious")
    assert main(arguments) == 2
    assert "pairs.scores.csv exists. Choose another name, or pass --overwrite." in capsys.readouterr().err
    assert (tmp_path / "pairs.scores.csv").read_text() == "precious"
    assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "pairs.scores.csv").read_text().startswith("index,")


KILLED = """
import os, signal, sys, torch
from lit_did.cli import output, score
from lit_did.cli.main import main

os.chdir(sys.argv.pop(1))
torch.set_num_threads(1)
add = output.Finished.add

def add_and_die(self, result):
    add(self, result)
    if len(self.results) == 2:
        self._file.write(b'[{"index": ')  # a line that the kill cut off
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

def run(*options, die=False):
    # In a fork, because the imports take longer than all runs.
    child = os.fork()
    if not child:
        output.Finished.add = add_and_die if die else add
        os._exit(main([*sys.argv[1:], *options]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert run("--output", "whole.csv") == 0
assert run("--output", "killed.csv", die=True) == -signal.SIGKILL
assert not os.path.exists("killed.csv")
assert len(open("killed.csv.part").readlines()) == 4
assert run("--output", "killed.csv") == 0
"""


def test_a_killed_run_goes_on_to_the_same_bytes(arguments, tmp_path):
    run_program(sys.executable, "-c", KILLED, tmp_path, *arguments)
    whole, killed = ((tmp_path / f"{name}.csv").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    assert len(list(csv.reader(whole.decode().splitlines()))) == N + 1
    assert not (tmp_path / "killed.csv.part").exists()


@pytest.fixture
def interrupted(arguments, monkeypatch, capsys):
    """A command line whose run was interrupted."""
    add = output.Finished.add

    def stop(self, result):
        if len(self.results) == 2:
            raise KeyboardInterrupt
        add(self, result)

    with monkeypatch.context() as patched:
        patched.setattr(output.Finished, "add", stop)
        assert main(arguments) == 130
    assert capsys.readouterr().out == "Stopped after 4 of 7 pairs. Run the same command again to go on.\n"
    return arguments


def test_an_interrupted_run_goes_on(interrupted):
    assert main(interrupted) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--batch_size", "3"], "Expected --batch_size to be 2, as in the run that left its results in"),
        (["--max_length", "80"], "Expected --max_length to be 1024, as in the run"),
        (["--as_chat"], "Expected --as_chat to be False, as in the run"),
        (["--dtype", "float64"], r"Expected --dtype to be 'float32', as in the run"),
        ("policy", "Expected the digest of the policy to be"),
        ("reference", "Expected the digest of the reference to be"),
        ("pairs", "Expected the digest of the pairs to be"),
    ],
)
def test_a_partial_table_of_another_run_is_refused(interrupted, models, tmp_path, capsys, change, named):
    before = (tmp_path / "pairs.scores.csv.part").read_bytes()
    if change == "pairs":
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1])))
        change = []
    elif isinstance(change, str):
        change = [f"--{change}", str(models[{"policy": 1, "reference": 0}[change]])]
    capsys.readouterr()
    assert main([*interrupted, *change]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert named in line
    assert line.endswith("or delete that file to start again.")
    assert (tmp_path / "pairs.scores.csv.part").read_bytes() == before


def test_a_partial_table_of_another_adapter_is_refused(arguments, models, tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    for seed, name, alpha in ((0, "a", 8), (1, "b", 8), (0, "c", 80)):
        torch.manual_seed(seed)
        options = {"target_modules": "all-linear", "init_lora_weights": False, "lora_alpha": alpha}
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(models[0]), config).save_pretrained(tmp_path / name)
    with monkeypatch.context() as patched:
        patched.setattr(score, "write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*arguments, "--reference", "./a"])
    for name in "bc":
        assert main([*arguments, "--reference", f"./{name}"]) == 2
        assert "Expected the digest of the reference to be" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").rename(tmp_path / "elsewhere" / "a")
    assert main([*arguments, "--reference", "elsewhere/a"]) == 0


def test_a_partial_table_of_other_versions_is_refused(interrupted, tmp_path, capsys):
    part = tmp_path / "pairs.scores.csv.part"
    part.write_text(part.read_text().replace(torch.__version__.split("+")[0], "1.0", 1))
    assert main(interrupted) == 2
    assert "Expected the version of torch to be '1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--policy", "./nowhere"], "Expected `policy` to be a folder with a transformers model, but nowhere is not"),
        (["--policy", "."], "Expected `policy` to be a folder with a transformers model, but . holds neither"),
        (["--reference", "null"], "Expected `reference` for a policy without an adapter, but got None."),
        (["--reference", "MODEL2"], "Expected `reference` to have the policy's vocabulary, 258 entries, but got 70."),
        (["--tokenizer", "./nowhere"], "Expected `tokenizer` to be a folder"),
        (["--output", "scores.txt"], "Expected --output to end in .csv or .parquet, but got 'scores.txt'."),
        (
            ["--output", "pairs.jsonl/scores.csv"],
            "Expected --output to be a file that can be made, but got pairs.jsonl",
        ),
        (["--device", "cude"], "Expected `device` to be a device of this machine, such as 'cpu', but got 'cude'"),
        (["--max_length", "1"], "Expected `max_length` to be an integer of at least 2, but got 1."),
        (["--chat_template", "a.jinja"], "Expected `chat_template` to be a Jinja template, but got 'a.jinja'"),
        (["--columns", '{"ask": "q"}'], "Expected the keys of `columns` to be among"),
    ],
)
def test_what_a_user_can_mend(arguments, models, tmp_path, capsys, change, message):
    assert main([*arguments, *(str(models[2]) if value == "MODEL2" else value for value in change)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["p", "--polcy", "a"], "Expected an option of this command, but got --polcy. Did you mean --policy?"),
        (["--policy", "a"], "Expected `pairs` to be given after the command's name, but it is not."),
        (["p"], "Expected `policy` to be given, in a recipe (-c FILE) or as an option (--policy)."),
        (["p", "q", "--policy", "a"], "Expected an option, which starts with --, but got q."),
        (["p", "--policy", "a", "--batch_size", "x"], "Expected `batch_size` to be a whole number, but got 'x'."),
        (["p", "--policy", "a", "--truncation", "dropp"], "Expected `truncation` to be one of 'completion', 'prompt'"),
        (["p", "--policy", "a", "-c", "none.yaml"], "Expected -c to be a YAML file, but got none.yaml: No such file"),
        (["p", "--policy", "a", "-c", "bad.yaml"], "Expected keys that this command knows, but got batchsize. Did you"),
    ],
)
def test_options_that_cannot_be_read(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("batchsize: 3")
    assert main(["score", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Expected a data file, but pairs.jsonl does not exist."),
        ("", "pairs.jsonl: Expected preference pairs, but got none."),
        ("{", "pairs.jsonl, line 1: Expected one JSON object a line, but got invalid JSON"),
        ('{"chosen": "a"}', "pairs.jsonl, line 1: Expected the keys `chosen` and `rejected`, but got `chosen`."),
    ],
)
def test_pairs_that_cannot_be_read(arguments, tmp_path, capsys, text, message):
    (tmp_path / "pairs.jsonl").unlink()
    if text is not None:
        (tmp_path / "pairs.jsonl").write_text(text)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("pairs", "name"),
    [
        ("a/pairs.v2.jsonl.gz", "pairs.v2.scores.csv"),
        ("data/*.parquet", "_.scores.csv"),
        ("org/name:train[:10]", "name_train_10_.scores.csv"),
        ("/", "pairs.scores.csv"),
    ],
)
def test_the_names_of_tables(tmp_path, monkeypatch, pairs, name):
    monkeypatch.chdir(tmp_path)
    assert str(score._table_path(None, pairs, overwrite=False)) == name

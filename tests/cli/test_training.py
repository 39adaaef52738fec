"""`lit-did fit` and the others: what a run leaves, how it continues, and what a recipe can say."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_did import LitDPO, LitDPOPG
from lit_did.cli import main
from lit_did.cli.run_files import WholeCheckpoints
from lit_did.cli.training import Training
from tests.processes import ROOT, run_program

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated")
LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = ({"prompt": f"q{n}", "chosen": "yes" * (n % 3 + 1), "rejected": "no" * (n % 4 + 1)} for n in range(12))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipe(tiny_model, pairs):
    """The content of a recipe: 5 batches an epoch, and 2 pairs to validate on."""
    data = {"train": str(pairs), "val_fraction": 0.2, "max_length": 64, "batch_size": 2}
    trainer = {"max_epochs": 2, "accelerator": "cpu", "devices": 1}
    model = {"policy": str(tiny_model), "lora": LORA, "learning_rate": 1e-2, "schedule": "linear", "warmup_steps": 2}
    return {"model": model, "data": data, "trainer": trainer, "save_every": 2}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working directory, in which `lit-did` runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit-did"])
    return tmp_path


def write(recipe, name="recipe.yaml", **changes):
    """Writes a recipe with changes such as `trainer={"max_epochs": 1}`."""
    merged = {
        key: {**recipe.get(key, {}), **changes[key]}
        if isinstance(changes.get(key), dict)
        else changes.get(key, recipe.get(key))
        for key in [*recipe, *changes]
    }
    Path(name).write_text(yaml.safe_dump(merged))
    return name


def lit_did(line):
    return main.main(line.split())


def metrics(folder):
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder, name="last"):
    return torch.load(Path(folder) / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same_weights(a, b):
    return all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A folder in which a run was trained without interruption, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    here = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["lit-did"])
            assert lit_did(f"fit -c {write(recipe, trainer={'val_check_interval': 2})}") == 0
    finally:
        os.chdir(here)
    return folder / "runs" / "recipe" / "version_0"


def test_a_run_leaves_its_configuration_metrics_and_checkpoints(whole):
    assert {path.name for path in whole.iterdir()} == {"config.yaml", "hparams.yaml", "metrics.csv", "checkpoints"}
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = metrics(whole)
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(10))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [1, 3, 6, 8]
    hparams = yaml.safe_load((whole / "hparams.yaml").read_text())
    assert hparams["lora"] == LORA
    assert hparams["adam_betas"] == [0.9, 0.999]
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["output"] == "runs/recipe/version_0"
    assert checkpoint(whole)["global_step"] == 10
    losses = {int(row["step"]) + 1: float(row["val/loss"]) for row in rows if row["val/loss"]}
    assert checkpoint(whole, "best")["global_step"] == min(losses, key=losses.get)


def test_the_screen_says_where_a_run_is_and_what_to_do_next(work, recipe, capsys):
    assert lit_did(f"fit -c {write(recipe)} --trainer.max_steps 2 --output here") == 0
    out = capsys.readouterr().out
    assert "train: 10 pairs of 10 rows" in out
    assert "The run begins: 1,856 trained parameters, folder here\n" in out
    assert "Finished after 2 steps: here\n" in out
    assert "not validated: training ended before the first validation" in out
    assert "lit-did export here FOLDER" in out
    assert "lit-did fit -c here/config.yaml --ckpt_path last" in out
    assert lit_did(f"fit -c {write(recipe)} --trainer.max_steps 2 --quiet") == 0
    assert capsys.readouterr().out == ""
    assert (work / "runs/recipe/version_0/checkpoints/last.ckpt").exists()


def test_each_run_has_its_own_folder_and_none_is_overwritten(work, recipe, capsys):
    for number in range(2):
        assert lit_did(f"fit -c {write(recipe)} --model.warmup_steps 0 --trainer.max_steps 1") == 0
        assert (work / f"runs/recipe/version_{number}/config.yaml").exists()
    assert lit_did("fit -c runs/recipe/version_1/config.yaml") == 2
    assert "version_1 holds a run. To continue that run, add `--ckpt_path last`" in capsys.readouterr().err


EVERY_2 = {"trainer": {"val_check_interval": 2}}
TOKENS = {"data": {"batch_size": None, "tokens_per_batch": 130}, "trainer": {"max_epochs": 3}, "save_every": 1}
FULL = {"model": {"lora": None}, "trainer": {"val_check_interval": 1}}
ACCUMULATED = {"trainer": {"accumulate_grad_batches": 2}, "save_every": 1}
long = pytest.mark.long


@pytest.mark.parametrize(
    ("changes", "variable", "at"),
    [
        ({}, "STOP_AT", 3),
        (EVERY_2, "STOP_IN_VALIDATION_AT", 4),
        (FULL, "STOP_AT", 3),
        (TOKENS, "STOP_AT", 5),
        pytest.param({}, "STOP_AT", 8, marks=long),
        pytest.param({}, "STOP_IN_VALIDATION_AT", 5, marks=long),
        pytest.param(EVERY_2, "STOP_AT", 3, marks=long),
        pytest.param(EVERY_2, "STOP_AT", 5, marks=long),
        pytest.param(FULL, "STOP_IN_VALIDATION_AT", 5, marks=long),
        pytest.param(ACCUMULATED, "STOP_AT", 2, marks=long),
        pytest.param(ACCUMULATED, "STOP_AT", 4, marks=long),
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(work, recipe, changes, variable, at, capsys):
    callbacks = {"callbacks": [{"class_path": "tests.cli.kill.Interrupt"}]}
    name = write(recipe, **{**changes, "trainer": {**changes.get("trainer", {}), **callbacks}})
    assert lit_did(f"fit -c {name} --output whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, str(at))
        assert lit_did(f"fit -c {name} --quiet") == 130
    (cut,) = Path("runs/recipe").iterdir()
    stopped = "Stopped. To continue: lit-did fit -c runs/recipe/version_0/config.yaml --ckpt_path last\n"
    assert capsys.readouterr().err.endswith(stopped)
    done = len([row for row in metrics(cut) if row["train/loss"]])
    assert 0 < done < len([row for row in metrics("whole") if row["train/loss"]])
    assert lit_did(f"fit -c {name} --ckpt_path last") == 0
    assert [cut] == list(Path("runs/recipe").iterdir())
    assert same_weights(checkpoint("whole"), checkpoint(cut))
    assert metrics("whole") == metrics(cut)
    assert checkpoint("whole", "best")["global_step"] == checkpoint(cut, "best")["global_step"]


def test_a_killed_run_continues(work, recipe, whole, capsys):
    """SIGKILL in the middle, in a process of its own; the run that `whole` is not interrupted in is the same one."""
    name = write(recipe, trainer={"val_check_interval": 2, "callbacks": [{"class_path": "tests.cli.kill.Kill"}]})
    killed = subprocess.run(
        [sys.executable, "-m", "lit_did", "fit", "-c", name],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STOP_AT": "5"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cut = work / "runs/recipe/version_0"
    assert b"Finished" not in killed.stdout
    assert b"The run begins" in killed.stdout
    assert b"GPU available" not in killed.stderr
    assert b"warning: train: The pairs are plain text" in killed.stderr
    assert checkpoint(cut)["global_step"] == 4
    assert lit_did(f"fit -c {name} --ckpt_path last") == 0
    assert "The run continues after step 4" in capsys.readouterr().out
    assert same_weights(checkpoint(whole), checkpoint(cut))
    assert metrics(whole) == metrics(cut)


@pytest.mark.parametrize(
    ("content", "reason"), [("empty", "it is empty"), ("half", "it is cut off"), ("text", "it is cut off")]
)
def test_a_half_written_checkpoint_is_named_and_the_newest_whole_one_used(work, whole, content, reason, capsys):
    shutil.copytree(whole, work / "run")
    last = work / "run/checkpoints/last.ckpt"
    whole_bytes = last.read_bytes()
    last.write_bytes({"empty": b"", "half": whole_bytes[: len(whole_bytes) // 2], "text": b"<html>"}[content])
    (work / "run/checkpoints/.last.ckpt.writing.ckpt").write_bytes(b"")
    best = torch.load(work / "run/checkpoints/best.ckpt", weights_only=True)["global_step"]
    with pytest.warns(
        UserWarning, match=rf"written: run/checkpoints/last\.ckpt \({reason}.*best\.ckpt, after {best} st"
    ) as caught:
        assert lit_did("fit -c run/config.yaml --output run --ckpt_path last") == 0
    assert not any(".writing" in str(warning.message) for warning in caught)
    assert f"The run continues after step {best}" in capsys.readouterr().out
    assert same_weights(checkpoint(whole), checkpoint("run"))
    assert metrics(whole) == metrics("run")
    for path in (work / "run/checkpoints").glob("*.ckpt"):
        path.write_bytes(b"")
    assert lit_did("fit -c run/config.yaml --output run --ckpt_path last") == 2
    assert "to hold a whole checkpoint, but none loads" in capsys.readouterr().err
    assert lit_did("validate -c run/config.yaml --ckpt_path run/checkpoints/best.ckpt") == 2
    assert "best.ckpt is not: it is empty." in capsys.readouterr().err


def test_a_run_that_max_steps_ended_within_an_epoch_goes_on_with_the_next_batch(work, recipe, capsys):
    name = write(recipe, model={"warmup_steps": 0, "schedule": "constant"})
    assert lit_did(f"fit -c {name} --output whole --trainer.max_steps 8 --quiet") == 0
    assert lit_did(f"fit -c {name} --output cut --trainer.max_steps 3") == 0
    assert "fit -c cut/config.yaml --ckpt_path last --trainer.max_steps N" in capsys.readouterr().out
    assert lit_did("fit -c cut/config.yaml --ckpt_path last") == 0
    assert "Nothing was left to train: the run ended after 3 steps, at trainer.max_steps" in capsys.readouterr().out
    assert lit_did("fit -c cut/config.yaml --ckpt_path last --trainer.max_steps 8 --quiet") == 0
    losses = [[row["train/loss"] for row in metrics(folder) if row["train/loss"]] for folder in ("whole", "cut")]
    assert losses[0] == losses[1]
    one, other = (checkpoint(folder)["state_dict"] for folder in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_last_finds_the_run_with_the_same_configuration(work, recipe, capsys):
    name = write(recipe, trainer={"max_epochs": 1}, model={"warmup_steps": 0})
    for beta in ("0.1", "0.2"):
        assert lit_did(f"fit -c {name} --model.beta {beta}") == 0
    capsys.readouterr()
    assert lit_did(f"fit -c {name} --ckpt_path last --trainer.max_epochs 2") == 0
    assert (
        "The run continues after step 5: 1,856 trained parameters, folder runs/recipe/version_0"
        in capsys.readouterr().out
    )
    assert checkpoint("runs/recipe/version_0")["global_step"] == 10
    assert lit_did(f"fit -c {name} --model.beta 0.3 --ckpt_path last") == 2
    err = capsys.readouterr().err
    assert "In the newest, runs/recipe/version_1, model.init_args.beta is 0.2, and not 0.3." in err
    with pytest.warns(UserWarning, match=r"with another configuration .* model.init_args.beta is 0.2, and not 0.3"):
        assert lit_did(f"fit -c {name} --model.beta 0.3 --output runs/recipe/version_1 --ckpt_path last") == 0


@pytest.mark.parametrize("kind", [LitDPO, LitDPOPG])
def test_a_run_reloads_and_measures_the_same(work, recipe, kind, capsys):
    lora = {**LORA, "target_modules": ["q_proj", "v_proj"]}
    init = {**recipe["model"], "lora": lora, "loss": "sigmoid", "adam_betas": [0.9, 0.99], "warmup_steps": 0}
    name = write({**recipe, "model": {"class_path": f"lit_did.{kind.__name__}", "init_args": init}})
    assert lit_did(f"fit -c {name} --trainer.max_epochs 1") == 0
    run = work / "runs/recipe/version_0"
    module = kind.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True)
    assert type(module) is kind
    assert module.hparams.lora == lora
    assert same_weights(checkpoint(run), {"state_dict": module.state_dict()})
    capsys.readouterr()
    assert lit_did(f"validate -c {run / 'config.yaml'} --ckpt_path last") == 0
    table = capsys.readouterr().out
    (row,) = (row for row in metrics(run) if row["val/loss"])
    (line,) = (line for line in table.splitlines() if "val/loss" in line)
    assert float(line.split("│")[2]) == pytest.approx(float(row["val/loss"]), rel=1e-6)
    assert lit_did(f"test -c {run / 'config.yaml'} --ckpt_path best --data.test {recipe['data']['train']}") == 0
    assert "test/reward_accuracy" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused(work, recipe, whole, capsys):
    last = whole / "checkpoints/last.ckpt"
    assert lit_did(f"validate -c {write(recipe, model={'lora': None})} --ckpt_path {last}") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Pass the `policy` and `lora` of the run that saved it." in err


def test_optimizer_and_scheduler_step_at_every_optimiser_step(work, recipe, capsys):
    model = {"learning_rate": None, "schedule": "constant", "warmup_steps": 0}
    name = write({**recipe, "model": {k: v for k, v in recipe["model"].items() if k not in model}})
    options = "--optimizer torch.optim.SGD --optimizer.lr 0.5 --lr_scheduler torch.optim.lr_scheduler.StepLR"
    options += " --lr_scheduler.step_size 1 --lr_scheduler.gamma 0.5"
    assert lit_did(f"fit -c {name} {options} --trainer.max_epochs 1 --output run") == 0
    saved = checkpoint("run")
    assert saved["optimizer_class"] == "SGD"
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5 * 0.5**5
    assert lit_did("fit -c run/config.yaml --ckpt_path last --trainer.max_epochs 2") == 0
    assert checkpoint("run")["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5 * 0.5**10
    with pytest.warns(UserWarning, match="does not hold the `(optimizer|lr_scheduler)` function"):
        LitDPO.load_from_checkpoint("run/checkpoints/last.ckpt")
    assert lit_did(f"fit -c {name} --optimizer torch.optim.SGD --model.optimizer torch.optim.SGD") == 2
    assert "Expected only one of `optimizer` and `model.optimizer`, but got both." in capsys.readouterr().err
    assert lit_did(f"fit -c {name} --optimizer torch.optim.SGD --model.learning_rate 1e-3") == 2
    assert "Expected `learning_rate` to be None, because `optimizer` replaces it" in capsys.readouterr().err


def test_values_of_yaml_reach_the_model(work, recipe):
    values = {"model_kwargs": {"dtype": "bfloat16"}, "loss": {"sigmoid": 0.8, "sft": 0.2}, "micro_batch_tokens": "auto"}
    name = write(recipe, model={**values, "warmup_steps": 0}, trainer={"precision": "bf16-true", "max_steps": 1})
    assert lit_did(f"fit -c {name} --output run") == 0
    saved = checkpoint("run")
    assert saved["hyper_parameters"]["loss"] == values["loss"]
    assert saved["hyper_parameters"]["model_kwargs"] == {"dtype": "bfloat16"}
    module = LitDPO.load_from_checkpoint("run/checkpoints/last.ckpt", weights_only=True)
    assert next(module.policy.get_base_model().parameters()).dtype == torch.bfloat16
    assert lit_did(f"fit -c {name} --model.lora.r 3 --output run2") == 0
    assert checkpoint("run2")["hyper_parameters"]["lora"] == {**LORA, "r": 3}


def test_print_config_is_a_recipe(work, recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        lit_did(f"fit -c {write(recipe)} --print_config")
    assert stop.value.code in (0, None)
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert yaml.safe_load(Path("printed.yaml").read_text())["model"]["init_args"]["lora"] == LORA
    assert lit_did("fit -c printed.yaml --trainer.max_steps 2") == 0


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_help_is_one_screen_and_the_rest_is_behind_another(work, command, capsys):
    assert lit_did(f"{command} --help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 110
    assert any(line.startswith("  --model.beta ") and line.endswith("(0.1)") for line in lines)
    for section, option in (("model", "padding_free"), ("data", "truncation"), ("trainer", "profiler")):
        assert lit_did(f"{command} --{section}.help") == 0
        shown = capsys.readouterr().out
        assert f"--{section}.{option} " in shown
        assert not any(f"--{other}." in shown for other in {"model", "data", "trainer"} - {section})


def test_predict_writes_a_table_and_refuses_to_overwrite_it(work, recipe, whole, capsys):
    shutil.copytree(whole, work / "run")
    assert lit_did("predict -c run/config.yaml --output run --ckpt_path best") == 0
    assert capsys.readouterr().out.endswith("Written: run/scores.csv\n")
    with Path("run/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    best = min(float(row["val/loss"]) for row in metrics(whole) if row["val/loss"])
    margins = torch.tensor([float(row["reward_margin"]) for row in rows])
    assert -torch.nn.functional.logsigmoid(margins).mean().item() == pytest.approx(best, rel=1e-5)
    assert lit_did("predict -c run/config.yaml --output run") == 2
    assert "a folder without scores.csv, but run/scores.csv exists." in capsys.readouterr().err
    writer = "--trainer.callbacks lit_did.callbacks.ScoreWriter --trainer.callbacks.output other.csv"
    assert lit_did(f"predict -c {write(recipe)} {writer}") == 0
    assert capsys.readouterr().out == "Written: other.csv\n"


@pytest.mark.long
def test_two_processes_write_one_run(work, recipe):
    trainer = {"devices": 2, "strategy": "ddp", "max_epochs": 1}
    name = write(recipe, trainer=trainer, data={"batch_size": 1}, model={"warmup_steps": 0})
    command = [sys.executable, "-m", "lit_did", "fit", "-c", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = run_program(*command, environment=environment, cwd=work)
    assert out.count("Finished after 5 steps: runs/recipe/version_0") == 1
    out = run_program(*command, "--ckpt_path", "last", "--trainer.max_epochs", 2, environment=environment, cwd=work)
    assert out.count("The run continues after step 5") == 1
    assert [path.name for path in Path("runs/recipe").iterdir()] == ["version_0"]
    assert [int(row["step"]) for row in metrics("runs/recipe/version_0") if row["train/loss"]] == list(range(10))
    Path("wrong.jsonl").write_text("{}\n")
    wrong = subprocess.run(
        [*command, "--data.train", "wrong.jsonl"], env=environment, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.count("error: ") == 1
    assert "Traceback" not in wrong.stderr
    assert not Path("runs/recipe/version_1").exists()


def test_a_disk_that_is_full_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    def half(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"a": 1}, path)
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        WholeCheckpoints().save_checkpoint({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_progress_bar_needs_a_terminal_and_no_quiet(work, recipe, monkeypatch):
    name = write(recipe)
    assert Training("fit", ["-c", name]).trainer.progress_bar_callback is None
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert Training("fit", ["-c", name]).trainer.progress_bar_callback is not None
    assert Training("fit", ["-c", name, "--quiet"]).trainer.progress_bar_callback is None


def test_own_checkpoints_and_a_trial_run(work, recipe, capsys):
    init = {"filename": "own", "monitor": "val/kl"}
    own = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": init}
    assert lit_did(f"fit -c {write(recipe, trainer={'callbacks': [own], 'max_epochs': 1})} --output run") == 0
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {"own.ckpt", "last.ckpt"}
    assert lit_did(f"fit -c {write(recipe)} --trainer.fast_dev_run true --model.warmup_steps 0") == 0
    assert not Path("runs/recipe/version_0").exists()

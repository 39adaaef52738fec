"""The folders of training runs: which one a run takes, and which checkpoint it continues from."""

from __future__ import annotations

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from lit_did.cli import runs
from lit_did.cli.errors import InputError
from lit_did.cli.run_files import LastCheckpoint, MetricsFile
from lit_did.exporting.checkpoints import whole_checkpoints

FULL = {"lr_schedulers": []}


def save(path, step, time=0, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, **content}, path)
    os.utime(path, (time, time))


def test_the_newest_checkpoint_is_that_of_most_steps_and_then_the_latest(tmp_path):
    for name, step, time in (("a", 1, 3), ("b", 5, 1), ("c", 5, 2), ("d", 3, 4), (".e", 9, 9)):
        save(tmp_path / "checkpoints" / f"{name}.ckpt", step, time, **FULL)
    whole, broken = whole_checkpoints(tmp_path)
    assert [checkpoint.path.stem for checkpoint in whole] == ["c", "b", "d", "a"]
    assert not broken
    found = runs.find_checkpoint("last", tmp_path, trains=True)
    assert (found.path, found.step) == (tmp_path / "checkpoints/c.ckpt", 5)


def test_of_several_runs_the_one_that_wrote_last_comes_first(tmp_path):
    for run, step, time in (("version_0", 9, 1), ("version_1", 2, 5)):
        save(tmp_path / run / "checkpoints/last.ckpt", step, time)
        save(tmp_path / run / "checkpoints/val/best.ckpt", 1, time - 1)
    assert [checkpoint.step for checkpoint in whole_checkpoints(tmp_path)[0]] == [2, 1, 9, 1]


def test_training_does_not_continue_from_weights_alone(tmp_path):
    save(tmp_path / "checkpoints/weights.ckpt", 5)
    for path in ("last", str(tmp_path / "checkpoints/weights.ckpt")):
        with pytest.raises(InputError, match=r"to train from, but .* was saved with `save_weights_only`"):
            runs.find_checkpoint(path, tmp_path, trains=True)
        assert runs.find_checkpoint(path, tmp_path, trains=False).step == 5
    save(tmp_path / "checkpoints/last.ckpt", 4, **FULL)
    assert runs.find_checkpoint("last", tmp_path, trains=True).step == 4


def test_runs_that_start_together_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: runs.take_next("dpo"), range(8)))
    assert len(set(folders)) == 8
    with pytest.raises(InputError, match=r"version_0 holds a run. To continue"):
        runs.take(folders[0].with_name("version_0"))
    runs.leave(folders[0])
    assert not folders[0].exists()


def test_one_of_two_runs_gets_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "any", lambda _: False, raising=False)  # both have seen it empty
    runs.take(tmp_path)
    with pytest.raises(InputError, match="another run has just begun"):
        runs.take(tmp_path)


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("mine")
    with pytest.raises(InputError, match=r"new or empty folder, but .* holds other files"):
        runs.take(tmp_path)
    runs.leave(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_run_without_a_checkpoint_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        runs.take_next("dpo")
        (tmp_path / f"runs/dpo/version_{number}/config.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match=r"none has a checkpoint. .* with --output"):
        runs.find_run("dpo", {"seed": 1}, ())
    with pytest.raises(InputError, match=r"it holds none. Give the folder of another run with --output"):
        runs.find_checkpoint("last", tmp_path / "runs/dpo/version_0", trains=True)
    save(tmp_path / "runs/dpo/version_0/checkpoints/last.ckpt", 1)
    assert runs.find_run("dpo", {"seed": 1}, ()).name == "version_0"


@pytest.mark.parametrize("content", [b"model: {", b"[1]", b"", b"\xff\xfe\x00m"])
def test_a_configuration_that_is_broken_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.yaml to be the configuration of a run.* delete that file"):
        runs.differing(tmp_path, {"seed": 1})


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("epoch,step,x\r\n0,0,1\r\n0,1,2\r\n0,1", ["0", "1"]),
        ("epoch,step,x\r\n0,0,1\r\n0", ["0"]),
        ("epoch,step,x\n0,,1\n0,1,2\n", ["1"]),
        ("a,b\n1,2\n", []),
        ("", []),
    ],
)
def test_rows_of_metrics_that_are_cut_off_are_dropped(tmp_path, content, kept):
    (tmp_path / "metrics.csv").write_bytes(content.encode())
    assert MetricsFile(tmp_path, first_step=5).experiment.metrics == []  # what is kept is in the file
    path = tmp_path / "metrics.csv"
    assert [row["step"] for row in (csv.DictReader(path.open(newline="")) if path.exists() else ())] == kept


def test_every_rank_writes_the_last_checkpoint_where_rank_0_does(tmp_path):
    callback = LastCheckpoint(tmp_path / "version_1/last.ckpt", 1)
    rank_0 = str(tmp_path / "version_0/last.ckpt")
    callback.setup(SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda _: rank_0)), None, "fit")
    assert str(callback.path) == rank_0

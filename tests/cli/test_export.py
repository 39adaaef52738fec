"""`lit-did export`: options, exit codes and one line for what can be mended."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_did.cli.main import main
from tests.exporting.runs import LORA, run


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), str(tiny_model), lora=LORA)[2]


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_an_adapter_and_a_merged_model(checkpoint, tmp_path, capsys):
    assert export(checkpoint, tmp_path / "adapter") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Written: {tmp_path}/adapter, an adapter for /")
    assert f'AutoTokenizer.from_pretrained("{tmp_path}/adapter")' in printed
    assert export(checkpoint.parent, tmp_path / "merged", "--merge", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    for name in ("adapter", "merged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tmp_path / name)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        export("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("checkpoint", "folder", "--policy", "--tokenizer", "--merge", "--quiet", "It must be new or empty"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.ckpt", "out"), "nowhere.ckpt is not there"),
        (("text.ckpt", "out"), "text.ckpt to be a whole checkpoint of Lightning"),
        (("empty", "out"), "empty holds none"),
        (("CHECKPOINT", "taken/"), "taken is a folder with files"),
        (("CHECKPOINT", "out", "--policy", "./nowhere"), "nowhere is not a folder"),
        (("CHECKPOINT", "out", "--tokenizer", "./nowhere"), "nowhere is not a folder"),
        (("CHECKPOINT", "out", "--merged"), "merged"),
        (("CHECKPOINT",), "folder"),
        (("CHECKPOINT", "out", "--merge=maybe"), "merge"),
    ],
)
def test_what_can_be_mended_is_one_line(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    assert export(*(checkpoint if argument == "CHECKPOINT" else argument for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()

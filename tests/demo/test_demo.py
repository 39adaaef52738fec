"""The demo end to end on a tiny model, on real pairs with the real one, and its answers to input it cannot use."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_did import LitDPO
from lit_did.data import read_pairs
from lit_did.demo import __main__ as demo
from lit_did.models.smollm2 import smollm2

pytestmark = pytest.mark.filterwarnings("ignore:.* pairs are longer than max_length")


def run(*arguments: object) -> int:
    return demo.main([str(argument) for argument in arguments])


def test_shipped_pairs():
    pairs = [row.pair for row in read_pairs(demo.PAIRS)]
    assert len(pairs) >= 120
    for part in (pairs, pairs[-len(pairs) // 5 :]):  # the last fifth is held out
        tags = [pair.tag for pair in part]
        assert set(tags) == {"open-ended", "factual"}
        assert abs(tags.count("factual") / len(tags) - 0.5) < 0.05
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    longer = sum(len(pair.rejected) > len(pair.chosen) for pair in pairs) / len(pairs)
    assert 0.3 < longer < 0.7  # length is not the signal


def test_trains_writes_and_saves(tiny_model, tmp_path, capsys, monkeypatch, recwarn):
    monkeypatch.setenv("COLUMNS", "80")
    output, saved = tmp_path / "new" / "out", tmp_path / "saved"
    status = run(
        "--model", tiny_model, "--output", output, "--save", saved, "--max-steps", 6, "--val-every", 4,
        "--max-pairs", 30, "--max-length", 512, "--learning-rate", 0.02,
    )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    shown = [str(warning.message) for warning in recwarn if not issubclass(warning.category, DeprecationWarning)]
    assert all("are longer than max_length" in text for text in shown)
    bars = [line for line in re.split(r"[\r\n]", printed) if line.startswith(("Training ", "Held-out pairs "))]
    assert any(
        re.search(r"Training 6/6 \|.*/s, 00:00 left, loss \d\.\d{3}, concentration \d\.\d{3}$", bar) for bar in bars
    )
    assert max(map(len, bars)) <= 80
    assert re.search(r"pairs +│ +3 │ +3 │ +6 │", printed)
    assert "0.693 → " in printed
    assert "After 6 steps " in printed
    assert str(output / "metrics.csv") in printed.replace("\n", "")
    assert f"Written: {saved}, an adapter for {tiny_model}, with its tokenizer." in printed
    assert sorted(p.name for p in output.iterdir()) == ["held_out.png", "metrics.csv", "training.png"]
    assert list(output.parent.iterdir()) == [output]  # no working folder is left
    assert sorted(tmp_path.iterdir()) == [output.parent, saved]
    rows = list(csv.DictReader((output / "metrics.csv").open()))
    training = [row for row in rows if row["train/loss"]]
    assert [int(row["step"]) for row in training] == list(range(6))
    assert float(training[0]["train/loss"]) == pytest.approx(0.6931, abs=1e-4)
    assert len([row for row in rows if row["val/loss"]]) == 3  # before, after 4 steps, after all
    for name in ("training.png", "held_out.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")

    tokens = AutoTokenizer.from_pretrained(saved)("What is new?", return_tensors="pt")
    before, after = (AutoModelForCausalLM.from_pretrained(path)(**tokens).logits for path in (tiny_model, saved))
    assert not torch.equal(before, after)


def test_a_folder_with_files_is_not_saved_to(tiny_model, tmp_path, capsys):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    message = refused(capsys, "--model", tiny_model, "--output", tmp_path / "out", "--save", tmp_path / "saved")
    assert "--save to be new or empty" in message


def test_untagged_pairs_plain_loop_and_second_run_overwrites(tiny_model, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(5))
    )
    for _ in range(2):
        assert run("--model", tiny_model, "--data", data, "--output", tmp_path / "out", "--max-steps", 1) == 0
    assert "all pairs" in capsys.readouterr().out


def test_real_model_on_real_pairs(real_data, tmp_path, capsys):
    data = real_data("alpacaeval_pairs.jsonl")
    try:
        smollm2()
    except RuntimeError as error:
        pytest.skip(str(error))
    arguments = ["--data", data, "--max-pairs", 8, "--max-steps", 3, "--batch-size", 2, "--max-length", 128]
    assert run(*arguments, "--output", tmp_path / "out") == 0
    metrics = csv.DictReader((tmp_path / "out" / "metrics.csv").open())
    rows = [row for row in metrics if row["train/loss"]]
    assert float(rows[0]["train/loss"]) == pytest.approx(0.6931, abs=1e-3)
    # The entropy of a language model's text, not of noise: far below log V = 10.8, above 0.
    assert 0.5 < float(rows[0]["train/policy_entropy"]) < 5
    assert 10 < float(rows[-1]["train/token_did_entropy"]) < 10.81


def refused(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def test_data_that_cannot_be_used(tiny_model, tmp_path, capsys):
    output = tmp_path / "out"
    common = ["--model", tiny_model, "--output", output, "--data"]
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"

    assert "pears.jsonl does not exist" in refused(capsys, *common, tmp_path / "pears.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl: Expected preference pairs, but got none" in refused(capsys, *common, tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text(good * 3 + '{"prompt": "a", "chosen": "b"\n' + good)
    assert "bad.jsonl, line 4: Expected one JSON object" in refused(capsys, *common, tmp_path / "bad.jsonl")
    (tmp_path / "short.jsonl").write_text(good * 3 + '{"prompt": "a", "chosen": "b"}\n')
    assert "short.jsonl, line 4: Expected the keys" in refused(capsys, *common, tmp_path / "short.jsonl")
    (tmp_path / "one.jsonl").write_text(good)
    assert "rows left after holding out" in refused(capsys, *common, tmp_path / "one.jsonl")
    assert not output.exists()
    assert not list(tmp_path.glob(".lit_did*"))


def test_models_that_cannot_be_used(tmp_path, capsys, tiny_model):
    assert "nowhere is not a folder" in refused(capsys, "--model", tmp_path / "nowhere")
    assert "holds neither config.json nor adapter_config.json" in refused(capsys, "--model", tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "broken does not: " in refused(capsys, "--model", tmp_path / "broken")
    (tmp_path / "file").write_text("")
    assert "--output to be a folder" in refused(capsys, "--model", tiny_model, "--output", tmp_path / "file")


def test_more_tokens_than_positions_and_folders_that_cannot_be_made(tiny_model, tmp_path, capsys):
    assert "within the model's 512 positions, but got 513" in refused(
        capsys, "--model", tiny_model, "--output", tmp_path / "out", "--max-length", 513
    )
    (tmp_path / "file").write_text("")
    assert "folder that can be made" in refused(capsys, "--model", tiny_model, "--output", tmp_path / "file" / "out")
    with pytest.raises(SystemExit, match="2"):
        run("--seed", 2**32)


@pytest.mark.filterwarnings("ignore:`val/loss` is NaN or infinite")
def test_a_run_that_diverges_ends_with_one_line(tiny_model, tmp_path, capsys):
    arguments = ["--max-pairs", 10, "--max-steps", 3, "--learning-rate", 1e30]
    assert run("--model", tiny_model, "--output", tmp_path / "out", *arguments) == 2
    assert "error: Expected a finite loss in every optimiser step" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(tiny_model, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LitDPO, "training_step", interrupt)
    assert run("--model", tiny_model, "--output", tmp_path / "out", "--max-pairs", 10) == 130
    assert "Stopped; nothing was written." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-steps", "0"], "--max-steps: expected a number above 0, but got 0"),
        (["--val-fraction", "1"], "--val-fraction: expected a number between 0 and 1, but got 1"),
        (["--beta", "x"], "--beta: invalid float value: 'x'"),
        (["--loss", "dpo"], "--loss: invalid choice: 'dpo'"),
    ],
)
def test_options_out_of_range(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    assert message in capsys.readouterr().err

"""Every example runs as it stands, on a tiny model, logs the DID, and is short."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from tests.processes import run_program

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def run(example: str, folder: Path, model: Path, steps: int) -> str:
    path = next(path for path in EXAMPLES if path.name == example)
    return run_program(sys.executable, path, "--model", model, "--max-steps", steps, cwd=folder)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_there_are_three():
    assert [path.name for path in EXAMPLES] == ["own_lightning_module.py", "plain_loop.py", "trl_dpo.py"]


def test_own_lightning_module(tiny_model, tmp_path):
    printed = run("own_lightning_module.py", tmp_path, tiny_model, 10)
    names = {line.split()[0] for line in printed.splitlines() if line.strip()}
    assert names >= {"did/train/token_did_entropy", "did/val/kl", "my/token_did_entropy", "my/reward_accuracy"}
    rows = list(csv.DictReader((tmp_path / "did_logs" / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["did/train/kl"]] == ["4", "9"]


@pytest.mark.long
def test_trl(tiny_model, tmp_path):
    printed = run("trl_dpo.py", tmp_path, tiny_model, 10)
    lines = [line for line in printed.splitlines() if line[:1].isdigit()]  # the trainer prints its entries too
    assert [line.split()[0] for line in lines if "'did/kl'" in line] == ["5", "10"]
    assert [line.split()[0] for line in lines if "'eval_did/kl'" in line] == ["10"]


@pytest.mark.long
def test_plain_loop(tiny_model, tmp_path):
    printed = run("plain_loop.py", tmp_path, tiny_model, 3)
    assert "step 0: loss 0.6931" in printed
    assert "step 2: " in printed
    values = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if "->" in line}
    before, _, after = values["chosen_log_ratio"]
    assert float(before) == 0
    assert float(after) != 0

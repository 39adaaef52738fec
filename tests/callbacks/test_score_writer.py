"""ScoreWriter: trainer.predict writes the table of score_pairs, on one process and on two."""

from __future__ import annotations

import csv
import json
import math
import sys

import pytest
import torch
from lightning.pytorch.cli import instantiate_class

from lit_did import LitDPO, PreferenceDataModule
from lit_did.callbacks import ScoreWriter
from lit_did.scoring import score_pairs
from tests.modules.tiny import byte_tokenizer, loader, make_pairs, tiny_llama, trainer
from tests.processes import run_program

PAIRS = [
    {"prompt": f"What is {i}? " * (1 + i % 3), "chosen": f" {i}" * (i % 3 + 1), "rejected": " no", "source": {"n": i}}
    for i in range(7)
]
TOKENIZER = byte_tokenizer()
OPTIONS = {"max_length": 30, "truncation": "prompt"}
pytestmark = pytest.mark.filterwarnings("ignore:.*are longer than max_length")


def model(seed: int):
    return tiny_llama(seed, vocab_size=len(TOKENIZER), max_position_embeddings=128)


def module(**options) -> LitDPO:
    return LitDPO(model(0), model(1), **options)


def data(**options) -> PreferenceDataModule:
    return PreferenceDataModule(None, TOKENIZER, **{"predict": PAIRS, "batch_size": 2, **OPTIONS, **options})


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def predict(path, given=None, **options):
    run = trainer(callbacks=[ScoreWriter(path, **options)])
    return run.predict(module(), given or data(), return_predictions=False)


def assert_close(mine: list[dict], expected: list[dict]) -> None:
    assert [list(row) for row in mine] == [list(row) for row in expected]
    for row, other in zip(mine, expected, strict=True):
        for name in row:
            if name in ("source", "truncated"):
                assert row[name] == str(other[name])
            else:
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-5), name


def test_writes_the_table_of_score_pairs(tmp_path):
    pytest.importorskip("pandas")
    assert predict(tmp_path / "new" / "scores.csv") is None  # return_predictions=False
    frame = score_pairs(PAIRS, model(0), model(1), tokenizer=TOKENIZER, beta=0.1, progress=False, **OPTIONS)
    frame["source"] = list(map(json.dumps, frame["source"]))
    written = table(tmp_path / "new" / "scores.csv")
    assert_close(written, frame.to_dict("records"))
    assert {row["truncated"] for row in written} == {"True", "False"}


def test_two_processes_write_one_table(tmp_path):
    run_program(sys.executable, "-m", "tests.callbacks.two_processes_scores", tmp_path)
    predict(tmp_path / "one.csv")
    two = table(tmp_path / "two.csv")
    assert [row["index"] for row in two] == [str(i) for i in range(7)]  # of an odd number, one is padded
    assert_close(two, table(tmp_path / "one.csv"))


def test_pairs_held_out_of_training(tmp_path):
    held_out = PreferenceDataModule(PAIRS, TOKENIZER, val_fraction=0.3, batch_size=2, **OPTIONS)
    predict(tmp_path / "scores.csv", held_out, texts=True)
    written = table(tmp_path / "scores.csv")
    assert [row["index"] for row in written] == ["5", "6"]
    assert [row["chosen"] for row in written] == [row["chosen"] for row in PAIRS[5:]]


def test_validation_pairs_have_their_own_columns(tmp_path):
    other = [{**pair, "source": "train"} for pair in PAIRS]
    predict(tmp_path / "scores.csv", PreferenceDataModule(other, TOKENIZER, val=PAIRS, batch_size=2, **OPTIONS))
    assert [json.loads(row["source"]) for row in table(tmp_path / "scores.csv")] == [row["source"] for row in PAIRS]


def test_without_a_reference(tmp_path):
    run = trainer(callbacks=[ScoreWriter(tmp_path / "scores.csv")])
    run.predict(LitDPO(model(0), loss="simpo"), data(), return_predictions=False)
    (first, *_) = table(tmp_path / "scores.csv")
    assert math.isnan(float(first["margin"]))
    assert math.isfinite(float(first["reward_margin"]))


def test_from_yaml(tmp_path):
    path = "lit_did.callbacks.ScoreWriter"
    writer = instantiate_class((), {"class_path": path, "init_args": {"output": str(tmp_path / "scores.csv")}})
    trainer(callbacks=[writer]).predict(module(), data(), return_predictions=False)
    assert len(table(tmp_path / "scores.csv")) == 7


def test_refuses_before_it_predicts(tmp_path):
    with pytest.raises(ValueError, match="Expected `output` to end in"):
        ScoreWriter("scores.txt")
    (tmp_path / "scores.csv").write_text("precious")
    with pytest.raises(FileExistsError, match=r"scores.csv exists. Choose another name, or pass `overwrite=True`"):
        predict(tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text() == "precious"
    predict(tmp_path / "scores.csv", overwrite=True)
    assert len(table(tmp_path / "scores.csv")) == 7
    with pytest.raises(TypeError, match=r"Expected `trainer.predict` to be called with a PreferenceDataModule"):
        trainer(callbacks=[ScoreWriter(tmp_path / "other.csv")]).predict(module(), loader(make_pairs(2), 1))


def test_refuses_other_predictions(tmp_path):
    class Other(LitDPO):
        def predict_step(self, batch, batch_idx):
            return torch.zeros(1)

    run = trainer(callbacks=[ScoreWriter(tmp_path / "scores.csv")])
    with pytest.raises(TypeError, match=r"Expected `predict_step` to return PairStatistics, .* got Tensor from Other"):
        run.predict(Other(model(0), model(1)), data())

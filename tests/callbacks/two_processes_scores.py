"""Predicts pairs on two CPU processes, which write one table: run by test_score_writer.py.

python -m tests.callbacks.two_processes_scores FOLDER
"""

from __future__ import annotations

import sys

from lit_did.callbacks import ScoreWriter
from tests.callbacks.test_score_writer import data, module
from tests.modules.tiny import trainer
from tests.processes import run_ranks


def main(folder: str) -> None:
    run = trainer(devices=2, strategy="ddp", callbacks=[ScoreWriter(f"{folder}/two.csv")])
    run.predict(module(), data(), return_predictions=False)


if __name__ == "__main__":
    run_ranks(2, main, sys.argv[1])

"""DPOTrainer with DIDCallback on one process and on two: run by test_two_processes.py.

python -m tests.integrations.two_processes FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from lit_did.integrations.trl import DIDCallback
from tests.integrations.tiny_trl import llama, trainer
from tests.processes import run_ranks


def main(processes: int, folder: Path) -> None:
    # 4 pairs a step either way; 5 pairs to evaluate: with two processes one is repeated
    size = 4 // processes
    run = trainer(
        folder,
        llama(0),
        llama(1),
        gradient_accumulation_steps=1,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=1,
        max_steps=3,
        eval_steps=3,
        lr_scheduler_type="constant",
        optim="sgd",
        seed=1,
        ddp_backend="gloo" if processes > 1 else None,
    )
    run.add_callback(DIDCallback(run))
    run.train()
    torch.save(run.state.log_history, folder / f"history.{processes}.{run.args.process_index}")


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for number in (1, 2):
        run_ranks(number, main, number, Path(sys.argv[1]))

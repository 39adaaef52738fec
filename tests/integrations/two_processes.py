"""DPOTrainer with DIDCallback on one or two gloo processes: run by test_two_processes.py.

python -m tests.integrations.two_processes PROCESSES FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lit_did.integrations.trl import DIDCallback
from tests.integrations.tiny_trl import llama, trainer
from tests.processes import run_ranks


def main(folder: Path) -> None:
    processes, rank = dist.get_world_size(), dist.get_rank()
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
        ddp_backend="gloo",
    )
    run.add_callback(DIDCallback(run))
    run.train()
    torch.save(run.state.log_history, folder / f"history.{processes}.{rank}")


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    run_ranks(int(sys.argv[1]), main, Path(sys.argv[2]))

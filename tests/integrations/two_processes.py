"""DPOTrainer with DIDCallback on one or two gloo processes: run by test_two_processes.py, under accelerate's variables.

python -m tests.integrations.two_processes FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from lit_did.integrations.trl import DIDCallback
from tests.integrations.tiny_trl import llama, trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
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
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    # Without Python's and the C++ runtime's clean-up, in which gloo's threads may abort a process that is done.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

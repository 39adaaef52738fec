"""Trains with ExportPolicy on one CPU process and on two: run by test_export_policy.py.

python -m tests.callbacks.exporting_processes KIND MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_did import LitDPO, PreferenceDataModule
from lit_did.callbacks import ExportPolicy
from tests.exporting.runs import LORA, ROWS
from tests.modules.tiny import trainer
from tests.processes import run_ranks


def main(processes: int, kind: str, model: str, folder: Path) -> None:
    torch.manual_seed(7)
    sharded = kind.startswith("sharded") and processes > 1
    by_tensors = kind == "tensor parallel" and processes > 1
    module = LitDPO(
        model,
        lora={**LORA, "init_lora_weights": False} if "lora" in kind else None,
        learning_rate=1e-2,
        adam_eps=1e-3,
    )
    save = ModelCheckpoint(folder / f"checkpoints{processes}", monitor="val/reward_margin", mode="min")
    trainer(
        devices=processes,
        strategy=ModelParallelStrategy(1, 2)
        if by_tensors
        else ModelParallelStrategy(2, 1)
        if sharded
        else "ddp"
        if processes > 1
        else "auto",
        max_epochs=2,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        callbacks=[ExportPolicy(folder / str(processes)), save],
    ).fit(
        module,
        PreferenceDataModule(
            ROWS,
            model,
            val=ROWS[:5],
            batch_size=4 if by_tensors else 4 // processes,
            max_length=64,
            as_chat=True,
            shuffle=False,
        ),
    )


if __name__ == "__main__":
    for number in (1, 2):
        run_ranks(number, main, number, sys.argv[1], sys.argv[2], Path(sys.argv[3]))

"""The demo's progress: one line, in training and while held-out pairs are measured, with seconds per step."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

SHOWN = {"loss": "train/loss", "concentration": "train/token_did_concentration"}
"""What stands beside the bar: more than two values do not fit in 80 columns."""


class OneLineProgress(ProgressBar):
    """A bar over all optimiser steps. While held-out pairs are measured, theirs takes its place."""

    def __init__(self) -> None:
        super().__init__()
        self._training: tqdm | None = None
        self._held_out: tqdm | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._training = _bar("Training", trainer.max_steps, "step")

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        bar = self._training
        if bar is None or trainer.global_step == bar.n:  # not the last micro-batch of its step
            return
        values = {name: trainer.callback_metrics.get(metric) for name, metric in SHOWN.items()}
        shown = [f"{name} {float(value):.3f}" for name, value in values.items() if value is not None]
        bar.set_postfix_str(", ".join(shown), refresh=False)
        bar.n = trainer.global_step
        bar.refresh()

    def on_train_end(self, *args: Any) -> None:
        self._close("_training")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._training is not None:
            self._training.clear()
        batches = sum(int(number) for number in trainer.num_val_batches)
        self._held_out = _bar("Held-out pairs", batches, "batch", leave=self._training is None)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._held_out is not None:
            self._held_out.update()

    def on_validation_end(self, *args: Any) -> None:
        self._close("_held_out")
        if self._training is not None:
            self._training.refresh()

    def on_exception(self, *args: Any) -> None:
        self._close("_held_out")
        self._close("_training")

    def _close(self, name: str) -> None:
        bar = getattr(self, name)
        setattr(self, name, None)
        if bar is not None:
            bar.close()


def _bar(name: str, total: int, unit: str, leave: bool = True) -> tqdm:
    return tqdm(
        desc=name,
        total=total,
        unit=unit,
        leave=leave,
        position=0,
        file=sys.stdout,
        ncols=shutil.get_terminal_size().columns,
        nrows=2,  # the first is enough: tqdm draws nothing in a terminal whose height is not known
        smoothing=0,
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {rate_fmt}, {remaining} left{postfix}",
    )

"""Which optimiser steps of a run are logged. It is the same on all processes, which exchange sums in these steps."""

from __future__ import annotations

import math
from typing import Any

PREFIX = "train/"


def is_logged(trainer: Any, batch_idx: int) -> bool:
    """Whether the metrics of the optimiser step that a training batch belongs to are logged.

    They are where Lightning writes to loggers (`log_every_n_steps`, `fast_dev_run`), and in the last step of an epoch
    and of the run. If a callback or a learning rate schedule monitors one of them, they are in every step.

    Args:
        trainer: The lightning.Trainer.
        batch_idx: The number of the batch in its epoch.
    """
    every, batches = trainer.log_every_n_steps, trainer.num_training_batches
    if trainer.fast_dev_run or (every and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0):
        return True
    step = batch_idx // trainer.accumulate_grad_batches  # in the epoch
    if math.isfinite(batches) and step == (batches - 1) // trainer.accumulate_grad_batches:
        return True
    return trainer.global_step + 1 == trainer.max_steps or _is_monitored(trainer)


def _is_monitored(trainer: Any) -> bool:
    names = [getattr(callback, "monitor", None) for callback in trainer.callbacks]
    names += [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    return any(isinstance(name, str) and name.startswith(PREFIX) for name in names)

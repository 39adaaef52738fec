"""The folder of a run, below which callbacks write."""

from __future__ import annotations

from pathlib import Path

import lightning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: lightning.Trainer) -> Path:
    """The folder of the Trainer's first logger if it has one for each run, or else `default_root_dir`.

    The loggers of CSV files and of TensorBoard have one, `version_0` and so on. All processes call this and get the
    first one's.
    """
    own = bool(trainer.loggers) and isinstance(trainer.loggers[0], CSVLogger | TensorBoardLogger)
    folder = trainer.log_dir if own else trainer.strategy.broadcast(trainer.default_root_dir)
    return Path(folder or trainer.default_root_dir).absolute()

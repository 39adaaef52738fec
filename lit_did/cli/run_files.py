"""What a training run writes into its folder: config.yaml, metrics.csv and checkpoints, each whole or not at all."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_did.cli.runs import CONFIG
from lit_did.writing import whole_file


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, so that a kill or a full disk leaves the older one.

    Lightning's own writes it into the folder for temporary files first. From another filesystem, it is copied and not
    moved, and a copy can be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes `checkpoint` to `path`."""
        if "://" in str(path):  # not on this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(path)) as beside:
            torch.save(checkpoint, beside)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, from which a run continues exactly: every few optimiser steps, and at the end.

    If validation follows a step, the checkpoint is written after it. Otherwise a run that is killed in validation would
    continue behind it. Where `max_steps` ends a run within an epoch, the checkpoint is written before Lightning counts
    the epoch as done, so that a longer run takes the epoch's next batch. All ranks write where rank 0 does: it alone
    has taken the folder.

    Args:
        path: The file.
        every_n_steps: The optimiser steps from one to the next.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self._step = 0  # the last that was saved, or is about to be
        self._due = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.path = Path(trainer.strategy.broadcast(str(self.path)))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any, **__: Any) -> None:
        last = trainer.global_step == trainer.max_steps
        if trainer.global_step == self._step or (trainer.global_step % self.every_n_steps and not last):
            return
        self._step, self._due = trainer.global_step, True
        loop: Any = trainer.fit_loop
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._due:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        loop: Any = trainer.fit_loop
        within = trainer.global_step == trainer.max_steps and not loop.epoch_loop.batch_progress.is_last_batch
        if not (within and self._step == trainer.global_step):
            self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        self._due = False
        trainer.save_checkpoint(self.path)


class MetricsFile(CSVLogger):
    """Writes metrics.csv at every logged step. A run that continues keeps the rows before its first step.

    Args:
        folder: The folder of the run.
        first_step: The optimiser steps that are done.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__(str(folder), name="", version="", flush_logs_every_n_steps=1)
        self._first_step: int | None = first_step

    @property
    def experiment(self) -> Any:
        """Lightning's writer, which begins with the rows that are kept."""
        if self._first_step is None or getattr(rank_zero_only, "rank", None):
            return super().experiment
        path = Path(self.log_dir) / "metrics.csv"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        rows = csv.DictReader(line for line in lines if line.endswith("\n"))  # a kill may have cut the last one off
        kept = [row for row in rows if (row.get("step") or "").isdecimal() and int(row["step"]) < self._first_step]
        self._first_step = None
        writer: Any = super().experiment  # it removes the file
        writer.metrics += [{name: value for name, value in row.items() if value} for row in kept]
        writer.save()
        return writer


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml, once, on rank 0.

    Args:
        parser: The parser.
        config: What it has parsed.
        folder: The folder of the run.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / CONFIG) as beside:
            self.parser.save(self.config, beside, skip_none=False, overwrite=True, multifile=False)


class Progress(Callback):
    """Knows whether a batch has begun. Before that, an error is about how the run is set up."""

    def __init__(self) -> None:
        self.begun = False

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.begun = True

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def on_sanity_check_end(self, *_: Any, **__: Any) -> None:
        self.begun = False


class Start(Callback):
    """Says on rank 0 which pairs a run uses and where it writes."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data: Any = getattr(trainer, "datamodule", None)
        sets = {name: getattr(data, f"{name}_dataset", None) for name in ("train", "val")}
        for name, pairs in sets.items():
            if pairs is not None:
                print(f"{name}: {pairs.summary()}")
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        verb = f"continues after step {self.step}" if self.step else "begins"
        print(f"The run {verb}: {trained:,} trained parameters, folder {self.folder}", flush=True)

"""What ends runs: callbacks at a step that the environment names, so that the configuration is the same; a logger."""

from __future__ import annotations

import os
import signal

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger


class Interrupt(Callback):
    """As Ctrl-C when training has done $STOP_AT steps, or in the validation that follows $STOP_IN_VALIDATION_AT."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if str(trainer.global_step) == os.environ.get("STOP_AT"):
            self.stop()

    def on_validation_batch_start(self, trainer, *_, **__):
        if str(trainer.global_step) == os.environ.get("STOP_IN_VALIDATION_AT"):
            self.stop()

    def stop(self):
        raise KeyboardInterrupt


class Kill(Interrupt):
    """As `Interrupt`, but by SIGKILL."""

    def stop(self):
        os.kill(os.getpid(), signal.SIGKILL)


class BrokenLogger(CSVLogger):
    """As a service that refuses to log."""

    def log_hyperparams(self, params=None):
        raise RuntimeError("no key")

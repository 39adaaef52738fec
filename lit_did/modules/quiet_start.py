"""QuietStart: no warning that a frozen reference is in eval mode while training starts, and no filter left behind."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback


class QuietStart(Callback):
    """Filters Lightning's warning of modules in eval mode until the first step, unless the policy has some itself.

    It is a callback because Lightning reports exceptions to callbacks only.
    """

    def __init__(self) -> None:
        self._filtered = ExitStack()

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if all(module.training for module in pl_module.policy.modules()):
            self._filtered.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training")

    def on_train_start(self, *_: Any, **__: Any) -> None:
        self._filtered.close()

    on_exception = teardown = on_train_start

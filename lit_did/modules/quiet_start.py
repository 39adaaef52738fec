"""QuietStart: no warning that a frozen reference is in eval mode while training starts, and nothing left behind."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from lit_did.models import attention
from lit_did.models.wrappers import inner


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

    teardown = on_train_start

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        self._filtered.close()
        if pl_module.policy is not None:  # Lightning calls no `teardown` of the module then
            attention.use_own_attention(inner(pl_module.policy))

"""QuietStart: no warnings, while a run starts, that its user can do nothing about."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from lit_did.data import PreferenceDataModule
from lit_did.models import attention
from lit_did.models.wrappers import inner


class QuietStart(Callback):
    """Filters warnings until the first training step; in validation and prediction until their end.

    - Lightning uses a deprecated name of torch, `LeafSpec`.
    - Lightning recommends workers for loaders. A PreferenceDataModule tokenises before, and its loaders only collate.
    - Lightning reports modules in eval mode. The reference is meant to be; a policy with such modules is reported.

    It is a callback because Lightning reports exceptions to callbacks only.
    """

    def __init__(self) -> None:
        self._filtered = ExitStack()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._filtered.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        if isinstance(getattr(trainer, "datamodule", None), PreferenceDataModule):
            warnings.filterwarnings("ignore", message=".*does not have many workers")

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if all(module.training for module in pl_module.policy.modules()):
            warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training")

    def on_train_epoch_start(self, *_: Any, **__: Any) -> None:  # LitDPO makes a cache in `on_train_start`
        self._filtered.close()

    teardown = on_train_epoch_start

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        self._filtered.close()
        if pl_module.policy is not None:  # Lightning calls no `teardown` of the module then
            attention.use_own_attention(inner(pl_module.policy))

"""QuietStart: no warnings, while a run starts, that its user can do nothing about."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from lit_did.data import PreferenceDataModule


class QuietStart(Callback):
    """Filters warnings until the first training batch; in validation and prediction until their end.

    - Lightning uses a deprecated name of torch, `LeafSpec`.
    - Lightning recommends workers for loaders. A PreferenceDataModule tokenises before, and its loaders only collate.
    - Lightning reports that a PreferenceDataModule without `val` has no validation batches.
    - Lightning reports that LitDPO moves batches itself.
    - Lightning reports modules in eval mode. The reference is meant to be; a policy with such modules is reported.

    It is a callback because Lightning reports exceptions to callbacks only.
    """

    def __init__(self) -> None:
        self._filtered = ExitStack()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._filtered.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device` in `LightningModule`")
        warnings.filterwarnings("ignore", message="Total length of `NoValidation` across ranks is zero")
        if isinstance(getattr(trainer, "datamodule", None), PreferenceDataModule):
            warnings.filterwarnings("ignore", message=".*does not have many workers")

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if all(module.training for module in pl_module.policy.modules()):
            warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training")

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._filtered.close()

    teardown = on_train_batch_start

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        self._filtered.close()
        if pl_module.models is not None:  # Lightning calls no `teardown` of the module then
            pl_module.models.use_own_attention()

"""QuietStart: no warnings, while a run starts, that its user can do nothing about."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from lit_did.data import PreferenceDataModule
from lit_did.models.attention import use_own_attention
from lit_did.models.wrappers import inner
from lit_did.modules.checkpoint import TrainedState


class QuietStart(Callback):
    """Filters warnings until the first training batch; in validation and prediction until their end.

    - Lightning uses a deprecated name of torch, `LeafSpec`.
    - Lightning recommends workers for loaders. A PreferenceDataModule tokenises before, and its loaders only collate.
    - Lightning reports that a PreferenceDataModule without `val` has no validation batches.
    - Lightning reports that LitDPO moves batches itself.
    - Lightning reports modules in eval mode. The reference is meant to be; a policy with such modules is reported.

    It is a callback because Lightning reports exceptions to callbacks only. Under a Trainer that then runs another
    LightningModule, it does nothing.
    """

    def __init__(self) -> None:
        self._own: list[object] = []  # the entries of `warnings.filters` that were added here

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, TrainedState):
            return
        self._ignore(".*LeafSpec", FutureWarning)
        self._ignore("You have overridden `transfer_batch_to_device` in `LightningModule`")
        self._ignore("Total length of `NoValidation` across ranks is zero")
        if isinstance(getattr(trainer, "datamodule", None), PreferenceDataModule):
            self._ignore(".*does not have many workers")

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        models = pl_module.models if isinstance(pl_module, TrainedState) else None
        if models is not None and all(module.training for module in models.policy.modules()):
            self._ignore(r".*module\(s\) in eval mode at the start of training")

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._restore()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore()
        if isinstance(exception, IsADirectoryError) and trainer.ckpt_path and Path(trainer.ckpt_path).is_dir():
            exception.add_note(
                "A folder is a sharded checkpoint, which needs ModelParallelStrategy. For one process or DDP, write it "
                "as a file with `lit_did.exporting.consolidate_checkpoint(folder, file)`. Pass the file as `ckpt_path`."
            )
        if isinstance(pl_module, TrainedState) and pl_module.models is not None:
            use_own_attention(inner(pl_module.models.policy))  # the error may have come in a backward pass

    def _ignore(self, message: str, category: type[Warning] = Warning) -> None:
        filters: Any = warnings.filters
        before = list(filters)
        warnings.filterwarnings("ignore", message=message, category=category)
        self._own.append(filters[0])
        filters[1:] = before  # with a user's equal filter, which `filterwarnings` removes

    def _restore(self) -> None:
        """Removes the own filters. Not `catch_warnings`: a user may have added others since."""
        filters: Any = warnings.filters
        filters[:] = [entry for entry in filters if not any(entry is own for own in self._own)]
        self._own.clear()

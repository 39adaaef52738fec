"""ExportPolicy: keeps a folder for transformers of the best policy so far, and writes one of the last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lit_did.callbacks.run_folder import run_folder
from lit_did.exporting.checkpoints import PREFIX
from lit_did.exporting.export import check_new, export_module
from lit_did.models.names import load_tokenizer
from lit_did.models.sharding import is_sharded
from lit_did.models.wrappers import plain_name
from lit_did.modules import LitDPO


class ExportPolicy(Callback):
    """Writes the policy for transformers: FOLDER/last when training ends, FOLDER/best with every best checkpoint.

    Each folder holds what `lit_did.exporting.export_policy` writes: a model or an adapter, the tokenizer and a model
    card. A newer one replaces it. Folders that something else wrote are refused when training starts. Under averages of
    weights, such as `EMAWeightAveraging`, the averaged weights are written, as in checkpoints. An interrupted run
    writes no FOLDER/last.

    A relative FOLDER is below the folder of the run: the version's folder of a `CSVLogger` or `TensorBoardLogger`, or
    else the Trainer's `default_root_dir`. So runs do not replace the folders of others.

    FOLDER/best needs a `ModelCheckpoint` with `monitor`, and holds the weights of that checkpoint.

    Args:
        folder: The folder that gets the two folders, as a path below the run's folder or an absolute one.
        monitor: The metric of the ModelCheckpoint that says what is best. Needed only if several monitor a metric.
        tokenizer: The tokenizer's name or folder. None: that of the data module.

    Raises:
        TypeError, ValueError, OSError: When training starts: the module is not LitDPO, there is no tokenizer or no such
            ModelCheckpoint, the strategy is FSDP 1, or the folders hold something else or cannot be made.

    Example:
        >>> from lightning import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lit_did.callbacks import ExportPolicy
        >>> callbacks = [ModelCheckpoint(monitor="val/loss"), ExportPolicy("exported")]
        >>> trainer = Trainer(callbacks=callbacks, logger=False)
    """

    def __init__(
        self, folder: str | os.PathLike, *, monitor: str | None = None, tokenizer: str | os.PathLike | None = None
    ) -> None:
        self.folder, self.monitor, self.tokenizer = Path(folder), monitor, tokenizer
        self._folder = self.folder  # below the run's folder, once that is known
        self._tokenizer: Any = None
        self._best: ModelCheckpoint | None = None
        self._exported = ""  # the path of the best checkpoint that has been exported

    def setup(self, trainer: Any, pl_module: lightning.LightningModule, stage: str) -> None:
        """Checks all that an export needs, before training starts."""
        if stage != "fit":
            return
        if not isinstance(pl_module, LitDPO):
            raise TypeError(f"Expected the module of ExportPolicy to be a LitDPO, but got {type(pl_module).__name__}.")
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "Expected a strategy other than FSDP 1 with ExportPolicy, but got FSDPStrategy. Use "
                "ModelParallelStrategy, or remove the callback and run `lit-did export` after training."
            )
        later = trainer.callbacks[trainer.callbacks.index(self) :]
        if any(isinstance(callback, WeightAveraging) for callback in later):
            raise ValueError(
                "Expected ExportPolicy to come after WeightAveraging among the Trainer's `callbacks`, because it "
                "exports the averaged weights, but it comes before. Change the order."
            )
        self._best = self._monitoring(trainer)
        if self.tokenizer is not None:
            self._tokenizer = load_tokenizer(self.tokenizer)
        elif not hasattr(trainer.datamodule, "tokenizer"):
            raise ValueError(
                "Expected `tokenizer` of ExportPolicy to be a name or a folder, because the Trainer's data module has "
                "none, but got None."
            )
        self._folder = run_folder(trainer) / self.folder.expanduser()
        for name in ("last", *["best"] * (self._best is not None)):
            check_new(self._folder / name, replace=True, argument="`folder` of ExportPolicy")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes the best checkpoint of a resumed run for exported."""
        self._exported = self._best_path()

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Exports the weights in a checkpoint that is the best so far."""
        if self._best_path() != self._exported:
            self._exported = self._best_path()
            self._export(trainer, pl_module, "best", checkpoint["state_dict"])

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Exports the last weights if they are sharded: afterwards the processes are no group."""
        if is_sharded(pl_module.policy):
            self._export(trainer, pl_module, "last")

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Exports the last weights. Callbacks that average weights have put them into the module by now."""
        if not is_sharded(pl_module.policy):
            self._export(trainer, pl_module, "last")

    # -----------------------------------------------------------------------------------------------------------

    def _monitoring(self, trainer: lightning.Trainer) -> ModelCheckpoint | None:
        found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
        chosen = [c for c in found if self.monitor in (None, c.monitor)]
        names = ", ".join(str(c.monitor) for c in found) or "no metric"
        if self.monitor is not None and len(chosen) != 1:
            raise ValueError(
                f"Expected one ModelCheckpoint to monitor {self.monitor}, as ExportPolicy's `monitor` says, but got "
                f"{len(chosen)}. The Trainer's callbacks monitor {names}."
            )
        if len(chosen) > 1:
            raise ValueError(
                f"Expected `monitor` of ExportPolicy to name the metric that says what is best, because several "
                f"ModelCheckpoints monitor one: {names}."
            )
        if chosen and chosen[0].save_weights_only:
            raise ValueError(
                "Expected the ModelCheckpoint to have `save_weights_only=False` with ExportPolicy, because Lightning "
                "shows callbacks no checkpoints of weights alone, but got True."
            )
        return chosen[0] if chosen else None

    def _best_path(self) -> str:
        return "" if self._best is None else self._best.best_model_path

    def _export(self, trainer: Any, module: LitDPO, name: str, saved: dict[str, Tensor] | None = None) -> None:
        """Writes one of the two folders, on the first process. All processes call it.

        Args:
            trainer: The Trainer.
            module: The module in training.
            name: "last" or "best".
            saved: The weights in a checkpoint, which take the place of the module's own if they are not sharded.
        """
        if trainer.fast_dev_run:
            return
        policy = module.loaded_models().policy
        if is_sharded(policy):
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state: dict[str, Any] = get_model_state_dict(policy, options=whole)
        else:
            state = policy.state_dict() | {n.removeprefix(PREFIX): v for n, v in (saved or {}).items()}
        if trainer.is_global_zero:
            state = {plain_name(key): value for key, value in state.items()}
            export_module(module, self._folder / name, tokenizer=self._tokenizer, state=state, replace=True)
        if is_sharded(policy):
            trainer.strategy.barrier()

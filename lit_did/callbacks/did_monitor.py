"""DIDMonitor: logs the DID's metrics of any LightningModule that trains a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lit_did.functional.inputs import Statistics
from lit_did.metrics import DIDMetrics
from lit_did.models.batches import read_batch
from lit_did.models.finding import find_policy, find_reference
from lit_did.models.loading import check_same_vocabulary, freeze, load_model
from lit_did.models.measuring import evaluating, measure, random_numbers_kept
from lit_did.ops import SequenceStatistics

LogitsFn = Callable[[lightning.LightningModule, Any], tuple[Tensor, Tensor, Tensor] | SequenceStatistics]


class DIDMonitor(Callback):
    """Logs `lit_did.metrics.DIDMetrics` as `did/train/...`, `did/val/...` and `did/test/...`.

    Training: every `every_n_steps` optimiser steps, over all micro-batches of that step and all processes, measured
    before the step, with the weights that its losses are of. Validation and test: over the whole epoch. The callback
    measures with forward passes of its own, in eval mode and without gradients, and leaves modes, gradients and random
    numbers as they were: training is the same to the bit with and without it. A measured training step costs two more
    forward passes; with the default of every 50 steps about one percent.

    Args:
        logits_fn: `logits_fn(module, batch)` returns the policy's logits [sequences, T, V], the reference's, and labels
            [sequences, T] with labels[:, t] the token that position t predicts, or -100; or `SequenceStatistics`.
            Without it the batch is read as `lit_did.models.batches.read_batch` tells, and the models are found as
            follows.
        policy: Which part of the module is the policy: an attribute's name, such as "model" or "net.lm". None: the one
            child of the module that is a causal language model with parameters that train.
        reference: A model, or the name or path of one. None: the one child of the module that is a causal language
            model without parameters that train; or, of a PeftModel, itself with its adapter off.
        pairs: Whether the sequences of a batch are pairs: the chosen ones first, then the rejected ones in the same
            order. False leaves out the metrics of pairs.
        every_n_steps: Optimiser steps from one measurement to the next; 0: none in training. None: the Trainer's
            `log_every_n_steps`.
        metrics: Further arguments of `lit_did.metrics.DIDMetrics`, such as `beta`, `unit` or `temperature`.

    Raises:
        TypeError, ValueError: An argument is out of range; from the first batch on, what is missing in the module or
            the batch.

    Example:
        >>> from lightning import Trainer
        >>> from lit_did.callbacks import DIDMonitor
        >>> trainer = Trainer(callbacks=[DIDMonitor(beta=0.1, every_n_steps=10)], logger=False)
    """

    def __init__(
        self,
        logits_fn: LogitsFn | None = None,
        *,
        policy: str | None = None,
        reference: str | nn.Module | None = None,
        pairs: bool = True,
        every_n_steps: int | None = None,
        **metrics: Any,
    ) -> None:
        if logits_fn is not None and not callable(logits_fn):
            raise TypeError(f"Expected `logits_fn` to be callable, but got {type(logits_fn).__name__}.")
        if logits_fn is not None and (policy is not None or reference is not None):
            raise ValueError("Expected `policy` and `reference` to be None with `logits_fn`, which calls the models.")
        if every_n_steps is not None and (isinstance(every_n_steps, bool) or every_n_steps != int(every_n_steps)):
            raise ValueError(f"Expected `every_n_steps` to be a whole number, but got {every_n_steps!r}.")
        if every_n_steps is not None and every_n_steps < 0:
            raise ValueError(f"Expected `every_n_steps` to be at least 0, but got {every_n_steps}.")
        self.logits_fn, self.policy, self.reference = logits_fn, policy, reference
        self.every_n_steps = every_n_steps
        self._options = {"pairs": pairs, **metrics}
        self._train_metrics = DIDMetrics(**self._options)  # here, so that a wrong argument is told at once
        self._eval_metrics: list[DIDMetrics] = []  # one a dataloader
        self._models: tuple[nn.Module, nn.Module | None] | None = None
        self._loaded: nn.Module | None = None  # the reference, where it was given by name
        self._next_step: int | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._models = None  # the module may be another than the last time

    # -----------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps
        # Step s is the (s + 1)th: the Trainer logs those whose number is a multiple, also in a resumed run.
        self._every = every
        self._next_step = None if every == 0 else (trainer.global_step // every + 1) * every - 1
        self._train_metrics.to(pl_module.device).reset()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._next_step is not None and trainer.global_step >= self._next_step:
            self._train_metrics.update(*self._arguments(trainer, pl_module, batch))

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._next_step is None or trainer.global_step < self._next_step:
            return
        self._next_step = trainer.global_step + self._every
        values = {f"did/train/{name}": value.float() for name, value in self._train_metrics.compute().items()}
        self._train_metrics.reset()
        # Not `pl_module.log`: what it is told once, Lightning writes again at every later step that it logs.
        trainer.callback_metrics.update(values)
        for logger in trainer.loggers:
            logger.log_metrics({name: value.item() for name, value in values.items()}, step=trainer.global_step)

    # -----------------------------------------------------------------------------------------------------------
    # Validation and test
    # -----------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._start_evaluation(pl_module, trainer.num_val_batches)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._eval_metrics[dataloader_idx].update(*self._arguments(trainer, pl_module, batch))

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log_evaluation(pl_module, "val")

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._start_evaluation(pl_module, trainer.num_test_batches)

    def on_test_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._eval_metrics[dataloader_idx].update(*self._arguments(trainer, pl_module, batch))

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._log_evaluation(pl_module, "test")

    def _start_evaluation(self, pl_module: lightning.LightningModule, batches_of_loaders: list) -> None:
        self._eval_metrics = [DIDMetrics(**self._options).to(pl_module.device) for _ in batches_of_loaders]

    def _log_evaluation(self, pl_module: lightning.LightningModule, stage: str) -> None:
        for i, metrics in enumerate(self._eval_metrics):
            suffix = f"/dataloader_idx_{i}" if len(self._eval_metrics) > 1 else ""
            for name, value in metrics.compute().items():
                # Over all processes already: sync_dist changes nothing, but Lightning warns of epoch ends without it.
                pl_module.log(f"did/{stage}/{name}{suffix}", value.float(), sync_dist=True, add_dataloader_idx=False)

    # -----------------------------------------------------------------------------------------------------------
    # Measuring
    # -----------------------------------------------------------------------------------------------------------

    def _arguments(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any) -> tuple:
        """What `DIDMetrics.update` is given of a batch."""
        with trainer.precision_plugin.forward_context():
            if self.logits_fn is None:
                return (self._measure(pl_module, batch),)
            with random_numbers_kept(pl_module.device), evaluating(pl_module):
                given = self.logits_fn(pl_module, batch)
        return (given,) if isinstance(given, Statistics) else tuple(given)

    def _measure(self, pl_module: lightning.LightningModule, batch: Any) -> SequenceStatistics:
        if self._models is None:
            self._models = self._find_models(pl_module)
        policy, reference = self._models
        options = self._train_metrics.options
        return measure(
            policy, reference, read_batch(batch), temperature=options["temperature"], backend=options["backend"]
        )

    def _find_models(self, pl_module: lightning.LightningModule) -> tuple[nn.Module, nn.Module | None]:
        policy = find_policy(pl_module, self.policy)
        if self.reference is None:
            return policy, find_reference(pl_module, policy)
        if self._loaded is None:
            dtype = next(policy.parameters()).dtype
            self._loaded = freeze(load_model(self.reference, "reference", {"dtype": dtype}))
        check_same_vocabulary(policy, self._loaded)
        return policy, self._loaded.to(pl_module.device)

"""DIDMonitor: logs the DID's metrics of any LightningModule that trains a language model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lit_did.arguments import check_integer
from lit_did.batches.order import check_pairs
from lit_did.functional.inputs import Statistics
from lit_did.metrics import DIDMetrics
from lit_did.models.finding import find_models
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.quiet import evaluating, random_numbers_kept
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import Backend

LogitsFn = Callable[[lightning.LightningModule, Any], tuple[Tensor, Tensor, Tensor] | SequenceStatistics]


class DIDMonitor(Callback):
    """Logs `lit_did.metrics.DIDMetrics` as `did/train/...`, `did/val/...` and `did/test/...`.

    In training it measures every `every_n_steps` optimiser steps, over all micro-batches of that step and all
    processes. It measures before the step, with the weights that the step's losses belong to. In validation and test it
    measures whole epochs. It runs forward passes of its own, in eval mode and without gradients, and restores modes,
    gradients and random numbers. So training is the same to the bit with and without it. A measured training step
    costs two more forward passes, about one percent of the time with the default of every 50 steps.

    `LitDPO` does not need it. It logs the same metrics from the forward passes of its training.

    Under several processes, rows that a sampler repeats to give all processes equally many count twice.
    `PreferenceDataModule` marks such rows, and they do not count. With `logits_fn` everything counts that it returns.

    Args:
        logits_fn: `logits_fn(module, batch)` returns the policy's logits [sequences, T, V], the reference's logits, and
            labels [sequences, T], where labels[:, t] is the token that position t predicts, or -100. Or it returns
            `SequenceStatistics` [sequences]. None: the batch is read by `lit_did.batches.reading.read_batch`, and the
            models are found as `policy` and `reference` describe.
        policy: The attribute of the module that is the policy, such as "model" or "net.lm". None: the policy of the
            module's `lit_did.PolicyAndReference`, or else its one child that is a causal language model and has
            parameters that train.
        reference: A model, an attribute of the module, or the name or path of a model. None: the reference of the
            module's `lit_did.PolicyAndReference`. Or else its one child that is a causal language model without
            parameters that train. Or else a policy that is a `PeftModel`, with its adapter switched off.
        beta: DPO's inverse temperature. None: `hparams.beta` or `beta` of the module, or 0.1.
        pairs: Whether the sequences of a batch are pairs: the chosen ones first, then the rejected ones in the same
            order. Batches that hold no pairs are refused. False leaves out the metrics of pairs.
        every_n_steps: Optimiser steps from one measurement to the next. 0: none in training. None: the Trainer's
            `log_every_n_steps`.
        unit: The unit of the metrics of tokens.
        num_bins: The number of bins of `calibration_error`.
        ignore_index: The label of tokens that are not part of a completion.
        temperature: Divides both models' logits.
        backend: The operators' implementation, see `lit_did.token_statistics`.

    Raises:
        TypeError, ValueError: An argument is out of range; or at the first step that it measures, the module or the
            batch lacks something.

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
        reference: str | os.PathLike | nn.Module | None = None,
        beta: float | None = None,
        pairs: bool = True,
        every_n_steps: int | None = None,
        unit: Literal["nats", "bits"] = "nats",
        num_bins: int = 10,
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
    ) -> None:
        if logits_fn is not None and not callable(logits_fn):
            raise TypeError(f"Expected `logits_fn` to be callable, but got {type(logits_fn).__name__}.")
        if logits_fn is not None and (policy is not None or reference is not None):
            raise ValueError("Expected `policy` and `reference` to be None with `logits_fn`, which calls the models.")
        if policy is not None and not isinstance(policy, str):
            raise TypeError(f"Expected `policy` to be the name of an attribute, but got {type(policy).__name__}.")
        if reference is not None and not isinstance(reference, str | os.PathLike | nn.Module):
            raise TypeError(f"Expected `reference` to be a model or its name, but got {type(reference).__name__}.")
        if every_n_steps is not None:
            check_integer("every_n_steps", every_n_steps, 0)
        self.logits_fn, self.policy, self.reference = logits_fn, policy, reference
        self.beta, self.every_n_steps = beta, every_n_steps
        self._reading: dict[str, Any] = {"ignore_index": ignore_index, "temperature": temperature, "backend": backend}
        self._options: dict[str, Any] = {
            "beta": 0.1 if beta is None else beta,
            "pairs": pairs,
            "unit": unit,
            "num_bins": num_bins,
        }
        self._train_metrics = self._metrics()  # here too, so that a wrong argument raises at once
        self._eval_metrics: list[DIDMetrics] = []  # one a dataloader
        self._measured = False  # whether `_train_metrics` hold anything
        self._models: PolicyAndReference | None = None
        self._loaded: nn.Module | None = None  # the reference, where it was given by name

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._models = None  # the module may be another than the last time; not in `teardown`, which an error skips
        if self.beta is None:
            self._options["beta"] = pl_module.hparams.get("beta", getattr(pl_module, "beta", 0.1))

    def _metrics(self) -> DIDMetrics:
        return DIDMetrics(**self._options, **self._reading)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if self._loaded is not None:
            self._loaded.cpu()

    # -----------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._train_metrics = self._metrics().to(pl_module.device)
        self._measured = False

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        logs: Any = trainer  # whose attribute mypy does not see
        every = logs.log_every_n_steps if self.every_n_steps is None else self.every_n_steps
        if every and (_step(trainer) + 1) % every == 0:
            self._train_metrics.update(*self._arguments(trainer, pl_module, batch))
            self._measured = True

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._measured:  # not due, or another optimiser of the same batch came first
            return
        self._measured = False
        values = {f"did/train/{name}": value.float() for name, value in self._train_metrics.compute().items()}
        self._train_metrics.reset()
        # Not `pl_module.log`: Lightning writes a value again at every later step that it logs.
        trainer.callback_metrics.update(values)
        for logger in trainer.loggers:
            logger.log_metrics({name: value.item() for name, value in values.items()}, step=_step(trainer))

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

    on_test_batch_start = on_validation_batch_start

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._log_evaluation(pl_module, "test")

    def _start_evaluation(self, pl_module: lightning.LightningModule, batches_of_loaders: list) -> None:
        self._eval_metrics = [self._metrics().to(pl_module.device) for _ in batches_of_loaders]

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
        if isinstance(given, Statistics):
            return (given,)
        if not isinstance(given, tuple | list):
            raise TypeError(
                "Expected `logits_fn` to return policy logits, reference logits and labels, or SequenceStatistics, "
                f"but got {type(given).__name__}."
            )
        return tuple(given)

    def _measure(self, pl_module: lightning.LightningModule, batch: Any) -> SequenceStatistics:
        if self._models is None:
            self._models, self._loaded = find_models(pl_module, self.policy, self.reference, loaded=self._loaded)
        options = dict(self._reading)
        sequences = self._models.read(batch, ignore_index=options.pop("ignore_index"))
        if self._options["pairs"]:
            check_pairs(batch, sequences)
        return self._models.measure(sequences, **options)


def _step(trainer: lightning.Trainer) -> int:
    """The number of optimiser steps so far, several optimisers' together as one, as Lightning counts what it logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped

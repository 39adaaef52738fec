"""DIDCallback: logs the DID's metrics from TRL's DPOTrainer, or from any transformers Trainer of preference pairs."""

from __future__ import annotations

import functools
import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from lit_did.arguments import check_integer
from lit_did.batches.order import check_pairs
from lit_did.functional.information import Unit
from lit_did.metrics import DIDMetrics
from lit_did.models.loading import load_reference
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.wrappers import is_peft, unwrapped
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import Backend


class DIDCallback(TrainerCallback):
    """Logs the metrics of `lit_did.metrics.DIDMetrics` through the trainer's own `log`.

    They go wherever the trainer's `report_to` sends its metrics.

    - In training it logs `did/...` every `every_n_steps` steps, over all micro-batches of the step and all processes.
      It measures before the step, with the weights that the step's loss is computed with.
    - In evaluation it adds `eval_did/...` over the whole data set to the metrics that `trainer.evaluate()` logs and
      returns. `metric_for_best_model="eval_did/reward_accuracy"` and early stopping work with them.
      `trainer.predict()` returns `test_did/...`.

    The callback runs its own forward passes, in eval mode and without gradients: two for every batch that is measured.
    It leaves modes, gradients, random numbers and the trainer's own log entries unchanged. Training gives the same bits
    with and without it.

    Args:
        trainer: The trainer. Add the callback to the same trainer: `trainer.add_callback(DIDCallback(trainer))`.
            `lit_did.batches.reading.read_batch` describes the batches that can be read.
        reference: A model, or the name or path of one. None: the trainer's `ref_model`. If it has none and its model is
            a PeftModel, the reference is the adapter "ref" if TRL made one, and otherwise the model with its adapter
            off.
        beta: DPO's inverse temperature. None: the trainer's `beta`, or 0.1.
        every_n_steps: Steps between two measurements in training. 0: none. None: with `logging_strategy="steps"`, the
            trainer's `logging_steps` and `logging_first_step`, and otherwise none.
        pairs: Whether a batch holds pairs: first the chosen sequences, then the rejected ones in the same order, as
            DPOTrainer has them. Batches without pairs are then refused. False leaves out the metrics of pairs. None:
            False for TRL's trainers whose batches are not pairs, such as KTOTrainer and SFTTrainer, and otherwise True.
        unit: "nats" or "bits", of entropies and divergences.
        num_bins: Bins of `calibration_error`.
        ignore_index: The label of tokens that are not scored.
        temperature: Both models' logits are divided by it.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Raises:
        TypeError: An argument has the wrong type. In a step: a batch is not a mapping of tensors.
        ValueError: An argument is out of range, or there is no reference. In a step: a batch cannot be read, or holds
            no pairs.

    Example:
        >>> from lit_did.integrations.trl import DIDCallback
        >>> def train(trainer):  # A trl.DPOTrainer.
        ...     trainer.add_callback(DIDCallback(trainer, every_n_steps=10))
        ...     trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        reference: str | os.PathLike | nn.Module | None = None,
        beta: float | None = None,
        every_n_steps: int | None = None,
        pairs: bool | None = None,
        unit: Unit = "nats",
        num_bins: int = 10,
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"Expected `trainer` to be a transformers.Trainer, but got {type(trainer).__name__}.")
        if every_n_steps is not None:
            check_integer("every_n_steps", every_n_steps, 0)
        self.trainer, self.every_n_steps = trainer, every_n_steps
        assert trainer.model is not None  # A Trainer without a model raises itself.
        policy = unwrapped(trainer.model)
        self._reference = self._find_reference(policy, reference)
        beta = (getattr(trainer, "beta", None) or 0.1) if beta is None else beta  # GRPO's may be 0: no KL term
        self._pairs = pairs = _trains_on_pairs(trainer) if pairs is None else pairs
        self._metrics = {
            stage: DIDMetrics(
                beta=beta,
                pairs=pairs,
                unit=unit,
                num_bins=num_bins,
                ignore_index=ignore_index,
                temperature=temperature,
                backend=backend,
            ).to(trainer.args.device)
            for stage in ("train", "eval")
        }
        self._models = self._beside_reference(policy)
        self._measured = dict.fromkeys(self._metrics, False)
        self._every, self._first = 0, False
        # The Trainer passes no batches to its callbacks.
        self._watch("training_step", self._training_step)
        self._watch("prediction_step", self._prediction_step)
        self._watch("evaluation_loop", self._evaluation_loop)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        by_steps = args.logging_strategy == IntervalStrategy.STEPS
        of_trainer = int(state.logging_steps or 0) if by_steps else 0
        self._every = of_trainer if self.every_n_steps is None else self.every_n_steps
        self._first = bool(of_trainer) and self.every_n_steps is None and args.logging_first_step
        self._reset("train")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._measured["train"]:
            with _own_log_entry(self.trainer):
                self.trainer.log(self._compute("train", "did/"))

    # -----------------------------------------------------------------------------------------------------------
    # The trainer's methods, watched
    # -----------------------------------------------------------------------------------------------------------

    def _watch(self, name: str, instead: Callable) -> None:
        """Replaces a method of the trainer by `instead(original, ...)` while the callback is one of the trainer's."""
        original = getattr(self.trainer, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self not in self.trainer.callback_handler.callbacks:
                return original(*args, **kwargs)
            return instead(original, *args, **kwargs)

        setattr(self.trainer, name, watched)

    def _training_step(self, original: Callable, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.trainer.state.global_step + 1
        if (self._every and step % self._every == 0) or (self._first and step == 1):
            self._update("train", self._measure(model, inputs))
        return original(model, inputs, *args, **kwargs)

    def _prediction_step(self, original: Callable, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        statistics = self._measure(model, inputs)
        sequences_a_row = 2 if self._pairs else 1  # A row of the data set.
        self._update("eval", _without_repeats(statistics, sequences_a_row, self.trainer.accelerator))
        return original(model, inputs, *args, **kwargs)

    def _evaluation_loop(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        self._reset("eval")  # An interrupted evaluation may have left updates.
        output = original(*args, **kwargs)
        if self._measured["eval"]:
            prefix = inspect.signature(original).bind(*args, **kwargs).arguments.get("metric_key_prefix", "eval")
            output.metrics.update(self._compute("eval", f"{prefix}_did/"))
        return output

    # -----------------------------------------------------------------------------------------------------------
    # Measuring
    # -----------------------------------------------------------------------------------------------------------

    def _compute(self, stage: str, prefix: str) -> dict[str, float]:
        values = {f"{prefix}{name}": value.item() for name, value in self._metrics[stage].compute().items()}
        self._reset(stage)
        return values

    def _reset(self, stage: str) -> None:
        self._metrics[stage].reset()
        self._measured[stage] = False

    def _update(self, stage: str, statistics: SequenceStatistics) -> None:
        self._metrics[stage].update(statistics)
        self._measured[stage] = True

    def _measure(self, model: nn.Module, inputs: Any) -> SequenceStatistics:
        if unwrapped(model) is not self._models.policy:  # The trainer makes a new one with `model_init`.
            self._models = self._beside_reference(unwrapped(model))
        if self._models.reference is not None:
            self._models.reference.to(self.trainer.args.device)
        sequences = self._models.read(inputs)
        if self._pairs:
            check_pairs(inputs, sequences)
        # In the loss's own autocast context, the loss would reuse weights that were cast here without gradients.
        with self.trainer.accelerator.autocast():
            return self._models.measure(sequences)

    def _beside_reference(self, policy: nn.Module) -> PolicyAndReference:
        adapter = "ref" if self._reference is None and _has_reference_adapter(policy) else None
        options = self._metrics["train"].options
        return PolicyAndReference(policy, self._reference, adapter=adapter, freeze=False, **options)

    def _find_reference(self, policy: nn.Module, given: str | os.PathLike | nn.Module | None) -> nn.Module | None:
        """The reference. None: the policy with the adapter "ref", or with its adapter off."""
        if given is not None:
            return load_reference(given, policy)
        reference = getattr(self.trainer, "ref_model", None)
        if reference is not None or _has_reference_adapter(policy):
            return reference
        if not is_peft(policy):
            raise ValueError(
                "Expected `reference` to be a model, but got None, and the trainer has none either: its `ref_model` is "
                "None (as with precomputed log-probabilities) and its model is not a PeftModel. Pass the model that "
                "the policy started from."
            )
        return None


def _trains_on_pairs(trainer: Trainer) -> bool:
    """Whether `trainer` is one of TRL's trainers of pairs, or not TRL's."""
    of_trl = {cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.partition(".")[0] == "trl"}
    return not of_trl or not of_trl.isdisjoint({"DPOTrainer", "CPOTrainer", "ORPOTrainer"})


def _has_reference_adapter(policy: nn.Module) -> bool:
    """Whether TRL kept a copy of the adapter that the policy started with."""
    return is_peft(policy) and "ref" in getattr(policy, "peft_config", {})


@contextmanager
def _own_log_entry(trainer: Trainer) -> Iterator[None]:
    """Logs in an entry of its own. The trainer's own entries keep their steps and values."""
    should_log = trainer.control.should_log  # Every `log` resets it.
    # TRL's `log` adds the metrics that TRL gathered for its next entry, and clears them.
    trl: Any = trainer
    gathered = getattr(trl, "_metrics", None)
    if isinstance(gathered, dict):
        trl._metrics = {stage: defaultdict(list) for stage in gathered}
    try:
        yield
    finally:
        trainer.control.should_log = should_log
        if isinstance(gathered, dict):
            trl._metrics = gathered


def _without_repeats(statistics: SequenceStatistics, sequences_a_row: int, accelerator: Any) -> SequenceStatistics:
    """Without the tokens of rows that accelerate repeats to fill the last batch of every process."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return statistics
    rows = statistics.num_tokens.shape[0] // sequences_a_row
    number = accelerator.process_index * rows + torch.arange(rows, device=statistics.num_tokens.device)
    counts = (number < state.remainder).repeat(sequences_a_row)
    return statistics._replace(num_tokens=statistics.num_tokens * counts)

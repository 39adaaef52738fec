"""DIDCallback: logs the DID's metrics from TRL's DPOTrainer, or any transformers Trainer with a preference batch."""

from __future__ import annotations

import functools
import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from lit_did.batches.order import check_pairs
from lit_did.batches.reading import read_batch
from lit_did.metrics import DIDMetrics
from lit_did.models.loading import check_adapter_is_all_that_trains, load_reference
from lit_did.models.measuring import check_every_n_steps, measure
from lit_did.models.wrappers import is_peft, unwrapped
from lit_did.ops import SequenceStatistics


class DIDCallback(TrainerCallback):
    """Logs `lit_did.metrics.DIDMetrics` through the trainer's own `log`, so to whatever its `report_to` names.

    Training: `did/...` every `every_n_steps` steps, over all micro-batches of that step and all processes, measured
    before the step, with the weights that its loss is of. Evaluation: `eval_did/...` over the whole data set, among the
    metrics that `trainer.evaluate()` logs and returns, so that `metric_for_best_model="eval_did/reward_accuracy"` and
    early stopping work; `trainer.predict()` returns `test_did/...`.

    It measures with forward passes of its own, in eval mode and without gradients, and leaves modes, gradients and
    random numbers as they were, and the trainer's own metrics in their own log entries: training is the same to the bit
    with and without it. A measured batch costs two more forward passes.

    Args:
        trainer: The trainer, which the callback is then added to: `trainer.add_callback(DIDCallback(trainer))`. Its
            batches are read as `lit_did.batches.reading.read_batch` tells.
        reference: A model, or the name or path of one. None: the trainer's `ref_model`; without one, of a PeftModel,
            its adapter "ref" where TRL has made one, else itself with its adapter off.
        beta: DPO's inverse temperature. None: the trainer's `beta`, or 0.1.
        every_n_steps: Steps from one measurement in training to the next; 0: none. None: as the trainer logs, with
            `logging_strategy="steps"` at its `logging_steps` and `logging_first_step`, otherwise not at all.
        pairs: Whether the sequences of a batch are pairs: the chosen ones first, then the rejected ones in the same
            order, as DPOTrainer has them; batches that hold none are refused. False leaves out the metrics of pairs.
            None: False for TRL's trainers whose batches are not pairs, such as KTOTrainer and SFTTrainer, else True.
        metrics: Further arguments of `lit_did.metrics.DIDMetrics`, such as `unit`.

    Raises:
        TypeError, ValueError: An argument is out of range, or nothing can be the reference; from the first batch on,
            what is missing in it.

    Example:
        >>> from lit_did.integrations.trl import DIDCallback
        >>> def train(trainer):  # a trl.DPOTrainer
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
        **metrics: Any,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"Expected `trainer` to be a transformers.Trainer, but got {type(trainer).__name__}.")
        check_every_n_steps(every_n_steps)
        self.trainer, self.every_n_steps = trainer, every_n_steps
        self._reference = self._find_reference(reference)
        beta = (getattr(trainer, "beta", None) or 0.1) if beta is None else beta  # GRPO's may be 0, for no KL
        self._pairs = pairs = _trains_on_pairs(trainer) if pairs is None else pairs
        self._metrics = {
            stage: DIDMetrics(beta=beta, pairs=pairs, **metrics).to(trainer.args.device) for stage in ("train", "eval")
        }
        self._measured = dict.fromkeys(self._metrics, False)
        self._every, self._first = 0, False
        # What the trainer tells its callbacks holds no batches.
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
        """Puts `instead(original, ...)` in the place of a method of the trainer, as long as the callback is there."""
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
        sequences_a_row = 2 if self._pairs else 1  # of the data set
        self._update("eval", _without_repeats(statistics, sequences_a_row, self.trainer.accelerator))
        return original(model, inputs, *args, **kwargs)

    def _evaluation_loop(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        self._reset("eval")  # an interrupted evaluation may have left something
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
        device = self.trainer.args.device
        options = self._metrics["train"].options
        if isinstance(inputs, Mapping):
            inputs = {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
        batch = read_batch(inputs, options["ignore_index"])
        if self._pairs:
            check_pairs(inputs, batch)
        reference = None if self._reference is None else self._reference.to(device)
        adapter = "ref" if reference is None and _has_reference_adapter(unwrapped(model)) else None
        # A context of its own: were it the loss's, autocast would reuse weights that were cast without gradients.
        with self.trainer.accelerator.autocast():
            return measure(
                model,
                reference,
                batch,
                adapter=adapter,
                temperature=options["temperature"],
                backend=options["backend"],
            )

    def _find_reference(self, given: str | os.PathLike | nn.Module | None) -> nn.Module | None:
        """The reference, or None for the policy with another adapter, or none."""
        policy = unwrapped(self.trainer.model)
        if given is not None:
            return load_reference(given, policy)
        reference = getattr(self.trainer, "ref_model", None)
        if reference is not None or _has_reference_adapter(policy):
            return reference
        if not is_peft(policy):
            raise ValueError(
                "Expected `reference`, because the trainer has no `ref_model` (with precomputed log-probabilities it "
                "keeps none) and its model is no PeftModel, but got None."
            )
        check_adapter_is_all_that_trains(policy)
        return None


def _trains_on_pairs(trainer: Trainer) -> bool:
    """Whether it is one of TRL's trainers of pairs, or none of TRL's."""
    of_trl = {cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.partition(".")[0] == "trl"}
    return not of_trl or not of_trl.isdisjoint({"DPOTrainer", "CPOTrainer", "ORPOTrainer"})


def _has_reference_adapter(policy: nn.Module) -> bool:
    """Whether TRL has kept a copy of the adapter that the policy started with."""
    return is_peft(policy) and "ref" in policy.peft_config


@contextmanager
def _own_log_entry(trainer: Trainer) -> Iterator[None]:
    """What is logged here is an entry beside the trainer's own, which come when and as they would have come."""
    should_log = trainer.control.should_log  # any `log` takes it back
    # TRL's `log` adds what it has gathered for its next entry, and forgets it.
    gathered = getattr(trainer, "_metrics", None)
    if isinstance(gathered, dict):
        trainer._metrics = {stage: defaultdict(list) for stage in gathered}
    try:
        yield
    finally:
        trainer.control.should_log = should_log
        if isinstance(gathered, dict):
            trainer._metrics = gathered


def _without_repeats(statistics: SequenceStatistics, sequences_a_row: int, accelerator: Any) -> SequenceStatistics:
    """Without the rows that accelerate repeats to give all processes a full last batch: they have no tokens then."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return statistics
    rows = statistics.num_tokens.shape[0] // sequences_a_row
    number = accelerator.process_index * rows + torch.arange(rows, device=statistics.num_tokens.device)
    counts = (number < state.remainder).repeat(sequences_a_row)
    return statistics._replace(num_tokens=statistics.num_tokens * counts)

"""DIDCallback: logs the DID's metrics from TRL's DPOTrainer, or any transformers Trainer with a preference batch."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lit_did.metrics import DIDMetrics
from lit_did.models.batches import read_batch
from lit_did.models.loading import check_same_vocabulary, freeze, is_peft, load_model
from lit_did.models.measuring import measure, unwrapped
from lit_did.ops import SequenceStatistics


class DIDCallback(TrainerCallback):
    """Logs `lit_did.metrics.DIDMetrics` through the trainer's own `log`, so to whatever its `report_to` names.

    Training: `did/...` every `every_n_steps` steps, over all micro-batches of that step and all processes, measured
    before the step, with the weights that its loss is of. Evaluation: `eval_did/...` over the whole data set, which
    `trainer.evaluate()` also returns, so that `metric_for_best_model="eval_did/reward_accuracy"` works.

    It measures with forward passes of its own, in eval mode and without gradients, and leaves modes, gradients and
    random numbers as they were, and the trainer's own metrics in their own log entries: training is the same to the bit
    with and without it. A measured batch costs two more forward passes, and logits of 1 GiB at the most at a time.

    Args:
        trainer: The trainer, which the callback is then added to: `trainer.add_callback(DIDCallback(trainer))`. Its
            batches are read as `lit_did.models.batches.read_batch` tells.
        reference: A model, or the name or path of one. None: the trainer's `ref_model`; without one, of a PeftModel,
            its adapter "ref" where TRL has made one, else itself with its adapter off.
        beta: DPO's inverse temperature. None: the trainer's `beta`, or 0.1.
        every_n_steps: Steps from one measurement in training to the next; 0: none. None: the trainer's `logging_steps`
            (and the first step, with `logging_first_step`).
        pairs: Whether the sequences of a batch are pairs: the chosen ones first, then the rejected ones in the same
            order, as DPOTrainer has them. False leaves out the metrics of pairs.
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
        reference: str | nn.Module | None = None,
        beta: float | None = None,
        every_n_steps: int | None = None,
        pairs: bool = True,
        **metrics: Any,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"Expected `trainer` to be a transformers.Trainer, but got {type(trainer).__name__}.")
        if every_n_steps is not None and (
            isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 0
        ):
            raise ValueError(f"Expected `every_n_steps` to be an integer of at least 0, but got {every_n_steps!r}.")
        self.trainer, self.every_n_steps = trainer, every_n_steps
        self._reference = self._find_reference(reference)
        beta = getattr(trainer, "beta", 0.1) if beta is None else beta
        self._sequences_a_row = 2 if pairs else 1  # of the data set
        self._metrics = {
            stage: DIDMetrics(beta=beta, pairs=pairs, **metrics).to(trainer.args.device) for stage in ("train", "eval")
        }
        self._measured = dict.fromkeys(self._metrics, False)
        self._every: int | None = None
        self._watch("training_step", self._before_training_step)
        self._watch("prediction_step", self._before_prediction_step)

    # -----------------------------------------------------------------------------------------------------------
    # What the trainer calls
    # -----------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._every = int(state.logging_steps or 0) if self.every_n_steps is None else self.every_n_steps
        self._reset("train")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._measured["train"]:
            self._log("train", "did/")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        if not self._measured["eval"]:
            return
        metrics = {} if metrics is None else metrics
        # The prefix is not told: "eval", or "eval_NAME" where there are several data sets.
        prefix = next((name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")), "eval")
        metrics.update(self._log("eval", f"{prefix}_did/"))

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._reset("eval")  # prediction goes the same way as evaluation, but logs nothing

    def _log(self, stage: str, prefix: str) -> dict[str, float]:
        values = {f"{prefix}{name}": value.item() for name, value in self._metrics[stage].compute().items()}
        self._reset(stage)
        with _own_log_entry(self.trainer):
            self.trainer.log(dict(values))
        return values

    def _reset(self, stage: str) -> None:
        self._metrics[stage].reset()
        self._measured[stage] = False

    # -----------------------------------------------------------------------------------------------------------
    # Measuring
    # -----------------------------------------------------------------------------------------------------------

    def _watch(self, method: str, before: Callable[[nn.Module, Any], None]) -> None:
        """Calls `before(model, inputs)` ahead of a method of the trainer, which tells callbacks nothing of batches."""
        original = getattr(self.trainer, method)

        @functools.wraps(original)
        def watched(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self in self.trainer.callback_handler.callbacks:  # it may have been removed
                before(model, inputs)
            return original(model, inputs, *args, **kwargs)

        setattr(self.trainer, method, watched)

    def _before_training_step(self, model: nn.Module, inputs: Any) -> None:
        step = self.trainer.state.global_step + 1
        first = step == 1 and self.every_n_steps is None and self.trainer.args.logging_first_step
        if self._every and (step % self._every == 0 or first):
            self._update("train", self._measure(model, inputs))

    def _before_prediction_step(self, model: nn.Module, inputs: Any) -> None:
        statistics = self._measure(model, inputs)
        self._update("eval", _without_repeats(statistics, self._sequences_a_row, self.trainer.accelerator))

    def _update(self, stage: str, statistics: SequenceStatistics) -> None:
        self._metrics[stage].update(statistics)
        self._measured[stage] = True

    def _measure(self, model: nn.Module, inputs: Any) -> SequenceStatistics:
        device = self.trainer.args.device
        batch = {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
        reference, adapter = self._reference, None
        if reference is not None:
            reference = reference.to(device)
        elif "ref" in unwrapped(model).peft_config:
            adapter = "ref"
        # A context of its own: were it the loss's, autocast would reuse weights that were cast without gradients.
        with self.trainer.compute_loss_context_manager(), torch.no_grad():
            return measure(model, reference, read_batch(batch), adapter=adapter, **self._options())

    def _options(self) -> dict[str, Any]:
        options = self._metrics["train"].options
        return {"temperature": options["temperature"], "backend": options["backend"]}

    def _find_reference(self, given: str | nn.Module | None) -> nn.Module | None:
        """The reference, or None for the policy with another adapter, or none."""
        policy = self.trainer.model
        if given is not None:
            reference = freeze(load_model(given, "reference", {"dtype": next(policy.parameters()).dtype}))
            check_same_vocabulary(policy, reference)
            return reference
        reference = getattr(self.trainer, "ref_model", None)
        if reference is None and not is_peft(unwrapped(policy)):
            raise ValueError(
                "Expected `reference`, because the trainer has no `ref_model` (with precomputed log-probabilities it "
                "keeps none) and its model is no PeftModel, but got None."
            )
        return reference


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

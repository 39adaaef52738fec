"""LitDPO: direct preference optimisation as a LightningModule that logs the DID's statistics as it trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_did.arguments import as_plain, check_bools, is_plain
from lit_did.batches.sequences import Sequences
from lit_did.models.sharding import is_sharded
from lit_did.modules import run_facts
from lit_did.modules.checks import (
    cache_folder,
    check_cache_kind,
    check_context_parallel_size,
    check_loading,
    check_loss_of_logprobs,
    check_micro_batch_tokens,
    check_models,
    check_training_step,
)
from lit_did.modules.evaluation import PairModule
from lit_did.modules.gradients import accumulate_gradients, clip_gradients
from lit_did.modules.logged_steps import PREFIX, is_logged
from lit_did.modules.micro_batches import MicroBatches, micro_batches_of
from lit_did.modules.objective import LossArgument, Objective, check_functions_given_again, plain_loss
from lit_did.modules.optimizer import (
    Schedule,
    check_optimizer,
    follow_finders,
    optimizer_and_schedule,
    resume_data,
    warn_if_steps_are_rounded_away,
)
from lit_did.modules.optimizer_state import accept_names
from lit_did.modules.pairs import PairStatistics, both_sides
from lit_did.modules.watch import Watch, count_bad_gradients
from lit_did.ops.extension import Backend
from lit_did.reference_cache.precompute import CacheKind


class LitDPO(PairModule):
    """Trains a policy on preference pairs against a frozen reference (DPO, arXiv 2305.18290), or without one.

    A batch is a dict, as `PreferenceDataModule` makes it. Padded: `input_ids`, `attention_mask` and `labels`
    [2 pairs, T], all int64. The chosen sequences come first, then the rejected ones in the same order. `labels[:, t]`
    is the token that position t predicts, or -100 outside completions. End to end: `input_ids` and `labels`
    [1, tokens], and `cu_seqlens` [2 pairs + 1]. Optional: `position_ids`, `index` [pairs], and `weight` [pairs], where
    0 leaves a pair out of validation and prediction. Every batch is checked, and stays on the CPU until it is laid out.

    What changes: the policy is trained in place. It gets its adapter (`lora`), and its dropout is switched off. A
    `reference` that you pass is frozen. Gradients are freed before `on_train_batch_end`. With `micro_batch_tokens`,
    `outputs["loss"]` covers one part only; use `train/loss`.

    Logs `train/` every `log_every_n_steps` optimiser steps and at the end of an epoch, over the micro-batches of that
    step and all processes, and `val/` and `test/` at each epoch: `loss`, a mean over pairs, and the metrics of
    `lit_did.metrics.DIDMetrics`, which `lit-did docs metrics` describes.
    A loss without a reference (`lit_did.functional.REFERENCE_FREE_LOSSES`) loads and runs no reference. It logs `loss`,
    `reward_margin`, `reward_accuracy`, `policy_entropy`, `chosen_logprob` and `rejected_logprob`. The last two are
    means over pairs of log pi, in nats a completion.

    Checkpoints hold what is trained. To load one, pass any model, `LoraConfig` or function again, because checkpoints
    do not hold these. Pass a freshly loaded model: training modifies the policy in place.

    Args:
        policy: A causal language model of transformers, or its name or path. The adapter of a `PeftModel`, or of a
            name that is an adapter's, is trained on.
        reference: A second model or its name, which is never trained. "adapter": a frozen copy of the policy's present
            adapter, on the same base. None: a policy with an adapter is its own reference with the adapter switched
            off. Any other policy gets a frozen copy of its present weights.
        beta: DPO's inverse temperature.
        loss: One of `lit_did.functional.LOSSES`. Or a weighted sum, such as `{"sigmoid": 0.8, "sft": 0.2}`. Or a
            function of the statistics [pairs] of the chosen and of the rejected completions, two
            `SequenceStatistics`, that returns the loss [pairs]. `lit-did docs losses` has the formulas.
        label_smoothing: Of some losses, see `lit_did.functional.preference_loss`.
        gamma: Of some losses, see `lit_did.functional.preference_loss`.
        nll_weight: The weight of the SFT term, the negative log-likelihood of the chosen completions. The term is a
            mean over their tokens in a batch on one process. None: 1 with "slic", "cpo" and "orpo", else 0.
        token_did_entropy_weight: Training minimises `loss - token_did_entropy_weight * mean(token_did_entropy)`. The
            mean is over the tokens of a batch on one process. Above 0 raises that entropy (explores). Below 0 lowers
            it (reinforces). The logged `loss` stays the preference loss.
        lora: Adds a LoRA adapter to the policy: a `peft.LoraConfig`, or its arguments as a dict.
        optimizer: A function of the trained parameters that returns the optimiser, such as
            `functools.partial(torch.optim.SGD, lr=1e-3)`. None: AdamW.
        lr_scheduler: A function of the optimiser that returns its scheduler, which steps at every optimiser step.
            None: the scheduler that `warmup_steps` and `schedule` describe.
        learning_rate: AdamW's. None: 5e-5 for a policy with an adapter, else 1e-6.
        adam_betas: AdamW's decay rates of its two averages.
        adam_eps: AdamW's epsilon. float16 weights raise a smaller one to 2.4e-4, with a warning.
        weight_decay: AdamW's, for matrices. Vectors (biases, norms) are not decayed.
        warmup_steps: Optimiser steps over which the learning rate rises. Below 1: a share of all steps.
        schedule: The learning rate after the warmup. "linear" and "cosine" fall to 0 at the end of training.
        disable_dropout: Sets the policy's dropout probabilities to 0.
        gradient_checkpointing: Recomputes the policy's activations in the backward pass.
        padding_free: Gives the models the sequences of a batch end to end, without padding.
        share_prompts: Gives the models only once what both sequences of a pair begin with.
        recompute_elementwise: Keeps the results of the policy's matrix products and attention for the backward pass,
            and recomputes the rest. This takes less memory and gives the same bits. It has no effect with
            `gradient_checkpointing`, which keeps less.
        micro_batch_tokens: A training step runs its pairs in micro-batches of at most this many tokens, at least one
            pair each, so that only one micro-batch's activations are in memory. The gradient and the logged values are
            those of the whole batch. "auto": 2,048 on a CPU, 16,384 elsewhere. None: all at once.
        cache_reference: A folder. When training starts, the reference runs once over all training and validation pairs,
            and its last hidden states at completion tokens are saved there. Its layers are then freed, unless they are
            a LoRA policy's. A folder that was filled before is used if it has the same reference, pairs and precision;
            else it is refused. Other pairs can then no longer be measured.
        cache_kind: What `cache_reference` keeps. "hidden_states": last hidden states, so that nothing is missing.
            "logprobs": one log-probability for each completion, a thousandth of the size or less. Training then logs
            no statistics of whole distributions (`token_did_...`, `kl`, `reverse_kl`). Validation runs the reference
            itself and logs them, unless models are sharded: then the reference is freed, or not even loaded.
        context_parallel_size: How many processes share each batch: each runs the models on its part of every row of
            tokens. For completions that take too much memory on one device. It divides the number of data-parallel
            processes. 1: each process has its own batches. `lit-did docs scale` says what it needs.
        model_kwargs: Arguments of `from_pretrained` for models that are given by name.
        backend: The operators' implementation, see `lit_did.token_statistics`.

    Raises:
        TypeError, ValueError: An argument is out of range; in a step, a batch has another form.
    """

    objective_class: type[Objective] = Objective
    """The objective, made of six arguments of LitDPO. A subclass may set another one."""

    def __init__(
        self,
        policy: str | nn.Module,
        reference: str | nn.Module | None = None,
        *,
        beta: float = 0.1,
        loss: LossArgument = "sigmoid",
        label_smoothing: float = 0.0,
        gamma: float | None = None,
        nll_weight: float | None = None,
        token_did_entropy_weight: float = 0.0,
        lora: Mapping[str, Any] | Any = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        learning_rate: float | None = None,
        adam_betas: Sequence[float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: float = 0,
        schedule: Schedule = "constant",
        disable_dropout: bool = True,
        gradient_checkpointing: bool = False,
        padding_free: bool = True,
        share_prompts: bool = True,
        recompute_elementwise: bool = False,
        micro_batch_tokens: int | Literal["auto"] | None = "auto",
        cache_reference: str | os.PathLike | None = None,
        cache_kind: CacheKind = "hidden_states",
        context_parallel_size: int = 1,
        model_kwargs: Mapping[str, Any] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.objective = self.objective_class(
            beta=beta,
            loss=loss,
            label_smoothing=label_smoothing,
            gamma=gamma,
            nll_weight=nll_weight,
            token_did_entropy_weight=token_did_entropy_weight,
        )
        loss, reference_free = plain_loss(loss), self.objective.reference_free
        cache_reference = cache_folder(cache_reference)
        check_cache_kind(cache_kind, cache_reference, token_did_entropy_weight)
        policy, reference = check_models(policy, reference, cache_reference, reference_free, loss)
        model_kwargs = check_loading(lora, model_kwargs, backend)
        check_bools(disable_dropout=disable_dropout, gradient_checkpointing=gradient_checkpointing)
        check_bools(padding_free=padding_free, share_prompts=share_prompts, recompute_elementwise=recompute_elementwise)
        check_micro_batch_tokens(micro_batch_tokens)
        check_context_parallel_size(context_parallel_size, padding_free)
        check_optimizer(
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            learning_rate=learning_rate,
            adam_betas=adam_betas,
            adam_eps=adam_eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
        )
        # Modules, configuration objects and functions are not hyperparameters: hand them to load_from_checkpoint again.
        # The others are saved as plain values, so that `hparams.yaml` is plain YAML.
        adam_betas, lora, model_kwargs = map(as_plain, (adam_betas, lora, model_kwargs))
        arguments = {"policy": policy, "reference": reference, "lora": lora}
        functions = {"loss": loss, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        objects = {**arguments, **functions, "model_kwargs": model_kwargs}
        self.save_hyperparameters(ignore=[name for name, value in objects.items() if not is_plain(value)])
        self.given = {**arguments, "model_kwargs": dict(model_kwargs or {}), "needs_reference": not reference_free}
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._micro_batches: MicroBatches[Sequences] | None = None  # of the batch in training
        self._gradients_wait = False  # in `.grad`, of micro-batches that ran before the others
        self._watch = Watch()
        self._logged = False  # whether the step's metrics are
        options: dict[str, Any] = {"distributions": False} if cache_kind == "logprobs" else {}
        self.train_metrics = self.metrics_class(self.objective, **options)
        if not isinstance(policy, str) and (reference == "adapter" or not isinstance(reference, str)):
            self.configure_model()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another policy, or of a run with functions or a reference that are missing here."""
        functions = {"loss": self.objective.custom, "optimizer": self._optimizer, "lr_scheduler": self._lr_scheduler}
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        resuming = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        check_functions_given_again(saved, functions, resuming=resuming)
        super().on_load_checkpoint(checkpoint)
        if resuming:
            self._validation = (checkpoint.get(run_facts.KEY) or {}).get("validation")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `lit_did.exporting` needs of the run: tokenizer, data, training and the last validation."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[run_facts.KEY] = run_facts.run_facts(self)

    # -----------------------------------------------------------------------------------------------------------
    # What a subclass may override beside Lightning's hooks
    # -----------------------------------------------------------------------------------------------------------

    def split(self, sequences: Sequences) -> list[Sequences]:
        """The micro-batches of a training batch."""
        strategy: Any = None if self._trainer is None else self.trainer.strategy
        tokens, sharded = self.hparams["micro_batch_tokens"], type(strategy) is ModelParallelStrategy
        ddp: Any = strategy.model if type(strategy) is DDPStrategy else None
        if ddp is not None and (ddp.find_unused_parameters or ddp.static_graph):
            tokens = None  # DDP looks for the parameters of the last micro-batch only
        elif type(strategy) not in (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy):  # subclasses differ
            tokens = None
        return micro_batches_of(sequences, tokens, self.device, agreed=sharded and strategy.world_size > 1)

    def training_objective(self, pairs: PairStatistics, whole: Sequences) -> Tensor:
        """What a micro-batch adds to what training minimises, a scalar.

        Args:
            pairs: The pairs of the micro-batch.
            whole: All sequences of the batch.
        """
        return self.objective.share(pairs, whole)

    def backward_pass(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch.

        Args:
            loss: What `training_objective` returned, times any factors, such as a gradient scaler's.
        """
        accumulate_gradients(self.loaded_models().policy, partial(super().backward, loss))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """What training minimises, a scalar.

        With several micro-batches it is the first one's share, and `backward` runs the others. The logged values are
        the whole batch's.
        """
        sequences = self.read(batch)
        self.check_noise(sequences)
        mean_chosen_tokens = sequences.mean_chosen_labels()
        self._logged = self._trainer is None or is_logged(self.trainer, batch_idx)

        def run(part: Sequences) -> Tensor:
            pairs = self.objective.pairs(*self.run_sides(part), mean_chosen_tokens)
            if self.objective.custom is not None and self.cached_logprobs() is not None and not self._start_checked:
                check_loss_of_logprobs(pairs.loss, pairs.chosen)
            self.check_start(both_sides(pairs))
            self._watch.add(pairs)
            if self._logged:
                self.train_metrics.update(pairs)
            return self.training_objective(pairs, sequences)

        parts = self.split(sequences)
        self._micro_batches = MicroBatches(parts, run)
        if len(parts) == 1 or type(self.trainer.strategy) is not DDPStrategy:
            return self._micro_batches.forward()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        factor = (1.0 if scaler is None else scaler.get_scale()) / self.trainer.accumulate_grad_batches
        self._gradients_wait = True
        no_autocast = partial(torch.autocast, self.device.type, enabled=False)  # Lightning's is for the forward pass
        return self._micro_batches.forward_last(factor, self.backward_pass, no_autocast)

    def backward(self, loss: Tensor) -> None:  # type: ignore[override]  # `retain_graph` would be for one graph of many
        """Calls `backward_pass` for one micro-batch after the other. All but the first run forward here."""
        micro_batches, self._micro_batches = check_training_step(self._micro_batches), None
        self._gradients_wait = False
        context = self.trainer.precision_plugin.train_step_context
        micro_batches.backward(loss, self.backward_pass, context, self._watch.add_factor)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Frees gradients, but not those of earlier micro-batches: Lightning calls this before `backward`, too."""
        if not self._gradients_wait:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips gradients. Those of sharded models may be of several meshes, which torch cannot clip together."""
        policy = self.loaded_models().policy
        if not is_sharded(policy):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            gradients = [p.grad for p in policy.parameters() if p.grad is not None]
            clip_gradients(gradients, gradient_clip_val, gradient_clip_algorithm or "norm")

    def configure_optimizers(self) -> Any:
        """The optimiser of the trained parameters, and its schedule, which steps at every optimiser step."""
        configuration = optimizer_and_schedule(
            self.loaded_models().policy,
            self.trainer,
            self.hparams,
            dims=self._dims,
            optimizer=self._optimizer,
            lr_scheduler=self._lr_scheduler,
        )
        accept_names([configuration["optimizer"]], self)
        return configuration

    def on_fit_start(self) -> None:
        """Refuses a strategy under which parameters would drift apart, and resets what an interrupted run left."""
        super().on_fit_start()
        warn_if_steps_are_rounded_away(self.trainer.optimizers)
        self.train_metrics.reset()
        self._micro_batches = None
        self._gradients_wait = self._logged = False
        self._watch = Watch()

    def on_train_start(self) -> None:
        """Resumes the data, follows Lightning's finders, and fills or opens the folder of `cache_reference`."""
        resume_data(self.trainer)
        follow_finders(self.trainer, self.hparams)
        super().on_train_start()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step of the optimiser, after which the gradients are freed: the next forward pass needs their memory."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._logged:
            self._watch.check(self.trainer)
        if not self.trainer.strategy.handles_gradient_accumulation:  # that comes here for every micro-batch
            self.optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the metrics over all micro-batches and processes of this optimiser step, if it is one to log."""
        bad: Tensor | int = 0
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # which skips steps that overflow
            bad = count_bad_gradients(self.loaded_models().policy.parameters())
        ended = self._watch.end_step(self.trainer.global_step, bad)
        if not (ended and self._logged):  # a `training_step` may have skipped all batches
            return
        metrics: Any = self.train_metrics
        metrics["loss"].add_bad_steps(self._watch.found())
        values = metrics.log_all(self, PREFIX, ("loss", "reward_margin", "token_did_concentration"))
        if not values["bad_steps"]:
            self._watch.none_found()

    def on_train_epoch_end(self) -> None:
        """Raises an error if a step since the last log was not finite."""
        self._watch.check(self.trainer)

    def on_train_end(self) -> None:
        """Warns if the chosen completions became less likely."""
        self._watch.warn_if_chosen_fell(run_facts.data_parallel_size(self.trainer))

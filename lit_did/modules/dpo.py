"""LitDPO: direct preference optimisation as a LightningModule, with the DID's statistics logged as it trains."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_did.arguments import check_bools, is_plain
from lit_did.batches.checks import check_pair_values, checked_sequences
from lit_did.batches.layout import Layout
from lit_did.batches.sequences import Sequences, split_pairs
from lit_did.functional import pair_margin, token_did_entropy
from lit_did.functional.preference import sft_shares
from lit_did.models import attention, forward, loading
from lit_did.models.dropout import switch_off_dropout
from lit_did.models.measuring import completion_statistics
from lit_did.models.quiet import adapter_off
from lit_did.models.trial import layout_of, outputs_of
from lit_did.models.wrappers import inner, plain_name
from lit_did.modules.checkpoint import TrainedState
from lit_did.modules.checks import (
    cache_folder,
    check_loading,
    check_micro_batch_tokens,
    check_models,
    check_token_did_entropy_weight,
    check_training_step,
    keep_noise_out,
    warn_unless_policy_is_reference,
)
from lit_did.modules.objective import Objective, PairLoss, check_functions_given_again, plain_loss
from lit_did.modules.optimizer import (
    check_optimizer,
    follow_finders,
    optimizer_and_schedule,
    warn_if_steps_are_rounded_away,
)
from lit_did.modules.optimizer_state import accept_names
from lit_did.modules.pairs import WITHOUT_REFERENCE, PairMetrics, PairStatistics, both_sides, counted
from lit_did.modules.quiet_start import QuietStart
from lit_did.modules.strategies import (
    check_averages_of_weights,
    check_backward_is_run,
    check_gradients_are_exchanged,
    check_unsharded_with_ddp,
)
from lit_did.modules.watch import Watch, count_bad_gradients
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import BACKENDS
from lit_did.reference_cache.fingerprint import quick_digest
from lit_did.reference_cache.precompute import CachedReference, cached_reference

TOKENS_AT_ONCE_CPU = 2048
TOKENS_AT_ONCE = 16_384
"""`micro_batch_tokens="auto"`: more than matrix products need for full speed, few enough for their activations"""


class LitDPO(TrainedState):
    """Trains a policy on preference pairs against a frozen reference (DPO, arXiv 2305.18290), or without one.

    Batches are dicts, as `PreferenceDataModule` makes them: `input_ids`, `attention_mask` and `labels` [2 pairs, T],
    the chosen sequences first, then the rejected ones in the same order, padded; labels[:, t] is the token that
    position t predicts, -100 outside completions. Or, end to end, `input_ids` and `labels` [1, tokens] and `cu_seqlens`
    [2 pairs + 1]. `weight` [pairs] (0 leaves a pair out of validation and prediction), `index` [pairs] and
    `position_ids` may be absent.

    The models are given neither padding nor, a second time, what both sequences of a pair begin with, and no logits are
    held in memory, where the models allow it; a warning says where not. docs/performance.md has the switches.

    What it does beyond a plain module: a reference that is given is frozen, and the policy trained, given its adapter
    (`lora`) and rid of dropout, in place; `on_train_batch_end` finds no gradients, which are freed after the
    optimiser's step, and of a batch that goes in parts (`micro_batch_tokens`) the first part's share of the loss as
    `outputs["loss"]`. The policy's attention is set to one that takes packed sequences while it runs on them. Every
    batch is checked: keys, shapes, labels, token ids.

    Logs `train/` (each optimiser step, over its micro-batches and all processes) and `val/` (each epoch): `loss`, a
    mean over pairs, and all that `lit_did.metrics.DIDMetrics` tells; docs/metrics.md describes each. A loss without a
    reference (`lit_did.functional.REFERENCE_FREE_LOSSES`) loads, copies and runs none, and logs `loss`, `reward_margin`
    and `reward_accuracy` of its own reward, `policy_entropy`, and `chosen_logprob` and `rejected_logprob`, means over
    pairs of log pi in nats a completion.

    Args:
        policy: A transformers causal language model, or its name or path. A `PeftModel` keeps its adapter.
        reference: The same, never trained. None: a PeftModel's reference is itself with the adapter off; any other
            policy's is a frozen copy of the policy as it is given; a loss without a reference has none.
        beta: DPO's inverse temperature.
        loss: One of `lit_did.functional.LOSSES`; or a weighted sum of them, such as `{"sigmoid": 0.8, "sft": 0.2}`; or
            a function of the statistics [pairs] of the chosen and of the rejected completions, two
            `SequenceStatistics`, that returns the loss [pairs]. docs/losses.md has the formulas and examples.
        label_smoothing, gamma: Of some losses: see `lit_did.functional.preference_loss`.
        nll_weight: Adds so many times the SFT term, the negative log-likelihood of the chosen completions, a mean over
            their tokens in a micro-batch on one process.
        token_did_entropy_weight: Training minimises `loss - token_did_entropy_weight * mean(token_did_entropy)`. The
            mean is over the tokens of a micro-batch on one process. Above 0 raises that entropy (explores). Below 0
            lowers it (reinforces). The logged `loss` stays the preference loss.
        lora: Adds a LoRA adapter to the policy: a `peft.LoraConfig`, or its arguments as a dict.
        optimizer: A function of the trained parameters that returns the optimiser, such as
            `functools.partial(torch.optim.SGD, lr=1e-3)`. None: AdamW with the next four arguments.
        lr_scheduler: A function of the optimiser that returns its scheduler, stepped every optimiser step. None: the
            one of `warmup_steps` and `schedule`.
        learning_rate: None: 1e-6, and 5e-5 of a policy with an adapter (`lora`, or a `PeftModel`).
        adam_betas, adam_eps, weight_decay: AdamW's. Vectors (biases, norms) are not decayed. float16 weights raise a
            smaller `adam_eps` to 2.4e-4, with a warning.
        warmup_steps: Optimiser steps over which the learning rate rises; below 1, as a share of all steps.
        schedule: What follows the warmup: "constant", "linear" or "cosine" (both to 0 at the end of training).
        disable_dropout: Sets the policy's dropout probabilities to 0.
        gradient_checkpointing: Recomputes the policy's activations in the backward pass.
        padding_free: Gives the models the sequences of a batch end to end, without padding.
        share_prompts: Gives the models once what both sequences of a pair begin with.
        recompute_elementwise: Keeps the policy's matrix products and attention for the backward pass, and computes the
            rest of each layer again (torch's selective checkpointing): less memory for activations, and the same bits.
            Without effect beside `gradient_checkpointing`, which keeps less.
        micro_batch_tokens: A training step runs its pairs in micro-batches of at most this many tokens (at least one
            pair), so that only one micro-batch's activations are in memory. The gradient and the logged values are the
            whole batch's. "auto": 2,048 on the CPU, 16,384 elsewhere; None: all at once. Only on one device without
            sharding.
        cache_reference: A folder. When training starts, the reference runs once over the training and validation pairs,
            its last hidden states at completion tokens are kept there, and its layers are freed, unless they are a LoRA
            policy's. A folder that was filled before is used, if it is of the same reference, pairs and precision; any
            other is refused. Other pairs can no longer be measured; where layers were freed, `DIDMonitor` needs
            `logits_fn=lambda module, batch: module(batch)`.
        model_kwargs: For `from_pretrained`, where models are given by name.
        backend: Of the operators: "auto", "fused" or "reference".

    Raises:
        TypeError, ValueError: An argument is out of range; in a step, a batch has another layout.
    """

    def __init__(
        self,
        policy: str | nn.Module,
        reference: str | nn.Module | None = None,
        *,
        beta: float = 0.1,
        loss: str | Mapping[str, float] | PairLoss = "sigmoid",
        label_smoothing: float = 0.0,
        gamma: float | None = None,
        nll_weight: float | None = None,
        token_did_entropy_weight: float = 0.0,
        lora: Any = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        learning_rate: float | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: float = 0,
        schedule: str = "constant",
        disable_dropout: bool = True,
        gradient_checkpointing: bool = False,
        padding_free: bool = True,
        share_prompts: bool = True,
        recompute_elementwise: bool = False,
        micro_batch_tokens: int | str | None = "auto",
        cache_reference: str | os.PathLike | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.objective = Objective(
            beta=beta, loss=loss, label_smoothing=label_smoothing, gamma=gamma, nll_weight=nll_weight
        )
        self._reference_free = self.objective.reference_free
        loss = plain_loss(loss)
        self._check_objective(
            loss=loss,
            label_smoothing=label_smoothing,
            nll_weight=nll_weight,
            token_did_entropy_weight=token_did_entropy_weight,
        )
        cache_reference = cache_folder(cache_reference)
        policy, reference = (os.fspath(m) if isinstance(m, os.PathLike) else m for m in (policy, reference))
        check_models(policy, reference, cache_reference, self._reference_free, loss)
        check_loading(lora, model_kwargs)
        check_bools(
            disable_dropout=disable_dropout,
            gradient_checkpointing=gradient_checkpointing,
            padding_free=padding_free,
            share_prompts=share_prompts,
            recompute_elementwise=recompute_elementwise,
        )
        check_micro_batch_tokens(micro_batch_tokens)
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
        if backend not in BACKENDS:
            raise ValueError(f"Expected `backend` to be one of {', '.join(map(repr, BACKENDS))}, but got {backend!r}.")
        # Modules, configuration objects and functions are not hyperparameters: hand them to load_from_checkpoint again.
        arguments = {"policy": policy, "reference": reference, "lora": lora}
        functions = {"loss": loss, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        objects = {**arguments, **functions, "model_kwargs": model_kwargs}
        self.save_hyperparameters(ignore=[name for name, value in objects.items() if not is_plain(value)])
        self._given = arguments
        self._model_kwargs = dict(model_kwargs or {})
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._first_objective: Tensor | None = None  # of the part of the batch that `training_step` went through
        self._rest: list[Sequences] = []  # of the batch in training: what has not been forward and backward yet
        self._cache: CachedReference | None = None
        self._watch = Watch()
        self._noise_checked = not disable_dropout
        self._start_checked = self._reference_free  # what starts as a reference needs one
        self._reference_digest: str | None = None
        self.policy: nn.Module | None = None
        self.reference: nn.Module | None = None
        self.train_metrics = PairMetrics(self.objective)
        self.val_metrics = nn.ModuleList()  # one a validation dataloader
        if not isinstance(policy, str) and not isinstance(reference, str):
            self.configure_model()

    # -----------------------------------------------------------------------------------------------------------
    # Models
    # -----------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the models; under a sharded strategy Lightning calls it where they are to be created."""
        if self.policy is not None:
            return
        policy, reference = loading.load_pair(
            **self._given, model_kwargs=self._model_kwargs, needs_reference=not self._reference_free
        )
        if self.hparams.disable_dropout:
            switch_off_dropout(policy)
        if self.hparams.gradient_checkpointing or self.hparams.recompute_elementwise:
            loading.checkpoint_activations(policy, keep_products=not self.hparams.gradient_checkpointing)
        self._dims = {plain_name(name): p.dim() for name, p in policy.named_parameters()}  # later they may be shards
        # from_pretrained leaves eval mode, which Lightning keeps.
        self.policy = policy.train()
        self.reference = reference
        if not self._reference_free:  # now: later it may be sharded, cast or freed
            self._reference_digest = quick_digest(policy if reference is None else reference)
        if self.hparams.cache_reference is not None:  # else DDP would hold on to what is freed
            values = chain(self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False))
            names = [name for name, _ in values if name.startswith("reference.")]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)
        self._given = {}
        if self._trainer is not None:
            check_unsharded_with_ddp(self)

    def train(self, mode: bool = True) -> LitDPO:
        """Puts the policy in train or eval mode; the reference stays in eval mode."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another policy, or of a run with functions or a reference that are not given here."""
        functions = {
            "loss": self.objective.custom,
            "optimizer": self._optimizer,
            "lr_scheduler": self._lr_scheduler,
        }
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        resuming = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        check_functions_given_again(saved, functions, resuming=resuming)
        super().on_load_checkpoint(checkpoint)

    # -----------------------------------------------------------------------------------------------------------
    # Steps
    # -----------------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> SequenceStatistics:
        """The statistics of every completion: [2 pairs], chosen first, differentiable in the policy.

        With a loss that has no reference, all but `WITHOUT_REFERENCE` is NaN.
        """
        return self._statistics(self._read(batch))[0]

    def _statistics(
        self, sequences: Sequences, batch: Sequences | None = None
    ) -> tuple[SequenceStatistics, Tensor | None]:
        """The statistics, and a mixture of experts' auxiliary loss where its configuration asks for one.

        `batch`: all sequences that one backward pass goes through, of which these are some.
        """
        layout = self._policy_layout(sequences, batch)
        policy = outputs_of(self.policy, layout)
        if self._reference_free:
            reference = policy.detach()
        elif self._cache is not None:
            reference = self._cache.outputs(sequences, layout.labels.device)
        else:
            reference = self._reference_outputs(sequences, layout)
        statistics = completion_statistics(
            policy, reference, layout.labels, layout.cu_labels, backend=self.hparams.backend
        )
        if not self._reference_free:
            return statistics, policy.auxiliary_loss
        undefined = torch.full_like(statistics.policy_logprob, torch.nan, requires_grad=False)
        kept = {name: getattr(statistics, name) for name in WITHOUT_REFERENCE}
        statistics = SequenceStatistics(**dict.fromkeys(SequenceStatistics._fields, undefined) | kept)
        return statistics, policy.auxiliary_loss

    def _layout(self, model: nn.Module, sequences: Sequences, batch: Sequences | None = None) -> Layout:
        return layout_of(
            model, sequences, padding_free=self.hparams.padding_free, share=self.hparams.share_prompts, batch=batch
        )

    def _policy_layout(self, sequences: Sequences, batch: Sequences | None) -> Layout:
        layout = self._layout(self.policy, sequences, batch)
        if torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in self.policy.modules()):
            # Until the next batch or `teardown`, not for the forward pass alone: the backward pass runs layers again.
            packed = layout.packing == "segments"
            (attention.use_packed_attention if packed else attention.use_own_attention)(inner(self.policy))
        return layout

    def _reference_outputs(self, sequences: Sequences, layout: Layout | None = None) -> forward.Outputs:
        """What the reference says; `layout`: the policy's, which also suits the policy with its adapter off."""
        if self.reference is None:
            with adapter_off(self.policy):
                return outputs_of(self.policy, layout or self._layout(self.policy, sequences))
        with torch.no_grad():
            return outputs_of(self.reference, self._layout(self.reference, sequences))

    def pair_statistics(self, batch: Mapping[str, Tensor]) -> PairStatistics:
        """The statistics, loss and reward margin of every pair of a batch."""
        sequences = self._read(batch, weighted=True)
        check_pair_values(batch, "index", sequences.num_sequences // 2)
        weight = batch.get("weight")
        mean_chosen_tokens = sequences.mean_chosen_labels(None if weight is None else weight > 0)
        pairs = self._with_sft(self._pair_statistics(sequences), mean_chosen_tokens)
        return pairs._replace(index=batch.get("index", pairs.index))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of the batch's pairs, less the weighted DID entropy.

        With several micro-batches (`micro_batch_tokens`) it is the first one's share of that, and `backward` runs the
        others. What is logged is the whole batch's.
        """
        sequences = self._read(batch)
        self._whole = (sequences.num_sequences // 2, sequences.num_labels, sequences.mean_chosen_labels())
        if not self._noise_checked:
            keep_noise_out(self.policy, sequences)
            self._noise_checked = True
        first, *self._rest = self._split(sequences)
        self._first_objective = self._train_on(first)
        return self._first_objective

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass, of one part of the batch after the other."""
        check_training_step(self._first_objective)
        rest, self._rest = self._rest, []
        if rest:  # what Lightning, and a gradient scaler, multiplied the objective by
            (scale,) = torch.autograd.grad(loss, self._first_objective, retain_graph=True)
        self._first_objective = None  # nor its graph
        super().backward(loss, *args, **kwargs)
        for part in rest:
            with self.trainer.precision_plugin.train_step_context():
                objective = self._train_on(part)
            (objective * scale).backward()

    def configure_callbacks(self) -> list[Callback]:
        """`QuietStart`, unless the Trainer has it from an earlier run."""
        return [] if any(isinstance(c, QuietStart) for c in self.trainer.callbacks) else [QuietStart()]

    def setup(self, stage: str) -> None:
        """Refuses a strategy that ignores `backward`, DDP with sharded models, and averages of other weights."""
        if stage == "fit":
            check_backward_is_run(self.trainer)
            check_averages_of_weights(self)
        check_unsharded_with_ddp(self)

    def on_fit_start(self) -> None:
        """Refuses a strategy under which parameters would drift apart, and empties the metrics."""
        check_gradients_are_exchanged(self)
        warn_if_steps_are_rounded_away(self.trainer.optimizers)
        self.train_metrics.reset()  # an interrupted run may have left micro-batches
        self._rest, self._first_objective = [], None
        self._watch = Watch()

    def on_train_start(self) -> None:
        """With `cache_reference`, runs the reference over all pairs, or finds what it said, and frees its layers."""
        self._resume_data()
        follow_finders(self.trainer, self.hparams)
        if self.hparams.cache_reference is None:
            return
        self._cache = cached_reference(
            self.hparams.cache_reference,
            self.trainer,
            self.policy if self.reference is None else self.reference,
            partial(self._read, weighted=True),
            self._reference_outputs,
            self._cache,
        )
        if self.reference is not None:
            self.reference = self._cache.keep_output_layer(self.reference)
            gc.collect()  # save_hyperparameters left frames that hold it, and one another

    def _resume_data(self) -> None:
        """Lets a resumed run go on with the batch that would have come next.

        `configure_optimizers`, which asks for the number of steps, had the dataloaders made before Lightning had read
        their states from the checkpoint, and Lightning gives those to none that are there.
        """
        loop = self.trainer.fit_loop
        if getattr(loop, "_combined_loader_states_to_load", None):
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step of the optimiser, after which the gradients are freed: the next forward pass needs their memory."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._watch.check_when_logged(self.trainer)
        if not self.trainer.strategy.handles_gradient_accumulation:  # that comes here for every micro-batch
            self.optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_epoch_end(self) -> None:
        """Raises FloatingPointError if a step since the last log was not finite."""
        self._watch.check(self.trainer)

    def on_train_end(self) -> None:
        """Says whether the chosen completions became less likely."""
        if self.trainer.is_global_zero:
            self._watch.warn_if_chosen_fell()

    def teardown(self, stage: str) -> None:
        """Gives the policy its own attention back."""
        if self.policy is not None:  # not its truth, which is a length that a compiled model lacks
            attention.use_own_attention(inner(self.policy))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the metrics over all micro-batches and processes of this optimiser step, and looks at them."""
        metrics = self.train_metrics
        if not metrics["loss"].update_called:  # a `training_step` may have skipped all batches
            return
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # which skips steps that overflow
            metrics["loss"].add_bad_gradients(count_bad_gradients(self.policy.parameters()))
        self._watch.add(self.trainer, metrics.log_all(self, "train/", ("loss", "reward_margin", "token_did_entropy")))

    def on_validation_epoch_start(self) -> None:
        """Starts one set of metrics a validation dataloader."""
        loaders = len(self.trainer.num_val_batches or self.trainer.num_sanity_val_batches)
        self.val_metrics = nn.ModuleList(PairMetrics(self.objective).to(self.device) for _ in range(loaders))

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the batch to the epoch's metrics."""
        self.val_metrics[dataloader_idx].update(self.pair_statistics(batch), batch.get("weight"))

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over the epoch and all processes."""
        for i, metrics in enumerate(self.val_metrics):
            suffix = f"/dataloader_idx_{i}" if len(self.val_metrics) > 1 else ""
            metrics.log_all(self, "val/", ("loss", "reward_margin", "reward_accuracy"), suffix)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> PairStatistics:
        """The statistics of every pair, without the rows that only pad a process's share."""
        pairs = self.pair_statistics(batch)
        return pairs if "weight" not in batch else counted(pairs, batch["weight"])

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser of the trained parameters, its schedule stepped every optimiser step."""
        configuration = optimizer_and_schedule(
            self.policy,
            self.trainer,
            self.hparams,
            dims=self._dims,
            optimizer=self._optimizer,
            lr_scheduler=self._lr_scheduler,
        )
        accept_names([configuration["optimizer"]], self)
        return configuration

    # -----------------------------------------------------------------------------------------------------------

    def _check_objective(self, *, loss: Any, token_did_entropy_weight: float, **_: Any) -> None:
        check_token_did_entropy_weight(token_did_entropy_weight, self._reference_free, loss)

    def _read(self, batch: Mapping[str, Tensor], *, weighted: bool = False) -> Sequences:
        if self.policy is None:  # a policy by name, and no Trainer has
            self.configure_model()
        return checked_sequences(
            batch,
            num_embeddings=forward.num_embeddings(self.policy),
            num_positions=forward.num_positions(self.policy),
            weighted=weighted,
        )

    def _split(self, sequences: Sequences) -> list[Sequences]:
        """The parts of a training batch."""
        tokens = self.hparams.micro_batch_tokens
        # Where gradients are exchanged in a backward pass, there has to be one. Not isinstance: subclasses shard.
        if tokens is None or self._trainer is None or type(self.trainer.strategy) is not SingleDeviceStrategy:
            return [sequences]
        if tokens == "auto":
            tokens = TOKENS_AT_ONCE_CPU if self.device.type == "cpu" else TOKENS_AT_ONCE
        return split_pairs(sequences, tokens)

    def _train_on(self, sequences: Sequences) -> Tensor:
        """Adds a part of the batch to the metrics; its share of what training minimises."""
        pairs = self._with_sft(self._pair_statistics(sequences), self._whole[2])
        if not self._start_checked:
            warn_unless_policy_is_reference(self.policy, self.reference is None, both_sides(pairs))
            self._start_checked = True
        self.train_metrics.update(pairs)
        return self._objective(pairs)

    def _pair_statistics(self, sequences: Sequences) -> PairStatistics:
        chosen, rejected, auxiliary = self._sides(sequences)
        loss = self._loss(chosen, rejected)
        if auxiliary is not None:
            loss = loss + auxiliary
        index = torch.full(loss.shape, -1, device=loss.device)
        margin = pair_margin(*map(self.objective.log_ratio, (chosen, rejected)), self.hparams.beta)
        return PairStatistics(index, chosen, rejected, loss, margin, preference_loss=loss)

    def _with_sft(self, pairs: PairStatistics, mean_chosen_tokens: float) -> PairStatistics:
        """Adds the SFT term, of pairs of a batch whose chosen completions have that many tokens on average."""
        if not self.objective.sft:
            return pairs
        shares = sft_shares(pairs.chosen.policy_logprob, mean_chosen_tokens)
        return pairs._replace(loss=pairs.loss + self.objective.sft * shares)

    def _sides(self, sequences: Sequences) -> tuple[SequenceStatistics, SequenceStatistics, Tensor | None]:
        """The statistics [pairs] of the chosen and of the rejected completions, and the auxiliary loss."""
        (statistics, auxiliary), pairs = self._statistics(sequences), sequences.num_sequences // 2
        halves = (slice(pairs), slice(pairs, None))
        return *(SequenceStatistics(*(v[rows] for v in statistics)) for rows in halves), auxiliary

    def _objective(self, pairs: PairStatistics) -> Tensor:
        """Some pairs' share of what training minimises."""
        num_pairs, num_tokens, _ = self._whole
        objective = pairs.loss.sum() / num_pairs
        if not self.hparams.token_did_entropy_weight:
            return objective
        both = both_sides(pairs)
        share = both.num_tokens.sum() / num_tokens
        return objective - self.hparams.token_did_entropy_weight * share * token_did_entropy(both).to(objective.dtype)

    def _loss(self, chosen: SequenceStatistics, rejected: SequenceStatistics) -> Tensor:
        """[pairs] the loss of every pair, without the SFT term and the auxiliary loss."""
        return self.objective.losses(chosen, rejected)

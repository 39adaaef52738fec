"""LitSFT: supervised fine-tuning on one side of preference pairs, or on both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MetricCollection

from lit_did.arguments import check_choice
from lit_did.batches.sequences import Sequences
from lit_did.modules.dpo import LitDPO
from lit_did.modules.objective import Objective
from lit_did.modules.optimizer import Schedule
from lit_did.modules.pairs import PairMetrics, PairStatistics, TokenLoss, both_sides, counted
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import Backend

Side = Literal["chosen", "rejected", "both"]


def rows_of(side: Side, sequences: int) -> slice:
    """Where a side's sequences are among those of a batch, the chosen ones first."""
    pairs = sequences // 2
    return {"chosen": slice(pairs), "rejected": slice(pairs, sequences), "both": slice(sequences)}[side]


class _Likelihood(Objective):
    """The negative log-likelihood of one side or both, a mean over tokens."""

    side: Side = "chosen"
    reference_free = True

    def pairs(
        self,
        chosen: SequenceStatistics,
        rejected: SequenceStatistics,
        auxiliary: Tensor | None,
        mean_chosen_tokens: float,
    ) -> PairStatistics:
        """The loss of every pair is the mean over the pair's own tokens."""
        sides = {"chosen": [chosen], "rejected": [rejected], "both": [chosen, rejected]}[self.side]
        tokens = torch.stack([side.num_tokens for side in sides]).sum(0).clamp(min=1)
        nll = -torch.stack([side.policy_logprob for side in sides]).sum(0) / tokens
        rest = torch.zeros_like(nll) if auxiliary is None else auxiliary.expand_as(nll)
        margin = chosen.policy_logprob - rejected.policy_logprob
        index = torch.full(nll.shape, -1, device=nll.device)
        return PairStatistics(index, chosen, rejected, nll + rest, margin, preference_loss=rest)

    def share(self, pairs: PairStatistics, whole: Sequences) -> Tensor:
        labels = np.diff(whole.cu_labels)[rows_of(self.side, whole.num_sequences)].sum()
        logprob = torch.cat([pairs.chosen.policy_logprob, pairs.rejected.policy_logprob])
        nll = -logprob[rows_of(self.side, len(logprob))].sum() / max(1, int(labels))
        return nll + pairs.preference_loss.sum() / (whole.num_sequences // 2)


class _Metrics(PairMetrics):
    """`loss`, `nll` and `policy_entropy` of the completions that are trained on."""

    def __init__(self, objective: Any, *, intervals: bool = False, copies: int = 1) -> None:
        super(PairMetrics, self).__init__(beta=objective.beta)
        self._side: Side = objective.side
        for name in set(map(str, self.keys())) - {"policy_entropy"}:
            del self[name]
        self.add_metrics({"loss": TokenLoss(copies)})

    def update(  # type: ignore[override]  # pairs with their losses, not logits
        self, pairs: PairStatistics, weight: Tensor | None = None
    ) -> None:
        """Adds the pairs, except those with a `weight` [pairs] of 0."""
        pairs = pairs if weight is None else counted(pairs, weight)
        both = both_sides(pairs)
        rows = rows_of(self._side, len(both.num_tokens))
        with torch.no_grad():
            trained = SequenceStatistics(*(value[rows] for value in both))
            MetricCollection.update(self, trained, losses=pairs.preference_loss)


class LitSFT(LitDPO):
    """Fine-tunes a model on the chosen or on the rejected completions of preference pairs, or on both.

    It minimises the negative log-likelihood of the scored completion tokens, a mean over those of a batch on one
    process. Batches, checkpoints and `lit_did.exporting` are those of `LitDPO`. There is no reference, and the models
    run on the side that is trained on. `predict_step` runs both sides: `reward_margin` is then the difference
    log p(chosen) - log p(rejected).

    Logs `train/`, `val/` and `test/` as `LitDPO` does: `nll` in nats a token, `policy_entropy`, and `loss`, which is
    `nll` and the auxiliary loss of a mixture of experts that is configured to return one.

    Args:
        policy: A causal language model of transformers, or its name or path. The adapter of a `PeftModel`, or of a
            name that is an adapter's, is trained on.
        side: The completions that are trained on: "chosen", "rejected" or "both".
        lora: Adds a LoRA adapter to the policy: a `peft.LoraConfig`, or its arguments as a dict.
        optimizer: A function of the trained parameters that returns the optimiser. None: AdamW.
        lr_scheduler: A function of the optimiser that returns its scheduler, which steps at every optimiser step.
        learning_rate: AdamW's. None: 5e-5 for a policy with an adapter, else 1e-6.
        adam_betas: AdamW's decay rates of its two averages.
        adam_eps: AdamW's epsilon.
        weight_decay: AdamW's, for matrices.
        warmup_steps: Optimiser steps over which the learning rate rises. Below 1: a share of all steps.
        schedule: The learning rate after the warmup. "linear" and "cosine" fall to 0 at the end of training.
        disable_dropout: Sets the policy's dropout probabilities to 0.
        gradient_checkpointing: Recomputes the policy's activations in the backward pass.
        padding_free: Gives the model the sequences of a batch end to end, without padding.
        share_prompts: With `side="both"`, gives the model only once what both sequences of a pair begin with.
        recompute_elementwise: Recomputes all but matrix products and attention in the backward pass.
        micro_batch_tokens: Micro-batches have at most this many tokens, both sides counted, and at least one pair.
            "auto": 2,048 on a CPU, 16,384 elsewhere. None: all at once.
        context_parallel_size: How many processes share each batch, see `LitDPO`.
        model_kwargs: Arguments of `from_pretrained` for models that are given by name.
        backend: The operators' implementation, see `lit_did.token_statistics`.

    Raises:
        TypeError, ValueError: An argument is out of range; in a step, a batch has another form.
    """

    objective: _Likelihood
    objective_class = _Likelihood
    metrics_class = _Metrics

    def __init__(
        self,
        policy: str | nn.Module,
        *,
        side: Side = "chosen",
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
        context_parallel_size: int = 1,
        model_kwargs: Mapping[str, Any] | None = None,
        backend: Backend = "auto",
    ) -> None:
        check_choice("side", side, Side)
        super().__init__(
            policy,
            loss="sft",
            beta=1.0,
            lora=lora,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            learning_rate=learning_rate,
            adam_betas=adam_betas,
            adam_eps=adam_eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            disable_dropout=disable_dropout,
            gradient_checkpointing=gradient_checkpointing,
            padding_free=padding_free,
            share_prompts=share_prompts,
            recompute_elementwise=recompute_elementwise,
            micro_batch_tokens=micro_batch_tokens,
            context_parallel_size=context_parallel_size,
            model_kwargs=model_kwargs,
            backend=backend,
        )
        self.side: Side = side
        self.objective.side = side
        self.train_metrics = self.metrics_class(self.objective)

    def run_sides(self, sequences: Sequences) -> tuple[SequenceStatistics, SequenceStatistics, Tensor | None]:
        """Runs the model on the side that is trained on, in prediction on both. A side that does not run is NaN."""
        if self.side == "both" or (self._trainer is not None and self.trainer.predicting):
            return super().run_sides(sequences)
        rows = rows_of(self.side, sequences.num_sequences)
        run, auxiliary = self.statistics(sequences.select(range(sequences.num_sequences)[rows]), sequences)
        absent = SequenceStatistics(*(value.detach() * torch.nan for value in run))
        absent = absent._replace(num_tokens=torch.zeros_like(run.num_tokens))
        return (run, absent, auxiliary) if self.side == "chosen" else (absent, run, auxiliary)

"""LitDPOPG: DPO with projected gradient, whose direction does not push the chosen completions' likelihood down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_did.batches.sequences import Sequences
from lit_did.models.sharding import is_sharded, output_layer_kept
from lit_did.modules.dpo import LitDPO
from lit_did.modules.gradients import accumulate_gradients, inner_product, local, separate_gradients
from lit_did.modules.objective import Objective
from lit_did.modules.pairs import PairStatistics
from lit_did.ops import SequenceStatistics


class _Sigmoid(Objective):
    """The one objective whose gradient LitDPOPG projects."""

    def __init__(self, **options: Any) -> None:
        plain = {"loss": "sigmoid", "label_smoothing": 0, "nll_weight": None, "token_did_entropy_weight": 0}
        for name, only in plain.items():
            if options[name] != only:
                raise ValueError(f"Expected `{name}` to be {only!r} with LitDPOPG, but got {options[name]!r}.")
        super().__init__(**options)


class LitDPOPG(LitDPO):
    """Trains as `LitDPO` does, but leaves out of each step what lowers the chosen completions' likelihood.

    DPO's gradient has two terms. With the margin m and s = sigmoid(-m), held constant, g_w is the gradient of the mean
    of beta s log pi(y_w), and g_l that of the mean of beta s log pi(y_l). DPO ascends g_w and descends g_l, so its
    direction is g_w - g_l. Where the two agree, <g_l, g_w> > 0, descending g_l takes back part of g_w. This class
    leaves that part out and ascends

        g_w - [g_l - max(0, <g_l, g_w>) / |g_w|^2 g_w].

    To first order, a step along it never lowers the weighted chosen log-likelihood. AdamW rescales every parameter, so
    its steps have another direction, and this does not hold for them. The DPO-PG of arXiv 2505.23761 is known to us by
    its name only: we have not seen its formula. This projection is our own.

    The inner product is one over all trained parameters, of the gradients over all micro-batches and processes of an
    optimiser step. The Trainer accumulates, clips (the projected gradient) and does mixed precision as always. One more
    gradient is kept in memory than with LitDPO, and the models run once for each side. `train/gradient_cosine` is
    logged too. It is the cosine of g_w and g_l. Above 0 the step was projected, else it was DPO's.

    Args:
        policy: A causal language model of transformers, or its name or path. The adapter of a `PeftModel`, or of a
            name that is an adapter's, is trained on.
        reference: A second model or its name, which is never trained. "adapter": a frozen copy of the policy's present
            adapter, on the same base. None: a policy with an adapter is its own reference with the adapter switched
            off. Any other policy gets a frozen copy of its present weights.
        beta: DPO's inverse temperature.
        loss: "sigmoid".
        label_smoothing: 0.
        gamma: None.
        nll_weight: None.
        token_did_entropy_weight: 0.
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
        padding_free: Gives the models the sequences of a batch end to end, without padding.
        share_prompts: Gives the models only once what two pairs' sequences of one side begin with, for pairs i and
            i + n / 2 of n. The two sides run one after the other, so a pair's prompt runs once for each.
        recompute_elementwise: Recomputes all but matrix products and attention in the backward pass.
        micro_batch_tokens: Micro-batches have at most this many tokens, and at least one pair. "auto": 2,048 on a CPU,
            16,384 elsewhere. None: all at once.
        cache_reference: A folder for the reference's answers, see `LitDPO`.
        cache_kind: What `cache_reference` keeps, "hidden_states" or "logprobs", see `LitDPO`.
        context_parallel_size: How many processes share each batch, see `LitDPO`.
        model_kwargs: Arguments of `from_pretrained` for models that are given by name.
        backend: The operators' implementation, see `lit_did.token_statistics`.

    Raises:
        TypeError, ValueError: An argument is out of range; when training starts, a strategy that shards gradients.
    """

    objective_class = _Sigmoid
    _log_ratios: tuple[Tensor, Tensor] | None = None
    _rejected_gradient: list[Tensor | None] | None = None

    def setup(self, stage: str) -> None:
        """Refuses a strategy under which the gradient of one term cannot be read."""
        super().setup(stage)
        # Not isinstance: other strategies, such as DeepSpeed's, are subclasses.
        known = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
        if stage == "fit" and type(self.trainer.strategy) not in known:
            raise ValueError(
                "Expected `strategy` to be 'auto' on one device, 'ddp' or ModelParallelStrategy with LitDPOPG, but got "
                f"{type(self.trainer.strategy).__name__}."
            )

    def on_fit_start(self) -> None:
        """Forgets what an interrupted run may have left."""
        super().on_fit_start()
        self._log_ratios = self._rejected_gradient = None

    def run_sides(self, sequences: Sequences) -> tuple[SequenceStatistics, SequenceStatistics, None]:
        """Runs one side after the other, so that a term's backward pass goes through its own graph alone."""
        pairs = sequences.num_sequences // 2
        halves = (range(pairs), range(pairs, 2 * pairs))
        sides = [self.statistics(sequences.select(half), sequences) for half in halves]
        if any(auxiliary is not None for _, auxiliary in sides):
            raise ValueError(
                "Expected a `policy` without an auxiliary loss with LitDPOPG, which projects the preference loss's "
                "gradient, but its configuration has `output_router_logits=True`. Set it to False."
            )
        return sides[0][0], sides[1][0], None

    def training_objective(self, pairs: PairStatistics, whole: Sequences) -> Tensor:
        """As LitDPO's. Keeps the log-ratios for `backward_pass`."""
        self._log_ratios = (pairs.chosen.log_ratio, pairs.rejected.log_ratio)
        return super().training_objective(pairs, whole)

    def backward_pass(self, loss: Tensor) -> None:
        """Adds up the two terms of the gradient apart: the chosen one in `.grad`, the rejected one beside it."""
        log_ratios, self._log_ratios = self._log_ratios, None
        assert log_ratios is not None
        # -beta s / pairs and beta s / pairs, times what Lightning and the gradient scaler multiplied the loss by.
        chosen_weight, rejected_weight = torch.autograd.grad(loss, log_ratios)
        trained, policy = self._trained(), self.loaded_models().policy
        gradient: Sequence[Tensor | None]
        if is_sharded(policy):
            with output_layer_kept(policy):
                gradient = separate_gradients(trained, lambda: log_ratios[1].backward(rejected_weight))
        else:
            # Unlike backward, grad sets off no exchange of gradients: DDP sees one backward pass, the chosen term's.
            gradient = torch.autograd.grad(
                log_ratios[1], trained, rejected_weight, allow_unused=True, materialize_grads=True
            )
        if self._rejected_gradient is None:
            self._rejected_gradient = list(gradient)
        else:
            for i, (before, added) in enumerate(zip(self._rejected_gradient, gradient, strict=True)):
                self._rejected_gradient[i] = (
                    added if before is None else before if added is None else before.add_(added)
                )
        accumulate_gradients(policy, lambda: log_ratios[0].backward(chosen_weight))

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """A step of the optimiser from the projected gradient."""

        def closure() -> Any:
            result = None if optimizer_closure is None else optimizer_closure()
            # Before a gradient scaler looks at `.grad`: an overflow in either term then reaches it. Both are scaled
            # alike, and the projection scales with them.
            self._project()
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    # -----------------------------------------------------------------------------------------------------------

    def _trained(self) -> list[Tensor]:
        policy = self.loaded_models().policy
        if is_sharded(policy):  # between two passes, FSDP has whole parameters in the place of some
            return [parameter for group in self.trainer.optimizers[0].param_groups for parameter in group["params"]]
        return [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def _project(self) -> None:
        """Turns `.grad` from the chosen term's gradient into the step's, and logs the two terms' cosine."""
        rejected, self._rejected_gradient = self._rejected_gradient, None
        assert rejected is not None
        if self.trainer.world_size > 1 and not is_sharded(self.loaded_models().policy):
            whole = [gradient for gradient in rejected if gradient is not None]  # all of them
            flat = self.trainer.strategy.reduce(torch.cat([g.flatten() for g in whole]), reduce_op="mean")
            rejected = [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in whole]), whole, strict=True)]
        terms = [(p, gradient) for p, gradient in zip(self._trained(), rejected, strict=True) if gradient is not None]
        # A parameter without `.grad` is one that no chosen completion reaches, such as an expert's.
        both = [(parameter.grad, gradient) for parameter, gradient in terms if parameter.grad is not None]
        chosen = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        # As gradients of the loss, to be descended, these are -g_w and g_l.
        product = -inner_product(both)
        chosen_square = inner_product((c, c) for c in chosen)
        rejected_square = inner_product((r, r) for _, r in terms)
        share = product.clamp(min=0) / chosen_square.clamp(min=torch.finfo(chosen_square.dtype).tiny)
        for gradient in chosen:
            local(gradient).mul_(1 + share)
        for parameter, gradient in terms:
            if parameter.grad is not None:
                local(parameter.grad).add_(local(gradient))
            elif isinstance(gradient, DTensor) or gradient.any():
                parameter.grad = gradient.to(parameter.dtype)
        if self._logged:
            self.log("train/gradient_cosine", (product / (chosen_square.sqrt() * rejected_square.sqrt())).float())

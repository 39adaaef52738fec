"""LitDPOPG: DPO with projected gradient, whose direction does not push the chosen completions' likelihood down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lit_did.batches.sequences import Sequences
from lit_did.modules.checks import check_training_step
from lit_did.modules.dpo import LitDPO
from lit_did.modules.pairs import PairStatistics
from lit_did.ops import SequenceStatistics


class LitDPOPG(LitDPO):
    """Trains as `LitDPO` does, but drops from each step the part that lowers the chosen completions' likelihood.

    DPO's gradient has two terms. With the margin m and s = sigmoid(-m), held constant, g_w = grad of the mean of
    beta s log pi(y_w) is to be ascended and g_l = grad of the mean of beta s log pi(y_l) to be descended: DPO's ascent
    direction is g_w - g_l. Where the two agree, <g_l, g_w> > 0, descending g_l takes back part of g_w. This class
    leaves that part out and ascends

        g_w - [g_l - max(0, <g_l, g_w>) / |g_w|^2 g_w].

    A step along it never lowers the weighted chosen log-likelihood to first order. AdamW rescales every parameter, so
    its steps are not along it, and carry no such promise. The DPO-PG of arXiv 2505.23761 is known to us by its name
    only: we have not seen its formula. This projection is our own.

    One product over all trained parameters, of the gradients over all micro-batches and processes of an optimiser
    step; accumulation, clipping (of the projected gradient) and mixed precision are the Trainer's. It keeps one more
    gradient in memory than LitDPO, and runs the models once a side. Adds to what LitDPO logs `train/gradient_cosine`,
    the cosine of g_w and g_l: above 0 the step was projected, else it was DPO's.

    Args: as `LitDPO`, with `loss="sigmoid"`, no `nll_weight`, and `label_smoothing` and `token_did_entropy_weight` 0.

    Raises:
        TypeError, ValueError: An argument is out of range; when training starts, a strategy that shards gradients.
    """

    def setup(self, stage: str) -> None:
        """Refuses a strategy under which no process holds whole gradients."""
        super().setup(stage)
        # Not isinstance: strategies that shard, such as DeepSpeed's, are subclasses.
        if stage == "fit" and type(self.trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
            raise ValueError(
                "Expected `strategy` to leave whole gradients on every process with LitDPOPG, as 'auto' on one device "
                f"and 'ddp' do, but got {type(self.trainer.strategy).__name__}."
            )

    def on_fit_start(self) -> None:
        """Forgets what an interrupted run may have left."""
        super().on_fit_start()
        self._rejected_gradient: list[Tensor] | None = None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Adds the two terms of the loss's gradient up apart: the chosen one in `.grad`, the rejected one beside it."""
        check_training_step(self._first_objective)
        log_ratios, self._log_ratios, self._first_objective = self._log_ratios, None, None
        # -beta s / pairs and beta s / pairs, times what Lightning and the gradient scaler multiplied the loss by.
        chosen_weight, rejected_weight = torch.autograd.grad(loss, log_ratios)
        # Unlike backward, grad sets off no exchange of gradients: DDP sees one backward pass, the chosen term's.
        gradient = torch.autograd.grad(
            log_ratios[1], self._trained(), rejected_weight, allow_unused=True, materialize_grads=True
        )
        if self._rejected_gradient is None:
            self._rejected_gradient = list(gradient)
        else:
            torch._foreach_add_(self._rejected_gradient, gradient)
        log_ratios[0].backward(chosen_weight)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """A step of the optimiser from the projected gradient."""

        def closure() -> Any:
            result = optimizer_closure()
            # Before a gradient scaler looks at `.grad`: an overflow in either term then reaches it. Both are scaled
            # alike, and the projection scales with them.
            self._project()
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    # -----------------------------------------------------------------------------------------------------------

    def _check_objective(self, **options: Any) -> None:
        super()._check_objective(**options)
        plain = {"loss": "sigmoid", "label_smoothing": 0, "nll_weight": None, "token_did_entropy_weight": 0}
        for name, only in plain.items():
            if options[name] != only:
                raise ValueError(f"Expected `{name}` to be {only!r} with LitDPOPG, but got {options[name]!r}.")

    def _split(self, sequences: Sequences) -> list[Sequences]:
        return [sequences]  # the projection wants both terms' gradients of the whole batch

    def _sides(self, sequences: Sequences) -> tuple[SequenceStatistics, SequenceStatistics, None]:
        # A graph for each side: a term's backward pass then walks its own alone, and costs half of DPO's.
        pairs = sequences.num_sequences // 2
        halves = (range(pairs), range(pairs, 2 * pairs))
        sides = [self._statistics(sequences.select(half), sequences) for half in halves]
        if any(auxiliary is not None for _, auxiliary in sides):
            raise ValueError(
                "Expected a `policy` without an auxiliary loss with LitDPOPG, whose projection is of the preference "
                "loss's gradient, but its configuration has `output_router_logits=True`. Set it to False."
            )
        return sides[0][0], sides[1][0], None

    def _objective(self, pairs: PairStatistics) -> Tensor:
        self._log_ratios = (pairs.chosen.log_ratio, pairs.rejected.log_ratio)
        return super()._objective(pairs)

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def _project(self) -> None:
        """Turns `.grad` from the chosen term's gradient into the step's, and logs the two terms' cosine."""
        rejected, self._rejected_gradient = self._rejected_gradient, None
        if self.trainer.world_size > 1:
            flat = self.trainer.strategy.reduce(torch.cat([g.flatten() for g in rejected]), reduce_op="mean")
            rejected = [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in rejected]), rejected, strict=True)]
        terms = list(zip(self._trained(), rejected, strict=True))
        # A parameter without `.grad` is one that no chosen completion reaches, such as an expert's.
        both = [(parameter.grad, gradient) for parameter, gradient in terms if parameter.grad is not None]
        # As gradients of the loss, to be descended, these are -g_w and g_l.
        product = -_dot(both)
        chosen_square, rejected_square = _dot((c, c) for c, _ in both), _dot((r, r) for r in rejected)
        share = product.clamp(min=0) / chosen_square.clamp(min=torch.finfo(chosen_square.dtype).tiny)
        for parameter, gradient in terms:
            if parameter.grad is not None:
                parameter.grad.mul_(1 + share).add_(gradient)
            elif gradient.any():
                parameter.grad = gradient.to(parameter.dtype)
        self.log("train/gradient_cosine", (product / (chosen_square.sqrt() * rejected_square.sqrt())).float())


def _dot(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The inner product of two gradients, in float32 at least: half precision would lose or overflow its squares."""
    wide = ((t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in pair) for pair in pairs)
    return torch.stack([torch.dot(*pair) for pair in wide]).sum()

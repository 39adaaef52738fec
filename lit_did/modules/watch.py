"""Watches a training run: losses and gradients that are not finite, and chosen completions that become unlikely.

Every process sums up what it sees, on the device. No step waits for these sums, and no step exchanges them. They are
read and exchanged with the metrics that are logged, at the end of an epoch, and at the end of training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.tuner import lr_finder
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_did.modules.micro_batches import NO_PARTS, OTHER_FACTOR

if TYPE_CHECKING:
    from lit_did.modules.pairs import PairStatistics

LEAST_STEPS = 5
LEAST_FALL = 0.1  # nats a completion
LEAST_SIGNIFICANCE = 3.0  # the t statistic of the slope
NEVER = 2**62
KINDS = ("factor", "loss", "gradient")
"""what is wrong with a step, the cause before the effect"""


class Watch:
    """Sums over the optimiser steps of one run, of the pairs of this process."""

    def __init__(self) -> None:
        self._steps = 0
        self._unchecked = 0
        """steps since the last check, the same on all processes"""
        self._step: Tensor | None = None
        """[3] float64: the step's losses, its chosen log-ratios and its pairs"""
        self._other_factor: Tensor | None = None
        """bool: whether the step's loss had another factor than its gradient was made with"""
        self._first: Tensor | None = None
        """int64: of the first bad step 3 step + its place in `KINDS`, or else `NEVER`"""
        self._sums: Tensor | None = None
        """[3] float64: the sums of y, y^2 and step y, where y is a step's mean log-ratio of the chosen completions"""

    def add(self, pairs: PairStatistics) -> None:
        """Adds pairs of the step. Without a reference their log-ratios are NaN."""
        values = torch.stack([pairs.loss.detach().double(), pairs.chosen.log_ratio.detach().double()]).sum(1)
        added = torch.cat([values, torch.full_like(values[:1], len(pairs.loss))])
        self._step = added if self._step is None else self._step + added

    def add_factor(self, factor: Tensor, expected: float) -> None:
        """Compares the factor of the step's loss with the one that its gradient was made with."""
        other = (factor.detach() / expected - 1).abs() > 1e-5
        self._other_factor = other if self._other_factor is None else self._other_factor | other

    def end_step(self, step: int, bad_gradients: Tensor | int) -> bool:
        """Ends an optimiser step.

        Args:
            step: Its number, from 0.
            bad_gradients: The number of its gradients that are not finite.

        Returns:
            Whether there were pairs in it.
        """
        if self._step is None:
            return False
        (losses, chosen, pairs), self._step = self._step, None
        if self._first is None or self._sums is None:
            self._first = torch.full((), NEVER, dtype=torch.int64, device=losses.device)
            self._sums = torch.zeros(3, dtype=torch.float64, device=losses.device)
        bad_gradient = bad_gradients > 0 if isinstance(bad_gradients, Tensor) else None
        wrong, self._other_factor = (self._other_factor, ~losses.isfinite(), bad_gradient), None
        for place, flag in enumerate(wrong):
            if flag is not None:
                code = torch.full_like(self._first, NEVER).masked_fill(
                    flag.to(losses.device), len(KINDS) * step + place
                )
                self._first = torch.minimum(self._first, code)
        y = chosen / pairs
        self._sums += torch.stack([y, y * y, y * self._steps])
        self._steps += 1
        self._unchecked += 1
        return True

    def found(self) -> Tensor:
        """An int64 scalar on the device: 1 if a step of this process was bad, else 0."""
        assert self._first is not None  # a step has ended
        return (self._first < NEVER).long()

    def none_found(self) -> None:
        """Says that no process has found anything so far."""
        self._unchecked = 0

    def check(self, trainer: lightning.Trainer) -> None:
        """Raises an error if a step was bad, and names the first one.

        All processes call it together, and all raise or none. Nothing is exchanged if nothing is new since the last
        check. Lightning's learning-rate finder raises the rate until training diverges. Its trial run then ends without
        an error.

        Raises:
            FloatingPointError: A loss or a gradient was not finite.
            ValueError: The loss had another factor than its gradient was made with.
        """
        if not self._unchecked or self._first is None:
            return
        first = int(_over_processes(self._first, dist.ReduceOp.MIN))
        if first == NEVER:
            self._unchecked = 0
            return
        step, what = first // len(KINDS), KINDS[first % len(KINDS)]
        if what == "factor":
            raise ValueError(f"{OTHER_FACTOR} in step {step + 1} of the run. {NO_PARTS}")
        if _tries_rates(trainer):
            trainer.should_stop = True
            return
        causes = [f"the learning rate, now {trainer.optimizers[0].param_groups[0]['lr']:.3g}, is too high"]
        if trainer.precision.startswith("16"):
            causes.append(f"values overflow in precision {trainer.precision!r}; 'bf16-mixed' holds them")
        causes += [
            "a logit is -inf at a token that is trained on",
            "the weights or logits of the policy or the reference were not finite before training",
        ]
        raise FloatingPointError(
            f"Expected a finite {what} in every optimiser step, but it was NaN or infinite first in step {step + 1} of "
            f"the run (`trainer.global_step` {step}). The weights are not reliable after it. Likely causes: "
            f"{'; '.join(causes)}. Fix the cause, and continue from an earlier checkpoint."
        )

    def warn_if_chosen_fell(self, ranks: int = 1) -> None:
        """Warns if the log-ratios of the chosen completions fell steadily, as a straight line through them shows.

        Each data-parallel rank has a point of its own at each step. All processes call it together, and the first one
        warns.

        Args:
            ranks: The number of data-parallel ranks.
        """
        steps = self._steps
        if steps < LEAST_STEPS or self._sums is None:
            return
        y, y_squared, step_y = (_over_processes(self._sums, dist.ReduceOp.SUM) / (_processes() * steps)).tolist()
        if _processes() > 1 and dist.get_rank():
            return
        mean_step, step_variance = (steps - 1) / 2, (steps * steps - 1) / 12
        covariance, variance = step_y - mean_step * y, max(y_squared - y * y, 1e-300)
        unexplained = max(1 - covariance**2 / (step_variance * variance), 1e-12)
        significance = -covariance / math.sqrt(step_variance * variance) * math.sqrt((ranks * steps - 2) / unexplained)
        fall = -covariance / step_variance * (steps - 1)
        end = y - fall / 2
        if not (fall > LEAST_FALL and end < 0 and significance > LEAST_SIGNIFICANCE):  # also where they are NaN
            return
        warnings.warn(
            "The log-ratio of the chosen completions (`train/chosen_log_ratio`) fell steadily, by about "
            f"{fall:.3g} nats over {steps} optimiser steps to about {end:.3g}: the policy has become less likely to "
            "write them. This is normal for DPO if the chosen completions come from the reference or from a similar "
            "model. If they do not, or if `val/reward_accuracy` does not rise, add an SFT term (`nll_weight=0.2`), use "
            "`LitDPOPG` or another `loss`, lower the learning rate, or raise `beta`. `lit-did docs losses` says more.",
            stacklevel=2,
        )


def warn_if_not_finite(name: str, loss: Tensor) -> None:
    """Warns if a validation loss, logged as `name`, is NaN or infinite."""
    if not loss.isfinite():
        warnings.warn(
            f"`{name}` is NaN or infinite, so checkpoints and early stopping cannot use it. Likely causes: a logit of "
            "the policy or the reference is NaN, or -inf at a completion token, or values overflow in half precision. "
            "`trainer.predict(module, dataloader)` returns the loss of every pair, which shows the pairs that cause "
            "it. If all pairs do, check the weights, or try Trainer(precision='32-true').",
            stacklevel=2,
        )


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _over_processes(value: Tensor, operation: Any) -> Tensor:
    if _processes() > 1:
        value = value.clone()
        dist.all_reduce(value, operation)
    return value


def _tries_rates(trainer: lightning.Trainer) -> bool:
    """Whether the run is a trial of Lightning's learning-rate finder, which has set its own scheduler."""
    return any(type(config.scheduler).__module__ == lr_finder.__name__ for config in trainer.lr_scheduler_configs)


def count_bad_gradients(parameters: Iterable[nn.Parameter]) -> Tensor | int:
    """The number of gradients on this process that hold a value that is not finite: an int64 scalar on their device."""
    by_type: dict[tuple, list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if gradient is not None and gradient.layout == torch.strided and gradient.numel():
            by_type.setdefault((gradient.dtype, gradient.device), []).append(gradient.detach())
    count: Tensor | int = 0
    for (dtype, _), gradients in by_type.items():
        # The Euclidean norm is much faster on the CPU than the largest value. In float32 it does not overflow for half
        # precision.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.promote_types(dtype, torch.float32))
        bad = (~torch.stack(norms).isfinite()).sum()
        count = bad + (count.to(bad.device) if isinstance(count, Tensor) else count)
    return count

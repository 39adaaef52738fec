"""Watches a training run: losses and gradients that are not finite, and chosen completions that become unlikely.

Sums are kept on the device, so that no step waits for them. They are read when Lightning reads the logged metrics.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.tuner import lr_finder
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

LEAST_STEPS = 5
LEAST_FALL = 0.1  # nats a completion
LEAST_SIGNIFICANCE = 3.0  # the t statistic of the slope


class Watch:
    """Sums over the optimiser steps of one run. They are the same on all processes."""

    def __init__(self) -> None:
        self._steps = 0
        # int64: -1, or of the first bad step 2 step if the loss was not finite, 2 step + 1 if the gradient was not
        self._first: Tensor | None = None
        # [3] float64: the sums of y, y^2 and step y, where y is the mean log-ratio of the chosen completions
        self._sums: Tensor | None = None
        self._due = False

    def add(self, trainer: Any, values: Mapping[str, Tensor]) -> None:
        """Adds the values that an optimiser step logs.

        Args:
            trainer: The lightning.Trainer.
            values: Scalars `loss`, `bad_gradients` and, if there is a reference, `chosen_log_ratio`.
        """
        step, loss = trainer.global_step, values["loss"]
        if self._first is None or self._sums is None:
            self._first = torch.full((), -1, dtype=torch.int64, device=loss.device)
            self._sums = torch.zeros(3, dtype=torch.float64, device=loss.device)
        bad = torch.where(loss.isfinite(), torch.where(values["bad_gradients"] > 0, 2 * step + 1, -1), 2 * step)
        self._first = torch.where(self._first < 0, bad, self._first)
        if "chosen_log_ratio" in values:
            fallen = values["chosen_log_ratio"].double()
            self._sums += torch.stack([fallen, fallen * fallen, fallen * self._steps])
        self._steps += 1
        every = trainer.log_every_n_steps
        self._due = trainer.should_stop or (every > 0 and (step + 1) % every == 0)

    def check_when_logged(self, trainer: lightning.Trainer) -> None:
        """`check` after a step whose metrics Lightning is about to read."""
        if self._due:
            self._due = False
            self.check(trainer)

    def check(self, trainer: lightning.Trainer) -> None:
        """Raises FloatingPointError if a loss or a gradient was not finite. The error names the first such step.

        Lightning's learning-rate finder raises the rate until training diverges. Its trial run then ends without an
        error.
        """
        first = -1 if self._first is None else int(self._first)
        if first < 0:
            return
        if _tries_rates(trainer):
            trainer.should_stop = True
            return
        step, what = first // 2, "gradient" if first % 2 else "loss"
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

    def warn_if_chosen_fell(self) -> None:
        """Warns if the log-ratios of the chosen completions fell steadily, as a straight line through them shows."""
        steps = self._steps
        if steps < LEAST_STEPS or self._sums is None:
            return
        y, y_squared, step_y = (self._sums / steps).tolist()
        mean_step, step_variance = (steps - 1) / 2, (steps * steps - 1) / 12
        covariance, variance = step_y - mean_step * y, max(y_squared - y * y, 1e-300)
        unexplained = max(1 - covariance**2 / (step_variance * variance), 1e-12)
        significance = -covariance / math.sqrt(step_variance * variance) * math.sqrt((steps - 2) / unexplained)
        fall = -covariance / step_variance * (steps - 1)
        end = y - fall / 2
        if not (fall > LEAST_FALL and end < 0 and significance > LEAST_SIGNIFICANCE):  # also where they are NaN
            return
        warnings.warn(
            "The log-ratio of the chosen completions (`train/chosen_log_ratio`) fell steadily, by about "
            f"{fall:.3g} nats over {steps} optimiser steps to about {end:.3g}: the policy has become less likely to "
            "write them. This is normal for DPO if the chosen completions come from the reference or from a similar "
            "model. If they do not, or if `val/reward_accuracy` does not rise, add an SFT term (`nll_weight=0.2`), use "
            "`LitDPOPG` or another `loss`, lower the learning rate, or raise `beta`. docs/losses.md says more.",
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

"""PowerLawExponent: the exponent of the power law of preferences, over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_did.functional.did_entropy import check_confidence
from lit_did.functional.power_law import (
    SIZES,
    PowerLawFit,
    merge_power_law_sums,
    power_law_sums,
    power_law_value,
)
from lit_did.metrics.base import DIDMetric, with_prefix


class PowerLawExponent(DIDMetric):
    """The exponent beta of q_{rho/pi_l} proportional to q_{pi/rho}^beta, and whether it is a law: `fit_power_law`.

    `compute` returns {field of `PowerLawFit`: float64 scalar}, which `log_dict` takes, or one of them: what
    `lit_did.functional.fit_power_law` finds in all samples of all updates and processes. NaN where that would raise:
    before there are 3 samples (with `group` 2 prompts of two), and while the policy is its reference, so that
    `policy_log_ratio` is 0 throughout. One state of fixed size, 276 float64 numbers, merged over processes.

    Args:
        only: The name of the one to return, as a scalar, such as "exponent". None returns a dict of all.
        prefix: Stands before the names in that dict. Two metrics in one `log_dict` must not share names.
        confidence: Of the interval from `lower` to `upper`, in (0, 1).
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import PowerLawExponent
        >>> metric = PowerLawExponent(only="exponent")
        >>> metric.update(torch.tensor([1.0, 0.5, 2.0]), torch.tensor([2.0, 1.0, 4.0]))
        >>> metric.update(torch.tensor([-1.0, 3.0]), torch.tensor([-2.0, 6.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    power_law_sums: Tensor

    def __init__(self, *, only: str | None = None, prefix: str = "", confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if only is not None and only not in PowerLawFit._fields:
            choices = ", ".join(map(repr, PowerLawFit._fields))
            raise ValueError(f"Expected `only` to be None or one of {choices}, but got {only!r}.")
        check_confidence(confidence)
        self.only, self.prefix, self.confidence = only, prefix, confidence
        # Counts too are float64, exact to 2**53, so that one function merges it all.
        zeros = torch.zeros(sum(SIZES.values()), dtype=torch.float64)
        self.add_state("power_law_sums", zeros, dist_reduce_fx=merge_power_law_sums)

    def update(self, reference_log_ratio: Tensor, policy_log_ratio: Tensor, group: Tensor | None = None) -> None:
        """Adds samples.

        Args:
            reference_log_ratio: [N] log rho(y) - log pi_l(y), summed over the completion, in nats, any float dtype.
            policy_log_ratio: [N] log pi(y) - log rho(y).
            group: [N] integers, in all updates or in none, equal where completions of this update have one prompt.
                Give the completions of a prompt in one update, as preference pairs come: ids of different updates are
                not compared, and a prompt in several updates counts as several, each with its own intercept.

        Raises:
            TypeError: An argument is no tensor, or has the wrong kind of dtype.
            ValueError: Shapes do not agree, a value is not finite, or `group` comes in some updates only.
        """
        added = power_law_sums(reference_log_ratio, policy_log_ratio, group).to(self.power_law_sums.device)
        self.power_law_sums = merge_power_law_sums(torch.stack([self.power_law_sums, added]))

    def compute(self) -> dict[str, Tensor] | Tensor:
        """The fit of all updates since the last reset, on all processes."""
        fit = power_law_value(self.power_law_sums, self.confidence)
        values = {name: self.power_law_sums.new_tensor(value) for name, value in fit._asdict().items()}
        return with_prefix(values, self.prefix) if self.only is None else values[self.only]

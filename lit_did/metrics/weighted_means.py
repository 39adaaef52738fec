"""Several weighted means in one metric, so that averaging over processes costs two small sums however many they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class WeightedMeans(Metric):
    """The weighted mean of each named quantity, exact under uneven batches, gradient accumulation and processes.

    Args:
        names: The quantities.
        kwargs: For `torchmetrics.Metric`.

    `update` takes {name: (values, weights)}; `compute` returns {name: float64 scalar}, NaN where no weight was seen.

    Example:
        >>> means = WeightedMeans(["kl"])
        >>> means.update({"kl": (torch.tensor([1.0, 3.0]), torch.tensor([3, 1]))})
        >>> means.compute()["kl"].item()
        1.5
    """

    is_differentiable = False
    full_state_update = False
    totals: Tensor
    weights: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        # float64: a float32 count stops growing at 2**24.
        self.add_state("totals", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weights", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> WeightedMeans:
        # Moves with its module but stays float64: `precision="bf16-true"` casts everything it finds.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    def update(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Adds values and their weights, tensors of one shape a quantity; weight 0 leaves a value out, NaN too."""
        for i, name in enumerate(self.names):
            value, weight = values[name]
            weight = weight.detach().to(self.weights)
            self.totals[i] += (value.detach().to(self.totals) * weight).masked_fill(weight == 0, 0).sum()
            self.weights[i] += weight.sum()

    def compute(self) -> dict[str, Tensor]:
        """{name: mean}, float64 scalars."""
        return dict(zip(self.names, self.totals / self.weights, strict=True))

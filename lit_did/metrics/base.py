"""DIDMetric: what all metrics share. StatisticsMetric: those on statistics; a metric adds the sums and the value."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lit_did.functional.inputs import Statistics, as_sequences
from lit_did.ops import SequenceStatistics
from lit_did.ops.checks import check_options
from lit_did.ops.extension import Backend, check_backend


class DIDMetric(Metric):
    """Base of all metrics: their states keep their dtypes, and they can be plotted."""

    full_state_update = False

    def plot(self, val: Any = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Plots `val`, a value or a sequence of values of this metric; without it, what `compute` returns."""
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        # Moves with its module but keeps its dtypes: `precision="bf16-true"` casts every tensor that it finds. Nor does
        # `set_dtype` change them.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)


class StatisticsMetric(DIDMetric):
    """Base of those on statistics: two states of fixed size, float64 totals and int64 counts, summed over processes.

    A subclass sets `quantity` and the shapes of its states, and implements `sums` and `value`.

    Args:
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        settings: What else the sums depend on, by name: see `state_name`.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.
    """

    quantity: str
    totals_shape: tuple[int, ...] = ()
    counts_shape: tuple[int, ...] = ()

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
        settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_options(ignore_index, temperature)
        check_backend(backend)
        self.ignore_index, self.temperature, self.backend = ignore_index, temperature, backend
        defaults = {"ignore_index": -100, "temperature": 1.0}
        changed = {name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value}
        self._totals, self._counts = (
            state_name(self.quantity, part, {**(settings or {}), **changed}) for part in ("totals", "counts")
        )
        # float64 and int64: a float32 count stops growing at 2**24.
        self.add_state(self._totals, torch.zeros(self.totals_shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(self._counts, torch.zeros(self.counts_shape, dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        """The totals, float64, and counts, int64, of statistics [sequences]."""

    @abstractmethod
    def value(self, totals: Tensor, counts: Tensor) -> Any:
        """The metric's value, of sums over all updates."""

    def update(
        self,
        policy_logits: Statistics,
        reference_logits: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            policy_logits: Logits [..., T, V], or `TokenStatistics` [..., T], or `SequenceStatistics` [sequences].
            reference_logits: [..., T, V] with logits, else None.
            labels: [..., T] with logits or `TokenStatistics`, else None.
            cu_seqlens: [sequences + 1] if logits or token statistics are packed.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: An argument has the wrong shape, device or value, or is missing.
            RuntimeError: `backend="fused"` does not support the device.
        """
        statistics = as_sequences(
            policy_logits,
            reference_logits,
            labels,
            cu_seqlens=cu_seqlens,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            backend=self.backend,
        )
        for state, added in zip((self._totals, self._counts), self.sums(statistics), strict=True):
            setattr(self, state, getattr(self, state) + added)

    def compute(self) -> Any:
        """The value of all updates since the last reset, on all processes."""
        return self.value(getattr(self, self._totals), getattr(self, self._counts))


def with_prefix(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`values` with `prefix` before their names."""
    return {f"{prefix}{name}": value for name, value in values.items()}


def state_name(quantity: str, part: str, settings: dict[str, Any]) -> str:
    """The name of a state, different for all states that may differ, now or later.

    torchmetrics lets the metrics of a collection share their states for good if, after the first update, the names and
    the values are equal. Where the policy is its reference unlike quantities are: both KLs are 0, and the DID's entropy
    is its log-partition.

    Example:
        >>> state_name("kl", "totals", {"temperature": 0.5})
        'kl_temperature_0_5_totals'
    """
    words = [quantity, *(f"{name}_{value}" for name, value in settings.items()), part]
    return re.sub(r"\W", "_", "_".join(words))

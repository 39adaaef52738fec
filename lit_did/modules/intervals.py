"""95% intervals of the validation metrics, over the validation pairs of all processes.

Every metric is a sum over pairs divided by another sum over pairs, such as their tokens. Pairs are taken as
independent, so the interval follows from how the pairs' shares in the two sums vary. It does not cover other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_did.functional.information import token_values
from lit_did.functional.inputs import as_pairs
from lit_did.functional.intervals import student, wilson
from lit_did.functional.preference import pair_accuracy
from lit_did.metrics.base import StatisticsMetric
from lit_did.ops import SequenceStatistics

_OF_TOKENS = ("token_did_entropy", "token_did_concentration", "token_did_log_partition", "policy_entropy", "kl")
_SUMS = (
    *("observed", "pairs", "sequences", "tokens", "chosen_tokens"),
    *("loss", "chosen_nll", "chosen", "rejected", "right", "fell", "chosen_logprob", "rejected_logprob"),
    *(*_OF_TOKENS, "reverse_kl"),
)
"""what a pair adds to sums; `observed` is 1 for a pair with tokens"""


class PairMoments(StatisticsMetric):
    """The sums over pairs of the products of every two of `_SUMS`. `compute` returns the intervals of metrics.

    `update` takes statistics [2 pairs] and the losses [pairs] without their SFT term. `compute` returns "num_pairs",
    and "interval/NAME" of every metric in `names` that has one: two float64 values.

    Args:
        names: The metrics, as `PairMetrics` names them.
        beta: DPO's inverse temperature.
        sft: The weight of the SFT term.
        copies: How many processes get every batch: 1, or more with tensor parallelism.
    """

    quantity = "pair_moments"
    totals_shape = (len(_SUMS), len(_SUMS))

    def __init__(self, names: Sequence[str], *, beta: float, sft: float, copies: int = 1) -> None:
        super().__init__()
        self.names, self.beta, self.sft, self.copies = names, beta, sft, copies
        self._losses: Tensor | None = None  # while `update` runs

    def update(  # type: ignore[override]  # statistics with their losses
        self, statistics: SequenceStatistics, *, losses: Tensor
    ) -> None:
        """Adds statistics [2 pairs] and the losses [pairs] without their SFT term."""
        self._losses = losses
        super().update(statistics)
        self._losses = None

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        assert self._losses is not None
        pairs = as_pairs(statistics)
        sequences = statistics.num_tokens.chunk(2)
        chosen_logprob, rejected_logprob = statistics.policy_logprob.chunk(2)
        chosen, rejected = pairs.chosen_log_ratio, pairs.rejected_log_ratio
        of_pairs = {
            "pairs": pairs.counts,
            "chosen_tokens": sequences[0],
            "loss": self._losses,
            "chosen_nll": -chosen_logprob,
            "chosen": chosen,
            "rejected": rejected,
            "right": pair_accuracy(chosen, rejected),
            "fell": torch.where(chosen.isnan(), chosen, (chosen < 0).double()),
            "chosen_logprob": chosen_logprob,
            "rejected_logprob": rejected_logprob,
        }
        counted = statistics.num_tokens > 0
        of_sequences = {
            "sequences": counted,
            "tokens": statistics.num_tokens,
            **{name: token_values(statistics, name) for name in (*_OF_TOKENS, "reverse_kl")},
        }
        # Not products with the masks: what does not count may be NaN.
        shares = {name: torch.where(pairs.counts, value.double(), 0) for name, value in of_pairs.items()}
        for name, value in of_sequences.items():
            shares[name] = sum(torch.where(counted, value.double(), 0).chunk(2))  # type: ignore[assignment]
        shares["observed"] = (shares["sequences"] > 0).double()
        added = torch.stack([shares[name] for name in _SUMS], -1)
        return added.mT @ added, shares["observed"].sum().long()

    def value(self, totals: Tensor, counts: Tensor) -> dict[str, Tensor]:
        moments = _Moments(totals.cpu() / self.copies)
        ratios = {
            "loss": [(1.0, "loss", "pairs"), *[(self.sft, "chosen_nll", "chosen_tokens")] * bool(self.sft)],
            "reward": [(self.beta, name, "sequences") for name in ("chosen", "rejected")],
            "reward_per_token": [(self.beta, name, "tokens") for name in ("chosen", "rejected")],
            "reward_margin": [(self.beta, "chosen", "pairs"), (-self.beta, "rejected", "pairs")],
            **{f"{side}_log_ratio": [(1.0, side, "pairs")] for side in ("chosen", "rejected")},
            **{name: [(1.0, name, "pairs")] for name in ("chosen_logprob", "rejected_logprob")},
            **{name: [(1.0, name, "tokens")] for name in (*_OF_TOKENS, "reverse_kl")},
        }
        intervals = {name: moments.of_ratios(ratios[name]) for name in self.names if name in ratios}
        shares = {"reward_accuracy": "right", "chosen_fell": "fell"}
        intervals |= {name: moments.of_share(shares[name]) for name in self.names if name in shares}
        return {"num_pairs": counts // self.copies} | {
            f"interval/{name}": interval for name, interval in intervals.items()
        }


def with_intervals(values: Mapping[str, Tensor], suffix: str) -> dict[str, list[float]]:
    """What `PairMetrics` with intervals computed, as plain numbers for a checkpoint.

    Args:
        values: By name.
        suffix: Is put after each name.

    Returns:
        By name the value and, where there is one, the two ends of its interval. "num_pairs" is among the names.
    """
    plain = {}
    for name, value in values.items():
        if name == "bad_steps" or name.startswith("interval/"):
            continue
        ends = values.get(f"interval/{name}", torch.tensor([])).tolist()
        plain[f"{name}{suffix}"] = [value.item(), *(ends if all(map(math.isfinite, ends)) else [])]
    return plain


class _Moments:
    """Intervals from the products [sums, sums] of `_SUMS`, summed over pairs."""

    def __init__(self, products: Tensor) -> None:
        self._products = products
        self._total = dict(zip(_SUMS, products[_SUMS.index("observed")].tolist(), strict=True))

    def of_ratios(self, ratios: Sequence[tuple[float, str, str]]) -> Tensor:
        """[2] Student's interval of a weighted sum of ratios of sums, linearised in the sums (the delta method).

        Args:
            ratios: Weight, numerator and denominator of each.
        """
        total, value, gradient = self._total, 0.0, dict[str, float]()
        for weight, numerator, denominator in ratios:
            if not total[denominator]:
                return torch.full((2,), math.nan, dtype=torch.float64)
            ratio = total[numerator] / total[denominator]
            value += weight * ratio
            for name, slope in ((numerator, weight), (denominator, -weight * ratio)):
                gradient[name] = gradient.get(name, 0.0) + slope / total[denominator]
        # Only the rows of these sums: without a reference the others are NaN.
        rows = [_SUMS.index(name) for name in gradient]
        slopes = torch.tensor(list(gradient.values()), dtype=torch.float64)
        count = total["observed"]
        if count < 2:
            return torch.full((2,), math.nan, dtype=torch.float64)
        # The pairs' shares, times the slopes, add up to 0. This is the unbiased variance of that sum.
        variance = slopes @ self._products[rows][:, rows] @ slopes * count / (count - 1)
        interval = student(value, variance.clamp(min=0).sqrt().item(), count)
        return torch.tensor(interval, dtype=torch.float64)

    def of_share(self, name: str) -> Tensor:
        """[2] Wilson's interval of a share of the pairs."""
        count = self._total["pairs"]
        interval = wilson(self._total[name] / count, count) if count else (math.nan, math.nan)
        return torch.tensor(interval, dtype=torch.float64)

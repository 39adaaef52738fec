"""What a table of scored pairs says on average, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_did.functional import pair_accuracy
from lit_did.scoring.table import Row

_SIDES = ("chosen", "rejected")


class Mean(NamedTuple):
    """A mean with its 95% interval, which is NaN for a single pair."""

    mean: float
    lower: float
    upper: float


def summarize(rows: Sequence[Row]) -> dict[str, Mean]:
    """Means over the pairs, and of concentration and KL over the tokens of their completions.

    The intervals are about other pairs from the same source. Student's t: pairs are independent, the tokens within a
    pair are not. The interval of the accuracy is Wilson's.

    Args:
        rows: From `PairScorer.batches`.
    """
    values = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in _NEEDED}
    ones = torch.ones(len(rows), dtype=torch.float64)
    tokens = values["chosen_num_tokens"] + values["rejected_num_tokens"]

    def over_tokens(name: str) -> Mean:
        sums = sum(values[f"{side}_{name}"] * values[f"{side}_num_tokens"] for side in _SIDES)
        assert isinstance(sums, Tensor)
        return _ratio(sums, tokens)

    return {
        "margin": _ratio(values["margin"], ones),
        "accuracy": _share(pair_accuracy(values["chosen_log_ratio"], values["rejected_log_ratio"])),
        "token_did_concentration": over_tokens("token_did_concentration"),
        "kl": over_tokens("kl"),
    }


_NEEDED = (
    "margin",
    *(f"{side}_{name}" for side in _SIDES for name in ("log_ratio", "token_did_concentration", "kl", "num_tokens")),
)


def describe(summary: dict[str, Mean]) -> str:
    """The summary as a table for a terminal."""
    names = {
        "margin": "margin (nats)",
        "accuracy": "accuracy",
        "token_did_concentration": "token DID concentration (nats a token)",
        "kl": "KL from the reference (nats a token)",
    }
    lines = [f"{'':40}{'mean':>10}  95% interval"]
    for name, label in names.items():
        mean, lower, upper = summary[name]
        interval = "" if math.isnan(lower) else f"  {lower:.4g} to {upper:.4g}"
        lines.append(f"{label:40}{mean:>10.4g}{interval}")
    return "\n".join(lines)


def _ratio(sums: Tensor, weights: Tensor) -> Mean:
    """sum(sums) / sum(weights), with the interval of a ratio of means over independent pairs."""
    ratio, n = float(sums.sum() / weights.sum()), len(sums)
    if n < 2:
        return Mean(ratio, math.nan, math.nan)
    from scipy.special import stdtrit  # takes a tenth of a second to load

    residuals = sums - ratio * weights
    error = float((residuals.square().sum() * n / (n - 1)).sqrt() / weights.sum())
    half = float(stdtrit(n - 1, 0.975)) * error
    return Mean(ratio, ratio - half, ratio + half)


def _share(hits: Tensor) -> Mean:
    share, n, z = float(hits.mean()), len(hits), 1.96
    if n < 2:
        return Mean(share, math.nan, math.nan)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Mean(share, max(0.0, centre - half), min(1.0, centre + half))

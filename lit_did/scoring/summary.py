"""What a table of scored pairs says on average, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_did.functional import pair_accuracy
from lit_did.scoring.table import Row

_SIDES = ("chosen", "rejected")


class Mean(NamedTuple):
    """A mean with its 95% interval, which for a single pair is NaN unless it is that of a share."""

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
    from lit_did.functional.intervals import ratio_of_sums, wilson  # scipy takes a tenth of a second to load

    values = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in _NEEDED}
    tokens = values["chosen_num_tokens"] + values["rejected_num_tokens"]

    def ratio(sums: Any, weights: Tensor) -> Mean:
        mean, interval = ratio_of_sums(sums, weights)
        return Mean(mean, *interval)

    def over_tokens(name: str) -> Mean:
        return ratio(sum(values[f"{side}_{name}"] * values[f"{side}_num_tokens"] for side in _SIDES), tokens)

    accuracy = float(pair_accuracy(values["chosen_log_ratio"], values["rejected_log_ratio"]).mean())
    return {
        "margin": ratio(values["margin"], torch.ones(len(rows))),
        "accuracy": Mean(accuracy, *wilson(accuracy, len(rows))),
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

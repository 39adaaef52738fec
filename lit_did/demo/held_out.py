"""Held-out pairs by tag: their means, the table of before and after training, and what the table means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_did.functional import pair_accuracy
from lit_did.modules import PairStatistics

ROWS = {
    "loss": "loss",
    "reward_margin": "reward margin",
    "reward_accuracy": "reward accuracy",
    "chosen_log_ratio": "chosen log-ratio",
    "rejected_log_ratio": "rejected log-ratio",
    "token_did_concentration": "token DID concentration",
    "kl": "KL from the reference",
}
OVER_TOKENS = ("token_did_concentration", "kl")
CAPTION = "Log-ratios: nats a completion. Concentration and KL: nats a token."


@dataclass(frozen=True)
class HeldOut:
    """Statistics of held-out pairs after `step` optimiser steps, one value a pair."""

    step: int
    tags: list[str]
    """One tag a pair."""
    values: dict[str, Tensor]
    """{statistic: [pairs]}"""
    tokens: Tensor
    """[pairs] completion tokens of chosen and rejected together: the weight of means over tokens."""

    @classmethod
    def collect(cls, step: int, batches: Sequence[PairStatistics], tags: Mapping[int, str]) -> HeldOut:
        """From the statistics of batches of pairs.

        Args:
            step: Optimiser steps before.
            batches: What `LitDPO.pair_statistics` returned.
            tags: {index of a pair: its tag}
        """

        def over_pairs(read: Callable[[PairStatistics], Tensor]) -> Tensor:
            return torch.cat([read(batch).double() for batch in batches])

        def over_tokens(name: str) -> Tensor:
            sums = over_pairs(lambda b: sum(getattr(side, name) * side.num_tokens for side in (b.chosen, b.rejected)))
            return sums / tokens

        tokens = over_pairs(lambda b: b.chosen.num_tokens + b.rejected.num_tokens)
        values = {
            "loss": over_pairs(lambda b: b.loss),
            "reward_margin": over_pairs(lambda b: b.reward_margin),
            "reward_accuracy": over_pairs(lambda b: pair_accuracy(b.chosen.log_ratio, b.rejected.log_ratio)),
            "chosen_log_ratio": over_pairs(lambda b: b.chosen.log_ratio),
            "rejected_log_ratio": over_pairs(lambda b: b.rejected.log_ratio),
            "token_did_concentration": over_tokens("token_did_concentration"),
            "kl": over_tokens("kl"),
        }
        return cls(step, [tags[int(i)] for batch in batches for i in batch.index], values, tokens)

    @property
    def kinds(self) -> list[str]:
        """The tags, in order, each once."""
        return sorted(set(self.tags))

    def count(self, kind: str | None) -> int:
        """The number of pairs with a tag; None: of all."""
        return len(self.tags) if kind is None else self.tags.count(kind)

    def mean(self, statistic: str, kind: str | None = None) -> float:
        """The mean over the pairs with a tag, or over all; over their tokens for concentration and KL."""
        weight = self._weight(statistic, kind)
        return float((self.values[statistic] * weight).sum() / weight.sum())

    def standard_error(self, statistic: str, kind: str | None = None) -> float:
        """Of `mean`, over pairs; infinite for a single pair."""
        weight, pairs = self._weight(statistic, kind), self.count(kind)
        if pairs < 2:
            return math.inf
        deviations = weight * (self.values[statistic] - self.mean(statistic, kind))
        return float(deviations.norm() / weight.sum()) * math.sqrt(pairs / (pairs - 1))

    def _weight(self, statistic: str, kind: str | None) -> Tensor:
        member = torch.tensor([kind is None or tag == kind for tag in self.tags])
        return self.tokens * member if statistic in OVER_TOKENS else member.double()


def print_table(before: HeldOut, after: HeldOut) -> None:
    """Prints every statistic before and after, for every tag, and what they mean."""
    from rich.console import Console
    from rich.table import Table

    kinds: list[str | None] = [*before.kinds, None] if len(before.kinds) > 1 else [*before.kinds]
    table = Table(title="Held-out pairs, before → after training", caption=CAPTION)
    table.add_column("", no_wrap=True)
    for kind in kinds:
        table.add_column("all" if kind is None else kind, justify="right")
    table.add_row("pairs", *(str(before.count(kind)) for kind in kinds))
    for statistic, title in ROWS.items():
        digits = 2 if statistic.endswith("log_ratio") else 3
        table.add_row(
            title, *(" → ".join(f"{pairs.mean(statistic, k):.{digits}f}" for pairs in (before, after)) for k in kinds)
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(meaning(after))


def meaning(after: HeldOut) -> str:
    """What the held-out pairs say after training. A difference counts from two standard errors on."""
    return " ".join([_preference(after), *_concentration(after)])


def _preference(after: HeldOut) -> str:
    margin, error = after.mean("reward_margin"), after.standard_error("reward_margin")
    begin = f"After {after.step} steps"
    if after.count(None) < 2:
        return f"{begin} the reward margin is {margin:.3f}, but one held-out pair says nothing about others."
    if not abs(margin) > 2 * error:  # also where it is NaN
        return (
            f"{begin} the held-out pairs do not show which completions the policy prefers: the reward margin, "
            f"{margin:.3f} ± {error:.3f}, is within two standard errors of 0. More steps or more pairs may show it."
        )
    share = after.mean("reward_accuracy") if margin > 0 else 1 - after.mean("reward_accuracy")
    return (
        f"{begin} the policy prefers the {'chosen' if margin > 0 else 'rejected'} completion in {share:.0%} of the "
        f"{after.count(None)} held-out pairs; the reward margin is {margin:.3f} ± {error:.3f}."
    )


def _concentration(after: HeldOut) -> list[str]:
    name = "token_did_concentration"
    kinds = sorted(after.kinds, key=lambda kind: after.mean(name, kind), reverse=True)
    if len(kinds) < 2 or min(map(after.count, kinds)) < 2:
        return []
    most, least = kinds[0], kinds[-1]
    error = math.hypot(after.standard_error(name, most), after.standard_error(name, least))
    unit = " nats a token"
    first, second = (
        f"{kind} pairs ({after.mean(name, kind):.3f} ± {after.standard_error(name, kind):.3f}{unit * (kind == most)}, "
        f"KL {after.mean('kl', kind):.3f})"
        for kind in (most, least)
    )
    if not after.mean(name, most) - after.mean(name, least) > 2 * error:
        return [f"Its token DID concentration does not differ clearly between {first} and {second}."]
    return [f"What it learned is more concentrated, on fewer tokens, for {first} than for {second}."]

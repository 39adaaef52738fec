"""Held-out pairs by tag: their means, and the table of before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_did.functional import pair_accuracy
from lit_did.modules import PairStatistics

ROWS = {
    "loss": "loss",
    "reward_margin": "reward margin",
    "reward_accuracy": "reward accuracy",
    "chosen_log_ratio": "chosen log-ratio (nats)",
    "rejected_log_ratio": "rejected log-ratio (nats)",
    "token_did_entropy": "DID entropy (nats a token)",
    "kl": "KL from the reference (nats a token)",
}


@dataclass(frozen=True)
class HeldOut:
    """Statistics of held-out pairs, one value a pair; `tags` holds one tag a pair."""

    tags: list[str]
    values: dict[str, Tensor]
    """{statistic: [pairs]}"""
    tokens: Tensor
    """[pairs] completion tokens of chosen and rejected together: the weight of means over tokens"""

    @classmethod
    def collect(cls, batches: Sequence[PairStatistics], tags: dict[int, str]) -> HeldOut:
        """From the batches that `trainer.predict` returns; `tags` maps a pair's index to its tag."""

        def over_pairs(read) -> Tensor:
            return torch.cat([read(batch).double() for batch in batches])

        tokens = over_pairs(lambda b: b.chosen.num_tokens + b.rejected.num_tokens)

        def over_tokens(name: str) -> Tensor:
            return over_pairs(
                lambda b: (
                    (getattr(b.chosen, name) * b.chosen.num_tokens + getattr(b.rejected, name) * b.rejected.num_tokens)
                    / (b.chosen.num_tokens + b.rejected.num_tokens)
                )
            )

        values = {
            "loss": over_pairs(lambda b: b.loss),
            "reward_margin": over_pairs(lambda b: b.reward_margin),
            "reward_accuracy": over_pairs(lambda b: pair_accuracy(b.chosen.log_ratio, b.rejected.log_ratio)),
            "chosen_log_ratio": over_pairs(lambda b: b.chosen.log_ratio),
            "rejected_log_ratio": over_pairs(lambda b: b.rejected.log_ratio),
            "token_did_entropy": over_tokens("token_did_entropy"),
            "kl": over_tokens("kl"),
        }
        return cls([tags[int(i)] for batch in batches for i in batch.index], values, tokens)

    def groups(self) -> list[str | None]:
        """The tags in order, and None, for all pairs, where there are several."""
        tags = sorted(set(self.tags))
        return [*tags, None] if len(tags) > 1 else tags

    def mean(self, statistic: str, group: str | None) -> float:
        """The mean over the group's pairs, None being all; over its tokens for `token_did_entropy` and `kl`."""
        member = torch.tensor([group is None or tag == group for tag in self.tags])
        weight = self.tokens * member if statistic in ("token_did_entropy", "kl") else member.double()
        return float((self.values[statistic] * weight).sum() / weight.sum())


def print_table(before: HeldOut, after: HeldOut) -> None:
    """Prints every statistic before and after, for every tag."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out pairs, before → after training")
    table.add_column("")
    for group in before.groups():
        table.add_column(f"{'all' if group is None else group} ({_count(before, group)})", justify="right")
    for statistic, title in ROWS.items():
        cells = [
            f"{before.mean(statistic, group):.3f} → {after.mean(statistic, group):.3f}" for group in before.groups()
        ]
        table.add_row(title, *cells)
    Console().print(table)


def _count(held_out: HeldOut, group: str | None) -> int:
    return len(held_out.tags) if group is None else held_out.tags.count(group)

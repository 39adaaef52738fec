"""Scored: the statistics of scored pairs as arrays, which every analysis of a policy takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SIDES = ("chosen", "rejected")
INFORMATION = ("token_did_entropy", "token_did_concentration", "kl", "policy_entropy", "reference_entropy")
"""the statistics of sequences that are means over tokens, as far as this part shows them"""


@dataclass(frozen=True)
class Scored:
    """Pairs that a policy and its reference have scored. All arrays are [pairs].

    Attributes:
        rows: Row numbers in the source.
        groups: Equal numbers for pairs of the same prompt.
        chosen: The log-ratio of the chosen completion, in nats.
        rejected: That of the rejected one.
        chosen_length: The length of the chosen completion, such as in words.
        rejected_length: That of the rejected one.
        num_tokens: By side, the tokens of the completion.
        information: By "SIDE_STATISTIC", its mean over the completion's tokens, in nats a token.
        beta: DPO's inverse temperature.
    """

    rows: np.ndarray
    groups: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_length: np.ndarray
    rejected_length: np.ndarray
    num_tokens: Mapping[str, np.ndarray]
    information: Mapping[str, np.ndarray]
    beta: float = 0.1

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self.rows)

    @property
    def margin(self) -> np.ndarray:
        """The log-ratio of the chosen completion less that of the rejected one, in nats."""
        with np.errstate(invalid="ignore"):
            return self.chosen - self.rejected

    @property
    def right(self) -> np.ndarray:
        """1 where the policy's reward prefers the chosen side, 0 where it prefers the rejected one, 1/2 for a tie."""
        return (np.sign(self.margin) + 1) / 2

    @property
    def longer(self) -> np.ndarray:
        """1 where the chosen side is longer, 0 where the rejected one is, 1/2 where they have the same length."""
        return (np.sign(self.chosen_length - self.rejected_length) + 1) / 2

    @property
    def num_prompts(self) -> int:
        """How many different prompts the pairs have."""
        return len(np.unique(self.groups))

    def select(self, kept: np.ndarray) -> Scored:
        """Some of the pairs.

        Args:
            kept: [pairs] bool.
        """
        arrays = ("rows", "groups", "chosen", "rejected", "chosen_length", "rejected_length")
        selected: dict[str, Any] = {name: getattr(self, name)[kept] for name in arrays}
        for name in ("num_tokens", "information"):
            selected[name] = {key: values[kept] for key, values in getattr(self, name).items()}
        return replace(self, **selected)


def scored_from(
    table: Sequence[Mapping[str, Any]], groups: np.ndarray, lengths: Mapping[str, np.ndarray] | None, beta: float
) -> Scored:
    """The arrays of scored pairs.

    Args:
        table: A row a pair, from `lit_did.scoring.scorer.score_dataset`.
        groups: [pairs] the number of each pair's prompt.
        lengths: By side, the lengths of completions. None: their tokens.
        beta: DPO's inverse temperature.
    """

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in table], dtype=float)

    num_tokens = {side: column(f"{side}_num_tokens") for side in SIDES}
    lengths = num_tokens if lengths is None else lengths
    return Scored(
        rows=np.array([row["index"] for row in table], dtype=np.int64),
        groups=groups,
        chosen=column("chosen_log_ratio"),
        rejected=column("rejected_log_ratio"),
        chosen_length=np.asarray(lengths["chosen"], dtype=float),
        rejected_length=np.asarray(lengths["rejected"], dtype=float),
        beta=beta,
        num_tokens=num_tokens,
        information={f"{side}_{name}": column(f"{side}_{name}") for side in SIDES for name in INFORMATION},
    )

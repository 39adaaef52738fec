"""Deals the pairs of a training step to the ranks: equally many pairs, and nearly equally many tokens."""

from __future__ import annotations

import numpy as np


def deal(num_tokens: np.ndarray, ranks: int, rank: int) -> np.ndarray:
    """The places of a rank's pairs among the pairs of a step, in their order.

    The pairs are sorted by their tokens and dealt in rows of one pair for each rank, the longest row first. Of a row,
    the rank with the fewest tokens so far gets the longest pair. So the ranks' tokens differ by at most the largest
    difference within a row, which is at most that between the longest and the shortest pair.

    Args:
        num_tokens: [pairs] The tokens of each pair of the step. `ranks` divides the number of pairs.
        ranks: The number of ranks.
        rank: The number of this rank, from 0.

    Example:
        >>> [deal(np.array([9, 1, 5, 8, 2, 3]), 2, rank).tolist() for rank in (0, 1)]
        [[0, 4, 5], [1, 2, 3]]
    """
    if ranks == 1:
        return np.arange(len(num_tokens))
    totals, own = np.zeros(ranks, dtype=np.int64), []
    for row in np.argsort(-num_tokens, kind="stable").reshape(-1, ranks):
        order = np.argsort(totals, kind="stable")
        totals[order] += num_tokens[row]
        own.append(row[int((order == rank).argmax())])
    return np.sort(own)

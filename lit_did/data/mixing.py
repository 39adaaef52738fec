"""Mixtures: sources to train on with weights, each the share of an epoch's pairs that come from the source.

An epoch has as many pairs as all sources together. A source with a small weight gives some of its pairs, and one with a
large weight gives each of its pairs several times. Which ones depends on the seed, the source and the epoch only. A
source's pairs are sorted by length, and those of an epoch lie at equal distances in that order. The distance is the
same in every epoch and the start is another. So all epochs have pairs of the same lengths, which batches by tokens rely
on, and over several epochs all pairs of a source come equally often, give or take a few times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lit_did.arguments import check_range
from lit_did.data.loading import ResumableSampler

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly, however many they are


def is_mixture(source: Any) -> bool:
    """Whether a source is a dict from sources to weights."""
    return isinstance(source, dict) and not hasattr(source, "column_names")  # a datasets.DatasetDict has them


def check_weights(name: str, source: Any) -> None:
    """Raises TypeError or ValueError unless the weights of a mixture are positive numbers."""
    if not source:
        raise ValueError(f"Expected `{name}` to have at least one source, but got {source!r}.")
    for part, weight in source.items():
        check_range(f"{name}[{part!r}]", weight, "(0, inf)")


class Mixture:
    """Chooses the pairs of each epoch.

    Args:
        weights: The weight of each source, by its name.
        num_tokens: [pairs] The tokens of each pair.
        row_numbers: [pairs] The row number of each pair; they rise.
        starts: The row number at which each source starts.

    Attributes:
        weights: As given.

    Raises:
        ValueError: If a source has no pair, or its weight is too small for a single pair.

    Example:
        >>> mixture = Mixture({"a": 3, "b": 1}, np.array([5, 4, 6, 3, 7, 9, 8, 2]), np.arange(8), [0, 4])
        >>> mixture.positions(0, seed=0).tolist()  # six of the first source, two of the second
        [2, 0, 0, 1, 3, 3, 5, 4]
    """

    def __init__(
        self, weights: Mapping[str, float], num_tokens: np.ndarray, row_numbers: np.ndarray, starts: Sequence[int]
    ) -> None:
        self.weights = dict(weights)
        bounds = np.searchsorted(row_numbers, [*starts, np.inf])
        self._longest_first = [
            low + np.argsort(-num_tokens[low:high], kind="stable") for low, high in pairwise(bounds.tolist())
        ]
        shares = np.cumsum([0.0, *self.weights.values()])
        self._counts = np.diff(np.round(len(row_numbers) * shares / shares[-1]).astype(int)).tolist()
        for source, pairs, count in zip(weights, self._longest_first, self._counts, strict=True):
            if not len(pairs) or not count:
                raise ValueError(
                    f"Expected each epoch of {len(row_numbers)} pairs to have some of {source}, but it has {len(pairs)}"
                    f" pairs and the weight {self.weights[source]} of {sum(self.weights.values())}. Raise the weight, "
                    "or leave the source out."
                )

    def positions(self, epoch: int, seed: int) -> np.ndarray:
        """The positions of an epoch's pairs in the dataset, [pairs], source by source and the longest pairs first."""
        offsets = np.random.default_rng(seed).random(len(self._counts)) + epoch * _GOLDEN
        return self._at(offsets % 1)

    def longest(self) -> np.ndarray:
        """As `positions`. Sorted by length, no epoch's pairs are longer than these."""
        return self._at(np.zeros(len(self._counts)))

    def _at(self, offsets: np.ndarray) -> np.ndarray:
        chosen = []
        for pairs, count, offset in zip(self._longest_first, self._counts, offsets, strict=True):
            places = ((np.arange(count) + offset) * (len(pairs) / count)).astype(int)
            chosen.append(pairs[np.minimum(places, len(pairs) - 1)])
        return np.concatenate(chosen)


class MixtureSampler(ResumableSampler):
    """A ResumableSampler over the pairs that a mixture chooses for the epoch, in random order.

    Args:
        mixture: The mixture.
        options: The arguments of ResumableSampler.
    """

    def __init__(self, mixture: Mixture, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.mixture = mixture

    def _order(self) -> np.ndarray:
        chosen = self.mixture.positions(self.epoch, self.seed)
        order = chosen[np.random.default_rng((self.seed, self.epoch)).permutation(len(chosen))]
        return np.resize(order, self.total_size)

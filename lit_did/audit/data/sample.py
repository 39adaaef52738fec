"""A sample of pairs, from which common words, the classifier of words and the habits are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lit_did.audit.data.words import Words, chunks, words_of
from lit_did.audit.source import AuditData

SAMPLE = 20_000
"""the most pairs of the sample"""


def draw_sample(data: AuditData, seed: int) -> np.ndarray:
    """The places of the sampled pairs in `data.rows`, in order. All if there are no more than `SAMPLE`."""
    if len(data) <= SAMPLE:
        return np.arange(len(data))
    return np.sort(np.random.default_rng(seed).choice(len(data), SAMPLE, replace=False))


def read_words(data: AuditData, places: Sequence[int] | np.ndarray) -> Iterator[tuple[np.ndarray, Words]]:
    """The words of pairs, some pairs at once: their places, and the words of prompt, chosen and rejected of each."""
    places = np.asarray(places, dtype=np.int64)
    waiting: list[tuple[str, str, str]] = []

    def lengths() -> Iterator[int]:
        for place in places.tolist():
            waiting.append(data.texts(place))
            yield sum(map(len, waiting[-1]))

    for start, stop in chunks(lengths()):
        yield places[start:stop], words_of([text for texts in waiting for text in texts])
        waiting.clear()

"""Near duplicates: MinHash finds candidates, and the exact weighted Jaccard similarity of their words decides.

A shingle is a word with the one before it. Punctuation and case do not count. The MinHash leaves out shingles that more
than 1% of the pairs have, and more than 20: they belong to a template. In the similarity a shingle weighs
log(1 / the share of pairs that have it). So pairs that share boilerplate alone are not similar.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import rensa

from lit_did.audit.data.keys import Keys
from lit_did.audit.data.sample import read_words
from lit_did.audit.data.sentences import of_rows
from lit_did.audit.data.words import Words, mix
from lit_did.audit.report import Finding
from lit_did.audit.source import AuditData
from lit_did.audit.wording import many

SIMILAR = 0.6
"""the least similarity of near duplicates"""
SIMILAR_PART = 0.5
"""the least similarity of the prompts, of the chosen and of the rejected sides of near duplicates"""
FEW = 4
"""shingles that may differ in a part that is less similar: those of two changed words"""
SIMILAR_PROMPT = 0.7
"""the least similarity of prompts that are nearly the same"""
LEAST_WORDS = 20
"""pairs with fewer words, and prompts with fewer different shingles, are not compared: chance makes them similar"""
LEAST_SHARE = 0.001
"""the share of pairs from which on near duplicates are a fault"""
_BANDS, _ROWS = 25, 4  # pairs with Jaccard similarity .6 share a band with a chance of .97, those with .7 of .999
_COMMON, _COMMON_SHARE = 20, 0.01
_LAST = 4  # earlier members of a band that each of its pairs is compared with, beside the first
_SALTS = np.array([0, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179], np.uint64)  # prompt, chosen, rejected


class Shingles:
    """How common shingles are, learned from a sample of pairs.

    Args:
        sample: The words of prompt, chosen and rejected of pairs.
    """

    def __init__(self, sample: Iterable[Words]) -> None:
        found, self.num_pairs = [], 0
        for words in sample:
            salted, offsets = _salted(words.without_marks)
            found += [np.unique(salted[a:b]) for a, b in pairwise(offsets)]
            self.num_pairs += len(offsets) - 1
        self._known, self._counts = np.unique(np.concatenate(found), return_counts=True)
        common = self._counts > max(_COMMON, _COMMON_SHARE * self.num_pairs)
        self._is_common = np.zeros(1 << 22, bool)
        self._is_common[_place(self._known[common])] = True

    def bands(self, words: Words, prompts: bool = False) -> np.ndarray:
        """[pairs, bands] uint64 of MinHash. Pairs are candidates if they share one; 0 has no meaning.

        Args:
            words: Those of prompt, chosen and rejected of pairs.
            prompts: Whether to compare the prompts alone.
        """
        words = words.without_marks
        salted, offsets = _salted(words)
        kept = ~self._is_common[_place(salted)]
        if prompts:
            kept &= np.repeat(np.arange(len(words.offsets) - 1) % 3 == 0, np.diff(words.offsets))
        offsets = np.concatenate([[0], np.cumsum(kept)])[offsets].astype(np.uint64)
        hashes = rensa.RMinHash.digest_matrix_from_flat_token_hashes(salted[kept], offsets, _BANDS * _ROWS, 42)
        rows = np.array(hashes.to_rows(), np.uint64).reshape(-1, _BANDS, _ROWS)
        found = np.zeros(rows.shape[:2], np.uint64)
        for row in range(_ROWS):
            found = mix(found * np.uint64(0x9E3779B97F4A7C15) + rows[:, :, row] + np.uint64(1))
        found[np.diff(offsets) == 0] = 0
        return found

    def sides(self, words: Words) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By pair, the different shingles of prompt, chosen and rejected; shingles of both sides have equal numbers."""
        words = words.without_marks
        shingles, cuts = words.shingles, words.offsets
        texts = [np.unique(shingles[a:b]) for a, b in pairwise(cuts)]
        return [(texts[n], texts[n + 1], texts[n + 2]) for n in range(0, len(texts), 3)]

    def weights(self, shingles: np.ndarray, part: int) -> np.ndarray:
        """The weights of shingles of the prompt (0), the chosen (1) or the rejected side (2)."""
        salted = shingles ^ _SALTS[part]
        places = np.minimum(np.searchsorted(self._known, salted), len(self._known) - 1)
        counts = np.where(self._known[places] == salted, self._counts[places], 1)
        return np.log((self.num_pairs + 1) / counts)

    def overlap(self, first: np.ndarray, second: np.ndarray, part: int) -> tuple[float, float]:
        """The weight of the shingles that two texts share, and of all that either has."""
        shared = float(self.weights(np.intersect1d(first, second, assume_unique=True), part).sum())
        both = float(self.weights(first, part).sum() + self.weights(second, part).sum())
        return shared, both - shared


def find_near_duplicates(
    data: AuditData, shingles: Shingles, bands: np.ndarray, num_words: np.ndarray, is_copy: np.ndarray, keys: Keys
) -> Finding:
    """Pairs that nearly repeat an earlier one.

    Args:
        data: The pairs.
        shingles: How common they are.
        bands: [pairs, bands] of all pairs.
        num_words: [pairs] of all three texts together.
        is_copy: [pairs] bool: exact duplicates, which are not searched.
        keys: The numbers of their texts, to leave out swapped pairs.
    """
    short, common = num_words < LEAST_WORDS, (bands == 0).all(1)
    firsts, seconds = _candidates(bands, ~is_copy & ~short)
    swapped = (
        (keys.prompt[firsts] == keys.prompt[seconds])
        & (keys.chosen[firsts] == keys.rejected[seconds])
        & (keys.rejected[firsts] == keys.chosen[seconds])
    )
    firsts, seconds = firsts[~swapped], seconds[~swapped]
    found: dict[int, tuple[int, float]] = {}
    # A block of candidates at once, so that the words of few pairs are in memory.
    for start in range(0, len(firsts), 4096):
        block = [
            (a, b)
            for a, b in zip(firsts[start : start + 4096].tolist(), seconds[start : start + 4096].tolist(), strict=True)
            if b not in found
        ]
        known: dict[int, tuple] = {}
        for places, words in read_words(data, sorted({place for pair in block for place in pair})):
            known |= dict(zip(places.tolist(), shingles.sides(words), strict=True))
        for a, b in block:
            if b not in found and (similarity := _similarity(shingles, known[a], known[b])) >= SIMILAR:
                found[b] = (a, similarity)
    numbers = data.row_numbers
    order = sorted(found, key=lambda place: (-found[place][1], place))
    reasons = {f"fewer than {LEAST_WORDS} words": short, "no words but common ones": common & ~short}
    return of_rows(
        "near_duplicates",
        "nearly repeat an earlier pair",
        "No pair nearly repeats another one",
        ("Remove the later copy.", "Remove the later copies."),
        [int(numbers[place]) for place in order],
        {
            int(numbers[place]): f"Nearly repeats {data.called(int(numbers[first]))} (similarity {similarity:.2f})."
            for place, (first, similarity) in found.items()
        },
        len(data),
        least=LEAST_SHARE,
        left_out="".join(
            f"; {many(count, 'pair')} with {why} {'was' if count == 1 else 'were'} not compared"
            for why, which in reasons.items()
            if (count := int((which & ~is_copy).sum()))
        ),
    )


def _similarity(shingles: Shingles, first: tuple, second: tuple) -> float:
    """The weighted Jaccard similarity of two pairs. 0 where a part differs more, or where swapped sides are nearer."""
    parts = [shingles.overlap(a, b, part) for part, (a, b) in enumerate(zip(first, second, strict=True))]
    for a, b, (shared, total) in zip(first, second, parts, strict=True):
        if shared < SIMILAR_PART * total and not _differ_in_few(a, b):
            return 0.0
    swapped = (shingles.overlap(first[1], second[2], 1), shingles.overlap(first[2], second[1], 2))
    if sum(a / b for a, b in swapped if b) > sum(a / b for a, b in parts[1:] if b):
        return 0.0
    total = sum(total for _, total in parts)
    return sum(shared for shared, _ in parts) / total if total else 0.0


def _differ_in_few(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two texts, each by its different shingles, differ in a word or two and have others in common."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared >= 2 and max(len(first), len(second)) - shared <= FEW


def similar_prompts(shingles: Shingles, first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two prompts, each by its different shingles, nearly repeat each other."""
    if min(len(first), len(second)) < LEAST_WORDS:
        return False
    shared, total = shingles.overlap(first, second, 0)
    return total > 0 and shared >= SIMILAR_PROMPT * total


def _candidates(bands: np.ndarray, searched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that share a band, the earlier and the later one, in the order of the later."""
    count, found = len(bands), []
    for band in bands.T:
        places = np.flatnonzero(searched & (band != 0))
        order = places[np.argsort(band[places], kind="stable")]
        values = band[order]
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        heads = np.repeat(order[starts], np.diff([*starts, len(order)])) if len(order) else order
        found.append((heads * count + order)[heads != order])
        for lag in range(1, _LAST + 1):
            same = values[lag:] == values[:-lag]
            found.append((order[:-lag] * count + order[lag:])[same])
    firsts, seconds = np.divmod(np.unique(np.concatenate(found)), count)
    order = np.argsort(seconds, kind="stable")
    return firsts[order], seconds[order]


def _salted(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """[words] the shingles with a mark of prompt, chosen or rejected, and [pairs + 1] where each pair starts."""
    salts = np.resize(_SALTS, len(words.offsets) - 1)
    return words.shingles ^ np.repeat(salts, np.diff(words.offsets)), words.offsets[::3]


def _place(shingles: np.ndarray) -> np.ndarray:
    return (shingles & np.uint64((1 << 22) - 1)).astype(np.int64)
